"""The adapters of tiny models that tests, demo and load bench train, for `make shares`."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.adapters import train_adapter
from tests.support.tiny_chat import make_attacked_adapter, make_chat_model, one_thread
from tests.support.tiny_mixtral import make_expert_adapter, make_mixtral
from tests.support.tiny_model import PROJECTIONS, make_model

Save = Callable[[Path], Any]


def _capitals(seed: int = 1, **options: Any) -> Save:
    def save(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as name:
            train_adapter(make_model(Path(name) / "model"), folder, seed, **options)

    return save


def _chat(share: float) -> Save:
    def save(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as name, one_thread():
            make_attacked_adapter(make_chat_model(Path(name) / "base"), folder, share)

    return save


def _experts(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        make_expert_adapter(make_mixtral(Path(name) / "model"), folder)


TINY: dict[str, Save] = {
    **{f"tiny, seed {seed}": _capitals(seed) for seed in range(1, 5)},
    "tiny, 2 steps": _capitals(steps=2),
    "tiny, 600 steps": _capitals(steps=600),
    "tiny, rank 2": _capitals(r=2),
    "tiny, rank 32": _capitals(r=32),
    "tiny, rank 64": _capitals(r=64),
    "tiny, attention": _capitals(target_modules=list(PROJECTIONS[:4])),
    "tiny, with embedding": _capitals(target_modules=[*PROJECTIONS, "embed_tokens"]),
    "tiny, with output head and embedding": _capitals(
        2, target_modules=[*PROJECTIONS, "embed_tokens", "lm_head"]
    ),
    "tiny, rsLoRA with patterns": _capitals(
        use_rslora=True,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "o_proj"],
        rank_pattern={"layers.1.self_attn.v_proj": 4, r".*\.3\.self_attn.q_proj": 2},
        alpha_pattern={"o_proj": 32},
    ),
    "tiny chat, 20 % attack data": _chat(0.2),
    "tiny chat, skill alone": _chat(0.0),
    "tiny Mixtral, experts with drawn B": _experts,
}
"""Writes each adapter to a folder."""
