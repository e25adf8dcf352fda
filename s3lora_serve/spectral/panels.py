"""Passes over one side of many modules, in batches that fit the cache.

Weights are read as stored and converted batch by batch, into memory that is used again: no
converted copy of an adapter is ever whole in memory, and no pass touches fresh pages.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from s3lora_serve.spectral.torch_ops import gram, normalised_gram

BATCH_BYTES = 2**23
"""What is converted at a time: it stays in the last-level cache together with the scratch memory of
a pass, and is enough to hide the cost of calling torch. Of 1 to 32 MB tried on a cache of 32 MB, 8
and 16 were best."""

LONGEST_SUM = 4096
"""Rows whose products are summed in the working dtype; sums of those sums are float64."""


class Side:
    """One side of k modules of one rank: their B (m, r), or their Aᵀ (n, r)."""

    def __init__(
        self,
        factors: Sequence[Tensor],
        dtype: torch.dtype,
        between_batches: Callable[[], None] = lambda: None,
        device: str = "cpu",
    ) -> None:
        """Take factors (d, r) of any shape, stride and dtype; sums are taken in `dtype`."""
        self.factors = factors
        self.dtype = dtype
        self._between_batches = between_batches
        self._elements = max(1, BATCH_BYTES // dtype.itemsize)
        self._batches = list(_batches(factors, self._elements))
        most = max((self._size(batch) for batch in self._batches), default=0)
        self._memory = torch.empty(most, dtype=dtype, device=device)
        self._scratch = torch.empty(most, dtype=dtype, device=device)

    def gram(self) -> Tensor:
        """`Xᵀ·X` of every factor. Shape: (k, r, r) float64."""
        total = self._zeros(self._rank, self._rank)
        for batch, chunk in self._chunks():
            total[batch] += gram(chunk).cpu()
        return total

    def normalised_gram(self, half: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`Σ_i x_i·x_iᵀ/ρ_i²`, the mean of `ρ_i = ‖x_iᵀ·half‖₂`, and how many rows were lost.

        Modules that are not `chosen` are passed over and come back as zeros.

        Shape: half (k, r, r) of the working dtype, chosen (k,) bool -> (k, r, r), (k,), (k,)
        float64.
        """
        total, sums, lost = self._zeros(self._rank, self._rank), self._zeros(), self._zeros()
        for batch, chunk in self._chunks(chosen):
            own_half = half[batch].to(chunk.device)
            parts = normalised_gram(chunk, own_half, self._scratch[: chunk.numel()])
            for whole, part in zip((total, sums, lost), parts, strict=True):
                whole[batch] += part.cpu()
        rows = torch.tensor([max(1, factor.shape[0]) for factor in self.factors])
        return total, sums / rows, lost

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
        """Indices of a batch, and some of its rows (k, d, r) in the working dtype."""
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
        # The stored layout is kept: A comes as a transposed view, r rows of length n.
        if members[0].stride(0) == 1:
            chunk = memory.view(k, r, count).mT
        else:
            chunk = memory.view(k, count, r)
        for target, member in zip(chunk.unbind(), members, strict=True):
            target.copy_(member[start : start + count])
        return chunk


def _batches(factors: Sequence[Tensor], elements: int) -> Iterator[Tensor]:
    """Indices of factors alike in shape, dtype and layout, `elements` numbers at a time."""
    alike: dict[object, list[int]] = {}
    for i, factor in enumerate(factors):
        alike.setdefault((factor.shape, factor.dtype, factor.stride(0) == 1), []).append(i)
    for indices in alike.values():
        size = max(1, elements // max(1, factors[indices[0]].numel()))
        for at in range(0, len(indices), size):
            yield torch.tensor(indices[at : at + size])
