"""The file of a base model's statistics: its format, and a strict reader.

One safetensors file. For each input site `<site>.V` and `<site>.U` (n, k), `<site>.F` (n, f) and
`<site>.mu` (k,), for each module `<module>.Q` (m, q), `<module>.gamma` (q,) and `<module>.shift`
(q, k); the key `s3lora_statistics` of its metadata holds the `StatisticsMetadata` as JSON.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from s3lora_serve.adapter.tensor_file import TensorFile, read_tensor_file, tensor_file
from s3lora_serve.errors import StatisticsInvalid
from s3lora_serve.policy.section import Digest, Fraction
from s3lora_serve.repair.shared_copy import shared_copy
from s3lora_serve.spectral import InputStatistics, OutputStatistics
from s3lora_serve.spectral.base_statistics import MAX_OVERLAP_ERROR
from s3lora_serve.spectral.leading_subspace import skew

METADATA_KEY = "s3lora_statistics"

PARTS = ("V", "U", "F", "mu")
"""The tensors of a site, by the ends of their names."""

OUTPUT_PARTS = ("Q", "gamma")
"""The tensors of a module, besides SHIFT."""

SHIFT = "shift"
"""The tensor of a module that suspicion is of; files from before it have none."""

MAX_BYTES = 32 * 2**30
"""k = 512 in float32 for all sites of a 70B model takes 24 GB."""

_shared_in: Path | None = None  # where a server's processes share a copy

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


class OutputRecord(_Record):
    """What the file says of one module's outputs beside its tensors."""

    gamma_rest: Annotated[float, Field(ge=0)]  # as in `OutputStatistics`
    captured: Fraction  # of tr(G), by the leading directions
    energy: Annotated[float, Field(gt=0)]  # mean ‖y‖² of the module's own outputs, harmful inputs


class SiteRecord(_Record):
    """What the file says of one input site beside its tensors."""

    # The modules that share the input.
    outputs: Annotated[dict[str, OutputRecord], Field(min_length=1)]
    ridge: Annotated[float, Field(ge=0)]  # as in `InputStatistics`
    mu_rest: Annotated[float, Field(ge=0)]
    beyond: Annotated[float, Field(ge=0)]
    harmful_captured: Annotated[float, Field(ge=0, le=1 + 1e-3)]  # of tr(C_h), by U
    benign_captured: Fraction  # of tr(C_b), by U and F


