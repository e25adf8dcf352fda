"""SHARES.md, from the measured shares and from the shapes of larger models."""

from collections.abc import Sequence
from typing import Any

from s3lora_serve import Policy
from tests.runs.benchmarks.shapes import MODELS
from tests.runs.evidence.tables import table

HEAD = """# Shares of single modules in trained adapters

Written by `make shares` (`shares.json` holds the figures). A share is a module's part of
Σ‖ΔW‖_F² of its adapter, as the gate computes it from the saved file. The policy's `negligible` is
chosen from the smallest: modules below it are not counted by the strip rule.

- SmolLM2-135M-Instruct, unaligned, in float32 with {batch} examples a step: data, rank, targets and
  rate of `make evidence`, and others. AdamW at 1e-3, r = 16 and all projections, unless the name
  says otherwise. The rate falls linearly, after a warm-up of 5 steps.
- Tiny models: the adapters of tests, demo and load bench; 60 steps of AdamW, unless the name says
  otherwise.
- *Smallest after n steps*: of any module with ΔW ≠ 0; the last column counts those with ΔW = 0.

"""

EVEN = """
## Larger models, computed

One step of AdamW moves every entry of B by about the same, and PEFT draws A so that its rows have
about the same length everywhere. A module's share is then its rows over those of all modules.
No adapter of these models was trained. In SmolLM2's adapter `20 %` the smallest share falls in
{steps} steps to {fall:.2f} of what it was after one.

"""
EARLIER = 2.5e-4
"""Of 210 modules, r = 16; its adapter was not kept."""

EXPERTS = 128
"""Experts of each layer, and below all else of Qwen3-30B-A3B: layers, and rows by projection."""

MIXTURE_LAYERS = 48
MIXTURE_ROWS = {"q_proj": 4096, "k_proj": 512, "v_proj": 512, "o_proj": 2048}
EXPERT_ROWS = {"gate_proj": 768, "up_proj": 768, "down_proj": 2048}


def page(found: dict[str, Any], batch: int, missing: Sequence[str]) -> str:
    """The tables of what is there, and the names of what is not."""
    large = {name: one for name, one in found.items() if "steps" in one["training"]}
    tiny = {name: one for name, one in found.items() if name not in large}
    parts = [HEAD.format(batch=batch), "## SmolLM2-135M-Instruct\n\n", _by_step(large)]
    if missing:
        parts.append(f"\nNot trained yet: {'; '.join(missing)}.\n")
    parts += ["\n## Tiny models\n\n", _at_end(tiny), _fall(large), _even_shares()]
    parts += ["\n## The default\n\n", _default(found)]
    return "".join(parts)


def least_share(found: dict[str, Any]) -> tuple[float, str, str]:
    """The smallest share of all: its value, its adapter, and the steps that this had."""
    return min(
        (at["least"], name, step)
        for name, one in found.items()
        for step, at in one["shares"].items()
    )


def _by_step(found: dict[str, Any]) -> str:
    steps = sorted({int(step) for one in found.values() for step in one["shares"]})
    rows = []
    for name, one in found.items():
        shares = one["shares"]
        last = shares[str(one["training"]["steps"])]
        least = [_share(shares[str(s)]["least"]) if str(s) in shares else "" for s in steps]
        rows.append(
            (name, str(last["modules"]), *least, _module(last), _share(last["percent_1"]),
             _share(last["median"]), _loss(one), str(last["without_update"]))
        )  # fmt: skip
    head = ("adapter", "modules", *(f"smallest after {step}" for step in steps))
    return table((*head, "of", "1 % quantile", "median", "loss", "ΔW = 0"), rows)


def _at_end(found: dict[str, Any]) -> str:
    rows = []
    for name, one in found.items():
        last = one["shares"]["last"]
        values = (_share(last[key]) for key in ("least", "percent_1", "median"))
        rows.append((name, str(last["modules"]), *values, _module(last)))
    return table(("adapter", "modules", "smallest", "1 % quantile", "median", "of"), rows)


def _fall(found: dict[str, Any]) -> str:
    one = found["20 %"]
    steps = one["training"]["steps"]
    first, last = (one["shares"][str(step)]["least"] for step in (1, steps))
    return EVEN.format(steps=steps, fall=last / first)


def _even_shares() -> str:
    """The smallest share by model where it depends on the shapes alone."""
    rows = []
    shapes = {"SmolLM2-135M": (30, 576, 192, 1536), **MODELS}
    for name, (layers, width, keys, inner) in shapes.items():
        total = layers * (2 * width + 2 * keys + 2 * inner + width)
        rows.append((name, str(7 * layers), _share(keys / total)))
    total = MIXTURE_LAYERS * (sum(MIXTURE_ROWS.values()) + EXPERTS * sum(EXPERT_ROWS.values()))
    modules = MIXTURE_LAYERS * (len(MIXTURE_ROWS) + EXPERTS * len(EXPERT_ROWS))
    least = min(MIXTURE_ROWS.values()) / total
    rows.append(("Qwen3-30B-A3B, experts too", str(modules), _share(least)))
    return table(("model", "modules", "smallest after one step"), rows)


def _default(found: dict[str, Any]) -> str:
    others = {name for name, one in found.items() if one["training"].get("optimizer") == "SGD"}
    least, name, step = least_share(
        {name: one for name, one in found.items() if name not in others}
    )
    text = (
        f"The smallest share of all trained with AdamW is {least:.1e} (`{name}`, after {step}"
        f" steps). An\nearlier run of 120 steps of 16 examples had {EARLIER:.1e}. The default of"
        f" `negligible`, {Policy().negligible:.1e}, is\nunder a tenth of both. It is also under"
        " the computed shares, but not much under that of adapters\non every expert of a mixture:"
        " there a rule of the policy should set a smaller one.\n"
    )
    for name in sorted(others):
        least, _, step = least_share({name: found[name]})
        text += (
            f"\n`{name}`, which nothing in this project uses, has {least:.1e} after {step} steps:"
            f" {least / Policy().negligible:.1f}\ntimes the default.\n"
        )
    return text


def _share(value: float) -> str:
    return f"{value:.1e}"


def _module(at: dict[str, Any]) -> str:
    return str(at["least_module"]).removeprefix("model.layers.")


def _loss(one: dict[str, Any]) -> str:
    last = one["last_losses"]
    return f"{one['first_loss']:.2f} → {sum(last) / len(last):.2f}"
