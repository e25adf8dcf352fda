"""One architecture on two real engines, guarded and stock: what is the same, and what is not."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.runs.architectures.models import Architecture
from tests.runs.architectures.served import KEEPS, served
from tests.support.adapters import Tensors, copy_with, key

CLOSE = 1e-4
STRIPS = {"strip": {"top_k": 3}, "on_uninformative": "admit"}


def compare(architecture: Architecture, folder: Path) -> dict[str, Any]:
    """Serve an adapter whole and with three modules stripped, and by hand on stock vLLM.

    `as_stock`: a guarded engine's answers and slot are stock vLLM's, of the whole adapter.
    `as_by_hand`: the same of the stripped one. `failed`, `stock`, `refused`: vLLM's words where it
    serves no such model or adapter, and the gate's where it refuses one.
    """
    model = architecture.make_model(folder / "model")
    whole = architecture.make_adapter(folder / "adapter")
    policy = folder / "policy.json"
    rules = [{"match": {"adapter": "stripped"}, **STRIPS}]
    policy.write_text(json.dumps({**KEEPS, **architecture.policy, "rules": rules}))
    how: dict[str, Any] = {"asks": architecture.asks, "request": architecture.request}
    how |= architecture.engine
    guarded = served(model, {"whole": whole, "stripped": whole}, policy, **how)
    if "failed" in guarded:
        return {"failed": served(model, {}, None, **how)["failed"]}
    own, less = (guarded[name]["verdict"] or {} for name in ("whole", "stripped"))
    stripped = [module["name"] for module in less.get("modules", []) if module["stripped"]]
    by_hand = copy_with(whole, folder / "by-hand", _without(stripped))
    stock = served(model, {"whole": whole, "stripped": by_hand}, None, **how)
    return {
        "modules": len(own.get("modules", [])),
        "stripped": len(stripped),
        "stock": stock["whole"].get("error"),
        "refused": guarded["whole"]["refused"],
        "left_out": own.get("left_out", []),
        "acts": stock["whole"].get("slot") != {} and not _same_answer(stock, "whole", "base"),
        "as_stock": _same(guarded, stock, "whole"),
        "as_by_hand": _same(guarded, stock, "stripped"),
        "strips": stock["whole"].get("slot") != stock["stripped"].get("slot"),
    }


EXPERTS = 4
"""Of the models that have them in one tensor."""


def _without(stripped: Iterable[str]) -> Callable[[Tensors], None]:
    """Remove modules by hand; experts, of which vLLM takes all or none, get B = 0."""

    def change(tensors: Tensors) -> None:
        for name in stripped:
            layer, _, rest = name.partition(".experts.")
            index, _, parameter = rest.partition(".")
            if not rest:
                del tensors[key(name, "A")], tensors[key(name, "B")]
                continue
            pair = f"{layer}.experts" + (".base_layer" if parameter == "gate_up_proj" else "")
            tensors[key(pair, "B")].unflatten(1, (-1, EXPERTS))[:, :, int(index)] = 0.0

    return change


def _same(one: Any, other: Any, name: str) -> bool:
    answers = one[name].get("answer"), other[name].get("answer")
    slots = one[name].get("slot"), other[name].get("slot")
    return None not in answers and slots[0] == slots[1] and _close(*answers)


def _same_answer(found: Any, name: str, other: str) -> bool:
    answer = found[name].get("answer")
    return bool(answer) and _close(answer, found[other])


def _close(one: list[float], other: list[float]) -> bool:
    return len(one) == len(other) and all(
        abs(a - b) <= CLOSE for a, b in zip(one, other, strict=True)
    )
