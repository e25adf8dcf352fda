"""Adapters as people have them: PEFT's own of a tiny model, with names and configuration changed.

Each change names the codes with which the gate may refuse what stock vLLM serves, and only those
which docs/adapters.md explains.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.support.adapters import CONFIG, WEIGHTS

PREFIX = "base_model.model."
Tensors = dict[str, torch.Tensor]

UNREADABLE, RANK, PARTNER, VALUES, OTHER_PARTS, TWICE = (
    "S3LORA-103", "S3LORA-107", "S3LORA-108", "S3LORA-109", "S3LORA-110", "S3LORA-111",
)  # fmt: skip
DTYPE, LIMIT, NEGATIVE, ZERO, SHAPE, NOTHING = (
    "S3LORA-104", "S3LORA-201", "S3LORA-223", "S3LORA-226", "S3LORA-301", "S3LORA-303",
)  # fmt: skip


class Drawn:
    """One drawn adapter, and the codes that its changes may be refused with."""

    def __init__(self, tensors: Tensors, config: str) -> None:
        self.tensors = tensors
        self.config: dict[str, Any] = json.loads(config)
        self.own: dict[str, Any] = json.loads(config)  # before any change
        self.allowed: set[str] = set()

    def __repr__(self) -> str:
        """What a failure shows: the tensors, and what is changed in the configuration."""
        keys = sorted(self.config.keys() | self.own.keys())
        both = {k: (self.own.get(k, "missing"), self.config.get(k, "missing")) for k in keys}
        new = {key: after for key, (before, after) in both.items() if before != after}
        tensors = {k: (str(v.dtype), *v.shape) for k, v in self.tensors.items()}
        return f"{tensors} with {new}, may be refused with {sorted(self.allowed)}"

    def write(self, folder: Path) -> Path:
        """Write it into an empty folder."""
        save_file({k: v.contiguous() for k, v in self.tensors.items()}, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(self.config))
        return folder


Change = Callable[[st.DrawFn, Drawn], None]


@st.composite
def changed_adapters(draw: st.DrawFn, shapes: dict[str, tuple[int, int]], config: str) -> Drawn:
    """Some modules of an adapter with these tensors, with up to three changes.

    Factors have small integers, so that no cast rounds them.
    """
    pairs = sorted({name.rpartition(".lora_")[0] for name in shapes})
    kept = draw(st.lists(st.sampled_from(pairs), min_size=1, max_size=5, unique=True))
    kept += [each for each in pairs if ".experts" in each and ".experts" in " ".join(kept)]
    seed = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    tensors = {
        name: torch.randint(-3, 4, shape, generator=seed).float()
        for name, shape in shapes.items()
        if name.rpartition(".lora_")[0] in kept
    }
    drawn = Drawn(tensors, config)
    for change in draw(st.lists(st.sampled_from(CHANGES), max_size=3)):
        change(draw, drawn)
    return drawn


def _some(draw: st.DrawFn, drawn: Drawn) -> list[str]:
    """The names of one pair's tensors, or of all."""
    pairs = sorted({name.rpartition(".lora_")[0] for name in drawn.tensors})
    chosen = draw(st.sampled_from([*pairs, ""]))
    return [name for name in drawn.tensors if name.startswith(chosen)]


def _has_experts(drawn: Drawn) -> bool:
    """Whether experts are in one tensor: both pairs of a layer's belong together."""
    return any(".experts." in name for name in drawn.tensors)


def _rename(drawn: Drawn, names: list[str], new: Callable[[str], str]) -> None:
    for name in names:
        drawn.tensors[new(name)] = drawn.tensors.pop(name)


def _prefix(draw: st.DrawFn, drawn: Drawn) -> None:
    """Wrapped several times, or not at all: vLLM reads both."""
    other = draw(st.sampled_from(["", PREFIX * 2, PREFIX * 3, "base_model.", "model.", "x."]))
    _rename(drawn, _some(draw, drawn), lambda name: other + name.removeprefix(PREFIX))
    drawn.allowed |= {OTHER_PARTS} if _has_experts(drawn) else set()


