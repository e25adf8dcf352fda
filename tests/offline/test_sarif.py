"""SARIF 2.1.0 logs of `s3lora scan`: their content, and their validity for code scanning."""

import json
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest
import sarif_pydantic
from typer.testing import CliRunner

from s3lora_serve import Policy, scan_adapter
from s3lora_serve.cli import app
from s3lora_serve.errors import rejection_codes, rejections
from s3lora_serve.offline.sarif import PLANNED, REPAIRED, SHARP, UNALIGNED, SarifLog
from s3lora_serve.policy.method import Strip
from tests.support import npm
from tests.support.adapters import WEIGHTS, copy_with, diverged

NO_HOMEPAGE = "SARIF2005"
"""The rule that asks for the tool's informationUri: the project has no home page yet."""


@pytest.fixture
def log(trained, tmp_path, monkeypatch) -> Path:
    """The log of one stripped, one unreadable and one diverged adapter."""
    hub = tmp_path / "hub"
    copy_with(trained, hub / "sharp")
    (copy_with(trained, hub / "broken") / WEIGHTS).write_bytes(b"nothing")
    copy_with(trained, hub / "naïve one", diverged)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["scan", "hub", "--format", "sarif", "-o", "log.sarif"])
    assert done.exit_code == 1
    return tmp_path / "log.sarif"


def test_a_log_has_a_result_for_each_adapter_that_is_not_whole(log):
    [ran] = sarif_pydantic.Sarif.model_validate_json(log.read_text()).runs
    rules = [rule.id for rule in ran.tool.driver.rules]
    assert len(set(rules)) == len(rules)
    assert set(rules) == {SHARP, UNALIGNED, PLANNED, REPAIRED, *rejection_codes()}
    found = {}
    for result in ran.results:
        assert rules[result.rule_index] == result.rule_id
        [place] = result.locations
        uri = place.physical_location.artifact_location.uri
        assert (log.parent / unquote(uri)).is_file(), "the URI is not relative to the checkout"
        found[uri] = result.rule_id, result.level.value
    assert found == {
        "hub/sharp/adapter_model.safetensors": (SHARP, "warning"),
        "hub/broken/adapter_model.safetensors": ("S3LORA-104", "error"),
        "hub/na%C3%AFve%20one/adapter_model.safetensors": ("S3LORA-109", "error"),
    }


def test_an_adapter_admitted_whole_has_no_result(trained):
    log = SarifLog()
    log.add(scan_adapter(trained, Policy(strip=Strip(top_k=0))))
    assert log.as_json()["runs"][0]["results"] == []


def test_an_adapter_outside_the_checkout_has_no_relative_uri(trained, tmp_path, monkeypatch):
    (tmp_path / "checkout").mkdir()
    copy_with(trained, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "checkout")
    log = SarifLog()
    log.add(scan_adapter("../elsewhere", Policy(strip=Strip(top_k=1))))
    [result] = log.as_json()["runs"][0]["results"]
    [place] = result["locations"]
    assert (
        place["physicalLocation"]["artifactLocation"]["uri"]
        == (tmp_path / "elsewhere" / WEIGHTS).as_uri()
    )


def test_every_rule_says_what_it_means_and_what_to_do(log):
    [ran] = sarif_pydantic.Sarif.model_validate_json(log.read_text()).runs
    remedies = {cause.code: cause.remedy for cause in rejections()}
    explained = set()
    for rule in ran.tool.driver.rules:
        why = rule.full_description.text
        assert len(why) > len(rule.short_description.text)
        assert remedies.get(rule.id, "") in rule.help.markdown
        assert why in rule.help.markdown
        changed = {SHARP: "warning", UNALIGNED: "warning", PLANNED: "note", REPAIRED: "note"}
        level = changed.get(rule.id, "error")
        assert rule.default_configuration.level == level
        explained.add(why)
    assert len(explained) == len(remedies) + 4


def test_a_log_is_valid_by_its_schema_and_by_what_github_asks_for(log):
    assert violated_rules(log) == {NO_HOMEPAGE}


def test_the_validator_finds_what_is_wrong_with_a_log(log):
    invalid = json.loads(log.read_text())
    del invalid["runs"][0]["results"][0]["message"]
    invalid["runs"][0]["results"][1]["level"] = "fatal"
    log.write_text(json.dumps(invalid))
    # An unknown enum value; a missing property.
    assert violated_rules(log) == {"JSON1002", "JSON1019"}


def violated_rules(log: Path) -> set[str]:
    """The rules of the validator that a log violates."""
    multitool = npm.installed(npm.MULTITOOL) / "node_modules" / ".bin" / "sarif-multitool"
    report = log.with_name("report.sarif")
    report.unlink(missing_ok=True)
    # The launcher passes its arguments to a shell, which needs the quotes.
    subprocess.run(
        [multitool, "validate", log.name, "--rule-kind", "'Sarif;Gh'",
         "--output", report.name, "--level", "'Error;Warning'"],
        cwd=log.parent, capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    [ran] = json.loads(report.read_text(encoding="utf-8-sig"))["runs"]
    assert ran["invocations"][0]["executionSuccessful"]
    return {result["ruleId"] for result in ran["results"]}
