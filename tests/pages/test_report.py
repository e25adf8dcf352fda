"""`s3lora report`: one self-contained page with the decision that the gate would make."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from s3lora_serve import Policy, scan_adapter
from s3lora_serve.admission.admit import admit
from s3lora_serve.cli import app
from s3lora_serve.pages.report import Subject, report
from s3lora_serve.policy.file import with_options
from s3lora_serve.policy.method import Strip
from tests.support.adapters import copy_with, diverged
from tests.support.plans import install, plan_for, read
from tests.support.statistics import chat_statistics


def run(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


class Reader(HTMLParser):
    """Ids, links, and the text of each table's rows."""

    def __init__(self, html):
        super().__init__()
        self.ids, self.links, self.tags, self.rows = [], [], set(), []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.add(tag)
        if "id" in values:
            self.ids.append(values["id"])
        if "href" in values:
            self.links.append(values["href"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


@pytest.fixture(scope="module")
def html(trained, spiked, tmp_path_factory):
    file = tmp_path_factory.mktemp("report") / "report.html"
    done = run(trained, spiked, "-o", file, "--compare", "mas-svd,svd,spsvd")
    assert done.exit_code == 0, done.output
    return file.read_text()


def test_the_page_needs_nothing_else_and_runs_nothing(html):
    page = Reader(html)
    assert not page.tags & {"script", "img", "link", "iframe", "object"}
    assert "url(" not in html
    assert all(link.startswith("#") for link in page.links)


def test_every_link_leads_somewhere_on_the_page(html):
    page = Reader(html)
    assert len(page.ids) == len(set(page.ids))
    assert len(page.links) > 56
    assert {link[1:] for link in page.links} <= set(page.ids)


def test_it_says_what_other_numbers_of_stripped_modules_would_be(html, trained):
    rows = [row for row in Reader(html).rows if row and row[0] in ("0", "5", "10", "15", "20")]
    assert len(rows) >= 10
    by_count = {row[0]: row for row in rows if len(row) == 3}
    for count in (5, 10):
        expected = scan_adapter(trained, Policy(strip=Strip(top_k=count)))
        assert any(row[2] == ", ".join(expected.stripped) for row in rows if row[0] == str(count))
    assert by_count["0"][1] == "admitted"


def test_it_compares_two_adapters_and_other_indices(html):
    assert "Where they differ most" in html
    correlations = re.findall(r"Spearman&#39;s ρ|Spearman's ρ between the two: (-?\d\.\d{3})", html)
    assert len(correlations) == 4
    assert all(-1 <= float(value) <= 1 for value in correlations)


def test_an_index_that_ranks_fewer_modules_is_compared_on_those_alone(spiked):
    verdict = scan_adapter(spiked, Policy())
    ranked = sorted(verdict.modules, key=lambda module: -module.relative_ssi)
    fewer = (replace(module, relative_ssi=None) for module in ranked[:-3])
    other = replace(verdict, modules=(*fewer, *ranked[-3:]))
    page = report([Subject(verdict, {}, {"svd": other})])
    assert "Spearman's ρ between the two: 1.000." in page.replace("&#39;", "'")


@pytest.fixture(scope="module")
def statistics(chat, tmp_path_factory):
    return chat_statistics(chat, tmp_path_factory.mktemp("statistics") / "chat.safetensors")


def rows_after(html, heading):
    """The rows of the first table after a heading."""
    table = html.partition(f"<h2>{heading}</h2>")[2].partition("</table>")[0]
    return [row for row in Reader(table).rows if row][1:]


def test_repair_and_plan_stand_beside_the_index(chat, statistics, tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    assert run(chat.adapter, "-o", page, "--repair", statistics).exit_code == 0
    repaired, by_index = rows_after(page.read_text(), "Plan, repair and index")
    assert (repaired[0], by_index[0]) == ("repair", "index")
    verdict = scan_adapter(chat.adapter, with_options(Policy(), statistics=statistics))
    assert repaired[4] == f"{100 * verdict.repair.residual:.3g} %"
    assert by_index[2:] == ["7 of 14", by_index[3], "–", "–"]
    plans = tmp_path / "plans"
    plans.mkdir()
    install(plan_for(read(chat.adapter), strip=["model.layers.0.self_attn.q_proj"]), plans)
    monkeypatch.setenv("S3LORA_PLANS", str(plans))
    assert run(chat.adapter, "-o", page, "--repair", statistics).exit_code == 0
    rows = rows_after(page.read_text(), "Plan, repair and index")
    assert [row[0] for row in rows] == ["plan", "repair", "index"]
    assert rows[0][2] == "1 of 14"
    assert rows[1:] == [repaired, by_index]


def test_without_plan_and_repair_there_is_nothing_to_compare(html):
    assert "Plan, repair and index" not in html


SWEEP = {
    "key": "k", "url": "http://server", "adapter": "/adapters/acme", "rule": {},
    "recommended": "plan", "complete": True,
    "trials": [
        {"label": label, "decision": "stripped", "changed": changed, "snippet": {}, "scores": [
            {"task": "t", "role": role, "log": "x",
             "rate": {"value": value, "low": 0, "high": 1, "count": 9}}
            for role, value in (("asr", asr), ("utility", 0.5))]}
        for label, changed, asr in (("top_k 0", 0, 1.0), ("plan", 7, 0.25))],
}  # fmt: skip


def test_what_an_evaluation_measured_is_shown(trained, tmp_path):
    sweep, page = tmp_path / "sweep.json", tmp_path / "page.html"
    sweep.write_text(json.dumps(SWEEP))
    assert run(trained, "-o", page, "--evaluation", sweep).exit_code == 0
    rows = rows_after(page.read_text(), "Measured on a server")
    assert rows == [["top_k 0", "0", "1.00", "0.50"], ["planrecommended", "7", "0.25", "0.50"]]


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps(SWEEP | {"trials": [{}]})])
def test_a_file_that_is_no_evaluation_is_refused(trained, tmp_path, text):
    sweep = tmp_path / "sweep.json"
    sweep.write_text(text)
    done = run(trained, "-o", tmp_path / "page.html", "--evaluation", sweep)
    assert done.exit_code == 2
    assert "S3LORA-911: " in done.output
    assert "is not what s3lora evaluate writes" in done.output
    assert not (tmp_path / "page.html").exists()


def test_names_are_text(trained, tmp_path):
    folder = copy_with(trained, tmp_path / "<script>alert(1)<")
    assert run(folder, "-o", tmp_path / "page.html").exit_code == 0
    html = (tmp_path / "page.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;" in html
    assert "<script" not in html


def test_a_refused_adapter_has_a_page_that_says_why(trained, tmp_path):
    bad = copy_with(trained, tmp_path / "bad", diverged)
    assert run(bad, "-o", tmp_path / "page.html").exit_code == 1
    assert "S3LORA-109" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    "arguments",
    [["/nowhere", "-o", "x.html"], [".", ".", ".", "-o", "x.html"], ["."],
     [".", "-o", "x.html", "--compare", "magic"], [".", "-o", "/no/such/folder/x.html"]],
)  # fmt: skip
def test_wrong_usage_exits_with_two(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments).exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rule", [{"top_k": 3}, {"fraction": 0.4}, {"outliers": 1.5}])
def test_another_policy_on_known_scores_decides_as_in_a_new_admission(spiked, rule):
    policy = Policy(strip=Strip(**rule))
    admission = admit(spiked, "spiked", Policy())

    def without_seconds(verdict):
        return {k: v for k, v in verdict.as_json().items() if k != "seconds"}

    assert without_seconds(admission.under(policy)) == without_seconds(
        admit(spiked, "spiked", policy).verdict
    )