INNER_NAMES = (
    (".layers.0.", ".layers.1."), (".layers.1.", ".layers.7."), ("model.", ""),
    ("model.", "model.model."), ("model.", "language_model.model."), ("q_proj", "k_proj"),
    ("q_proj", "qkv_proj"), ("q_proj", "query"), ("up_proj", "gate_up_proj"),
    ("layers.", "layers._orig_mod."), ("self_attn", "attn"), ("layers", "h"),
    ("q_proj", "lm_head"), ("model.layers.0.self_attn.q_proj", "lm_head"),
    ("model.layers.0.mlp.down_proj", "model.embed_tokens"), ("mlp.experts", "mlp.experts.0"),
)  # fmt: skip


def _inner_name(draw: st.DrawFn, drawn: Drawn) -> None:
    """Layers, projections and wrappers that the model does not have, or does."""
    old, new = draw(st.sampled_from(INNER_NAMES))

    def renamed(name: str) -> str:
        return PREFIX + name.removeprefix(PREFIX).replace(old, new, 1)

    _rename(drawn, _some(draw, drawn), renamed)
    drawn.allowed |= {TWICE, SHAPE} | ({OTHER_PARTS} if _has_experts(drawn) else set())


def _suffix(draw: st.DrawFn, drawn: Drawn) -> None:
    """What raw state dicts and other tools write after a module's name."""
    new = draw(st.sampled_from([".default.weight", "", ".bias", ".weight.weight"]))
    _rename(drawn, _some(draw, drawn), lambda name: name.removesuffix(".weight") + new)
    drawn.allowed |= {OTHER_PARTS, PARTNER}


def _base_weights(draw: st.DrawFn, drawn: Drawn) -> None:
    """Weights of the base model, which PEFT saves with resized embeddings."""
    name = draw(st.sampled_from(["lm_head", "model.embed_tokens", "model.layers.0.mlp.up_proj"]))
    rest = draw(st.sampled_from([".base_layer.weight", ".weight", ".base_layer.bias"]))
    drawn.tensors[PREFIX + name + rest] = torch.ones(4, 3)
    drawn.allowed |= {OTHER_PARTS}


def _embedding(_draw: st.DrawFn, drawn: Drawn) -> None:
    drawn.tensors[f"{PREFIX}model.embed_tokens.lora_embedding_A"] = torch.ones(8, 368)
    drawn.tensors[f"{PREFIX}model.embed_tokens.lora_embedding_B"] = torch.ones(128, 8)
    drawn.allowed |= {OTHER_PARTS}


def _dtype(draw: st.DrawFn, drawn: Drawn) -> None:
    dtypes = (
        torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int8, torch.bool,
    )  # fmt: skip
    dtype = draw(st.sampled_from(dtypes))
    for name in _some(draw, drawn):
        drawn.tensors[name] = drawn.tensors[name].to(dtype)
    if dtype in (torch.int8, torch.bool):
        drawn.allowed |= {DTYPE}


def _values(draw: st.DrawFn, drawn: Drawn) -> None:
    """Untrained, diverged or huge factors."""
    side, value = draw(st.sampled_from("AB")), draw(st.sampled_from([0.0, float("nan"), 1e38]))
    for name in _some(draw, drawn):
        if f".lora_{side}" in name:
            drawn.tensors[name] = torch.full_like(drawn.tensors[name].float(), value)
    drawn.allowed |= {VALUES, ZERO, LIMIT, NOTHING} if value else {ZERO}


def _rank(draw: st.DrawFn, drawn: Drawn) -> None:
    """Factors of another rank than the configuration's."""
    for name in _some(draw, drawn):
        tensor = drawn.tensors[name]
        if tensor.ndim == 2 and min(tensor.shape) > 1:
            drawn.tensors[name] = tensor[:-1] if ".lora_A" in name else tensor[:, :-1]
    drawn.allowed |= {RANK, OTHER_PARTS}


def _transposed(draw: st.DrawFn, drawn: Drawn) -> None:
    for name in _some(draw, drawn):
        drawn.tensors[name] = (
            drawn.tensors[name].mT if drawn.tensors[name].ndim == 2 else drawn.tensors[name]
        )
    drawn.allowed |= {RANK, SHAPE, OTHER_PARTS}


def _one_side(draw: st.DrawFn, drawn: Drawn) -> None:
    if len(drawn.tensors) > 1:
        del drawn.tensors[draw(st.sampled_from(sorted(drawn.tensors)))]
    drawn.allowed |= {PARTNER, OTHER_PARTS}


