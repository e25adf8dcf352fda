"""The file of an alignment reference: its format, and a strict reader.

One safetensors file. For each module `<name>.U` (m, k) and `<name>.sigma` (k,); the key
`s3lora_reference` of its metadata holds the `ReferenceMetadata` as JSON.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from s3lora_serve.adapter.tensor_file import read_tensor_file
from s3lora_serve.errors import ReferenceInvalid
from s3lora_serve.spectral import Subspace
from s3lora_serve.spectral.leading_subspace import skew

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


class ReferenceMetadata(_Record):
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
    about: ReferenceMetadata
    subspaces: Mapping[str, Subspace]


def read_reference(path: Path, *, expected: str | None = None) -> Reference:
    """Read a reference whole into memory, then check it.

    Raises:
        ReferenceInvalid: it cannot be read, is not a reference, has impossible numbers, or has
            another digest than expected.
    """
    try:
        file = read_tensor_file(path, MAX_BYTES, expected)
        about = file.about(ReferenceMetadata, METADATA_KEY)
        file.check_names([f"{name}.{part}" for name in about.modules for part in ("U", "sigma")])
        if not about.modules:
            raise ValueError(f"{path} holds no module")
        subspaces = {
            name: _subspace(path, name, record, file.tensors, about.rank)
            for name, record in about.modules.items()
        }
    except ValueError as error:
        raise ReferenceInvalid(str(error)) from None
    return Reference(file.digest, about, subspaces)


@lru_cache(maxsize=2)
def loaded_reference(path: Path, digest: str) -> Reference:
    """The reference with this digest, read once in a process.

    Raises:
        ReferenceInvalid: as `read_reference`.
    """
    return read_reference(path, expected=digest)


def _subspace(
    path: Path, name: str, record: ModuleRecord, found: Mapping[str, Tensor], rank: int
) -> Subspace:
    """The subspace of one module.

    Raises:
        ValueError: shapes do not match, or no matrix V has these numbers.
    """
    U, sigma = found[f"{name}.U"], found[f"{name}.sigma"]
    m, n = record.shape
    k = min(rank, m, n) if record.frobenius else 0
    if U.shape != (m, k) or sigma.shape != (k,):
        raise ValueError(
            f"{path}: {name} has U {tuple(U.shape)} and sigma {tuple(sigma.shape)}; expected"
            f" {(m, k)} and {(k,)}"
        )
    values = sigma.double()
    if record.frobenius and not NORMS[0] <= record.frobenius <= NORMS[1]:
        raise ValueError(f"{path}: {name} has the norm {record.frobenius:g}, outside of {NORMS}")
    if not (U.isfinite().all() and values.isfinite().all()):
        raise ValueError(f"{path}: {name} holds NaN or Inf")
    if not ((values >= 0).all() and (values.diff() <= 0).all()):
        raise ValueError(f"{path}: the singular values of {name} are negative, or do not fall")
    gram = U.double().mT @ U.double()
    if (off := skew(gram)) > MAX_SKEW:
        raise ValueError(f"{path}: U of {name} is not orthonormal: UᵀU differs from 1 by {off:.1e}")
    if math.sqrt(float(values.square().sum())) > record.frobenius * (1 + MAX_SKEW):
        raise ValueError(f"{path}: {name} captures more energy than it has")
    return Subspace(U, values, record.frobenius, gram)
