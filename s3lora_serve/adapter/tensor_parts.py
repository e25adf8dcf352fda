"""Make an operator's safetensors file from parts, so that an interrupted run can go on."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from s3lora_serve.adapter.safetensors_format import DTYPES, Entry, write_header

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def begin_parts(target: Path, settings: str, *, resume: bool) -> Path:
    """The folder of the parts beside a target: empty, or an interrupted run's of equal settings."""
    parts = target.with_name(f".{target.name}.parts")
    note = parts / "settings.json"
    if not (resume and note.exists() and note.read_text() == settings):
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir()
        note.write_text(settings)
    return parts


def assemble(
    parts: Path,
    target: Path,
    tensors: Callable[[], Iterator[tuple[str, Tensor]]],
    metadata: Mapping[str, str],
) -> None:
    """Write the target, whole or not at all, and remove the folder of its parts.

    `tensors()` is called twice: for the header, and for the data.
    """
    staging = parts / "whole"
    entries, at = [], 0
    for name, tensor in tensors():
        size = tensor.numel() * tensor.element_size()
        entry = Entry(name, _NAMES[tensor.dtype], tuple(tensor.shape), at, at + size)
        entries.append((entry, at))
        at += size
    with staging.open("wb") as file:
        file.write(write_header(iter(entries), metadata))
        for _, tensor in tensors():
            if tensor.numel():
                file.write(tensor.contiguous().view(torch.uint8).numpy().data)
    staging.chmod(0o644)
    staging.rename(target)
    shutil.rmtree(parts)
