"""A tiny Mixtral and adapters for its experts, with one module per projection of each expert."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

from tests.support.tiny_model import SEED, make_tokenizer

LAYERS, EXPERTS, HIDDEN, INNER = 2, 4, 128, 64


def make_mixtral(folder: Path) -> Path:
    """Write an untrained model that vLLM loads."""
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=256,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_expert_adapter(model: Path, folder: Path) -> Path:
    """A LoRA on every projection of every expert, saved by PEFT.

    transformers fuses the experts into one parameter. Older adapters and vLLM's per-expert layout
    have one module for each expert's projection, so PEFT gets a skeleton with those modules.
    """
    torch.manual_seed(SEED)
    skeleton = torch.nn.Module()
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            for name, m, n in (("w1", INNER, HIDDEN), ("w2", HIDDEN, INNER), ("w3", INNER, HIDDEN)):
                path = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
                parent = skeleton
                for part in path.split("."):
                    if not hasattr(parent, part):
                        parent.add_module(part, torch.nn.Module())
                    parent = getattr(parent, part)
                parent.add_module(name, torch.nn.Linear(n, m, bias=False))
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["w1", "w2", "w3"])
    adapted = get_peft_model(skeleton, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.peft_config["default"].base_model_name_or_path = str(model)
    adapted.save_pretrained(folder)
    return folder
