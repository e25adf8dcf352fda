"""A folder of plans is read only if nobody but this user and root can write what is in it."""

import os

import pytest

from s3lora_serve.errors import PlanInvalid, PolicyInvalid
from s3lora_serve.plans import folder
from s3lora_serve.plans.folder import check_plans, plan_bytes, plan_name
from s3lora_serve.policy.schema import Policy

DIGEST = "sha256:" + "ab" * 32
STRANGER = 12345


@pytest.fixture
def plans(tmp_path):
    made = tmp_path / "plans"
    made.mkdir(mode=0o755)
    (made / plan_name(DIGEST)).write_bytes(b"{}")
    (made / plan_name(DIGEST)).chmod(0o644)
    return made


def refusal(plans):
    with pytest.raises(PlanInvalid) as caught:
        plan_bytes(plans, DIGEST)
    return str(caught.value)


def test_a_plan_is_found_by_the_digest_of_the_weights(plans):
    assert plan_name(DIGEST) == "ab" * 32 + ".json"
    assert plan_bytes(plans, DIGEST) == b"{}"
    assert plan_bytes(plans, "sha256:" + "0" * 64) is None
    check_plans(Policy(plans=plans))


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777, 0o1777])
def test_a_folder_that_others_can_write_stops_the_start_and_refuses_adapters(plans, mode):
    plans.chmod(mode)
    assert f"mode is {mode:04o}" in refusal(plans)
    with pytest.raises(PolicyInvalid, match=r"S3LORA-901: plans: .* written by others"):
        check_plans(Policy(plans=plans))


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_file_that_others_can_write_is_refused(plans, mode):
    (plans / plan_name(DIGEST)).chmod(mode)
    assert "written by others" in refusal(plans)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_a_folder_or_file_of_another_user_is_refused(plans):
    os.chown(plans / plan_name(DIGEST), STRANGER, -1)
    assert f"belongs to user {STRANGER}" in refusal(plans)
    os.chown(plans, STRANGER, -1)
    with pytest.raises(PolicyInvalid, match=f"belongs to user {STRANGER}"):
        check_plans(Policy(plans=plans))


@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "dead link"])
def test_whatever_is_no_regular_file_is_refused_at_once(plans, tmp_path, kind):
    file = plans / plan_name(DIGEST)
    file.rename(tmp_path / "elsewhere.json")
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to(tmp_path / ("elsewhere.json" if kind == "link" else "nowhere"))
    assert refusal(plans).startswith("S3LORA-208: ")


@pytest.mark.parametrize("name", ["nowhere", "file", "a\0b"])
def test_a_folder_that_is_none_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("")
    assert refusal(tmp_path / name).startswith("S3LORA-208: ")
    with pytest.raises(PolicyInvalid, match="plans"):
        check_plans(Policy(plans=tmp_path / name))


def test_without_plans_or_with_the_gate_off_there_is_nothing_to_check(tmp_path):
    check_plans(Policy())
    check_plans(Policy(plans=tmp_path / "nowhere", mode="off"))


def test_a_larger_file_than_a_plan_can_be_is_refused(plans, monkeypatch):
    monkeypatch.setattr(folder, "MAX_PLAN_BYTES", 1)
    assert "larger than 1 bytes" in refusal(plans)
