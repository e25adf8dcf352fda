"""Alignment references of models whose unaligned twin is made by a known change."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from s3lora_serve.lab.make_reference import ReferenceOptions, make_reference
from tests.support.adapters import Tensors, q_proj, write_adapter

CHECKPOINT = "model.safetensors"


def write_checkpoint(folder: Path, tensors: Tensors) -> Path:
    """A checkpoint of one file, with a config."""
    folder.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / CHECKPOINT)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def linear(m: int, n: int, layers: int = 3, seed: int = 0, dtype=torch.float32) -> Tensors:
    """q_proj weights of a few layers, and an embedding that no reference holds."""
    draw = torch.Generator().manual_seed(seed)
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(layers)]
    weights = {name: torch.randn(m, n, generator=draw).to(dtype) for name in names}
    return weights | {"model.embed_tokens.weight": torch.ones(5, n, dtype=dtype)}


def realigned(tensors: Tensors, *, seed: int = 7, size: float = 0.1, decay: float = 0.7) -> Tensors:
    """The weights as an alignment with a falling spectrum would have left them."""
    draw = torch.Generator().manual_seed(seed)
    changed = {}
    for name, weight in tensors.items():
        if weight.ndim == 2 and "embed" not in name and "lm_head" not in name:
            m, n = weight.shape
            k = min(m, n)
            left = torch.linalg.qr(torch.randn(m, k, generator=draw)).Q
            right = torch.linalg.qr(torch.randn(n, k, generator=draw)).Q
            change = left * (size * decay ** torch.arange(k)) @ right.T
            changed[name] = (weight.float() + change).to(weight.dtype)
    return {**tensors, **changed}


def reference_of(base: Path, aligned: Path, file: Path, **options) -> Path:
    """A reference in float32, of as many directions as asked for."""
    make_reference(base, aligned, file, ReferenceOptions(**{"dtype": "float32", **options}))
    return file


def small_reference(folder: Path, m: int = 24, n: int = 16, layers: int = 3, **options) -> Path:
    """A reference for `plans.small_adapter`."""
    plain = linear(m, n, layers)
    base = write_checkpoint(folder / "base", plain)
    aligned = write_checkpoint(folder / "aligned", realigned(plain, size=3.0))
    return reference_of(base, aligned, folder / "reference.safetensors", **{"rank": 8, **options})


def reference_for_model(model: Path, folder: Path, **options) -> Path:
    """A reference for a real model, whose base is the model less a made-up alignment."""
    base = folder / "unaligned"
    shutil.copytree(model, base)
    save_file(realigned(load_file(model / CHECKPOINT), size=1.0), base / CHECKPOINT)
    return reference_of(base, model, folder / "reference.safetensors", **options)


def wide_adapter(folder: Path, count: int = 12, m: int = 24, n: int = 16) -> Path:
    """An adapter of as many q_proj modules as asked for, r = 4."""
    draw = torch.Generator().manual_seed(3)
    tensors: Tensors = {}
    for layer in range(count):
        B, A = torch.randn(m, 4, generator=draw), torch.randn(4, n, generator=draw)
        tensors |= q_proj(layer, B, A)
    return write_adapter(folder, tensors)
