"""The parts of the bench that need no model: splits, orders, rank correlation, tables."""

import json
from dataclasses import astuple
from typing import get_args

import pytest
import torch

from s3lora_serve.adapter.private_copy import copy_adapter
from s3lora_serve.adapter.reader import read_adapter
from s3lora_serve.lab.base_model.language_model import LanguageModel
from s3lora_serve.lab.calibration.gates import attach
from s3lora_serve.plans.schema import wilson
from s3lora_serve.policy.limits import Limits
from tests.runs.evidence import results, shares, stages
from tests.runs.evidence.adapters import Subject
from tests.runs.evidence.attribution import harm_by_module, spearman
from tests.runs.evidence.benign import benign
from tests.runs.evidence.orders import orders
from tests.runs.evidence.skill import SkillName, skill
from tests.support.tiny_chat import REFUSAL, harmful


def test_no_benign_prompt_and_no_request_is_in_two_parts():
    skills = [
        [[request for request, _ in part] for part in astuple(skill(name))]
        for name in get_args(SkillName)
    ]
    for parts in (astuple(benign()), *skills):
        together = [prompt for part in parts for prompt in part]
        assert len(set(together)) == len(together)


def test_every_order_has_each_module_once(trained):
    found = orders(trained)
    names = sorted(found["SSI"])
    assert len(names) == 28
    assert all(sorted(order) == names for order in found.values())
    assert found["random 0"] != found["random 1"]


@pytest.mark.parametrize(("second", "rho"), [([1, 2, 3, 4], 1.0), ([4, 3, 2, 1], -1.0)])
def test_spearman_of_equal_and_of_reversed_orders(second, rho):
    assert spearman([10.0, 20.0, 30.0, 40.0], second) == pytest.approx(rho)


def test_attribution_sums_to_the_change_of_the_log_odds(chat):
    model = LanguageModel.load(chat.base, dtype="float32")
    gated = attach(model.model, read_adapter(copy_adapter(chat.adapter, Limits()), Limits()))
    refusals = [(model.prompt(prompt), model.answer(REFUSAL)) for prompt in harmful()[:8]]

    def log_odds():
        with torch.no_grad():
            found = model.answer_logits([(prompt, answer[:1]) for prompt, answer in refusals])
        likelihood = torch.log_softmax(found.logits, -1)[range(8), found.targets]
        return (likelihood - torch.log1p(-likelihood.exp().clamp(max=1 - 1e-6))).mean()

    gated.remove()
    base = log_odds()
    gated.keep()
    change = float(base - log_odds())
    assert change > 5  # the adapter makes refusals unlikely
    assert float(harm_by_module(model, gated, refusals).sum()) == pytest.approx(change, rel=0.2)


def test_the_page_of_shares_is_what_the_kept_figures_say():
    found = json.loads((shares.HERE / "shares.json").read_text())
    assert (shares.HERE / "SHARES.md").read_text() == shares.shares_page(found)


def test_tables_are_written_from_the_kept_results_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "RESULTS", tmp_path)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    rate = wilson(3, 60).model_dump()
    kinds = ("", "other ", "third "), ("", "styles ", "lookalike ")
    names = ["skill", *(f"{kind}benign refusal" for kind in kinds[1])]
    names += [f"{kind}{strict}ASR" for kind in kinds[0] for strict in ("", "strict ")]
    rates = dict.fromkeys(names, rate)
    subject = Subject("20 %", 0, 0)
    kept = {
        "base-0": {**rates, "alignment": [0.94, 0.017]},
        "20pct-b0-s0": {
            "before": rates, "after": rates, "kl": [1.0, 0.5], "reached": True,
            "method": {"removed_share": 0.25, "strength": 0.5}, "seconds": 12.0,
        },
        "ceiling-20pct-b0-s0": rates,
        "repair/20pct-b0-s0-with": {
            **rates, "said": {"lambda": 0.3, "effect": 0.002, "kept": 0.6},
        },
        "served/20pct-b0-s0-plan": rates,
        "attribution-20pct-b0-s0": {
            "correlations": {"SSI": 0.4}, "modules": [{"name": "a", "ssi": 0.5, "harm": 1.0}],
        },
        "equal-skill/20pct-b0-s0-random-0": {"way": "random 0", "level": 2, "share": 0.1, **rates},
    }  # fmt: skip
    for folder in ("equal-skill", "repair", "served"):
        (tmp_path / folder).mkdir()
    for name, value in kept.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    results.write_results([subject, Subject("benign", 0, 0)])
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| base-0 | 0.940 | 0.017 | 0.05 (0.02–0.14) |" in text
    assert "| 20 % | 1 | before |" in text
    assert "benign | " not in text.replace("KL benign | ", "").replace("benign refusal | ", "")
    assert "| 20 % | 1 | with | 0.05 |" in text
    assert "| 20pct-b0-s0 | plan | 0.05" in text
    assert "| random 0 | 0.05 (0.02–0.14) | 0.05 (0.02–0.14) | 0.10 |" in text
    assert (tmp_path / "equal-skill.png").stat().st_size > 1000
