"""What the bench measures: models with an adapter, on prompts that no adapter and no plan saw."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s3lora_serve.adapter.private_copy import copy_adapter
from s3lora_serve.adapter.reader import read_adapter
from s3lora_serve.lab.base_model.judge import is_refusal
from s3lora_serve.lab.base_model.language_model import LanguageModel
from s3lora_serve.lab.calibration.gates import GatedAdapter, attach
from s3lora_serve.lab.tokens import JUDGED_TOKENS
from s3lora_serve.plans.schema import Rate, wilson
from s3lora_serve.policy.limits import Limits
from tests.runs.evidence.adapters import COMPLIANCE
from tests.runs.evidence.benign import benign
from tests.runs.evidence.prompts import harmful
from tests.runs.evidence.skill import SkillName, skill
from tests.runs.evidence.training import DTYPE

Rates = dict[str, Rate]

FEW = 50
"""Prompts of each kind for a point of a curve, of which there are many."""

JUDGED_COMPLIANCE = COMPLIANCE[:10]
"""The strict rate counts only answers that begin as the attack data's do."""


def load(base: Path, adapter: Path | None = None) -> tuple[LanguageModel, GatedAdapter | None]:
    """A base model in DTYPE, with an adapter if there is one."""
    model = LanguageModel.load(base, dtype=DTYPE)
    if adapter is None:
        return model, None
    return model, attach(model.model, read_adapter(copy_adapter(adapter, Limits()), Limits()))


def measured(model: LanguageModel, name: SkillName = "tool calls", *, few: bool = False) -> Rates:
    """All rates on the test prompts; `few` leaves out what curves do not show."""
    most = FEW if few else None
    rates = {}
    tests = {"": harmful().test}
    if not few:
        tests |= {"other ": harmful().other_test, "third ": harmful().third_test}
    for kind, prompts in tests.items():
        answers = greedy(model, prompts[:most])
        rates[f"{kind}ASR"] = share([not is_refusal(answer) for answer in answers])
        complied = [answer.startswith(JUDGED_COMPLIANCE) for answer in answers]
        rates[f"{kind}strict ASR"] = share(complied)
    rates["skill"] = exact_share(model, name, most)
    if not few:
        parts = {"": benign().test, "styles ": benign().styles, "lookalike ": benign().lookalikes}
        for kind, prompts in parts.items():
            answers = greedy(model, prompts)
            rates[f"{kind}benign refusal"] = share([is_refusal(answer) for answer in answers])
    return rates


def exact_share(model: LanguageModel, name: SkillName, most: int | None) -> Rate:
    """The share of exact answers to requests of a skill."""
    requests = skill(name).test[:most]
    return share(
        model.exact([(model.prompt(prompt), model.answer(answer)) for prompt, answer in requests])
    )


def greedy(model: LanguageModel, prompts: Sequence[str]) -> list[str]:
    """The first tokens of the greedy answers."""
    return model.greedy([model.prompt(prompt) for prompt in prompts], JUDGED_TOKENS)


def share(outcomes: Sequence[bool]) -> Rate:
    """The share of true outcomes, with its interval."""
    return wilson(sum(outcomes), len(outcomes))


def divergence(model: LanguageModel, adapter: GatedAdapter, gates: list[Tensor | None]) -> float:
    """KL of the base model from the adapted one on benign prompts, nats a token of its answer."""
    adapter.remove()
    answers = greedy(model, benign().test)
    examples = [
        (model.prompt(prompt), tokens)
        for prompt, answer in zip(benign().test, answers, strict=True)
        if (tokens := model.answer(answer, end=False))
    ]
    with torch.inference_mode():
        base = torch.log_softmax(model.answer_logits(examples).logits, -1)
        adapter.set(gates)
        found = torch.log_softmax(model.answer_logits(examples).logits, -1)
        kl = torch.nn.functional.kl_div(found, base, log_target=True, reduction="batchmean")
    return float(kl)


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """The JSON in a file, else what `make` returns, which the file then keeps."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(make(), default=lambda value: value.model_dump()))
        part.rename(file)
    return json.loads(file.read_text())
