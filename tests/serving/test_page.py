"""The HTML page of a real guarded vLLM, in a real browser."""

import os
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from s3lora_serve.cli import app
from tests.support.adapters import copy_with, diverged
from tests.support.browser import FOLDER, save_screenshot
from tests.support.server import OPEN_LOADING, Server

pytestmark = pytest.mark.serving
HOSTILE = "<img src=x onerror=document.title='owned'>"
KEY = "a key"


@pytest.fixture(scope="module")
def server(browser, model, spiked, trained, policy_file, workplace):
    environment = OPEN_LOADING | {
        "S3LORA_POLICY": str(policy_file),
        "VLLM_API_KEY": KEY,
        "S3LORA_DEVICE": "cuda",  # which fails on a machine without one
    }
    with Server(model, workplace / "page.log", (), environment, key=KEY) as server:
        broken = copy_with(spiked, workplace / "page-nan", diverged)
        for name, folder in (("acme/one", spiked), ("acme/two", trained), (HOSTILE, trained)):
            assert server.load(name, folder).status_code == 200
        assert server.load("initech/broken", broken).status_code == 400
        yield server


@pytest.fixture
def page(browser, server):
    """A tab that sends the key as a browser does and collects its errors."""
    context = browser.new_context(http_credentials={"username": "me", "password": KEY})
    page = context.new_page()
    page.problems = []
    page.on("console", lambda line: line.type == "error" and page.problems.append(line.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.goto(server.url("/s3lora/"))
    yield page
    assert page.problems == []
    context.close()


def test_the_page_asks_for_the_key(browser, server):
    context = browser.new_context()
    answer = context.request.get(server.url("/s3lora/"))
    assert answer.status == 401
    assert answer.headers["www-authenticate"].startswith("Basic")  # a browser shows a prompt
    context.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_server_whose_scoring_device_fails_scores_on_the_cpu_and_says_so_once(server):
    assert server.metrics()['s3lora_device_fallbacks_total{cause="failure"}'] >= 2
    assert server.log.read_text().count("s3lora: the scoring device failed") == 1


def test_it_lists_what_is_served_and_what_was_refused_and_why(page):
    assert page.locator("h1").inner_text() == "3 adapters served"
    rows = page.locator("table").first.locator("tbody tr")
    assert rows.count() == 3
    assert "3 of 28" in rows.last.inner_text()
    save_screenshot(page, "page-adapters.png")
    refused = page.locator("table").last.inner_text()
    assert "initech/broken" in refused
    assert "S3LORA-109" in refused
    assert "holds NaN or Inf" in refused


def test_a_name_that_is_markup_is_text(page):
    assert page.get_by_text(HOSTILE).count() == 1
    page.get_by_role("link", name=HOSTILE).click()
    assert page.locator("h1").inner_text() == HOSTILE
    assert page.title() != "owned"


def test_the_heat_map_leads_to_each_modules_spectrum_by_keyboard(page, server):
    page.get_by_role("link", name="acme/one").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".map")
    verdict = server.get("/s3lora/adapters/acme/one").json()
    assert page.locator(".map td.cut").count() == 3
    save_screenshot(page, "page-adapter.png")
    first = verdict["modules"][0]
    cell = page.get_by_title(first["name"]).first
    cell.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#module")
    assert page.locator("#module").inner_text() == first["name"]
    assert page.locator(".bars rect").count() == len(first["spectrum"])


def test_a_filter_finds_a_tenants_adapters(page):
    page.get_by_label("Name contains").fill("ACME/")
    page.keyboard.press("Enter")
    page.wait_for_url("**q=ACME**")
    assert page.locator("table").first.locator("tbody tr").count() == 2


def test_it_refreshes_itself_and_keeps_the_focus(page, server, trained):
    page.get_by_role("link", name="acme/one").focus()
    focused = page.evaluate("document.activeElement.id")
    assert server.load("newcomer", trained).status_code == 200
    page.get_by_role("link", name="newcomer").wait_for(timeout=15_000)
    assert page.evaluate("document.activeElement.id") == focused
    server.unload("newcomer")


def test_it_is_dark_where_the_browser_is(browser, server):
    seen = {}
    for scheme in ("light", "dark"):
        context = browser.new_context(
            color_scheme=scheme, http_credentials={"username": "me", "password": KEY}
        )
        tab = context.new_page()
        tab.goto(server.url("/s3lora/"))
        seen[scheme] = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        save_screenshot(tab, f"page-{scheme}.png")
        context.close()
    assert seen["light"] == "rgb(255, 255, 255)"
    assert seen["dark"] != seen["light"]


def test_a_report_on_two_adapters_is_read_in_a_browser(browser, trained, spiked, workplace):
    versions = workplace / "versions"
    first = copy_with(trained, versions / "support-bot-v1")
    second = copy_with(spiked, versions / "support-bot-v2")
    file = workplace / "sample-report.html"
    done = CliRunner().invoke(app, ["report", str(first), str(second), "-o", str(file)])
    assert done.exit_code == 0, done.output
    tab, problems = browser.new_page(), []
    tab.on("console", lambda line: line.type == "error" and problems.append(line.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.goto(file.as_uri())
    headings = tab.locator("h1").all_inner_texts()
    assert headings == ["support-bot-v1", "support-bot-v2", "Where they differ most"]
    assert tab.locator(".map").count() == 2
    assert problems == []
    save_screenshot(tab, "report.png", whole=False)
    if folder := os.environ.get("SCREENSHOTS"):
        text = re.sub(FOLDER, "/adapters", file.read_text())
        (Path(folder) / file.name).write_text(text)
    tab.close()
