"""What the name of a tensor says, as PEFT writes names and vLLM reads them.

Source: vLLM, `parse_fine_tuned_lora_name` and `is_base_embedding_weights`; PEFT,
`get_peft_model_state_dict`.
"""

import re
from typing import NamedTuple

PREFIX = "base_model.model."
"""Of every name that PEFT writes. A model that was wrapped twice has it twice."""

MAX_NAME_LENGTH = 256
"""Module names appear in labels, logs and patterns. The longest in use has about 80 characters."""

_IGNORED = ".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight"
"""Weights of the base model itself, which PEFT saves beside an adapter of resized embeddings."""

_FACTOR = re.compile(r"(?P<module>[\w.-]+)\.lora_(?P<side>[AB])\.weight", re.ASCII)

_OTHER_TOOLS = (
    (r"\.lora_[ab]$", "mlx", "transpose its factors and name them as PEFT does"),
    (r"^_orig_mod\.|\._orig_mod\.", "torch.compile", "save the model that was not compiled"),
    (r"\.lora_[AB]\.\w+\.weight$", "a state_dict", "save with PEFT's save_pretrained"),
    (r"_fsdp_wrapped_module|_flat_param", "FSDP", "gather the full state dict, then save"),
    (r"\.linear_(in|out)\.|\.adapter\.linear_", "Megatron", "convert it with Megatron Bridge"),
    (r"\.lora_(up|down)\.|^lora_(unet|te)", "kohya", "convert it to PEFT's layout"),
)
"""Layouts of other tools: how a name shows it, the tool, and what to do."""


class FactorName(NamedTuple):
    """The name of a lora_A or lora_B."""

    module: str  # PEFT name without prefix, as in model.layers.3.self_attn.q_proj
    side: str  # A or B


def without_prefix(name: str) -> str:
    """The name as vLLM reads it: each prefix is removed from one that begins with it."""
    return name.replace(PREFIX, "") if name.startswith(PREFIX) else name


def factor_name(name: str) -> FactorName | None:
    """What a tensor is a factor of; None if it is no lora_A or lora_B of a linear module."""
    found = _FACTOR.fullmatch(without_prefix(name))
    if found is None or len(name) > MAX_NAME_LENGTH or PREFIX in found["module"]:
        return None
    return FactorName(found["module"], found["side"])


def is_ignored(name: str) -> bool:
    """Whether vLLM reads past a tensor of this name."""
    return name.endswith(_IGNORED) and len(name) <= MAX_NAME_LENGTH


def layout_of(name: str) -> str:
    """A sentence on the tool that writes such names, and the conversion; else an empty text."""
    for pattern, tool, cure in _OTHER_TOOLS:
        if re.search(pattern, name):
            return f"; this is the layout of {tool}: {cure}"
    return ""
