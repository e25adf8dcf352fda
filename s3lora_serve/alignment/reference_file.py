"""The file of an alignment reference: its format, and a strict reader.

One safetensors file. For each module `<name>.U` (m, k) and `<name>.sigma` (k,); the key
`s3lora_reference` of its metadata holds the `About` as JSON.
"""

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from s3lora_serve.adapter.operator_file import OPEN_FLAGS, contents, foreign_writer
from s3lora_serve.adapter.safetensors_format import read_header, tensors
from s3lora_serve.errors import ReferenceInvalid, WeightsUnreadable
from s3lora_serve.spectral import Subspace

METADATA_KEY = "s3lora_reference"

MAX_BYTES = 32 * 2**30
"""k = 512 in float32 for all modules of a 70B model takes 23 GB."""

NORMS = (1e-30, 1e30)
"""Norms of V whose squares float32 weights can have, and float64 can hold with room to spare."""

MAX_SKEW = 1e-3
"""Largest entry of |UᵀU − 1|. Rounding to bfloat16 makes half of it at m = 512, less above."""

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModuleRecord(_Record):
    """What the reference says of one module beside its two tensors."""

    shape: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]  # (m, n) of V
    frobenius: Annotated[float, Field(ge=0)]  # ‖V‖_F


class About(_Record):
    """What a reference was made of, and how."""

    version: Literal[1] = 1
    rank: Annotated[int, Field(ge=1)]
    base_digest: Digest
    aligned_digest: Digest
    config_digest: Digest | None  # of the aligned model's config.json, as served models have it
    exact: bool
    s3lora_serve: str
    modules: dict[str, ModuleRecord]


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference in memory. `subspaces` has one for each module of `about.modules`."""

    digest: str
    about: About
    subspaces: Mapping[str, Subspace]


def read_reference(path: Path, *, expected: str | None = None) -> Reference:
    """Read a reference whole into memory, then check it.

    Raises:
        ReferenceInvalid: it cannot be read, is not a reference, has impossible numbers, or has
            another digest than expected.
    """
    data = _contents(path)
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    if expected not in (None, digest):
        raise ReferenceInvalid(f"{path} is {digest}; {expected} was expected")
    try:
        view = memoryview(data)
        header = read_header(view)
        about = About.model_validate_json(header.metadata.get(METADATA_KEY, ""))
        found = dict(tensors(header, view))
    except WeightsUnreadable as error:
        raise ReferenceInvalid(f"{path}: {error.problem}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or METADATA_KEY
        raise ReferenceInvalid(f"{path}: metadata {where[:120]}: {first['msg']}") from None
    names = {f"{name}.{part}" for name in about.modules for part in ("U", "sigma")}
    if odd := names ^ found.keys():
        problem = "lacks" if min(odd) in names else "has the surplus tensor"
        raise ReferenceInvalid(f"{path} {problem} {min(odd)[:120]}")
    if not about.modules:
        raise ReferenceInvalid(f"{path} holds no module")
    try:
        subspaces = {
            name: _subspace(name, record, found[f"{name}.U"], found[f"{name}.sigma"], about.rank)
            for name, record in about.modules.items()
        }
    except ValueError as error:
        raise ReferenceInvalid(f"{path}: {error}") from None
    return Reference(digest, about, subspaces)


@lru_cache(maxsize=2)
def loaded_reference(path: Path, digest: str) -> Reference:
    """The reference with this digest, read once in a process.

    Raises:
        ReferenceInvalid: as `read_reference`.
    """
    return read_reference(path, expected=digest)


def check_owner(path: Path) -> None:
    """Check that nobody but this user and root can write the file.

    Raises:
        ReferenceInvalid: others can, or it cannot be read.
    """
    try:
        problem = foreign_writer(path.stat(), path)
    except OSError as error:
        raise ReferenceInvalid(f"{path}: {error.strerror or error}") from None
    if problem:
        raise ReferenceInvalid(problem)


def _contents(path: Path) -> bytearray:
    try:
        return contents(os.open(path, OPEN_FLAGS), path, MAX_BYTES, owned=False)
    except ValueError as error:
        raise ReferenceInvalid(str(error)) from None
    except OSError as error:
        raise ReferenceInvalid(f"{path}: {error.strerror or error}") from None


def skew(gram: Tensor) -> float:
    """Largest entry of |UᵀU − 1|, from UᵀU."""
    return float((gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max()) if len(gram) else 0.0


def _subspace(name: str, record: ModuleRecord, U: Tensor, sigma: Tensor, rank: int) -> Subspace:
    """The subspace of one module.

    Raises:
        ValueError: shapes do not match, or no matrix V has these numbers.
    """
    m, n = record.shape
    k = min(rank, m, n) if record.frobenius else 0
    if U.shape != (m, k) or sigma.shape != (k,):
        raise ValueError(
            f"{name} has U {tuple(U.shape)} and sigma {tuple(sigma.shape)}; expected {(m, k)} and"
            f" {(k,)}"
        )
    values = sigma.double()
    if record.frobenius and not NORMS[0] <= record.frobenius <= NORMS[1]:
        raise ValueError(f"{name} has the norm {record.frobenius:g}, outside of {NORMS}")
    if not (U.isfinite().all() and values.isfinite().all()):
        raise ValueError(f"{name} holds NaN or Inf")
    if not ((values >= 0).all() and (values.diff() <= 0).all()):
        raise ValueError(f"the singular values of {name} are negative, or do not fall")
    gram = U.double().mT @ U.double()
    if (off := skew(gram)) > MAX_SKEW:
        raise ValueError(f"U of {name} is not orthonormal: UᵀU differs from 1 by {off:.1e}")
    if math.sqrt(float(values.square().sum())) > record.frobenius * (1 + MAX_SKEW):
        raise ValueError(f"{name} captures more energy than it has")
    return Subspace(U, values, record.frobenius, gram)
