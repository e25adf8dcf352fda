"""The file of a base model's input statistics: its format, and a strict reader.

One safetensors file. For each input site `<site>.V` and `<site>.U` (n, k), `<site>.F` (n, f) and
`<site>.mu` (k,); the key `s3lora_statistics` of its metadata holds the `About` as JSON.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from s3lora_serve.adapter.tensor_file import TensorFile, read_tensor_file
from s3lora_serve.errors import StatisticsInvalid
from s3lora_serve.policy.section import Digest, Fraction
from s3lora_serve.spectral import InputStatistics
from s3lora_serve.spectral.input_projection import MAX_OVERLAP_ERROR
from s3lora_serve.spectral.leading_subspace import skew

METADATA_KEY = "s3lora_statistics"

PARTS = ("V", "U", "F", "mu")
"""The tensors of a site, by the ends of their names."""

MAX_BYTES = 32 * 2**30
"""k = 512 in float32 for all sites of a 70B model takes 24 GB."""

_Count = Annotated[int, Field(ge=1)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ProbesRecord(_Record):
    """One file of probes whose inputs were measured."""

    kind: Literal["harmful", "benign"]
    digest: Digest
    count: _Count
    tokens: _Count
    weight: Annotated[float, Field(gt=0)] = 1.0  # among the files of benign probes


class SiteRecord(_Record):
    """What the file says of one input site beside its tensors."""

    # By the modules that share the input: E‖W·x‖², what they put out on harmful inputs.
    outputs: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]
    ridge: Annotated[float, Field(gt=0)]  # C_b ≈ F·Fᵀ + ridge·I
    beyond: Annotated[float, Field(ge=0)]  # as in `InputStatistics`
    harmful_captured: Annotated[float, Field(ge=0, le=1 + 1e-3)]  # of tr(C_h), by the pairs
    benign_captured: Fraction  # of tr(C_b), by F


class About(_Record):
    """What statistics were made of, and how."""

    version: Literal[1] = 1
    rank: _Count
    epsilon: Annotated[float, Field(gt=0)]
    base_digest: Digest
    config_digest: Digest | None  # of the base model's config.json, as served models have it
    probes: Annotated[tuple[ProbesRecord, ...], Field(min_length=2)]
    s3lora_serve: str
    sites: Annotated[dict[str, SiteRecord], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class StatisticsFile:
    """Statistics in memory."""

    digest: str
    about: About
    sites: Mapping[str, InputStatistics]
    by_module: Mapping[str, InputStatistics]


def read_statistics(path: Path, *, expected: str | None = None) -> StatisticsFile:
    """Read statistics whole into memory, then check them.

    Raises:
        StatisticsInvalid: the file cannot be read, holds no statistics, has impossible numbers, or
            has another digest than expected.
    """
    try:
        file = read_tensor_file(path, MAX_BYTES, expected)
        about = file.about(About, METADATA_KEY)
        file.check_names([f"{site}.{part}" for site in about.sites for part in PARTS])
        sites = {name: _site(file, name, record) for name, record in about.sites.items()}
        by_module = _by_module(about, sites)
    except ValueError as error:
        raise StatisticsInvalid(str(error)) from None
    return StatisticsFile(file.digest, about, sites, by_module)


@lru_cache(maxsize=1)
def loaded_statistics(path: Path, digest: str) -> StatisticsFile:
    """The statistics with this digest, read once in a process.

    Raises:
        StatisticsInvalid: as `read_statistics`.
    """
    return read_statistics(path, expected=digest)


def _by_module(about: About, sites: Mapping[str, InputStatistics]) -> dict[str, InputStatistics]:
    found: dict[str, InputStatistics] = {}
    for site, record in about.sites.items():
        for module in record.outputs:
            if module in found:
                raise ValueError(f"module {module[:120]} belongs to two sites")
            found[module] = sites[site]
    return found


def _site(file: TensorFile, name: str, record: SiteRecord) -> InputStatistics:
    """The statistics of one site.

    Raises:
        ValueError: shapes do not match, or no two covariances have these pairs.
    """
    V, U, F, mu = (file.tensors[f"{name}.{part}"] for part in PARTS)
    where = f"{file.path}: site {name[:120]}"
    if V.ndim != 2 or U.shape != V.shape or mu.shape != V.shape[1:] or not V.numel():
        shapes = tuple(V.shape), tuple(U.shape), tuple(mu.shape)
        raise ValueError(f"{where} has V, U and mu of the shapes {shapes}")
    if F.ndim != 2 or len(F) != len(V) or not F.numel():
        raise ValueError(f"{where} has F of the shape {tuple(F.shape)}, V {tuple(V.shape)}")
    mu = mu.double()
    if not all(each.isfinite().all() for each in (V, U, F, mu)):
        raise ValueError(f"{where} holds NaN or Inf")
    if not ((mu >= 0).all() and (mu.diff() <= 0).all()):
        raise ValueError(f"the eigenvalues of {where} are negative, or do not fall")
    overlap = V.double().mT @ U.double()
    error = skew(overlap)
    if not error <= MAX_OVERLAP_ERROR or not math.isfinite(error):
        raise ValueError(f"the pairs of {where} are not orthonormal: VᵀU is off 1 by {error:.1e}")
    return InputStatistics(V, U, mu, F, record.ridge, record.beyond, overlap)
