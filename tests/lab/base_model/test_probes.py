"""Probes: what is read, what is refused, and that splits are disjoint."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3lora_serve.errors import ProbesInvalid
from s3lora_serve.lab.base_model.judge import is_refusal
from s3lora_serve.lab.base_model.probes import Probe, read_probes, split


def _lines(count, **more):
    return "".join(json.dumps({"prompt": f"question {i}", **more}) + "\n" for i in range(count))


def test_prompts_are_read_with_the_files_digest(tmp_path):
    file = tmp_path / "probes.jsonl"
    file.write_text(_lines(12) + "\n")
    found = read_probes(file, "harmful")
    assert found.probes[0] == Probe("question 0")
    assert found.digest.startswith("sha256:")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "0 different probes"),
        (_lines(11), "11 different probes"),
        (_lines(1) * 40, "1 different probes"),
        (_lines(12) + '{"question": "x"}\n', ":13: 'prompt' is missing"),
        (_lines(12) + '{"prompt": "  "}\n', ":13: 'prompt' is missing"),
        (_lines(12) + '{"prompt": 3}\n', ":13: 'prompt' is missing"),
        (_lines(12) + "[1]\n", ":13: not a JSON object"),
        (_lines(12) + "{\n", ":13: not JSON"),
    ],
)
def test_bad_probes_are_refused_with_their_line(tmp_path, text, problem):
    file = tmp_path / "probes.jsonl"
    file.write_text(text)
    with pytest.raises(ProbesInvalid, match="S3LORA-905") as refusal:
        read_probes(file, "harmful")
    assert problem in str(refusal.value)


def test_skill_probe_with_an_empty_answer_is_refused(tmp_path):
    file = tmp_path / "skill.jsonl"
    file.write_text(_lines(12, answer="yes") + '{"prompt": "x", "answer": ""}\n')
    with pytest.raises(ProbesInvalid, match="'answer' is missing"):
        read_probes(file, "skill")


def test_skill_probe_without_an_answer_asks_for_the_adapters_own(tmp_path):
    file = tmp_path / "skill.jsonl"
    file.write_text(_lines(12, answer="yes") + '{"prompt": "x"}\n')
    assert read_probes(file, "skill").probes[-1] == Probe("x", None)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused_and_never_raise_otherwise(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("probes") / "probes.jsonl"
    file.write_bytes(data)
    with pytest.raises(ProbesInvalid):
        read_probes(file, "benign")


@given(st.integers(12, 400), st.integers(0, 9))
def test_splits_are_disjoint_and_lose_no_probe(count, seed):
    probes = [Probe(str(i)) for i in range(count)]
    parts = split(probes, seed)
    together = parts.search + parts.calibration + parts.held_out
    assert sorted(together, key=lambda p: int(p.prompt)) == probes
    assert min(len(parts.search), len(parts.calibration), len(parts.held_out)) >= 3


@pytest.mark.parametrize(
    ("answer", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I can\N{RIGHT SINGLE QUOTATION MARK}t assist with that request.", True),
        ("Sure, here is what you asked for:", False),
        ("Bread is baked. " * 10 + "I cannot say more.", False),
        ("", False),
    ],
)
def test_answer_that_begins_with_a_refusal_is_one(answer, refuses):
    assert is_refusal(answer) is refuses
