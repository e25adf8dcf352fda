"""Weights from host to device: all factors of a part in one buffer, without a copy for each."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from s3lora_serve.spectral.panels import FactorPair

ALIGNED_BYTES = 16
"""In bytes, of factors that do not lie in one buffer already: the widest load of a kernel."""

SLICE_BYTES = 2**24
"""Copied to pinned memory at a time: the device receives a slice while the next is copied. Ours."""

MOST_GAPS = 2**25
"""Most bytes between factors that are copied along with them, and no more than they have. Ours."""


class Uploaded(NamedTuple):
    """Factors in device memory."""

    memory: Tensor  # (bytes,) uint8 on the device
    offsets: list[int]  # in bytes, of the B and the A of each module in turn
    factors: list[Tensor]  # the same on the host: shapes, strides and dtypes


def upload(
    modules: Sequence[FactorPair], device: torch.device, between_batches: Callable[[], None]
) -> Uploaded:
    """Copy factors to a device. Nothing waits for it, except later work on the device.

    Factors that share a buffer, as those of a file do, are copied as they lie there.

    Raises:
        torch.OutOfMemoryError: the device has not enough free memory.
    """
    factors = [_dense(factor) for module in modules for factor in module]
    sizes = [factor.numel() * factor.itemsize for factor in factors]
    shared = _shared_span(factors, sum(sizes) + min(sum(sizes), MOST_GAPS))
    if shared is not None:
        sources, starts = [shared], [0]
        offsets = [factor.data_ptr() - shared.data_ptr() for factor in factors]
        size = len(shared)
    else:
        sources = [_bytes(factor) for factor in factors]
        offsets = starts = list(_aligned(sizes))
        size = starts[-1] + sizes[-1]
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    memory = torch.empty(size, dtype=torch.uint8, device=device)
    sent = 0
    for source, start in zip(sources, starts, strict=True):
        for at in range(0, len(source), SLICE_BYTES):
            part = source[at : at + SLICE_BYTES]
            end = start + at + len(part)
            pinned[end - len(part) : end].copy_(part)
            if end - sent >= SLICE_BYTES:
                between_batches()
                memory[sent:end].copy_(pinned[sent:end], non_blocking=True)
                sent = end
    if sent < size:
        memory[sent:].copy_(pinned[sent:], non_blocking=True)
    return Uploaded(memory, offsets, factors)


def _aligned(sizes: Sequence[int]) -> Iterator[int]:
    """The start of each of these many bytes, one after the other."""
    start = 0
    for size in sizes:
        yield start
        start += -(-size // ALIGNED_BYTES) * ALIGNED_BYTES


def _dense(factor: Tensor) -> Tensor:
    """The factor itself if it or its transpose is contiguous, else a contiguous copy."""
    return factor if factor.is_contiguous() or factor.mT.is_contiguous() else factor.contiguous()


def _bytes(factor: Tensor) -> Tensor:
    """All bytes of a dense factor, in the order in which they are stored."""
    stored = factor if factor.is_contiguous() else factor.mT
    return stored.reshape(-1).view(torch.uint8)


def _shared_span(factors: Sequence[Tensor], most: int) -> Tensor | None:
    """The bytes from the first to the last of factors that share one storage.

    None if they do not share one, or if the span has more than `most` bytes.
    """
    storage = factors[0].untyped_storage()
    if any(factor.untyped_storage().data_ptr() != storage.data_ptr() for factor in factors):
        return None
    starts = [factor.storage_offset() * factor.itemsize for factor in factors]
    ends = [
        start + factor.numel() * factor.itemsize
        for start, factor in zip(starts, factors, strict=True)
    ]
    # Kernels read elements at their own size's multiples, also if the storage itself is not there.
    first = min(starts) // ALIGNED_BYTES * ALIGNED_BYTES
    if max(ends) - first > most:
        return None
    return torch.empty(0, dtype=torch.uint8).set_(storage)[first : max(ends)]
