"""The weights file of an adapter with factors replaced; header, layout and other bytes stay."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from s3lora_serve.adapter.private_copy import CONFIG_NAME, OWN_FOLDER, WEIGHTS_NAME
from s3lora_serve.adapter.reader import MAX_CANCELLATION, Adapter, Module, as_served
from s3lora_serve.adapter.safetensors_format import Entry
from s3lora_serve.errors import StoredInEightBits


class NewFactor(NamedTuple):
    """A module's new lora_A or lora_B, with the norms of its update without scaling."""

    module: Module
    side: Literal["A", "B"]
    tensor: Tensor  # in the dtype that the module's own is stored in
    before: float  # ‖B·A‖_F
    after: float

    @property
    def key(self) -> str:
        """The name of the tensor in the file."""
        return self.module.keys["AB".index(self.side)]


@dataclass(frozen=True, slots=True)
class ChangedWeights:
    """The weights file of an adapter with some of its tensors replaced."""

    own: memoryview
    replaced: dict[str, tuple[int, memoryview]]  # by tensor name: offset in the file, new bytes

    @classmethod
    def of(cls, adapter: Adapter, factors: Iterable[NewFactor]) -> "ChangedWeights":
        """The weights of an adapter with new factors in the place of its own.

        Raises:
            StoredInEightBits: a factor is stored in 8 bits, which cannot hold a new one.
        """
        by_key: dict[str, list[NewFactor]] = {}
        for new in factors:
            by_key.setdefault(new.key, []).append(new)
        entries = {entry.name: entry for entry in adapter.header.entries}
        replaced = {}
        for key, those in by_key.items():
            data = _new_bytes(entries[key], adapter.copy.weights, those)
            replaced[key] = entries[key].start, data
        return cls(adapter.copy.weights, replaced)

    def chunks(self) -> Iterator[memoryview]:
        """The whole file in parts, in their order."""
        position = 0
        for start, data in sorted(self.replaced.values(), key=itemgetter(0)):
            yield self.own[position:start]
            yield data
            position = start + len(data)
        yield self.own[position:]

    def digest(self) -> str:
        """sha256 of the file."""
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return "sha256:" + digest.hexdigest()

    def write_into(self, folder: Path) -> None:
        """Put the file in the place of a private copy's weights, whose own move to OWN_FOLDER.

        The private copy is not in the store yet: a process that is killed here leaves nothing that
        is ever served.

        Raises:
            OSError: it cannot be written.
        """
        own = folder / OWN_FOLDER
        own.mkdir(mode=0o700)
        (own / CONFIG_NAME).write_bytes((folder / CONFIG_NAME).read_bytes())
        (folder / WEIGHTS_NAME).rename(own / WEIGHTS_NAME)
        with (folder / WEIGHTS_NAME).open("xb") as file:
            for chunk in self.chunks():
                file.write(chunk)


def _new_bytes(entry: Entry, file: memoryview, new: list[NewFactor]) -> memoryview:
    """The bytes of a tensor with new factors in it; experts that have none keep their own."""
    own, (first, *_) = file[entry.start : entry.end], new
    if math.prod(entry.shape) * first.tensor.itemsize != len(own):
        raise StoredInEightBits(f"tensor {entry.name} is stored as {entry.dtype}")
    if first.module.expert is None:
        return first.tensor.contiguous().view(torch.uint8).numpy().reshape(-1).data
    data = bytearray(own)
    whole = torch.frombuffer(data, dtype=first.tensor.dtype).reshape(entry.shape)
    for each in new:
        each.module.part(each.side, whole).copy_(each.tensor)
    return memoryview(data)


def rounded_lora_b(module: Module, B: Tensor) -> NewFactor:
    """B' rounded to the dtype that B is stored in, checked.

    Shape: B (m, r) float64.

    Raises:
        ValueError: it holds NaN or Inf as served, or ‖B'‖_F·‖A‖_F exceeds the larger of both
            updates by more than MAX_CANCELLATION. The message names no cause: the caller does.
    """
    new = B.to(module.B.dtype).contiguous()
    if not as_served(new).isfinite().all():
        raise ValueError(f"makes the lora_B of {module.name} NaN or Inf")
    A = module.A.double()
    before, after = update_norm(module.B.double(), A), update_norm(new.double(), A)
    _check_cancellation(module, float(new.double().norm() * A.norm()), max(before, after))
    return NewFactor(module, "B", new, before, after)


class Grams(NamedTuple):
    """The Gram matrices of two factors, (r, r) float64."""

    b: Tensor  # BᵀB
    a: Tensor  # A·Aᵀ

    @property
    def update(self) -> float:
        """‖B·A‖_F."""
        return _norm(self.b, self.a)

    @property
    def size(self) -> float:
        """‖B‖_F·‖A‖_F."""
        square = float(self.b.trace() * self.a.trace())
        return math.sqrt(max(square, 0.0))


def new_pair(
    module: Module, B: Tensor, A: Tensor, own: Grams, new: Grams
) -> tuple[NewFactor, NewFactor]:
    """B' and A' in the dtypes that B and A are stored in, checked by Gram matrices.

    Raises:
        ValueError: as `rounded_lora_b`, of either factor.
    """
    for name, factor, gram in (("lora_B", B, new.b), ("lora_A", A, new.a)):
        wide = factor.dtype == torch.float64  # which may hold what no server does
        if not gram.isfinite().all() or (wide and not as_served(factor).isfinite().all()):
            raise ValueError(f"makes the {name} of {module.name} NaN or Inf")
    before, after = own.update, new.update
    _check_cancellation(module, new.size, max(before, after))
    return NewFactor(module, "B", B, before, after), NewFactor(module, "A", A, before, after)


def _check_cancellation(module: Module, factors: float, update: float) -> None:
    if not factors <= MAX_CANCELLATION * update:
        raise ValueError(
            f"makes factors of {factors:g} for {module.name} that cancel: its update is {update:g}"
        )


def update_norm(B: Tensor, A: Tensor) -> float:
    """‖B·A‖_F = √Σ (BᵀB ∘ AAᵀ), without forming B·A."""
    return _norm(B.T @ B, A @ A.T)


def _norm(gram_b: Tensor, gram_a: Tensor) -> float:
    square = float((gram_b * gram_a).sum())
    return max(square, 0.0) ** 0.5 if square == square else square
