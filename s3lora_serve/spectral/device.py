"""Modules on an accelerator: uploaded in chunks from pinned memory and solved on the device.

The next chunk is copied on a separate stream while the current chunk is solved. The device memory
in use at a time, including matrices and workspace, stays below 256 MB.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from s3lora_serve.spectral.gram import Modules, Side
from s3lora_serve.spectral.panels import Factors, HostModules, PanelSide, alike, row_counts

CHUNK_BYTES = 2**25
"""Bytes of weights uploaded at a time. The device holds two chunks, the size of a third for stacked
batches, 64 MB for r×r matrices (`precision.GRAM_BYTES`), and the partial sums of the kernels."""

ALIGNMENT = 16
"""In bytes: the widest load instruction of a kernel."""


class Chunk(NamedTuple):
    """Consecutive modules in the order given, and access to their factors."""

    modules: Sequence[Factors]
    place: Modules


def upload(
    parts: Sequence[Sequence[Factors]], device: str, between_batches: Callable[[], None]
) -> Iterator[Chunk]:
    """Upload modules to the device, one chunk ahead of the caller. Each part has one rank.

    A module larger than a chunk stays on the host.

    Raises:
        torch.OutOfMemoryError: the device has not enough free memory for a chunk.
    """
    uploader = Uploader(torch.device(device))
    ahead: tuple[Sequence[Factors], Callable[[], Modules]] | None = None

    def start(modules: Sequence[Factors]) -> Callable[[], Modules]:
        if _bytes(modules[0]) > CHUNK_BYTES:
            return lambda: HostModules(modules, between_batches)
        arrival = uploader.start(modules)
        return lambda: DeviceModules(arrival())

    for part in parts:
        for chunk in _chunks(part):
            between_batches()
            current, ahead = ahead, (chunk, start(chunk))
            if current:
                yield Chunk(current[0], current[1]())
    if ahead:
        yield Chunk(ahead[0], ahead[1]())


class Uploader:
    """Copies chunks from host to device, one copy per chunk, in parallel with other device work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]

    def start(self, modules: Sequence[Factors]) -> Callable[[], list[Factors]]:
        """Start a copy. The returned function makes later work wait for it and gives the modules.

        Each factor keeps its shape, dtype and strides.
        """
        tensors = [_dense(tensor) for module in modules for tensor in module]
        shared = _shared_span(tensors)
        if shared is not None and self._cuda and shared.is_pinned():
            source = shared
            offsets = [tensor.data_ptr() - shared.data_ptr() for tensor in tensors]
        else:
            source, offsets = self._staged(tensors)
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            target = source.to(self._device, non_blocking=True)
            copied = self._stream.record_event() if self._stream else None

        def arrival() -> list[Factors]:
            if copied:
                working = torch.cuda.current_stream(self._device)
                working.wait_event(copied)
                target.record_stream(working)
            views = [_view_at(target, *where) for where in zip(offsets, tensors, strict=True)]
            return list(zip(views[::2], views[1::2], strict=True))

        return arrival

    def _staged(self, tensors: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """Copy all tensors to one pinned buffer, which torch keeps until the upload ends.

        Returns:
            The buffer, and the offset of each tensor in bytes.
        """
        offsets, size = [], 0
        for tensor in tensors:
            offsets.append(size)
            size += -(-tensor.numel() * tensor.itemsize // ALIGNMENT) * ALIGNMENT
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=self._cuda)
        for offset, tensor in zip(offsets, tensors, strict=True):
            _view_at(memory, offset, tensor).copy_(tensor)
        return memory, offsets


class DeviceModules:
    """Modules of one rank whose factors are on a device."""

    def __init__(self, modules: Sequence[Factors]) -> None:
        self._modules = modules
        self._ops = _kernels(modules[0][0].shape[1])

    @property
    def arithmetics(self) -> tuple[torch.dtype, ...]:
        """Working dtypes to try, the fastest first."""
        # Without our kernels, float32 products may be rounded to tf32: a setting of the process.
        return (torch.float64,) if self._ops is None else (torch.float32, torch.float64)

    def sides(self, chosen: Sequence[int], dtype: torch.dtype) -> tuple[Side, Side]:
        """The B and the Aᵀ of the chosen modules, for passes in `dtype`."""
        rows = [self._modules[i][0] for i in chosen]
        columns = [self._modules[i][1].mT for i in chosen]
        if self._ops is None:
            return PanelSide(rows, dtype), PanelSide(columns, dtype)
        return DeviceSide(rows, dtype, self._ops), DeviceSide(columns, dtype, self._ops)


class DeviceSide:
    """A `gram.Side` on a device. Its batches consist of whole factors in their stored dtype."""

    def __init__(self, factors: Sequence[Tensor], dtype: torch.dtype, ops: ModuleType) -> None:
        """Accept factors (d, r) of any shapes, strides and dtypes; `ops` implements the passes."""
        self.dtype = dtype
        self._ops = ops
        groups = alike(factors)
        self._batches = [_stacked([factors[i] for i in group]) for group in groups]
        order = torch.tensor([i for group in groups for i in group])
        self._order = order.to(factors[0].device)
        self._back = order.argsort().to(factors[0].device)
        self._rows = row_counts(factors)

    def gram(self) -> Tensor:
        """See `gram.Side.gram`."""
        return torch.cat([self._ops.gram(X, self.dtype) for X in self._batches])[self._back]

    def normalised_gram(self, lower: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG002
        """See `gram.Side.normalised_gram`.

        All modules are processed: reading `chosen` would synchronise host and device.
        """
        per_batch = lower[self._order].split_with_sizes([len(X) for X in self._batches])
        parts = [
            self._ops.normalised_gram(X, L) for X, L in zip(self._batches, per_batch, strict=True)
        ]
        total, sums, lost = (torch.cat(part)[self._back] for part in zip(*parts, strict=True))
        return total, sums / self._rows, lost


def _kernels(rank: int) -> ModuleType | None:
    """The Triton kernels; None if Triton is not installed or the rank exceeds MAX_RANK."""
    try:
        from s3lora_serve.spectral import triton_ops
    except ImportError:
        return None
    return triton_ops if rank <= triton_ops.MAX_RANK else None


def _chunks(modules: Sequence[Factors]) -> Iterator[Sequence[Factors]]:
    """Consecutive modules of at most CHUNK_BYTES together; a larger module is a chunk by itself."""
    start, size = 0, 0
    for i, module in enumerate(modules):
        if i > start and size + _bytes(module) > CHUNK_BYTES:
            yield modules[start:i]
            start, size = i, 0
        size += _bytes(module)
    yield modules[start:]


def _bytes(module: Factors) -> int:
    return sum(factor.numel() * factor.itemsize + ALIGNMENT for factor in module)


def _stacked(factors: list[Tensor]) -> Tensor:
    """Stack factors of one shape, dtype and layout to (k, d, r), in their stored layout."""
    if len(factors) == 1:
        return factors[0].unsqueeze(0)
    if factors[0].stride(0) == 1:
        return torch.stack([factor.mT for factor in factors]).mT
    return torch.stack(factors)


def _dense(tensor: Tensor) -> Tensor:
    """The tensor itself if it or its transpose is contiguous, else a contiguous copy."""
    return tensor if tensor.is_contiguous() or tensor.mT.is_contiguous() else tensor.contiguous()


def _view_at(memory: Tensor, offset: int, like: Tensor) -> Tensor:
    """A view of `memory` at an offset in bytes, with the shape, strides and dtype of `like`."""
    size = like.numel() * like.itemsize
    flat = memory[offset : offset + size].view(like.dtype)
    return flat.as_strided(like.shape, like.stride(), flat.storage_offset())


def _shared_span(tensors: Sequence[Tensor]) -> Tensor | None:
    """The bytes from the first to the last of the tensors, which share one storage.

    None if they do not share one, or if the span exceeds twice their bytes or two chunks.
    """
    storage = tensors[0].untyped_storage()
    starts = [tensor.storage_offset() * tensor.itemsize for tensor in tensors]
    sizes = [tensor.numel() * tensor.itemsize for tensor in tensors]
    if any(tensor.untyped_storage().data_ptr() != storage.data_ptr() for tensor in tensors):
        return None
    first = min(starts) // ALIGNMENT * ALIGNMENT
    last = max(start + size for start, size in zip(starts, sizes, strict=True))
    if last - first > min(2 * CHUNK_BYTES, 2 * sum(sizes)):
        return None
    whole = torch.empty(0, dtype=torch.uint8).set_(storage)
    return whole[first:last]
