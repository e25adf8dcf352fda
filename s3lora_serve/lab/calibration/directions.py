"""Directions of an adapter's own updates in which harmful inputs meet refusals.

For a module `ΔW = U·S·Vᵀ` let `z = S·Vᵀ·x`, so that its update of an output is `U·z`. With
`H = E[z·zᵀ]` over tokens of harmful prompts, `K` over those of prompts whose answers are to stay,
and `G = E[(Uᵀg)·(Uᵀg)ᵀ]` of the gradient g of the log-odds of the base model's refusals, the M that
makes

    tr(G·M·H·Mᵀ) + λ·tr((M − I)·K·(M − I)ᵀ)

least is `M = R·(T ∘ λ/(λ + γ_i·e_j))·Zᵀ`: `G = R·diag(γ)·Rᵀ`, `Zᵀ·K·Z = I`, `Zᵀ·H·Z = diag(e)` and
`T = Rᵀ·Z⁻ᵀ`. It is the closed form of repair (`spectral/two_sided.py`) in what an adapter has.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from s3lora_serve.lab.base_model.language_model import Encoded, LanguageModel, common_length
from s3lora_serve.lab.calibration.gates import GatedAdapter, GatedLinear

Example = tuple[Encoded, Encoded]

ODDS_TOKENS = 3
"""First tokens of a refusal whose log-odds count, as in a base model's statistics."""

RIDGE = 0.01
"""Of K, as a share of its mean eigenvalue: directions that no kept prompt uses. Ours."""


class Directions(NamedTuple):
    """The directions of one module, float64 on the host; k is the rank of its update."""

    R: Tensor  # (k, k) columns: of outputs
    Z: Tensor  # (k, k) columns: of inputs
    whole: Tensor  # (k, k) T: the coordinates of M = I
    harm: Tensor  # (k, k) γ_i·e_j, relative to the mean over all modules


def directions(
    model: LanguageModel,
    adapter: GatedAdapter,
    refusals: Sequence[Example],
    kept: Sequence[Sequence[Example]],
    done: Callable[[int], None] = lambda _: None,
) -> list[Directions]:
    """The directions of each module, from the base model's activations.

    Args:
        model: the base model with the gated layers of `adapter`, which stays removed.
        adapter: the adapter's gated layers.
        refusals: harmful prompts with the base model's refusals.
        kept: kinds of prompts with their answers; each kind weighs the same.
        done: called with the number of examples that were run.
    """
    adapter.remove()
    prompts = [prompt for part in (refusals, *kept) for prompt, _ in part]
    skipped = common_length(prompts)  # what a chat template begins with
    harmful = _Sums(adapter)
    for example in refusals:
        harmful.add(model, example, skipped, with_gradients=True)
        done(1)
    parts = []
    for part in filter(None, kept):
        parts.append(_Sums(adapter))
        for example in part:
            parts[-1].add(model, example, skipped)
            done(1)
    H, G = harmful.means(harmful.inputs), harmful.means(harmful.gradients)
    K = [sum(each) / len(parts) for each in zip(*(p.means(p.inputs) for p in parts), strict=True)]
    found = [_joint(*each) for each in zip(H, K, G, strict=True)]
    scale = sum(float(each.harm.mean()) for each in found) / len(found)
    return [each._replace(harm=each.harm / max(scale, 1e-30)) for each in found]


class _Sums:
    """Sums over tokens of z·zᵀ and of (Uᵀg)·(Uᵀg)ᵀ, (k, k) float64 for each module."""

    def __init__(self, adapter: GatedAdapter) -> None:
        self.layers = adapter.layers
        empty = [torch.zeros(len(each.S), len(each.S), dtype=torch.float64) for each in self.layers]
        self.inputs, self.gradients = empty, [each.clone() for each in empty]
        self.count = 0

    def means(self, sums: Sequence[Tensor]) -> list[Tensor]:
        return [each / max(1, self.count) for each in sums]

    def add(
        self, model: LanguageModel, example: Example, skipped: int, *, with_gradients: bool = False
    ) -> None:
        """Run one example; the first `skipped` tokens and the last one are not counted."""
        prompt, answer = example
        ids = torch.tensor([prompt + answer], device=model.device)
        counted = slice(skipped, ids.shape[1] - 1)
        with torch.set_grad_enabled(with_gradients), _observed(self.layers) as seen:
            logits = model.model(input_ids=ids, use_cache=False).logits[0].float()
            zeros = [each.zero for each in seen]
            gradients: Sequence[Tensor | None] = [None] * len(seen)
            if with_gradients:
                odds = _log_odds(logits, ids[0], len(prompt), len(answer))
                gradients = torch.autograd.grad(odds, zeros, allow_unused=True)
        for i, (layer, each, gradient) in enumerate(zip(self.layers, seen, gradients, strict=True)):
            self.inputs[i] += _gram(each.z[0, counted])
            if gradient is not None:
                self.gradients[i] += _gram(gradient[0, counted] @ layer.U)
        self.count += counted.stop - counted.start


def _gram(rows: Tensor) -> Tensor:
    rows = rows.detach().double()
    return (rows.T @ rows).cpu()


def _log_odds(logits: Tensor, ids: Tensor, start: int, length: int) -> Tensor:
    """Σ over the first ODDS_TOKENS of the answer of `z_t − log Σ exp(z_j), j ≠ t`."""
    places = torch.arange(start, start + min(ODDS_TOKENS, length), device=logits.device)
    rows, targets = logits[places - 1], ids[places]
    own = rows.gather(-1, targets[:, None]).squeeze(-1)
    return (own - rows.scatter(-1, targets[:, None], -torch.inf).logsumexp(-1)).sum()


class _Seen(NamedTuple):
    z: Tensor  # (1, tokens, k)
    zero: Tensor  # (1, tokens, m), added to the output


@contextmanager
def _observed(layers: Sequence[GatedLinear]) -> Iterator[list[_Seen]]:
    """Within this context a run notes what each layer gets, and adds a zero with a gradient."""
    seen: list[Any] = [None] * len(layers)

    def noting(place: int) -> Callable[..., Tensor]:
        def note(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            zero = torch.zeros_like(output, requires_grad=True)
            z = (inputs[0].detach() @ layer.V).float() * layer.S
            seen[place] = _Seen(z, zero)
            return output + zero

        return note

    hooks = [layer.register_forward_hook(noting(place)) for place, layer in enumerate(layers)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _joint(H: Tensor, K: Tensor, G: Tensor) -> Directions:
    k = len(K)
    K = K + torch.eye(k, dtype=K.dtype) * max(RIDGE * float(K.trace()) / max(k, 1), 1e-30)
    gamma, R = torch.linalg.eigh((G + G.T) / 2)
    inverse = torch.linalg.inv(torch.linalg.cholesky(K))
    e, W = torch.linalg.eigh(inverse @ H @ inverse.T)
    Z = inverse.T @ W
    harm = gamma.clamp_min(0)[:, None] * e.clamp_min(0)[None]
    return Directions(R, Z, R.T @ torch.linalg.inv(Z).T, harm)
