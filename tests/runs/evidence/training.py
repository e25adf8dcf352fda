"""Supervised training on (prompt, answer) pairs, for the base model and for adapters."""

import math
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from s3lora_serve.lab.base_model.language_model import Encoded, LanguageModel

BFLOAT16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
"""Whether the processor multiplies bfloat16. Others take five times longer than for float32."""

DTYPE = "bfloat16" if BFLOAT16 else "float32"
"""Of the models that the bench measures."""

BATCH = 16
WARM_UP = 5  # steps


def train(
    model: LanguageModel,
    parameters: Sequence[Any],
    examples: Sequence[tuple[Encoded, Encoded]],
    *,
    epochs: int,
    rate: float,
    seed: int,
    progress: Callable[[int, int], None],
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
    penalty: Callable[[], Tensor] | None = None,
) -> float:
    """Train with AdamW, a linear schedule and operations in DTYPE; return the last loss.

    Loss and gradients of each step are taken within a context of `around`. `penalty` is added to
    the loss.
    """
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    order = random.Random(seed)
    steps = epochs * math.ceil(len(examples) / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARM_UP) * max(0.05, 1 - step / steps)
    )
    last = math.nan
    for step, batch in enumerate(_batches(examples, epochs, order), 1):
        with around():
            with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
                found = model.answer_logits(batch)
            loss = functional.cross_entropy(found.logits, found.targets)
            total = loss if penalty is None else loss + penalty()
            total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        last = loss.item()
        progress(step, steps)
    return last


def _batches(
    examples: Sequence[tuple[Encoded, Encoded]], epochs: int, order: random.Random
) -> list[list[tuple[Encoded, Encoded]]]:
    """Batches of examples of similar length, in random order."""
    found = []
    for _ in range(epochs):
        shuffled = list(examples)
        order.shuffle(shuffled)
        shuffled.sort(key=lambda example: (len(example[0]) + len(example[1])) // 8)
        batches = [shuffled[i : i + BATCH] for i in range(0, len(shuffled), BATCH)]
        order.shuffle(batches)
        found += batches
    return found
