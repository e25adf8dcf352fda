"""Which slices of a packed LoRA layer (q, k and v of qkv) have weights, and in which runs."""

from collections.abc import Iterator
from typing import Any


def weights_given(lora_a: Any, lora_b: Any, slices: int) -> list[bool]:
    """Which slices of a layer get an update that is not zero.

    Where factors are not one pair a slice, vLLM divides them among slices: all count then.
    """
    packed = isinstance(lora_a, list)
    if packed != isinstance(lora_b, list) or (packed and len(lora_a) != len(lora_b)):
        return [True] * slices
    if not packed:
        lora_a, lora_b = [lora_a], [lora_b]
    found = [_acts(a) and _acts(b) for a, b in zip(lora_a, lora_b, strict=True)]
    return found if len(found) == slices else [any(found)] * slices


def _acts(factor: Any) -> bool:
    """Whether a factor is there and not zero; one look at its first number nearly always tells."""
    if factor is None or not factor.numel():
        return False
    return bool(factor[(0,) * factor.dim()] != 0) or bool(factor.any())


def runs(needed: list[bool], *, in_one_call: bool) -> Iterator[tuple[int, int]]:
    """Neighbouring slices that are needed; in one call, with what lies between them."""
    places = [i for i, one in enumerate(needed) if one]
    if in_one_call:
        yield from [(places[0], places[-1] + 1)] if places else []
        return
    for i in places:
        if i == 0 or not needed[i - 1]:
            yield i, next((j for j in range(i, len(needed)) if not needed[j]), len(needed))
