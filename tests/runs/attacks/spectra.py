"""What an owner can do to the spectra of an adapter: while it is trained, and afterwards."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from s3lora_serve.lab.calibration.gates import svd_of_product

PADDED_RANK = 64
PADDING = 1e-3
"""Size of each further direction, as a share of ‖ΔW‖_F."""

DECOYS = 12
"""More than `strip.top_k` by default."""

SPIKE = 0.97
"""Share of a decoy's ‖ΔW‖_F² in its first direction."""

WEIGHT = 0.02
"""Of a penalty, beside the loss: it halves the peaks of spectra and leaves skill and harm."""


def layers_of(wrapped: Any) -> dict[str, Any]:
    """PEFT's layers in a model, by name."""
    return {name: each for name, each in wrapped.named_modules() if hasattr(each, "lora_A")}


def peaks(wrapped: Any) -> Callable[[], Tensor]:
    """A penalty: the sum over modules of `Σσ⁴/(Σσ²)²`, which is 1/r for a flat spectrum."""
    return lambda: WEIGHT * sum(_peak(*_grams(layer)) for layer in layers_of(wrapped).values())


def uneven(wrapped: Any) -> Callable[[], Tensor]:
    """A penalty: how unevenly ‖ΔW‖_F² is split over modules, `n·Σe²/(Σe)²`."""

    def penalty() -> Tensor:
        energies = torch.stack(
            [(gram_b * gram_a).sum() for gram_b, gram_a in map(_grams, layers_of(wrapped).values())]
        )
        spread = len(energies) * energies.square().sum() / energies.sum().square().clamp_min(1e-30)
        return 10 * WEIGHT * spread

    return penalty


def _grams(layer: Any) -> tuple[Tensor, Tensor]:
    B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    return B.T @ B, A @ A.T


def _peak(gram_b: Tensor, gram_a: Tensor) -> Tensor:
    product = gram_b @ gram_a  # its eigenvalues are σ²
    return (product * product.T).sum() / product.trace().square().clamp_min(1e-30)


Factors = dict[str, tuple[Tensor, Tensor]]
"""B and A of each module."""


def rebalanced(factors: Factors) -> Factors:
    """Singular values moved half of the way to equal ones, by their logarithms; norms stay."""
    new = {}
    for name, (B, A) in factors.items():
        U, S, V = svd_of_product(B, A)
        flatter = S.clamp_min(1e-6 * S.max()).sqrt()
        flatter = flatter * S.norm() / flatter.norm()
        new[name] = (U * flatter.sqrt()).float(), (flatter.sqrt()[:, None] * V.T).float()
    return new


def padded(factors: Factors) -> Factors:
    """Written with PADDED_RANK, in tiny random directions."""
    draw = torch.Generator().manual_seed(0)
    new = {}
    for name, (B, A) in factors.items():
        more = PADDED_RANK - len(A)
        b, a = (
            torch.randn(len(B), more, generator=draw),
            torch.randn(more, A.shape[1], generator=draw),
        )
        size = PADDING * float((B @ A).norm())
        root = (size / float(b.norm(dim=0).mean() * a.norm(dim=1).mean())) ** 0.5
        new[name] = torch.cat([B, root * b], 1), torch.cat([A, root * a])
    return new


def with_decoys(factors: Factors) -> Factors:
    """The DECOYS modules of least norm replaced by sharp ones of the median norm."""
    draw = torch.Generator().manual_seed(0)
    norms = {name: float((B @ A).norm()) for name, (B, A) in factors.items()}
    order = sorted(norms, key=lambda name: norms[name])
    size = norms[order[len(order) // 2]]
    new = dict(factors)
    for name in order[:DECOYS]:
        B, A = factors[name]
        q_b, _ = torch.linalg.qr(torch.randn(B.shape, generator=draw))
        q_a, _ = torch.linalg.qr(torch.randn(A.T.shape, generator=draw))
        rest = ((1 - SPIKE) / (len(A) - 1)) ** 0.5
        sizes = torch.full((len(A),), rest)
        sizes[0] = SPIKE**0.5
        new[name] = size * q_b * sizes, q_a.T.contiguous()
    return new


def rewrite(folder: Path, change: Callable[[Factors], Factors]) -> None:
    """Change the factors of PEFT's adapter in a folder, with alpha/r as it was."""
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(file)
    names = sorted({name.rpartition(".lora_")[0] for name in tensors})
    factors = {
        name: (tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"]) for name in names
    }
    new = change(factors)
    save_file(_named(new), file)
    rank = len(next(iter(new.values()))[1])
    _write_rank(config, rank)


def _named(factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    found = {}
    for name, (B, A) in factors.items():
        found[f"{name}.lora_B.weight"] = B.contiguous()
        found[f"{name}.lora_A.weight"] = A.contiguous()
    return found


def _write_rank(config: Path, rank: int) -> None:
    fields = json.loads(config.read_text())
    scaling = fields["lora_alpha"] / fields["r"]
    config.write_text(json.dumps(fields | {"r": rank, "lora_alpha": scaling * rank}, indent=2))
