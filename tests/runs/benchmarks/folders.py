"""Folders of models and adapters with random weights, as vLLM and PEFT read them."""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from tests.support.tiny_model import make_tokenizer

HEAD = 64
"""Width of an attention head."""


def make_model(folder: Path, layers: int, width: int, keys: int, inner: int) -> Path:
    """A Llama without weights, for `--load-format dummy`; `keys` is the width of k_proj."""
    tokenizer = make_tokenizer()
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD,
        num_key_value_heads=keys // HEAD,
        head_dim=HEAD,
        max_position_embeddings=256,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(folder: Path, tensors: dict[str, Tensor], rank: int) -> Path:
    """Tensors under PEFT's names, and their configuration; alpha is 16."""
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 16,
        "target_modules": sorted({key.split(".")[-3] for key in tensors}), "bias": "none",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
