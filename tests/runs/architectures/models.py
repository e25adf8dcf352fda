"""Tiny random models of many architectures, made by transformers, and adapters made by PEFT."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.support.adapters import WEIGHTS
from tests.support.tiny_model import SEED, make_tokenizer

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD = 128, 256, 2, 4, 2, 32
STACKED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

ADMIT_REST = {"on_unscorable": "admit"}
"""For a classifier's head, which PEFT saves whole."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A kind of model, how PEFT adapts it, and how an engine of it is asked."""

    name: str
    model: Callable[[transformers.PreTrainedTokenizerFast], torch.nn.Module]
    adapter: Mapping[str, Any] = field(default_factory=dict)  # of LoraConfig
    engine: Mapping[str, Any] = field(default_factory=dict)  # of vLLM
    asks: str = "generate"
    policy: Mapping[str, Any] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)  # of vLLM's LoRARequest
    processor: Callable[[transformers.PreTrainedTokenizerFast], Any] | None = None
    checkpoint_name: Callable[[str], str] | None = None  # of a tensor that transformers renames
    adapter_name: Callable[[str], str] | None = None

    def make_model(self, folder: Path) -> Path:
        """Write the model from a seed, with its tokenizer."""
        torch.manual_seed(SEED)
        tokenizer = make_tokenizer()
        if self.processor is not None:
            processor = self.processor(tokenizer)
            processor.save_pretrained(folder)
        model = self.model(tokenizer)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _rename(folder / "model.safetensors", self.checkpoint_name)
        return folder

    def make_adapter(self, folder: Path) -> Path:
        """Write an adapter on all linear modules, whose updates are random and not zero."""
        torch.manual_seed(SEED)
        model = self.model(make_tokenizer())
        options = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **self.adapter}
        adapted = get_peft_model(model, LoraConfig(**options))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        adapted.save_pretrained(folder)
        _rename(folder / WEIGHTS, self.adapter_name)
        return folder


def _rename(file: Path, new_name: Callable[[str], str] | None) -> None:
    if new_name is not None:
        tensors = load_file(file)
        save_file({new_name(k): v for k, v in tensors.items()}, file, metadata={"format": "pt"})


def _common(tokenizer: transformers.PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "max_position_embeddings": 256,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
        **more,
    }


def _of(kind: str, config: str, **own: Any) -> Callable[..., torch.nn.Module]:
    """How to make a model of these classes of transformers, with what is its own."""

    def make(tokenizer: transformers.PreTrainedTokenizerFast) -> torch.nn.Module:
        settings = getattr(transformers, config)(**_common(tokenizer, **own))
        model: torch.nn.Module = getattr(transformers, kind)(settings)
        return model.float()

    return make


def _gpt2(tokenizer: transformers.PreTrainedTokenizerFast) -> torch.nn.Module:
    settings = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=256
    )
    return transformers.GPT2LMHeadModel(settings).float()


IMAGE = "<image>"


def _llava(tokenizer: transformers.PreTrainedTokenizerFast) -> torch.nn.Module:
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    text = transformers.LlamaConfig(**_common(tokenizer))
    vision = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        image_size=28, patch_size=14, projection_dim=64,
    )  # fmt: skip
    settings = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",  # with the class token, which vLLM's tower counts
        image_seq_length=5,
    )
    return transformers.LlavaForConditionalGeneration(settings).float()


def _with_vision_model(name: str) -> str:
    """A tensor of the tower as checkpoints and vLLM name it, and transformers 5 does not."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def _llava_processor(tokenizer: transformers.PreTrainedTokenizerFast) -> Any:
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    images = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    return transformers.LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=14,
        vision_feature_select_strategy="full", image_token=IMAGE, num_additional_image_tokens=1,
    )  # fmt: skip


_MOE = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
_HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
_ON_STACKED = {"target_parameters": STACKED, "target_modules": ["q_proj", "v_proj"]}

_LLAVA = Architecture(
    "LLaVA, with its tower",
    _llava,
    engine={"limit_mm_per_prompt": {"image": 1}, "enable_tower_connector_lora": True},
    processor=_llava_processor,
    asks="image",
    checkpoint_name=_with_vision_model,
    adapter_name=_with_vision_model,
)

ARCHITECTURES = (
    Architecture("Llama", _of("LlamaForCausalLM", "LlamaConfig")),
    Architecture("Qwen2", _of("Qwen2ForCausalLM", "Qwen2Config")),
    Architecture("Qwen3, tied", _of("Qwen3ForCausalLM", "Qwen3Config", tie_word_embeddings=True)),
    Architecture("Qwen3-MoE", _of("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **_MOE), asks="slots"),
    Architecture(
        "Qwen3-MoE, experts in one tensor",
        _of("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **_MOE),
        _ON_STACKED,
        asks="slots",
    ),
    Architecture(
        "Qwen3-MoE, experts in one tensor, mixed formats",
        _of("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **_MOE),
        _ON_STACKED,
        {"enable_mixed_moe_lora_format": True},
        asks="slots",
        request={"is_3d_lora_weight": True},
    ),
    Architecture(
        "Qwen3.5, hybrid",
        _of("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", **_HYBRID),
        engine={"dtype": "bfloat16"},  # vLLM's CPU kernels of such layers know no other
    ),
    Architecture(
        "Mixtral",
        _of("MixtralForCausalLM", "MixtralConfig", num_local_experts=4, num_experts_per_tok=2),
        asks="slots",
    ),
    Architecture("Gemma 3", _of("Gemma3ForCausalLM", "Gemma3TextConfig")),
    Architecture("Phi-3", _of("Phi3ForCausalLM", "Phi3Config")),
    Architecture("GPT-2", _gpt2, {"fan_in_fan_out": True}),
    _LLAVA,
    replace(_LLAVA, name="LLaVA, its tower named as transformers 5 does", adapter_name=None),
    Architecture(
        "Qwen3, embeddings",
        _of("Qwen3Model", "Qwen3Config"),
        {"task_type": "FEATURE_EXTRACTION"},
        {"runner": "pooling"},
        "embed",
    ),
    Architecture(
        "Qwen3, classifier",
        _of("Qwen3ForSequenceClassification", "Qwen3Config", num_labels=3),
        {"task_type": "SEQ_CLS"},
        {"runner": "pooling"},
        "classify",
        ADMIT_REST,
    ),
    Architecture(
        "gpt-oss, experts in one tensor",
        _of(
            "GptOssForCausalLM",
            "GptOssConfig",
            num_local_experts=4,
            num_experts_per_tok=2,
            layer_types=["sliding_attention", "full_attention"],
        ),
        _ON_STACKED,
        asks="slots",
    ),
)


def named(name: str) -> Architecture:
    """The architecture of this name."""
    return next(each for each in ARCHITECTURES if each.name == name)
