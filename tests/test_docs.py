"""Tests, links, files and make targets that the documents name exist."""

import json
import re
from pathlib import Path

import pytest

from deploy import doc_tables
from s3lora_serve.errors import LoadPostponed, S3LoRAError, rejections
from tests.runs.architectures import report as architectures
from tests.runs.architectures.models import ARCHITECTURES
from tests.runs.compat import report

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("deploy/*.md")])
SOURCES = {path.name: path.read_text() for path in ROOT.glob("tests/**/test_*.py")}


@pytest.fixture(params=DOCUMENTS, ids=lambda path: path.name)
def document(request):
    return request.param


def test_every_test_named_in_a_document_exists(document):
    text = document.read_text()
    for name in set(re.findall(r"`(?:tests/[\w/]*)?(test_\w+)(\.py)?`", text)):
        stem, is_file = name
        if is_file:
            assert f"{stem}.py" in SOURCES
        else:
            assert any(f"def {stem}(" in source for source in SOURCES.values()), stem


def test_every_link_in_a_document_leads_somewhere(document):
    for target in re.findall(r"\]\(([^)#][^)]*)\)", document.read_text()):
        if not target.startswith(("http:", "https:", "mailto:")):
            assert (document.parent / target.partition("#")[0]).exists(), target


def test_every_file_and_folder_named_in_the_structure_exists():
    text = (ROOT / "docs" / "structure.md").read_text()
    named = set(re.findall(r"`([\w/.]+(?:\.py|/))`", text))
    assert len(named) > 40
    package = ROOT / "s3lora_serve"
    anywhere = {path.name for path in package.rglob("*.py")}
    for name in named:
        found = (package / name).exists() or (ROOT / name).exists()
        assert found or name in anywhere, name


def test_the_reference_lists_each_code_as_the_catalogue_has_it():
    text = (ROOT / "docs" / "reference.md").read_text()
    others = (*S3LoRAError.__subclasses__(), *LoadPostponed.__subclasses__())
    for error in (*rejections(), *(one for one in others if hasattr(one, "code"))):
        assert f"| {error.code} | {error.__doc__} | {error.remedy} |" in text


@pytest.mark.parametrize("path", doc_tables.written(), ids=lambda path: path.name)
def test_tables_of_documents_are_made_of_what_they_are_about(path):
    assert path.read_text() == doc_tables.written()[path], "run `make generate`"


def test_a_document_without_the_marks_of_a_table_is_an_error():
    with pytest.raises(ValueError, match="lacks the marks of its table metrics"):
        doc_tables.between("no marks", "metrics", "| a |")


def test_every_make_target_named_in_a_document_exists(document):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([\w-]+)", document.read_text())) <= targets


def test_the_readmes_versions_are_those_that_make_compat_ran():
    results = json.loads((ROOT / "tests" / "runs" / "compat" / "results.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert report.in_readme(readme, results) == readme


def test_the_readmes_architectures_are_those_that_make_architectures_ran():
    results = json.loads((ROOT / "tests" / "runs" / "architectures" / "results.json").read_text())
    assert list(results) == [each.name for each in ARCHITECTURES]
    assert all(architectures.holds(found) for found in results.values())
    readme = (ROOT / "README.md").read_text()
    assert architectures.in_readme(readme, results) == readme
