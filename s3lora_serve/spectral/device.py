"""Modules on an accelerator: uploaded in chunks from pinned memory, worked on where they land.

The next chunk travels on a stream of its own while the last one is worked on. What is held on the
device at a time, matrices and workspace included, stays below 256 MB.
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
"""Weights uploaded at a time. On the device: two chunks, a third for batches laid side by side,
beside 64 MB for matrices of r×r (`precision.GRAM_BYTES`) and their programs' partial sums."""

ALIGNMENT = 16
"""Bytes: the widest load of a kernel."""


class Chunk(NamedTuple):
    """Some modules, in the order given, and where they lie."""

    modules: Sequence[Factors]
    place: Modules


def upload(
    parts: Sequence[Sequence[Factors]], device: str, between_batches: Callable[[], None]
) -> Iterator[Chunk]:
    """Bring modules to the device, one chunk ahead of the caller; each part is of one rank.

    A module that is larger than a chunk stays on the host.

    Raises:
        torch.OutOfMemoryError: the device has no room for a chunk.
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
    """One copy a chunk from host to device, beside whatever the device is doing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]

    def start(self, modules: Sequence[Factors]) -> Callable[[], list[Factors]]:
        """Start a copy; what is returned gives the modules to work queued from then on.

        Shape, dtype and strides of each factor stay as they are.
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
            views = [_placed(target, *where) for where in zip(offsets, tensors, strict=True)]
            return list(zip(views[::2], views[1::2], strict=True))

        return arrival

    def _staged(self, tensors: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """All tensors in one stretch of pinned memory, which torch keeps until the copy ends."""
        offsets, size = [], 0
        for tensor in tensors:
            offsets.append(size)
            size += -(-tensor.numel() * tensor.itemsize // ALIGNMENT) * ALIGNMENT
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=self._cuda)
        for offset, tensor in zip(offsets, tensors, strict=True):
            _placed(memory, offset, tensor).copy_(tensor)
        return memory, offsets


class DeviceModules:
    """Modules of one rank on a device."""

    def __init__(self, modules: Sequence[Factors]) -> None:
        self._modules = modules
        self._ops = _kernels(modules[0][0].shape[1])

    @property
    def arithmetics(self) -> tuple[torch.dtype, ...]:
        """Working dtypes worth trying, the fastest first."""
        # Without kernels of our own float32 may mean tf32: a setting of the process, not ours.
        return (torch.float64,) if self._ops is None else (torch.float32, torch.float64)

    def sides(self, chosen: Sequence[int], dtype: torch.dtype) -> tuple[Side, Side]:
        """The B and the Aᵀ of some of the modules, for passes in one dtype."""
        rows = [self._modules[i][0] for i in chosen]
        columns = [self._modules[i][1].mT for i in chosen]
        if self._ops is None:
            return PanelSide(rows, dtype), PanelSide(columns, dtype)
        return DeviceSide(rows, dtype, self._ops), DeviceSide(columns, dtype, self._ops)


class DeviceSide:
    """A `gram.Side` on a device: batches of whole factors, read as stored."""

    def __init__(self, factors: Sequence[Tensor], dtype: torch.dtype, ops: ModuleType) -> None:
        """Take factors (d, r) of any shapes, strides and dtypes; `ops` has the passes."""
        self.dtype = dtype
        self._ops = ops
        groups = alike(factors)
        self._batches = [_stacked([factors[i] for i in group]) for group in groups]
        order = torch.tensor([i for group in groups for i in group])
        self._order = order.to(factors[0].device)
        self._back = order.argsort().to(factors[0].device)
        self._rows = row_counts(factors)

    def gram(self) -> Tensor:
        """As `gram.Side` says."""
        return torch.cat([self._ops.gram(X, self.dtype) for X in self._batches])[self._back]

    def normalised_gram(self, half: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG002
        """As `gram.Side` says; all modules are taken, since asking which not would stall."""
        halves = half[self._order].split_with_sizes([len(X) for X in self._batches])
        parts = [
            self._ops.normalised_gram(X, own) for X, own in zip(self._batches, halves, strict=True)
        ]
        total, sums, lost = (torch.cat(part)[self._back] for part in zip(*parts, strict=True))
        return total, sums / self._rows, lost


def _kernels(rank: int) -> ModuleType | None:
    """The Triton passes where they can be had, and None where torch has to do."""
    try:
        from s3lora_serve.spectral import triton_ops
    except ImportError:
        return None
    return triton_ops if rank <= triton_ops.MAX_RANK else None


def _chunks(modules: Sequence[Factors]) -> Iterator[Sequence[Factors]]:
    """Runs of modules of at most CHUNK_BYTES; a larger module makes a run of its own."""
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
    """(k, d, r) of factors that are alike, in their stored layout."""
    if len(factors) == 1:
        return factors[0].unsqueeze(0)
    if factors[0].stride(0) == 1:
        return torch.stack([factor.mT for factor in factors]).mT
    return torch.stack(factors)


def _dense(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where its elements do not fill one stretch of memory."""
    return tensor if tensor.is_contiguous() or tensor.mT.is_contiguous() else tensor.contiguous()


def _placed(memory: Tensor, offset: int, like: Tensor) -> Tensor:
    """A tensor of the shape, strides and dtype of another, at an offset in bytes."""
    size = like.numel() * like.itemsize
    flat = memory[offset : offset + size].view(like.dtype)
    return flat.as_strided(like.shape, like.stride(), flat.storage_offset())


def _shared_span(tensors: Sequence[Tensor]) -> Tensor | None:
    """The bytes from the first to the last of tensors that fill most of one storage's stretch."""
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
