"""Trains an adapter by PEFT on an aligned base, and keeps it in a folder."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s3lora_serve.lab.base_model.language_model import Encoded, LanguageModel
from tests.runs.evidence.training import DTYPE, train

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")

Around = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an adapter is trained."""

    seed: int  # of the first factors
    order: int  # seed of the order of examples
    targets: Sequence[str] = ALL
    rank: int = 16
    rate: float = 1e-3
    epochs: int = 2
    around: Callable[[Any], Around] | None = None  # of each step, from the wrapped model
    penalty: Callable[[Any], Callable[[], Tensor]] | None = None  # alike
    afterwards: Callable[[Path], None] | None = None  # changes the written folder


def trained_adapter(
    folder: Path,
    base: Path,
    recipe: Recipe,
    examples: Callable[[LanguageModel], list[tuple[Encoded, Encoded]]],
    progress: Callable[[int, int], None],
) -> Path:
    """Train an adapter and write it to the folder; one that is there is kept."""
    if (folder / "adapter_config.json").exists():
        return folder
    torch.manual_seed(recipe.seed)
    model = LanguageModel.load(base, dtype=DTYPE)
    wrapped = with_lora(model, recipe.targets, recipe.rank)
    train(
        model,
        learnt(wrapped),
        examples(model),
        epochs=recipe.epochs,
        rate=recipe.rate,
        seed=recipe.order,
        progress=progress,
        around=recipe.around(wrapped) if recipe.around else nullcontext,
        penalty=recipe.penalty(wrapped) if recipe.penalty else None,
    )
    staging = folder.with_suffix(".part")
    wrapped.save_pretrained(staging)
    if recipe.afterwards:
        recipe.afterwards(staging)
    staging.rename(folder)
    return folder


def with_lora(model: LanguageModel, targets: Sequence[str], rank: int = 16) -> Any:
    """The model with a LoRA of PEFT's on these projections; alpha is twice the rank."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(targets), task_type="CAUSAL_LM"
    )
    return get_peft_model(model.model, config)


def learnt(wrapped: Any) -> list[Any]:
    """The parameters that are trained."""
    return [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
