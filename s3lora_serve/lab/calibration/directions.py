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
from s3lora_serve.lab.base_model.padded_batches import counted_tokens, last_logits, log_odds
from s3lora_serve.lab.calibration.gates import GatedAdapter, GatedLinear
from s3lora_serve.lab.tokens import ODDS_TOKENS

Example = tuple[Encoded, Encoded]

EXAMPLES, BATCH = 32, 16
"""Examples of each kind that are run, and run together: some thousand tokens for a k x k mean."""

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
    """The directions of each module, from the base model's activations on some of the examples.

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
    H, G = _means(model, adapter, refusals, skipped, done, with_gradients=True)
    kinds = [_means(model, adapter, part, skipped, done)[0] for part in kept if part]
    K = [sum(each) / len(kinds) for each in zip(*kinds, strict=True)]
    found = [_joint(*each) for each in zip(H, K, G, strict=True)]
    scale = sum(float(each.harm.mean()) for each in found) / len(found)
    return [each._replace(harm=each.harm / max(scale, 1e-30)) for each in found]


def examples_run(*kinds: Sequence[Example]) -> int:
    """How many examples `directions` runs."""
    return sum(min(EXAMPLES, len(kind)) for kind in kinds)


def _means(
    model: LanguageModel,
    adapter: GatedAdapter,
    examples: Sequence[Example],
    skipped: int,
    done: Callable[[int], None],
    *,
    with_gradients: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Means over tokens of z·zᵀ and of (Uᵀg)·(Uᵀg)ᵀ, (k, k) float64 for each module.

    The first `skipped` tokens of an example and the last one are not counted.
    """
    layers = adapter.layers
    inputs = [torch.zeros(len(each.S), len(each.S), dtype=torch.float64) for each in layers]
    gradients, count = [each.clone() for each in inputs], 0
    some = sorted(examples[:EXAMPLES], key=lambda each: len(each[0]) + len(each[1]))
    for start in range(0, len(some), BATCH):
        batch = some[start : start + BATCH]
        ids, mask = model.padded([prompt + answer for prompt, answer in batch])
        counted = counted_tokens(mask, skipped)
        with torch.set_grad_enabled(with_gradients), _observed(layers) as seen:
            longest = max(len(answer) for _, answer in batch)
            logits = last_logits(model, ids, mask, longest + 1).float()
            found: Sequence[Tensor | None] = [None] * len(seen)
            if with_gradients:
                zeros = [each.zero for each in seen]
                found = torch.autograd.grad(_refusal_odds(logits, batch), zeros, allow_unused=True)
        for i, (layer, each, gradient) in enumerate(zip(layers, seen, found, strict=True)):
            inputs[i] += _gram(each.z[counted])
            if gradient is not None:
                gradients[i] += _gram(gradient[counted] @ layer.U)
        count += int(counted.sum())
        done(len(batch))
    count = max(1, count)
    return [each / count for each in inputs], [each / count for each in gradients]


def _gram(rows: Tensor) -> Tensor:
    rows = rows.detach().double()
    return (rows.T @ rows).cpu()


def _refusal_odds(logits: Tensor, batch: Sequence[Example]) -> Tensor:
    """Σ of the log-odds of the first ODDS_TOKENS of each answer."""
    rows, targets = [], []
    for row, (_, answer) in zip(logits, batch, strict=True):
        rows.append(row[-len(answer) - 1 :][: min(ODDS_TOKENS, len(answer))])
        targets += answer[:ODDS_TOKENS]
    return log_odds(torch.cat(rows), torch.tensor(targets, device=logits.device)).sum()


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
