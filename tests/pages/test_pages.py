"""Pages show the decisions, and an adapter's owner cannot run code on them."""

import base64
import hashlib
import re
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3lora_serve import Policy, scan_adapter
from s3lora_serve.admission.verdict import Decision, ModuleVerdict, Verdict, with_rejection
from s3lora_serve.errors import Reason
from s3lora_serve.pages.heat_map import SHADES, heat_map
from s3lora_serve.pages.report import Subject, report
from s3lora_serve.pages.server_pages import ROWS, AdapterRow, adapter_page, adapters_page
from s3lora_serve.policy.method import Strip

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&lt;"


class ParsedPage(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.words, self.open = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def all(self, tag):
        return [attributes for found, attributes in self.elements if found == tag]


def row(name, **changes):
    values = {"decision": "stripped", "stripped": 3, "modules": 28,
              "seconds": 0.12, "time": datetime(2026, 1, 2, tzinfo=UTC)}  # fmt: skip
    return AdapterRow(name=name, **values | changes)


def listing(served, refused=(), query="", number=1):
    page = adapters_page(
        served, refused, lambda one: one, query=query, number=number, mode="enforce",
        policy_digest="sha256:0",
    )  # fmt: skip
    return ParsedPage(page.html)


def test_plans_have_a_column_where_a_folder_of_plans_is_named():
    assert "Plan" not in listing([row("acme")]).text
    planned = listing([replace(row("acme"), plan="waiting"), replace(row("b"), plan=None)]).text
    assert "Plan" in planned
    assert "waiting" in planned


def test_rows_are_made_for_the_shown_adapters_alone():
    made = []

    def counted(one):
        made.append(one.name)
        return one

    served = [row(f"acme/{number}") for number in range(3 * ROWS)]
    adapters_page(served, (), counted, query="", number=2, mode="enforce", policy_digest="sha256:0")
    assert made == [f"acme/{number}" for number in range(ROWS, 2 * ROWS)]


def verdict_of(*modules, name="acme"):
    return Verdict(
        path="/adapters/acme", name=name, digest="sha256:1", config_digest=None,
        decision=Decision.STRIPPED, reason=None, uninformative=False, mode="enforce",
        scorer={}, policy_digest="sha256:0", modules=modules,
    )  # fmt: skip


def module(name, layer, projection, ssi, stripped=False, spectrum=(2.0, 1.0)):
    return ModuleVerdict(name, layer, projection, (8, 8), 2, ssi, ssi, spectrum, 1.0, 1.0, stripped)


def test_an_adapters_page_shows_its_heat_map_and_the_sharpest_modules_spectrum(spiked):
    verdict = scan_adapter(spiked, Policy(strip=Strip(top_k=3)))
    found = ParsedPage(adapter_page(verdict, None, quarantined=False).html)
    cells = [cell for cell in found.all("td") if "class" in cell]
    assert len(cells) == len(verdict.modules)
    assert sum("cut" in cell["class"] for cell in cells) == 3
    sharpest = max(verdict.modules, key=lambda each: each.ssi)
    assert sharpest.name in found.text
    assert len(found.all("rect")) == len(sharpest.spectrum)
    chosen = ParsedPage(adapter_page(verdict, verdict.modules[0].name, quarantined=False).html)
    assert verdict.modules[0].name in chosen.text


@pytest.mark.parametrize(
    ("share", "shown"), [(0.996, "99.6 %"), (1.0, "100 %"), (0.0021, "0.21 %")]
)
def test_a_modules_share_of_the_update_is_a_percentage_without_exponent(share, shown):
    one = replace(module("model.layers.0.q_proj", 0, "q_proj", 0.5), energy_share=share)
    page = ParsedPage(adapter_page(verdict_of(one), None, quarantined=False).html)
    assert f", {shown} of the adapter's" in page.text


def test_the_list_says_which_adapters_are_experiments():
    text = listing([row("eval/acme", experiment=True), row("acme")]).text
    assert text.count("experiment") == 1
    assert "eval/acme experiment" in text


def test_the_page_shows_the_reason_of_a_refusal_in_words():
    reason = Reason("S3LORA-109", "module q_proj holds NaN or Inf. Use an earlier checkpoint.")
    verdict = with_rejection(verdict_of(), reason)
    found = ParsedPage(adapter_page(verdict, None, quarantined=True).html)
    assert "S3LORA-109 module q_proj holds NaN or Inf. Use an earlier checkpoint." in found.text
    assert "quarantined" in found.text
    refused = row("bad", code=reason.code, reason=reason.message)
    assert "S3LORA-109 module q_proj holds NaN" in listing([], [refused]).text


def test_a_lone_surrogate_is_an_escape_on_every_page():
    name = "half \ud83d of a character"
    verdict = verdict_of(module(f"m.{name}", 0, "q_proj", 0.4), name=name)
    verdict = with_rejection(replace(verdict, path=f"/{name}"), Reason("S3LORA-101", name))
    pages = [
        adapters_page([row(name)], [row(name, code="S3LORA-101", reason=name)], lambda one: one,
                      query=name,
                      number=1, mode="enforce", policy_digest="sha256:0").html,
        adapter_page(verdict, f"m.{name}", quarantined=False).html,
        report([Subject(verdict, {}, {})]),
    ]  # fmt: skip
    for html in pages:
        assert "half \\ud83d of a character" in html.encode().decode()


@pytest.mark.parametrize("name", [HOSTILE, "a/b c&d=e?f#g", "ünï/ℵ", "{{ 7 * 7 }}"])
def test_nothing_an_owner_chose_is_markup(name):
    pages = [
        listing([row(name)], [row(name, code="S3LORA-101", reason=name)], query=name),
        ParsedPage(
            adapter_page(
                verdict_of(module(name, 0, name, 0.4), name=name), name, quarantined=False
            ).html
        ),
    ]
    for found in pages:
        assert found.all("script") == [{}]
        assert found.all("img") == []
        assert " ".join(name.split()) in found.text
        for _, attributes in found.elements:
            assert not any(attribute.startswith("on") for attribute in attributes)
            assert str(attributes.get("href", "/")).startswith(("/s3lora/", "#", "/"))


@given(name=st.text(min_size=1, max_size=40))
def test_any_name_leaves_the_pages_elements_as_they_are(name):
    plain = [tag for tag, _ in listing([row("plain")]).elements]
    assert [tag for tag, _ in listing([row(name)]).elements] == plain


def test_the_content_security_policy_lets_nothing_else_run_or_load():
    page = adapter_page(verdict_of(module("q", 0, "q_proj", 0.3)), None, quarantined=False)
    assert "default-src 'none'" in page.policy
    for tag in ("style", "script"):
        [inline] = re.findall(f"<{tag}>(.*?)</{tag}>", page.html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in page.policy
    assert "http://" not in page.html
    assert "https://" not in page.html


def test_a_thousand_adapters_are_listed_in_pages_and_filtered_by_tenant():
    served = [row(f"tenant-{i % 10}/adapter-{i}") for i in range(1000)]
    first = listing(served)
    assert "1000 adapters served" in first.text
    assert len(first.all("time")) == ROWS
    last = listing(served, number=99)
    assert "Page 20 of 20" in last.text
    mine = listing(served, query="Tenant-3/", number=2)
    assert "Page 2 of 2 (100 adapters)" in mine.text
    assert "tenant-4/" not in mine.text
    [before] = [each["href"] for each in mine.all("a") if each.get("rel") == "prev"]
    assert before == "/s3lora/?q=Tenant-3/&page=1"
    assert "No served adapter has “nobody” in its name" in listing(served, query="nobody").text


def test_experts_share_a_cell_and_layers_without_a_number_have_a_row():
    experts = [module(f"e{i}", 1, "w1", 0.1 * i, stripped=i == 3) for i in range(4)]
    found = heat_map(verdict_of(*experts, module("head", None, "lm_head", None)))
    assert found.projections == ("lm_head", "w1")
    assert [layer for layer, _ in found.rows] == [None, 1]
    cell = found.rows[1][1][1]
    assert (len(cell.modules), cell.stripped, cell.shade) == (4, 1, SHADES)
    assert cell.sharpest.name == "e3"
    assert found.rows[0][1][0].shade is None
    page = ParsedPage(adapter_page(verdict_of(*experts), "e3", quarantined=False).html)
    assert "1/4" in page.text


def test_the_page_shows_what_a_plan_chose_and_what_it_transforms():
    bent = replace(
        module("model.layers.0.q_proj", 0, "q_proj", 0.5), transformed=True, removed_share=0.375
    )
    cut = module("model.layers.1.q_proj", 1, "q_proj", 0.4, stripped=True)
    verdict = verdict_of(bent, cut)
    plain = ParsedPage(adapter_page(verdict_of(cut), None, quarantined=False).html)
    assert "Selected by index" in plain.text
    verdict = replace(
        verdict, selected_by="plan", plan_digest="sha256:f00", served_digest="sha256:2"
    )
    found = ParsedPage(adapter_page(verdict, bent.name, quarantined=False).html)
    for words in ("sha256:f00", "Served as", "sha256:2", "1 of 2 modules", "37.5 %"):
        assert words in found.text
    cells = [cell for cell in found.all("td") if "class" in cell]
    assert [("bent" in cell["class"], "cut" in cell["class"]) for cell in cells] == [
        (True, False),
        (False, True),
    ]
    listed = listing([replace(row("acme"), selected_by="plan", transformed=5)], []).text
    assert "by plan" in listed
    assert "5 transformed" in listed
