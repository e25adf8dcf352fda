"""Passes over one side of many modules, on the host, in batches that fit the cache.

Weights are read as stored and converted batch by batch into reused memory. Memory never holds a
converted copy of a whole adapter, and passes do not touch fresh pages.
"""

import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from s3lora_serve.spectral.torch_ops import gram, normalised_gram

BATCH_BYTES = 2**23
"""Bytes converted at a time. A batch and the scratch memory of a pass fit the last-level cache
together, and a batch is large enough to hide the overhead of torch calls. Measured with 1 to 32 MB
on a cache of 32 MB: 8 and 16 MB are best."""

LONGEST_SUM = 4096
"""Largest number of rows summed in the working dtype; these partial sums are added in float64."""

FLOAT32_RANK = 16
"""Smallest rank for which float32 is tried. Below it, BLAS libraries sum row after row, and the
error of a long sum reaches 2e-6 (measured, MKL, 4096 rows, r = 8; 3e-7 at r = 16)."""

FactorPair = tuple[Tensor, Tensor]  # B (m, r), A (r, n), as stored


class HostModules:
    """Modules of one rank whose factors are in host memory."""

    def __init__(
        self, modules: Sequence[FactorPair], between_batches: Callable[[], None] = lambda: None
    ) -> None:
        self._modules = modules
        self._between_batches = between_batches

    @property
    def arithmetics(self) -> tuple[torch.dtype, ...]:
        """Working dtypes to try, the fastest first."""
        if self._modules[0][0].shape[1] < FLOAT32_RANK or not float32_is_whole():
            return (torch.float64,)
        return (torch.float32, torch.float64)

    def sides(self, chosen: Sequence[int], dtype: torch.dtype) -> "tuple[PanelSide, PanelSide]":
        """The B and the Aᵀ of the chosen modules, for passes in `dtype`."""
        rows = [self._modules[i][0] for i in chosen]
        columns = [self._modules[i][1].mT for i in chosen]
        return (
            PanelSide(rows, dtype, self._between_batches),
            PanelSide(columns, dtype, self._between_batches),
        )


def float32_is_whole() -> bool:
    """False if a torch setting of the process lets float32 products round to bf16 or tf32."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    precision = getattr(matmul, "fp32_precision", None)
    if precision is None:  # torch before 2.9
        return torch.get_float32_matmul_precision() == "highest"
    return precision in ("none", "ieee")


class PanelSide:
    """A `gram.Side` that converts panels of rows to the working dtype."""

    def __init__(
        self,
        factors: Sequence[Tensor],
        dtype: torch.dtype,
        between_batches: Callable[[], None] = lambda: None,
    ) -> None:
        """Accept factors (d, r) of any shapes, strides and dtypes; `dtype` is the working dtype."""
        self.factors = factors
        self.dtype = dtype
        self._between_batches = between_batches
        self._elements = max(1, BATCH_BYTES // dtype.itemsize)
        self._batches = list(_batches(factors, self._elements))
        most = max((self._size(batch) for batch in self._batches), default=0)
        # Both sides of a module share this memory, because their passes alternate.
        self._memory = _scratch.memory("panel", most, dtype)
        self._scratch = _scratch.memory("scratch", most, dtype)

    def gram(self) -> Tensor:
        """See `gram.Side.gram`."""
        total = self._zeros(self._rank, self._rank)
        for batch, chunk in self._chunks():
            total[batch] += gram(chunk, self.dtype)
        return total

    def normalised_gram(self, lower: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `gram.Side.normalised_gram`; modules that are not `chosen` get zeros."""
        total, sums, lost = self._zeros(self._rank, self._rank), self._zeros(), self._zeros()
        for batch, chunk in self._chunks(chosen):
            parts = normalised_gram(chunk, lower[batch], self._scratch[: chunk.numel()])
            for whole, part in zip((total, sums, lost), parts, strict=True):
                whole[batch] += part
        return total, sums / row_counts(self.factors), lost

    @property
    def _rank(self) -> int:
        return self.factors[0].shape[1]

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(len(self.factors), *shape, dtype=torch.float64)

    def _size(self, batch: Tensor) -> int:
        rows, rank = self.factors[int(batch[0])].shape
        return len(batch) * min(rows, self._step(rank, len(batch))) * rank

    def _step(self, rank: int, count: int) -> int:
        return min(LONGEST_SUM, max(256, self._elements // max(1, rank * count)))

    def _chunks(self, chosen: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Module indices of a batch, and a panel of its rows (k, d, r) in the working dtype."""
        for whole in self._batches:
            batch = whole if chosen is None else whole[chosen[whole]]
            if not len(batch):
                continue
            self._between_batches()
            members = [self.factors[i] for i in batch.tolist()]
            rows, rank = members[0].shape
            step = self._step(rank, len(members))
            for start in range(0, rows, step):
                yield batch, self._converted(members, start, min(step, rows - start))

    def _converted(self, members: Sequence[Tensor], start: int, count: int) -> Tensor:
        k, r = len(members), self._rank
        memory = self._memory[: k * count * r]
        # Keep the stored layout: Aᵀ is a transposed view of r rows of length n.
        if members[0].stride(0) == 1:
            chunk = memory.view(k, r, count).mT
        else:
            chunk = memory.view(k, count, r)
        whole = count == members[0].shape[0]
        for target, member in zip(chunk.unbind(), members, strict=True):
            target.copy_(member if whole else member[start : start + count])
        return chunk


class _ScratchMemory(threading.local):
    """Memory that passes write to, reused within each thread. Without reuse, the first touch of
    fresh pages takes a third of the time to score an adapter."""

    def __init__(self) -> None:
        self._pages: dict[str, Tensor] = {}

    def memory(self, use: str, count: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised memory for `count` numbers, valid until the next call with this `use`."""
        size = count * dtype.itemsize
        pages = self._pages.get(use)
        if pages is None or len(pages) < size:
            pages = torch.empty(size, dtype=torch.uint8)
            if size <= 2 * BATCH_BYTES:
                self._pages[use] = pages
        return pages[:size].view(dtype)


_scratch = _ScratchMemory()


def row_counts(factors: Sequence[Tensor]) -> Tensor:
    """Number of rows of each factor, at least 1: the divisor for means. Shape: (k,) float64."""
    counts = [max(1, factor.shape[0]) for factor in factors]
    return torch.tensor(counts, dtype=torch.float64)


def alike(factors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the factors, grouped by shape, dtype and layout."""
    groups: dict[object, list[int]] = {}
    for i, factor in enumerate(factors):
        groups.setdefault((factor.shape, factor.dtype, factor.stride(0) == 1), []).append(i)
    return list(groups.values())


def _batches(factors: Sequence[Tensor], elements: int) -> Iterator[Tensor]:
    """Indices of factors of one group of `alike`, in batches of at most `elements` numbers.

    A larger factor is a batch by itself.
    """
    for indices in alike(factors):
        size = max(1, elements // max(1, factors[indices[0]].numel()))
        for at in range(0, len(indices), size):
            yield torch.tensor(indices[at : at + size])
