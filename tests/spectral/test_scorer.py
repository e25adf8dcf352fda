"""Scoring a whole adapter: batches, names, and no import besides torch."""

import subprocess
import sys

import pytest
import torch

from s3lora_serve.spectral import Factors, Scorer, panels, score_modules
from tests.support.factors import gaussian


def modules(count=6, dtype=torch.float32):
    shapes = [(20, 12, 4), (12, 20, 4), (20, 12, 8)]
    made = []
    for i in range(count):
        B, A = gaussian(*shapes[i % 3], k=1, seed=i)
        made.append(Factors(f"m{i}", B[0].to(dtype), A[0].to(dtype), scaling=1.0 + i))
    return made


def test_scores_are_returned_in_the_order_of_the_modules():
    assert [score.name for score in score_modules(modules(), device="cpu")] == [
        f"m{i}" for i in range(6)
    ]


def test_batching_does_not_change_a_score(monkeypatch):
    whole = score_modules(modules(9), device="cpu")
    monkeypatch.setattr(panels, "BATCH_BYTES", 1)
    one_by_one = score_modules(modules(9), device="cpu")
    for together, alone in zip(whole, one_by_one, strict=True):
        assert together.ssi == pytest.approx(alone.ssi, abs=1e-6)
        assert together.spectrum == pytest.approx(alone.spectrum, rel=1e-5)


def test_undefined_scores_are_none_and_never_nan():
    B, A = gaussian(6, 5, 1, k=1)
    zero = Factors("zero", torch.zeros(6, 2), torch.ones(2, 5), 1.0)
    rank_one = Factors("rank_one", B[0], A[0], 1.0)
    found = {score.name: score for score in score_modules([zero, rank_one], device="cpu")}
    assert found["zero"].ssi is None
    assert found["zero"].relative_ssi is None
    assert found["rank_one"].ssi == pytest.approx(1.0)
    assert found["rank_one"].relative_ssi is None
    assert all(score.finite for score in found.values())


def test_not_finite_modules_are_marked():
    broken = Factors("broken", torch.full((3, 2), torch.nan), torch.ones(2, 3), 1.0)
    [score] = score_modules([broken], device="cpu")
    assert not score.finite


def test_deadline_is_asked_between_batches(monkeypatch):
    monkeypatch.setattr(panels, "BATCH_BYTES", 1)
    checks = []
    score_modules(modules(4), device="cpu", between_batches=lambda: checks.append(1))
    assert len(checks) >= 4 * 4  # two passes over each side of each module


def test_unknown_scorer_is_refused():
    with pytest.raises(ValueError, match="'magic'"):
        score_modules(modules(), Scorer(name="magic"))


def test_spectral_engine_imports_nothing_but_torch():
    program = (
        "import sys; before = set(sys.modules); import s3lora_serve.spectral;"
        "heavy = {'pydantic', 'vllm', 'safetensors', 'yaml', 'prometheus_client', 'triton'};"
        "print(sorted(heavy & {m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
