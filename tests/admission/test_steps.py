"""The steps of an admission: one that refuses ends them, and the verdict tells what was known."""

from itertools import pairwise

import pytest

from s3lora_serve.admission.admit import admit
from s3lora_serve.admission.partial import Begun, Circumstances, Copied, Decided, Placed, Read
from s3lora_serve.errors import NothingPlaced
from s3lora_serve.policy.schema import Policy
from tests.support.adapters import copy_with, diverged


def verdict_on(folder, policy=None, **about):
    circumstances = Circumstances(**about)
    return admit(folder, "tenant", policy or Policy(), circumstances=circumstances).verdict


def test_without_an_allowed_format_nothing_is_read(trained):
    verdict = verdict_on(trained, Policy.model_validate({"limits": {"formats": []}}))
    assert verdict.reason.code == "S3LORA-102"
    assert verdict.digest is None


def test_an_adapter_of_another_model_is_refused_with_what_was_read_of_it(trained):
    def refuse(_adapter):
        raise NothingPlaced("nothing of it")

    verdict = verdict_on(trained, left_out_of_model=refuse)
    assert verdict.reason.code == "S3LORA-303"
    assert verdict.digest is not None
    assert verdict.config_digest is not None
    assert verdict.modules == ()


def test_a_refusal_by_a_score_knows_no_module(trained, tmp_path):
    verdict = verdict_on(copy_with(trained, tmp_path / "nan", diverged))
    assert verdict.reason.code == "S3LORA-109"
    assert verdict.digest is not None
    assert verdict.modules == ()
    assert verdict.seconds.score == 0


def test_an_error_of_the_gates_own_refuses_too(trained):
    def fail(_adapter):
        raise ZeroDivisionError("a mistake")

    verdict = verdict_on(trained, left_out_of_model=fail)
    assert verdict.decision == "rejected"
    assert verdict.reason.code == "S3LORA-401"


def test_each_step_knows_all_that_the_one_before_knew():
    ordered = Begun, Copied, Read, Placed, Decided
    for before, after in pairwise(ordered):
        assert issubclass(after, before)
    with pytest.raises(TypeError):
        Copied(policy=Policy(), started=0.0, deadline=1.0)  # no step ends without what it finds