class StatisticsMetadata(_Record):
    """What statistics were made of, and how."""

    version: Literal[1] = 1
    rank: _Count  # directions of each input
    output_rank: _Count  # directions of each output
    epsilon: Annotated[float, Field(gt=0)]
    base_digest: Digest
    config_digest: Digest | None  # of the base model's config.json, as served models have it
    probes: Annotated[tuple[ProbesRecord, ...], Field(min_length=2)]
    s3lora_serve: str
    shifts: bool = False  # whether each module has a tensor SHIFT
    sites: Annotated[dict[str, SiteRecord], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class StatisticsFile:
    """Statistics in memory."""

    digest: str
    about: StatisticsMetadata
    sites: Mapping[str, InputStatistics]
    by_module: Mapping[str, InputStatistics]
    outputs: Mapping[str, OutputStatistics]

    @property
    def energy(self) -> float:
        """Σ E‖y‖² of what all modules put out on harmful inputs: effects are measured by it."""
        return sum(out.energy for s in self.about.sites.values() for out in s.outputs.values())


def read_statistics(
    path: Path, *, expected: str | None = None, shared_in: Path | None = None
) -> StatisticsFile:
    """Read statistics whole into memory, then check them.

    With a digest and a folder they are mapped from a copy there, if there can be one.

    Raises:
        StatisticsInvalid: the file cannot be read, holds no statistics, has impossible numbers, or
            has another digest than expected.
    """
    try:
        file = _shared(path, expected, shared_in) or read_tensor_file(path, MAX_BYTES, expected)
        about = file.about(StatisticsMetadata, METADATA_KEY)
        records = [each for site in about.sites.values() for each in site.outputs.items()]
        names = [f"{site}.{part}" for site in about.sites for part in PARTS]
        parts = (*OUTPUT_PARTS, SHIFT) if about.shifts else OUTPUT_PARTS
        file.check_names(names + [f"{name}.{part}" for name, _ in records for part in parts])
        sites = {name: _site(file, name, record) for name, record in about.sites.items()}
        by_module = _by_module(about, sites)
        outputs = {
            name: _outputs(file, name, record, by_module[name] if about.shifts else None)
            for name, record in records
        }
    except ValueError as error:
        raise StatisticsInvalid(str(error)) from None
    return StatisticsFile(file.digest, about, sites, by_module, outputs)


def _shared(path: Path, digest: str | None, folder: Path | None) -> TensorFile | None:
    data = shared_copy(path, digest, MAX_BYTES, folder) if digest and folder else None
    return tensor_file(path, digest or "", memoryview(data)) if data else None


@lru_cache(maxsize=1)
def loaded_statistics(path: Path, digest: str) -> StatisticsFile:
    """The statistics with this digest, read once in a process.

    Raises:
        StatisticsInvalid: as `read_statistics`.
    """
    return read_statistics(path, expected=digest, shared_in=_shared_in)


def share_in(folder: Path) -> None:
    """Have `loaded_statistics` map a copy in this folder, which a server's processes share."""
    global _shared_in
    _shared_in = folder


def _by_module(
    about: StatisticsMetadata, sites: Mapping[str, InputStatistics]
) -> dict[str, InputStatistics]:
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
    mu = _eigenvalues(where, mu, V, U, F)
    inverse = _inverse(where, V, U)
    return InputStatistics(
        V=V,
        U=U,
        mu=mu,
        F=F,
        ridge=record.ridge,
        mu_rest=record.mu_rest,
        beyond=record.beyond,
        inverse=inverse,
    )


def _outputs(
    file: TensorFile, name: str, record: OutputRecord, inputs: InputStatistics | None
) -> OutputStatistics:
    """The statistics of one module's outputs; `inputs` is there if the file has shifts.

    Raises:
        ValueError: shapes do not match, or no covariance has these directions.
    """
    Q, gamma = (file.tensors[f"{name}.{part}"] for part in OUTPUT_PARTS)
    where = f"{file.path}: module {name[:120]}"
    if Q.ndim != 2 or gamma.shape != Q.shape[1:] or not Q.numel():
        shapes = tuple(Q.shape), tuple(gamma.shape)
        raise ValueError(f"{where} has Q and gamma of the shapes {shapes}")
    gamma = _eigenvalues(where, gamma, Q)
    shift = None
    if inputs is not None:
        shift = file.tensors[f"{name}.{SHIFT}"].double()
        if shift.shape != (Q.shape[1], inputs.V.shape[1]) or not shift.isfinite().all():
            raise ValueError(
                f"{where} has a shift of the shape {tuple(shift.shape)}, or NaN or Inf"
            )
    return OutputStatistics(Q, gamma, record.gamma_rest, _inverse(where, Q, Q), shift)


def _eigenvalues(where: str, values: Tensor, *directions: Tensor) -> Tensor:
    """Eigenvalues in float64.

    Raises:
        ValueError: they or their directions are not finite, or they are negative or rise.
    """
    values = values.double()
    if not all(each.isfinite().all() for each in (values, *directions)):
        raise ValueError(f"{where} holds NaN or Inf")
    if not ((values >= 0).all() and (values.diff() <= 0).all()):
        raise ValueError(f"the eigenvalues of {where} are negative, or do not fall")
    return values


def _inverse(where: str, V: Tensor, U: Tensor) -> Tensor:
    """(VᵀU)⁻¹, (k, k) float64.

    Raises:
        ValueError: VᵀU is not I up to MAX_OVERLAP_ERROR.
    """
    overlap = V.double().mT @ U.double()
    error = skew(overlap)
    if not error <= MAX_OVERLAP_ERROR or not math.isfinite(error):
        raise ValueError(f"the directions of {where} are not orthonormal: off by {error:.1e}")
    inverse: Tensor = torch.linalg.inv(overlap)
    return inverse
