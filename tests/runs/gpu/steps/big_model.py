"""A model of a well-known shape with random weights that vLLM makes itself, and adapters for it."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.runs.benchmarks import shapes
from tests.runs.gpu.steps import ON_GPU

SHAPE = "Llama-3.2-1B"
TINY = (2, 128, 64, 256)
RANK = 16


def make_base(folder: Path, tokenizer: Path) -> Path:
    """A configuration and a small tokenizer; vLLM's `--load-format dummy` does the rest."""
    layers, width, keys, inner = shapes.MODELS[SHAPE] if ON_GPU else TINY
    head = 64 if ON_GPU else 32
    small = json.loads((tokenizer / "config.json").read_text())
    config = small | {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": width // head, "num_key_value_heads": keys // head,
        "head_dim": head, "max_position_embeddings": 2048,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for file in tokenizer.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def make_adapter(folder: Path, seed: int) -> Path:
    """An adapter of all projections in bfloat16, in PEFT's layout."""
    shape = SHAPE
    if not ON_GPU:
        shapes.MODELS[shape] = TINY
    torch.manual_seed(seed)
    tensors = {}
    for module in shapes.adapter(shape, RANK, torch.bfloat16):
        group = (
            "mlp" if module.name.endswith(("gate_proj", "up_proj", "down_proj")) else "self_attn"
        )
        stem, _, projection = module.name.rpartition(".")
        for side, factor in (("A", module.A), ("B", module.B)):
            key = f"base_model.model.{stem}.{group}.{projection}.lora_{side}.weight"
            # Small updates: a model of random weights answers with noise in any case.
            tensors[key] = (0.01 * torch.randn_like(factor)).contiguous()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    projections = sorted({key.split(".")[-3] for key in tensors})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": projections}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def module_count() -> int:
    """LoRA modules of an adapter of all projections."""
    return 7 * (shapes.MODELS[SHAPE] if ON_GPU else TINY)[0]
