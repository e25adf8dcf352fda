"""How far an adapter's plan is, as a server reads it beside its folder of plans."""

import json
import os
from dataclasses import asdict

import pytest

from s3lora_serve.plans.folder import plan_name
from s3lora_serve.plans.planner_records import (
    PlannerRecord,
    plan_progress,
    record_name,
    records_folder,
)

DIGEST = "sha256:" + "b" * 64


@pytest.fixture
def plans(tmp_path):
    folder = tmp_path / "plans"
    folder.mkdir()
    records_folder(folder).mkdir()
    return folder


def note(plans, **fields):
    record = PlannerRecord(first_seen=1.0, **fields)
    (records_folder(plans) / record_name(DIGEST)).write_text(json.dumps(asdict(record)))


def test_a_plan_waits_fails_and_is_made(plans):
    assert plan_progress(plans, DIGEST) == ("none", "")
    note(plans)
    assert plan_progress(plans, DIGEST) == ("waiting", "")
    note(plans, code="S3LORA-401", failures=1, retry_at=5.0)
    assert plan_progress(plans, DIGEST) == ("waiting", "S3LORA-401")
    note(plans, code="S3LORA-908", failures=1)
    assert plan_progress(plans, DIGEST) == ("failed", "S3LORA-908")
    (plans / plan_name(DIGEST)).write_text("{}")
    assert plan_progress(plans, DIGEST) == ("made", "")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"first_seen": 1, "unknown": 2}', "[" * 5000, "9" * 99999]
)
def test_a_record_that_is_none_says_nothing(plans, text):
    (records_folder(plans) / record_name(DIGEST)).write_text(text)
    assert plan_progress(plans, DIGEST) == ("none", "")


def test_a_code_that_is_none_is_not_shown(plans):
    note(plans, code="<img src=x>")
    assert plan_progress(plans, DIGEST) == ("failed", "")


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_what_is_no_file_of_a_planners_is_not_waited_for(plans, tmp_path, kind):
    file = records_folder(plans) / record_name(DIGEST)
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "link":
        (tmp_path / "elsewhere").write_text('{"first_seen": 1.0}')
        file.symlink_to(tmp_path / "elsewhere")
    else:
        file.mkdir()
    assert plan_progress(plans, DIGEST) == ("none", "")
