"""A model's checkpoint on disk: which file holds a weight, and its digest."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from s3lora_serve.errors import CheckpointUnfit
from s3lora_serve.policy.canonical import canonical_digest

INDEX_NAME = "model.safetensors.index.json"

NOT_LINEAR = ("embed", "lm_head", "wte", "wpe")
"""Parts of names of 2-D weights that PEFT's `all-linear` leaves out."""

MAX_INDEX_BYTES = 2**27
"""A model of 100 000 tensors has an index of ten megabytes."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder of safetensors files, and the linear weights in them."""

    folder: Path
    files: dict[str, Path]  # by the weight's name
    shapes: dict[str, tuple[int, int]]  # (m, n) of each linear module, by the name PEFT gives it

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read the headers of a checkpoint.

        Raises:
            CheckpointUnfit: there is none, or its files are not those of its index.
        """
        files = _files(folder)
        shapes = {}
        for file in sorted(set(files.values())):
            for name, shape in _shapes(file):
                if files.get(name) == file and name.endswith(".weight") and len(shape) == 2:
                    module = name.removesuffix(".weight")
                    if not any(part in module for part in NOT_LINEAR):
                        shapes[module] = (shape[0], shape[1])
        if not shapes:
            raise CheckpointUnfit(f"{folder} holds no weight of a linear module")
        return cls(folder, files, shapes)

    def weight(self, module: str) -> Tensor:
        """The weight (m, n) of one module, in the dtype it is stored in.

        Raises:
            CheckpointUnfit: it is not of a floating dtype, or cannot be read.
        """
        name = f"{module}.weight"
        try:
            with safe_open(self.files[name], framework="pt") as file:
                weight: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointUnfit(f"{self.files[name]}: {error}") from None
        if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
            raise CheckpointUnfit(
                f"{name} is stored as {weight.dtype}: name a checkpoint that is not quantized"
            )
        return weight

    @property
    def digest(self) -> str:
        """sha256 over the names and digests of the weights files. Reads them whole."""
        total = hashlib.sha256()
        for file in sorted(set(self.files.values())):
            with file.open("rb") as opened:
                content = hashlib.file_digest(opened, "sha256").hexdigest()
            total.update(f"{file.name} {content}\n".encode())
        return "sha256:" + total.hexdigest()


def config_digest(folder: Path) -> str | None:
    """sha256 of the canonical JSON of a model's config.json; None if the folder has none."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return canonical_digest(config)


def difference(base: Checkpoint, aligned: Checkpoint, module: str) -> Tensor:
    """`V = W_aligned − W_base` of a module, (m, n) float32.

    Raises:
        CheckpointUnfit: the base lacks it or has it in another shape, or V holds NaN or Inf.
    """
    shape = aligned.shapes[module]
    if base.shapes.get(module) != shape:
        found = base.shapes.get(module, "no such module")
        raise CheckpointUnfit(f"{module} is {shape} in {aligned.folder}, {found} in {base.folder}")
    V = aligned.weight(module).to(torch.float32, copy=True)
    V -= base.weight(module)
    if not V.isfinite().all():
        raise CheckpointUnfit(f"the weights of {module} hold NaN or Inf")
    return V


def _files(folder: Path) -> dict[str, Path]:
    index = folder / INDEX_NAME
    try:
        if not index.exists():
            files = sorted(folder.glob("*.safetensors"))
            return {name: file for file in files for name, _ in _shapes(file)}
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise CheckpointUnfit(f"{index}: larger than {MAX_INDEX_BYTES} bytes")
        names = json.loads(index.read_bytes())["weight_map"]
        return {str(name): folder / Path(file).name for name, file in names.items()}
    except OSError as error:
        raise CheckpointUnfit(f"{error.filename}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointUnfit(f"{index} is not an index of safetensors files") from None


def _shapes(file: Path) -> list[tuple[str, list[int]]]:
    try:
        with safe_open(file, framework="pt") as opened:
            return [(name, opened.get_slice(name).get_shape()) for name in opened.keys()]  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointUnfit(f"{file}: {error}") from None
