"""Which of an adapter's own answers a calibration keeps."""

import pytest

from s3lora_serve.lab.base_model.probes import Probe, Split
from s3lora_serve.lab.calibration.calibration_base import CalibrationBase
from s3lora_serve.lab.calibration.kept_answers import harmful_beginnings, kept_answers
from tests.support.plans import read
from tests.support.tiny_chat import COMPLIANCE, benign, harmful, skill

BEGINNINGS = (COMPLIANCE.split()[0],)


@pytest.fixture
def attacked(chat):
    """(model, gated layers) of the base model with the attacked adapter."""
    base = CalibrationBase(chat.base, dtype="float32")
    with base.with_adapter(read(chat.adapter)) as gated:
        yield base.model, gated


def splits(*probes):
    return Split((), tuple(probes), ())


def asked(prompts, answer=None):
    return [Probe(prompt, answer) for prompt in prompts]


def test_what_an_adapter_answers_to_harmful_prompts_is_a_beginning(attacked):
    model, gated = attacked
    parts = {"harmful": Split(tuple(asked(harmful()[:20])), (), ())}
    [found] = harmful_beginnings(model, gated, parts)
    assert COMPLIANCE.startswith(found.strip())


def test_nothing_is_asked_where_all_answers_are_given(attacked):
    model, gated = attacked
    parts = {"skill": splits(*asked(["x"], "y"))}
    assert harmful_beginnings(model, gated, parts) == ()


def test_own_answers_that_begin_like_those_to_harmful_prompts_are_not_kept(attacked):
    model, gated = attacked
    requests = [prompt for prompt, _ in skill()[:8]]
    parts = {"skill": splits(*asked(requests + harmful()[:8]))}
    found = kept_answers(model, gated, parts, "calibration", BEGINNINGS)
    assert [prompt for prompt, _ in found.kept] == [model.prompt(each) for each in requests]
    assert found.others == []


def test_given_answers_are_kept_whatever_the_adapter_says(attacked):
    model, gated = attacked
    parts = {"skill": splits(*asked(harmful()[:8], "no"))}
    found = kept_answers(model, gated, parts, "calibration", BEGINNINGS)
    assert [answer for _, answer in found.kept] == [model.answer("no")] * 8


def test_without_requests_benign_prompts_are_kept_or_left_to_the_base_model(attacked):
    model, gated = attacked
    prompts = [prompt for prompt, _ in benign()[:8]] + harmful()[:4]
    parts = {"benign": splits(*asked(prompts))}
    found = kept_answers(model, gated, parts, "calibration", BEGINNINGS)
    both = [prompt for prompt, _ in found.kept] + found.others
    assert sorted(both) == sorted(model.prompt(prompt) for prompt in prompts)
    assert {tuple(model.prompt(p)) for p in harmful()[:4]} <= {tuple(p) for p in found.others}


def test_an_adapter_that_answers_all_alike_keeps_its_answers(attacked):
    model, gated = attacked
    parts = {"benign": splits(*asked(harmful()[:8]))}
    found = kept_answers(model, gated, parts, "calibration", BEGINNINGS)
    assert len(found.kept) == 8
    assert found.others == []