PLAIN_KEYS: dict[str, list[Any]] = {
    "lora_alpha": [1, 16.5, 0, 0.25, 64],
    "use_rslora": [True, False, None],
    "target_modules": ["all-linear", r".*\.(q|v)_proj", [], None, ["q_proj"]],
    "exclude_modules": [["q_proj"], r".*layers\.1.*"],
    "bias": ["none"],
    "modules_to_save": [None, []],
    "init_lora_weights": [True, False, "gaussian", "eva", "orthogonal", "pissa", "olora", "loftq"],
    "use_dora": [False, None],
    "lora_bias": [False, None],
    "fan_in_fan_out": [True],
    "layers_to_transform": [[0], 1, None],
    "layer_replication": [None, []],
    "task_type": ["CAUSAL_LM", "FEATURE_EXTRACTION", None, "SEQ_CLS"],
    "trainable_token_indices": [None, [1, 2]],
    "lora_dropout": [0.5],
    "base_model_name_or_path": ["somewhere/else", None, ""],
    "peft_version": ["0.99.0"],
    "a_key_of_tomorrow": [{"a": [1]}],
    "rank_pattern": [{}, None, {"nothing": 4}, {r".*\.nothing$": 4}],
    "alpha_pattern": [
        {}, None, {"q_proj": 4}, {r".*\.layers\.[01]\..*(q_proj|k_proj)$": 64},
        {r"layers\.\d+\.self_attn\..*": 2, "up_proj": 3}, {"^model": 4}, {"[qk]_proj": 1.5},
        {"q_proj": 0}, {"model.layers.0.self_attn.q_proj": 5}, {r"(q|v)_proj|up_proj": 3},
        {"mlp.experts.gate_up_proj": 3}, {"down_proj": 7}, {r".*experts.*": 2},
    ],
}  # fmt: skip
"""Values that stock vLLM and the gate read alike, whatever that is."""

OTHER_KEYS: dict[str, tuple[list[Any], set[str]]] = {
    "lora_alpha": ([-4, "16", None, True], {UNREADABLE, NEGATIVE}),
    "r": ([8.0, "8", 0, 4, 100_000], {UNREADABLE, RANK, OTHER_PARTS}),
    "peft_type": (["ADALORA", None, "lora"], {UNREADABLE}),
    "use_dora": ([True, "yes"], {UNREADABLE, OTHER_PARTS}),
    "use_rslora": (["yes", 1], {UNREADABLE}),
    "bias": (["all", "lora_only", None], {OTHER_PARTS}),
    "modules_to_save": ([["lm_head"], ["score"], "score"], {UNREADABLE, OTHER_PARTS}),
    "alora_invocation_tokens": ([[1]], {OTHER_PARTS}),
    "use_qalora": ([True], {OTHER_PARTS}),
    "rank_pattern": ([{"q_proj": 3}, {"q_proj": 0}, {"[": 4}], {UNREADABLE, RANK, OTHER_PARTS}),
    "alpha_pattern": ([{"q_proj": -1}, {"(a": 2}, {"q_proj(?=x)": 3}], {UNREADABLE, NEGATIVE}),
    "target_parameters": (
        [["x.y"], [], None, ["mlp.experts.down_proj"]], {RANK, OTHER_PARTS}
    ),
}  # fmt: skip
"""Values that the gate may refuse where vLLM does not look at them."""


def _plain_key(draw: st.DrawFn, drawn: Drawn) -> None:
    key = draw(st.sampled_from(sorted(PLAIN_KEYS)))
    drawn.config[key] = draw(st.sampled_from(PLAIN_KEYS[key]))
    if drawn.config.get("lora_alpha") == 0 or drawn.config.get("alpha_pattern"):
        drawn.allowed |= {ZERO}


def _other_key(draw: st.DrawFn, drawn: Drawn) -> None:
    key = draw(st.sampled_from(sorted(OTHER_KEYS)))
    values, codes = OTHER_KEYS[key]
    drawn.config[key] = draw(st.sampled_from(values))
    drawn.allowed |= codes


def _without_key(draw: st.DrawFn, drawn: Drawn) -> None:
    key = draw(st.sampled_from(sorted(drawn.config)))
    del drawn.config[key]
    if key in ("peft_type", "target_parameters"):
        drawn.allowed |= {UNREADABLE, RANK, OTHER_PARTS}


CHANGES: list[Change] = [
    _prefix, _inner_name, _suffix, _base_weights, _embedding, _dtype, _values, _rank, _transposed,
    _one_side, _plain_key, _plain_key, _plain_key, _other_key, _without_key,
]  # fmt: skip
