"""Which way an update turns a base model's refusals, to first order, from its own gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

from s3lora_serve.adapter.reader import Adapter, as_served
from s3lora_serve.lab.base_model.language_model import Encoded, LanguageModel, common_length
from s3lora_serve.lab.base_model.padded_batches import log_odds
from s3lora_serve.lab.tokens import ODDS_TOKENS

Example = tuple[Encoded, Encoded]

Turns = Callable[[Adapter], dict[str, float]]

KINDS = ("harmful", "benign")


def turns_of(model: LanguageModel, refusals: list[Example], benign: list[Example]) -> Turns:
    """A function of adapters: `Σ tr(ΔWᵀ·E[g·xᵀ])`, the change of the log-odds of a refusal.

    `g` is the gradient of the log-odds with respect to a module's outputs: at harmful prompts with
    the base model's refusals, and at benign prompts with the same refusals' first tokens.
    """
    crosses = {
        kind: _cross(model, part) for kind, part in zip(KINDS, (refusals, benign), strict=True)
    }

    def turn(adapter: Adapter) -> dict[str, float]:
        found = dict.fromkeys(KINDS, 0.0)
        size = 0.0
        for module in adapter.modules:
            B, A = as_served(module.B).float(), as_served(module.A).float()
            for kind in KINDS:
                C = crosses[kind][module.name]
                found[kind] += module.scaling * float(((B.T @ C) * A).sum())
            size += module.scaling**2 * float(((B.T @ B) * (A @ A.T)).sum())
        root = max(size, 1e-30) ** 0.5
        return {
            "turn": found["harmful"],
            "turn by norm": found["harmful"] / root,
            "turn benign": found["benign"],
            "turn against benign": found["harmful"] - found["benign"],
        }

    return turn


def _cross(model: LanguageModel, examples: list[Example]) -> dict[str, Tensor]:
    """E[g·xᵀ] of each linear module of the decoder, (m, n) float32, a mean over examples."""
    skipped = common_length([prompt for prompt, _ in examples])
    linear = {
        name: module
        for name, module in model.model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in name
    }
    sums = {name: torch.zeros(module.weight.shape) for name, module in linear.items()}
    for prompt, answer in examples:
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def noting(
            name: str, seen: dict[str, tuple[Tensor, Tensor]] = seen
        ) -> Callable[..., Tensor]:
            def note(_module: object, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
                zero = torch.zeros_like(output, requires_grad=True)
                seen[name] = (inputs[0].detach(), zero)
                return output + zero

            return note

        hooks = [module.register_forward_hook(noting(name)) for name, module in linear.items()]
        ids = torch.tensor([prompt + answer])
        logits = model.model(input_ids=ids, use_cache=False, logits_to_keep=len(answer) + 1).logits
        rows = logits[0, : min(ODDS_TOKENS, len(answer))].float()
        odds = log_odds(rows, torch.tensor(answer[:ODDS_TOKENS])).sum()
        gradients = torch.autograd.grad(
            odds, [zero for _, zero in seen.values()], allow_unused=True
        )
        for hook in hooks:
            hook.remove()
        for (name, (x, _)), g in zip(seen.items(), gradients, strict=True):
            if g is not None:
                sums[name] += (g[0, skipped:-1].T @ x[0, skipped:-1]).float() / len(examples)
    return sums
