"""The result of a scorer for a batch of modules, and the indices computed from it."""

from typing import NamedTuple

from torch import Tensor, nan, where


class Spectrum(NamedTuple):
    """Magnitude-aware spectra of a batch of k modules, all float64 on the CPU.

    All values of a module are NaN if its factors contain NaN or Inf, and 0 if its update is zero.
    """

    singular_values: Tensor  # (k, M) descending, σ̃ in the units of ΔW
    row_norm_mean: Tensor  # (k,) r̄, mean over all rows of ‖ΔW[i,:]‖₂
    column_norm_mean: Tensor  # (k,) c̄, mean over all columns of ‖ΔW[:,j]‖₂
    frobenius_norm: Tensor  # (k,) ‖ΔW‖_F


def spectral_sharpness(singular_values: Tensor) -> Tensor:
    """Spectral Sharpness Index, `σ̃_1 / Σ_k σ̃_k`, in [1/M, 1].

    Shape: singular_values (k, M) -> (k,), NaN where ΔW = 0 or not finite.
    Source: S3LoRA, arXiv 2508.15068, section on SSI.
    """
    total = singular_values.sum(-1)
    if singular_values.shape[-1] == 0:
        return total * nan
    return where(total > 0, singular_values[..., 0] / total, nan)


def relative_sharpness(index: float, count: int) -> float:
    """SSI rescaled from [1/M, 1] to [0, 1]: `(SSI − 1/M) / (1 − 1/M)`, M = `count`.

    It ranks modules of different M fairly. Undefined (NaN) for M = 1.
    """
    if count <= 1:
        return nan
    floor = 1.0 / count
    return (index - floor) / (1.0 - floor)
