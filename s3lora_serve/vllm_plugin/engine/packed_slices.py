"""The slices of a packed LoRA layer (q, k, v of qkv) that have weights, and runs of them."""

from collections.abc import Iterator
from typing import Any


def weights_given(lora_a: Any, lora_b: Any, slices: int) -> list[bool]:
    """Which slices of a layer get an update that is not zero.

    Factors that are not one pair for each slice are divided among the slices by vLLM: then all
    slices count.
    """
    packed = isinstance(lora_a, list)
    if packed != isinstance(lora_b, list) or (packed and len(lora_a) != len(lora_b)):
        return [True] * slices
    if not packed:
        lora_a, lora_b = [lora_a], [lora_b]
    found = [_acts(a) and _acts(b) for a, b in zip(lora_a, lora_b, strict=True)]
    return found if len(found) == slices else [any(found)] * slices


def _acts(factor: Any) -> bool:
    """Whether a factor exists and is not zero; its first entry nearly always decides."""
    if factor is None or not factor.numel():
        return False
    return bool(factor[(0,) * factor.dim()] != 0) or bool(factor.any())


def runs(needed: list[bool], *, in_one_call: bool) -> Iterator[tuple[int, int]]:
    """Runs (first, end) of needed slices; `in_one_call` gives one run, with its gaps."""
    indices = [i for i, one in enumerate(needed) if one]
    if in_one_call:
        yield from [(indices[0], indices[-1] + 1)] if indices else []
        return
    for i in indices:
        if i == 0 or not needed[i - 1]:
            yield i, next((j for j in range(i, len(needed)) if not needed[j]), len(needed))
