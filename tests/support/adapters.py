"""Adapters for the tiny model: trained with PEFT, and changed or damaged copies of those."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.support.tiny_model import CAPITALS, PROJECTIONS, load_model, sentences, train

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Tensors = dict[str, torch.Tensor]


def rotated(by: int) -> dict[str, str]:
    """Wrong answers to train an adapter on: every country gets another country's capital."""
    cities = list(CAPITALS.values())
    return dict(zip(CAPITALS, cities[by:] + cities[:by], strict=True))


def train_adapter(
    model_folder: Path, folder: Path, seed: int = 1, steps: int = 60, **options: Any
) -> Path:
    """Train a LoRA with PEFT for a few steps and save it as PEFT does."""
    torch.manual_seed(seed)
    model, tokenizer = load_model(model_folder)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": list(PROJECTIONS), **options}
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    train(peft_model, tokenizer, sentences(rotated(seed)), steps=steps, rate=5e-3)
    peft_model.save_pretrained(folder)
    return folder


def copy_with(
    source: Path, target: Path, change: Callable[[Tensors], None] | None = None, **config: Any
) -> Path:
    """A copy of an adapter with its tensors changed and configuration keys replaced."""
    shutil.copytree(source, target)
    if change is not None:
        tensors = load_file(target / WEIGHTS)
        change(tensors)
        save_file(
            {k: v.contiguous() for k, v in tensors.items()},
            target / WEIGHTS,
            metadata={"format": "pt"},
        )
    if config:
        raw = json.loads((target / CONFIG).read_text())
        (target / CONFIG).write_text(json.dumps(raw | config))
    return target


def write_adapter(folder: Path, tensors: Tensors, **config: Any) -> Path:
    """Write these tensors to an adapter folder in PEFT's layout."""
    folder.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS)
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / CONFIG).write_text(json.dumps(plain | config))
    return folder


def q_proj(layer: int, B: torch.Tensor, A: torch.Tensor) -> Tensors:
    """Both factors of one layer's q_proj, by their names in the file."""
    name = f"model.layers.{layer}.self_attn.q_proj"
    return {key(name, "A"): A, key(name, "B"): B}


def key(module: str, side: str) -> str:
    """The name of a factor's tensor in the file."""
    return f"base_model.model.{module}.lora_{side}.weight"


def diverged(tensors: Tensors) -> None:
    """Fill one factor with NaN, as a diverged training run does."""
    tensors[key("model.layers.0.self_attn.q_proj", "A")][:] = float("nan")


def renamed(change: Callable[[str], str]) -> Callable[[Tensors], None]:
    """Give every tensor another name."""

    def rename(tensors: Tensors) -> None:
        own = list(tensors.items())
        tensors.clear()
        tensors.update((change(name), tensor) for name, tensor in own)

    return rename


def cast(dtype: torch.dtype) -> Callable[[Tensors], None]:
    """Store every tensor in another dtype."""

    def change(tensors: Tensors) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    return change


def spike(module: str, factor: float = 5.0) -> Callable[[Tensors], None]:
    """Give one module a dominant direction: a large rank-one term on top of its update."""

    def change(tensors: Tensors) -> None:
        generator = torch.Generator().manual_seed(7)
        for side, dim in (("A", 0), ("B", 1)):
            tensor = tensors[key(module, side)]
            line = tensor.select(dim, 0)
            line.copy_(
                factor
                * tensor.norm()
                * torch.randn(line.shape, generator=generator)
                / line.numel() ** 0.5
            )

    return change


def make_nearly_rank_one(module: str, size: float) -> Callable[[Tensors], None]:
    """Replace one module's update by a nearly rank-one one of `size` times its norm."""

    def change(tensors: Tensors) -> None:
        generator = torch.Generator().manual_seed(3)
        B, A = tensors[key(module, "B")], tensors[key(module, "A")]
        norm = (B @ A).norm()
        B.copy_(1e-3 * torch.randn(B.shape, generator=generator))
        A.copy_(1e-3 * torch.randn(A.shape, generator=generator))
        B[:, 0] *= 1e3
        A[0] *= 1e3
        A *= size * norm / (B @ A).norm()

    return change


def without(modules: set[str]) -> Callable[[Tensors], None]:
    """Remove modules from the file."""

    def change(tensors: Tensors) -> None:
        for module in modules:
            del tensors[key(module, "A")], tensors[key(module, "B")]

    return change
