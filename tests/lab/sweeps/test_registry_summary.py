"""`s3lora summary`: the results of a sweep over a whole registry."""

import json
import random
from dataclasses import replace

import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from s3lora_serve import Policy, scan_adapter
from s3lora_serve.admission.verdict import Decision
from s3lora_serve.cli import app
from s3lora_serve.errors import Reason
from s3lora_serve.lab.sweeps.registry_summary import BINS, COLUMNS, summarize
from tests.support.adapters import copy_with, diverged


@pytest.fixture(scope="module")
def swept(trained, tmp_path_factory):
    """The verdicts file of a real sweep over two tenants."""
    folder = tmp_path_factory.mktemp("registry")
    for name in ("acme/v1", "acme/v2", "globex/<b>v1"):
        copy_with(trained, folder / "hub" / name)
    copy_with(trained, folder / "hub" / "globex" / "broken", diverged)
    file = folder / "verdicts.jsonl"
    CliRunner().invoke(app, ["scan", str(folder / "hub"), "--format", "jsonl", "-o", str(file)])
    return file


@pytest.fixture(scope="module")
def verdict(trained):
    return scan_adapter(trained, Policy())


def json_lines(verdicts):
    return (json.dumps(verdict.as_json()) for verdict in verdicts)


def run(*arguments):
    return CliRunner().invoke(app, ["summary", *map(str, arguments)])


def test_a_page_and_a_table_show_the_same(swept, tmp_path):
    done = run(swept, "-o", tmp_path / "page.html", "--parquet", tmp_path / "table.parquet")
    assert done.exit_code == 0, done.output
    assert "4 adapters: 0 admitted, 3 stripped, 1 rejected" in done.stdout
    html = (tmp_path / "page.html").read_text()
    assert "<h1>4 adapters</h1>" in html
    assert "S3LORA-109" in html
    assert "not finite" in html
    assert "<b>v1" not in html
    table = pyarrow.parquet.read_table(tmp_path / "table.parquet")
    assert table.column_names == list(COLUMNS)
    rows = {row["name"]: row for row in table.to_pylist()}
    assert rows["broken"]["code"] == "S3LORA-109"
    assert rows["broken"]["highest_ssi"] is None
    assert {row["tenant"] for row in rows.values()} == {"acme", "globex"}
    lines = [json.loads(line) for line in swept.read_text().splitlines()]
    [first] = [line for line in lines if line["name"] == "v2"]
    assert rows["v2"]["highest_ssi"] == max(module["ssi"] for module in first["modules"])


def test_tenants_with_the_most_refused_come_first(swept):
    found = summarize(swept.read_text().splitlines()).tenants()
    assert [(one.name, one.adapters, one.rejected) for one in found] == [
        ("globex", 2, 1), ("acme", 2, 0),
    ]  # fmt: skip


def test_an_adapter_that_stands_out_is_an_outlier_and_no_other(verdict):
    generator = random.Random(0)

    def like(i, highest):
        module = replace(verdict.modules[0], relative_ssi=highest, ssi=highest)
        return replace(verdict, name=f"a{i}", path=f"/hub/t/a{i}", modules=(module,))

    ordinary = [like(i, 0.2 + 0.01 * generator.random()) for i in range(200)]
    found = summarize(json_lines([*ordinary, like(999, 0.6)])).outliers()
    assert [one.row.name for one in found] == ["a999"]
    assert summarize(json_lines([like(1, 0.2)] * 5)).outliers() == []


@given(indices=st.lists(st.floats(0, 1), max_size=30))
def test_every_module_is_in_one_bin(verdict, indices):
    modules = tuple(replace(verdict.modules[0], ssi=ssi) for ssi in indices)
    counted = summarize(json_lines([replace(verdict, modules=modules)])).modules
    assert len(counted) == BINS
    assert sum(counted) == len(indices)


def test_nothing_but_refusals_and_nothing_at_all_have_a_page_too(verdict, tmp_path):
    reason = Reason("S3LORA-101", "no adapter.")
    bare = replace(verdict, modules=(), decision=Decision.REJECTED, reason=reason)
    for lines in ("", "\n".join(json_lines([bare])) + "\n"):
        (tmp_path / "lines.jsonl").write_text(lines)
        assert run(tmp_path / "lines.jsonl", "-o", tmp_path / "page.html").exit_code == 0
        assert "<h2>Outliers</h2>" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("index", ["high", [0.5], float("nan"), -0.5, 1.5])
def test_a_line_whose_index_is_no_index_is_named(verdict, tmp_path, index):
    broken = replace(verdict, modules=(replace(verdict.modules[0], ssi=index),))
    (tmp_path / "lines.jsonl").write_text("\n".join(json_lines([verdict, broken])))
    done = run(tmp_path / "lines.jsonl", "-o", tmp_path / "page.html")
    assert done.exit_code == 2
    assert "line 2 is no verdict" in done.output


def test_wrong_usage_exits_with_two(swept, tmp_path):
    (tmp_path / "other.jsonl").write_text(swept.read_text() + '{"name": "half')
    for arguments in (
        [swept], ["/nowhere", "-o", tmp_path / "x.html"],
        [tmp_path / "other.jsonl", "-o", tmp_path / "x.html"],
        [swept, "-o", tmp_path / "no" / "x.html"],
    ):  # fmt: skip
        done = run(*arguments)
        assert done.exit_code == 2, arguments
    assert "line 5" in run(tmp_path / "other.jsonl", "-o", tmp_path / "x.html").stderr


def test_tenants_of_a_bucket_and_of_a_folder_are_distinguished_in_one_registry(verdict):
    paths = ("s3://hub/lora/acme/v1", "s3://hub/lora/globex/v1", "/srv/umbrella/v1", "/srv/one/v1")
    found = summarize(json_lines(replace(verdict, path=path) for path in paths))
    assert {row.path: row.tenant for row in found.rows} == dict(
        zip(paths, ("acme", "globex", "umbrella", "one"), strict=True)
    )
