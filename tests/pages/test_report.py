"""`s3lora report`: one self-contained page with the decision that the gate would make."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from s3lora_serve import Policy, scan_adapter
from s3lora_serve.admission.admit import admit
from s3lora_serve.cli import app
from s3lora_serve.pages.report import Subject, report
from s3lora_serve.policy.method import Strip
from tests.support.adapters import copy_with, diverged


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
