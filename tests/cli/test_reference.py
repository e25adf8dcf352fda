"""`s3lora reference make` and `show`, and the commands that score with a reference."""

import json

import pytest
from typer.testing import CliRunner

from s3lora_serve.cli import app
from tests.support.plans import small_adapter
from tests.support.references import linear, realigned, small_reference, write_checkpoint


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    small_reference(folder)
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    return folder / "reference.safetensors"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return small_adapter(tmp_path_factory.mktemp("adapters") / "small")


def test_make_writes_a_reference_that_show_describes(folder, tmp_path):
    file = tmp_path / "r.safetensors"
    options = ("--base", folder / "base", "--aligned", folder / "aligned", "-o", file)
    made = run("reference", "make", *options, "--rank", 5, "--dtype", "float32")
    assert made.exit_code == 0, made.output
    assert "3 modules, rank 5" in made.stdout
    shown = run("reference", "show", file)
    assert shown.exit_code == 0
    assert "model.layers.0.self_attn.q_proj" in shown.stdout
    data = json.loads(run("reference", "show", file, "--format", "json").stdout)
    captured = [module["captured"] for module in data["modules"].values()]
    assert all(0.8 < share < 1 for share in captured)
    again = run("reference", "make", *options)
    assert again.exit_code == 2
    assert "exists" in again.stderr


def test_make_says_that_equal_checkpoints_hold_no_alignment(folder, tmp_path):
    same = ("--base", folder / "base", "--aligned", folder / "base")
    made = run("reference", "make", *same, "-o", tmp_path / "r.safetensors")
    assert made.exit_code == 2
    assert "S3LORA-910" in made.stderr
    assert "alignment changed nothing" in made.stderr
    assert list(tmp_path.glob("*.safetensors")) == []


def test_show_names_modules_that_are_weakly_captured(tmp_path):
    plain = linear(24, 16)
    base = write_checkpoint(tmp_path / "base", plain)
    aligned = write_checkpoint(tmp_path / "aligned", realigned(plain, decay=1.0))
    file = tmp_path / "r.safetensors"
    run("reference", "make", "--base", base, "--aligned", aligned, "-o", file, "--rank", 2)
    assert "3 with less than 50% of their change captured" in run("reference", "show", file).stdout


def test_file_that_is_no_reference_is_wrong_usage(tmp_path):
    (tmp_path / "r").write_text("hello")
    shown = run("reference", "show", tmp_path / "r")
    assert shown.exit_code == 2
    assert "S3LORA-909" in shown.stderr


@pytest.mark.parametrize("scorer", ["safe-lora", "splora"])
def test_scan_scores_with_a_reference(adapter, reference, scorer):
    done = run("scan", adapter, "--scorer", scorer, "--reference", reference, "--format", "json")
    [verdict] = json.loads(done.stdout)["adapters"]
    assert verdict["scorer"]["name"] == scorer
    assert all(module["alignment"] is not None for module in verdict["modules"])
    table = run("scan", adapter, "--scorer", scorer, "--reference", reference)
    assert "alignment" in table.stdout


def test_scan_without_the_reference_says_what_is_missing(adapter):
    done = run("scan", adapter, "--scorer", "safe-lora")
    assert done.exit_code == 2
    assert "s3lora reference make" in done.stderr


def test_report_compares_alignment_scorers_offline(adapter, reference, tmp_path):
    page = tmp_path / "page.html"
    options = ("--compare", "safe-lora,splora", "--reference", reference)
    done = run("report", adapter, "-o", page, *options)
    assert done.exit_code == 0, done.output
    assert "safe-lora" in page.read_text()
    assert "splora" in page.read_text()


def test_strip_projects_and_its_provenance_says_so(adapter, reference, tmp_path):
    target = tmp_path / "projected"
    options = ("--action", "project", "--scorer", "safe-lora", "--reference", reference)
    policy = tmp_path / "policy.yaml"
    policy.write_text("strip: {top_k: 1}\n")
    done = run("strip", adapter, target, "--policy", policy, *options)
    assert done.exit_code == 0, done.output
    statement = json.loads((target / "s3lora-provenance.json").read_text())
    parameters = statement["predicate"]["buildDefinition"]["externalParameters"]
    assert len(parameters["projectedModules"]) == 1
    assert parameters["strippedModules"] == []
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (adapter, target)]
    assert len(weights[0]) == len(weights[1])
    assert weights[0] != weights[1]


def test_project_without_a_reference_is_wrong_usage(adapter, tmp_path):
    done = run("strip", adapter, tmp_path / "x", "--action", "project")
    assert done.exit_code == 2
    assert "S3LORA-901" in done.stderr
    assert not (tmp_path / "x").exists()


def test_sarif_and_policy_check_know_references(adapter, reference, tmp_path):
    options = ("--scorer", "safe-lora", "--reference", reference)
    log = json.loads(run("scan", adapter, *options, "--format", "sarif").stdout)
    assert log["runs"][0]["results"][0]["ruleId"] == "S3LORA-UNALIGNED"
    policy = tmp_path / "policy.yaml"
    policy.write_text(f"scorer: {{name: safe-lora, reference: {reference}}}\n")
    assert "reference_digest: sha256:" in run("policy", "check", policy).stdout
    bad = tmp_path / "bad.safetensors"
    bad.write_text("hello")
    policy.write_text(f"scorer: {{name: safe-lora, reference: {bad}}}\n")
    checked = run("policy", "check", policy)
    assert checked.exit_code == 2
    assert "scorer.reference" in checked.stderr
