"""Numbers that a gate has of an adapter at admission, without any prompt."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from s3lora_serve.adapter.private_copy import copy_adapter
from s3lora_serve.adapter.reader import Adapter, Module, as_served, read_adapter
from s3lora_serve.lab.calibration.gates import svd_of_product
from s3lora_serve.policy.limits import Limits
from s3lora_serve.policy.method import RepairChoice
from s3lora_serve.repair.apply import repaired
from s3lora_serve.repair.statistics_file import StatisticsFile
from tests.runs.evidence.peft_adapters import ATTENTION

Features = dict[str, float]


def features(folder: Path, statistics: StatisticsFile) -> Features:
    """All numbers of one adapter."""
    adapter = read_adapter(copy_adapter(folder, Limits()), Limits())
    spectra = [_spectrum(module) for module in adapter.modules]
    found = {**_spectral(spectra), **_values(adapter), **_sizes(adapter, spectra)}
    return {**found, **_effects(adapter, statistics, math.exp(found["norm"]))}


def _spectrum(module: Module) -> Tensor:
    """Singular values of ΔW, with scaling."""
    _, S, _ = svd_of_product(as_served(module.B), as_served(module.A))
    return abs(module.scaling) * S


def _spectral(spectra: Sequence[Tensor]) -> Features:
    sharp, entropy, stable = [], [], []
    for S in spectra:
        energy = S.square() / S.square().sum().clamp_min(1e-30)
        sharp.append(float(S[0] / S.sum().clamp_min(1e-30)))
        entropy.append(
            float(-(energy * energy.clamp_min(1e-30).log()).sum()) / math.log(max(2, len(S)))
        )
        stable.append(float(S.square().sum() / S[0].square().clamp_min(1e-30)) / len(S))
    return {
        **_moments("sharpness", sharp),
        **_moments("entropy", entropy),
        **_moments("stable rank", stable),
    }


def _values(adapter: Adapter) -> Features:
    """Kurtosis of the factors' entries."""
    kurtosis = {
        side: [_kurtosis(as_served(getattr(module, side)).double()) for module in adapter.modules]
        for side in ("A", "B")
    }
    return {
        name: value
        for side, those in kurtosis.items()
        for name, value in _moments(f"kurtosis {side}", those).items()
    }


def _sizes(adapter: Adapter, spectra: Sequence[Tensor]) -> Features:
    norms = torch.stack([S.norm() for S in spectra])
    shares = norms.square() / norms.square().sum()
    attention = torch.tensor(
        [module.name.rpartition(".")[2] in ATTENTION for module in adapter.modules]
    )
    return {
        "norm": float(norms.norm().log()),
        "energy entropy": float(-(shares * shares.clamp_min(1e-30).log()).sum()),
        "energy attention": float(shares[attention].sum()),
        **_moments("norms", (norms / norms.mean()).tolist()),
    }


def _effects(adapter: Adapter, statistics: StatisticsFile, norm: float) -> Features:
    """What repair finds: effects on refusals and on benign inputs, λ, and suspicion."""
    found = repaired(adapter, statistics, RepairChoice(statistics=Path("/")))
    assert found is not None and found.suspicion is not None  # noqa: PT018 - trained adapters
    whole = found.effect
    effect = math.log(max(whole.harmful_before, 1e-30) / statistics.energy) / 2
    benign = math.log(max(whole.benign_before, 1e-30) / statistics.energy) / 2
    return {
        "effect": effect,
        "effect ratio": effect - benign,
        "lambda": math.log(found.strength),
        "kept": whole.kept,
        "suspicion": found.suspicion,
        "shift": (shift := found.suspicion * 100 * math.exp(benign)),
        "shift by norm": shift / norm,
    }


def _moments(name: str, values: Sequence[float]) -> Features:
    each = torch.tensor(values, dtype=torch.float64)
    spread = float(each.std(unbiased=False))
    return {
        f"{name} mean": float(each.mean()),
        f"{name} spread": spread,
        f"{name} most": float(each.max()),
    }


def _kurtosis(values: Tensor) -> float:
    centred = values.flatten() - values.mean()
    square = centred.square().mean()
    return float(centred.pow(4).mean() / square.square().clamp_min(1e-60))
