"""The catalogue of refusals: codes are unique, reasons are typed, and some pass."""

import pickle

import pytest

from s3lora_serve.errors import (
    AdapterRejected,
    GateFailed,
    LoadPostponed,
    NotFinite,
    PlanInvalid,
    QueueFull,
    Reason,
    Refused,
    S3LoRAError,
    rejections,
)


def test_no_two_causes_share_a_code():
    causes = [*rejections(), *LoadPostponed.__subclasses__(), *S3LoRAError.__subclasses__()]
    codes = [cause.code for cause in causes if hasattr(cause, "code")]
    assert len(codes) == len(set(codes))


def test_a_refusal_has_the_reason_that_it_was_raised_for():
    reason = Reason.of(NotFinite("module q_proj holds NaN"))
    assert Reason.of(Refused(reason)) == reason
    assert str(Refused(reason)) == str(reason)
    assert Reason.of(pickle.loads(pickle.dumps(Refused(reason)))) == reason  # noqa: S301 - our own


def test_a_load_that_was_turned_away_is_postponed():
    assert Reason.of(QueueFull("12 loads wait")).is_postponed
    assert not Reason.of(NotFinite("module q_proj holds NaN")).is_postponed


@pytest.mark.parametrize(
    ("cause", "passes"), [(GateFailed, True), (PlanInvalid, True), (NotFinite, False)]
)
def test_what_the_adapter_did_not_cause_passes(cause, passes):
    assert Reason.of(cause("a problem")).passes is passes
    assert issubclass(cause, AdapterRejected)
