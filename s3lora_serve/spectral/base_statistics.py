"""What is known of a base model: the inputs of its modules, and how refusals depend on outputs."""

from dataclasses import dataclass

from torch import Tensor

MAX_OVERLAP_ERROR = 2e-2
"""Largest entry of |VᵀU − 1| and of |QᵀQ − 1|: directions are normalised in float64, and rounded to
bfloat16 for the file, or to float32 where that would cost more."""


@dataclass(frozen=True, slots=True, eq=False)
class InputStatistics:
    """What is known of the inputs of the modules that share one input site.

    `C_b ≈ U·Uᵀ + R`, `R = F·Fᵀ + ridge·I`, and `C_h ≈ U·diag(μ)·Uᵀ + mu_rest·R`.
    """

    V: Tensor  # (n, k), VᵀU = I
    U: Tensor  # (n, k)
    mu: Tensor  # (k,) float64, descending
    F: Tensor  # (n, f)
    ridge: float
    mu_rest: float
    beyond: float  # largest eigenvalue of C_h − U·diag(μ)·Uᵀ against C_b
    inverse: Tensor  # (k, k) float64, (VᵀU)⁻¹: I up to the rounding of V and U

    @property
    def width(self) -> int:
        """n, the number of inputs."""
        return len(self.V)


@dataclass(frozen=True, slots=True, eq=False)
class OutputStatistics:
    """What is known of one module's outputs: `G ≈ Q·diag(γ)·Qᵀ + gamma_rest·(I − Q·Qᵀ)`."""

    Q: Tensor  # (m, q), QᵀQ = I
    gamma: Tensor  # (q,) float64, descending
    gamma_rest: float
    inverse: Tensor  # (q, q) float64, (QᵀQ)⁻¹: I up to the rounding of Q
    shift: Tensor | None = None  # (q, k) float64, Qᵀ·C·V with `C = E[Σ g·xᵀ]` of a harmful prompt

    @property
    def width(self) -> int:
        """m, the number of outputs."""
        return len(self.Q)
