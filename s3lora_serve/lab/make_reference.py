"""Make an alignment reference of two checkpoints, one module at a time."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from s3lora_serve.adapter.tensor_parts import assemble, begin_parts
from s3lora_serve.alignment.checkpoint import Checkpoint, config_digest, difference
from s3lora_serve.alignment.reference_file import METADATA_KEY, ModuleRecord, ReferenceMetadata
from s3lora_serve.errors import CheckpointUnfit
from s3lora_serve.policy.globs import selects
from s3lora_serve.spectral.leading_subspace import leading_subspace, skew

BFLOAT16_SKEW = 9e-4
"""Entry of |UᵀU − 1| from which U stays in float32: a reader allows a tenth more."""


@dataclass(frozen=True, slots=True)
class ReferenceOptions:
    """How a reference is made."""

    rank: int = 128  # captures what alignment changed in models of 135M: docs/alignment.md
    modules: tuple[str, ...] = ("*",)  # globs for names or projections
    exact: bool = False
    dtype: str = "bfloat16"
    device: str = "cpu"


Progress = Callable[[str, int, int], None]
"""A phase's name, steps done, and all steps."""


def make_reference(
    base: Path,
    aligned: Path,
    target: Path,
    options: ReferenceOptions,
    *,
    resume: bool = False,
    progress: Progress = lambda *_: None,
) -> ReferenceMetadata:
    """Write the reference of `aligned` against `base`, whole or not at all.

    Each module's factors are kept in a folder beside the target until all are made; `resume` goes
    on with those.

    Raises:
        CheckpointUnfit: the checkpoints have no common modules, differ in shape, or are equal.
        FileExistsError: the target exists.
        OSError: it cannot be written.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists; name a file that does not")
    both = first, second = Checkpoint.open(base), Checkpoint.open(aligned)
    names = [name for name in second.shapes if selects(options.modules, name)]
    if not names:
        raise CheckpointUnfit(f"{list(options.modules)} match no linear module of {aligned}")
    digests = []
    for done, checkpoint in enumerate(both):
        progress("digests", done, len(both))
        digests.append(checkpoint.digest)
    progress("digests", len(both), len(both))
    parts = begin_parts(target, json.dumps([digests, asdict(options)]), resume=resume)
    records = {}
    for place, name in enumerate(names):
        part = parts / f"{place}.safetensors"
        records[name] = _kept(part) or _make(first, second, name, part, options)
        progress("modules", place + 1, len(names))
    if not any(record.frobenius for record in records.values()):
        raise CheckpointUnfit(
            f"{base} and {aligned} are equal in all {len(names)} modules: alignment changed nothing"
        )
    about = _about(digests, aligned, options, records)
    metadata = {METADATA_KEY: about.model_dump_json()}
    assemble(parts, target, lambda: _tensors(about, parts), metadata)
    return about


def _about(
    digests: list[str], aligned: Path, options: ReferenceOptions, records: dict[str, ModuleRecord]
) -> ReferenceMetadata:
    return ReferenceMetadata(
        rank=options.rank,
        base_digest=digests[0],
        aligned_digest=digests[1],
        config_digest=config_digest(aligned),
        exact=options.exact,
        s3lora_serve=version("s3lora-serve"),
        modules=records,
    )


def _kept(part: Path) -> ModuleRecord | None:
    try:
        shape = load_file(part)["shape"].tolist()
        return ModuleRecord(shape=(int(shape[0]), int(shape[1])), frobenius=shape[2])
    except (OSError, SafetensorError, KeyError):
        return None


def _make(
    base: Checkpoint, aligned: Checkpoint, name: str, part: Path, options: ReferenceOptions
) -> ModuleRecord:
    V = difference(base, aligned, name)
    m, n = V.shape
    rows = (V[at : at + 256].double() for at in range(0, m, 256))  # float64, without a copy of V
    record = ModuleRecord(shape=(m, n), frobenius=sum(float((r * r).sum()) for r in rows) ** 0.5)
    if record.frobenius:
        U, values = leading_subspace(V.to(options.device), options.rank, exact=options.exact)
        factors = {"U": _rounded(U.cpu(), options.dtype), "sigma": values.cpu()}
    else:
        factors = {"U": V.new_zeros(m, 0), "sigma": V.new_zeros(0)}
    shape = torch.tensor([m, n, record.frobenius], dtype=torch.float64)
    partial = part.with_suffix(".partial")
    save_file(factors | {"shape": shape}, partial)
    partial.rename(part)
    return record


def _rounded(U: Tensor, dtype: str) -> Tensor:
    """U in the dtype, or in float32 where rounding would cost too much of its orthonormality."""
    rounded = U.to(getattr(torch, dtype))
    return rounded if skew(rounded.double().mT @ rounded.double()) <= BFLOAT16_SKEW else U


def _tensors(about: ReferenceMetadata, parts: Path) -> Iterator[tuple[str, Tensor]]:
    for place, name in enumerate(about.modules):
        factors = load_file(parts / f"{place}.safetensors")
        yield f"{name}.U", factors["U"]
        yield f"{name}.sigma", factors["sigma"]
