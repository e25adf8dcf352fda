"""Factors whose update acts little on refusals, and on benign inputs as before; the rank stays.

With `C_h = E[x·xᵀ]` over harmful and `C_b` over benign inputs of a module, and `G = E[g·gᵀ]` of the
gradient g of the log-odds of refusals with respect to its outputs, B' and A' make

    tr(G·ΔW'·C_h·ΔW'ᵀ) + λ·tr((ΔW' − ΔW)·C_b·(ΔW' − ΔW)ᵀ),  ΔW' = B'·A',

small: the square of what an update does to the log-odds at a token, to first order, beside what it
loses on benign inputs. For one factor that is held, the other's minimum has a closed form. Neither
grows the sum, so it falls with each step. All is in coordinates of some leading directions and Gram
matrices of the rest: nothing is larger than r×k.
"""

from typing import NamedTuple

import torch
from torch import Tensor

STEPS = "bab"
"""Which factor is made anew in each step. Two more steps move the loss by under a hundredth."""

SINGULAR = {torch.float32: 1e-7, torch.float64: 1e-14}
"""Share of a Gram matrix's largest eigenvalue under which a smaller one counts as this, by the
dtype of the products: factors may have dependent rows, and products are not better. Ours."""


CONDITION = 100.0
"""Of what leads from orthonormal factors back to those that are nearest to an adapter's own, at
most: beyond it, B' and A' would be large and cancel. Ours."""


class FactorPair(NamedTuple):
    """B and A of modules of one shape, float64.

    A is `P` on the leading directions of inputs, and `X_a` times its own rest beside them; B is `S`
    on those of outputs, and its own rest times `X_b`.
    """

    P: Tensor  # (modules, r, k)
    X_a: Tensor  # (modules, r, r)
    S: Tensor  # (modules, q, r)
    X_b: Tensor  # (modules, r, r)


class Surroundings(NamedTuple):
    """The metrics of modules of one shape, and what their own factors are, float64."""

    own: FactorPair  # X_a = X_b = I
    rest_a: Tensor  # (modules, r, r) of A beside its leading directions, against C_b
    rest_b: Tensor  # (modules, r, r) of B beside its leading directions
    mu: Tensor  # (modules, k): C_h on the leading directions, on which C_b is 1
    mu_rest: Tensor  # (modules, 1): C_h beside them, as a multiple of C_b
    gamma: Tensor  # (modules, q): G on the leading directions
    gamma_rest: Tensor  # (modules, 1): G beside them, the same in each direction
    singular: Tensor  # (modules, 1): of SINGULAR, for their Gram matrices

    def repaired(self, lam: float, steps: str = STEPS) -> FactorPair:
        """B' and A' for λ.

        A step makes the factor that it holds orthonormal, and the other takes its sizes: the next
        step's Gram matrix has those of the update alone. W leads back: `A' = W·A`, `B' = B·W⁻¹`.
        """
        factors, W = self.own, torch.eye(self.own.P.shape[1], dtype=self.own.P.dtype)
        W = W.expand_as(self.own.X_a)
        for step in steps:
            if step == "a":
                factors, (Z, _) = self._with_best_a(factors, lam)
                W = W @ Z
            else:
                factors, (_, inverse) = self._with_best_b(factors, lam)
                W = W @ inverse.mT
        return _changed(factors, W)

    def _with_best_a(self, factors: FactorPair, lam: float) -> tuple[FactorPair, "_Whitening"]:
        e, (Z, inverse) = _joint(self.sensitivity(factors), self.gram_b(factors), self.singular)
        T = Z.mT @ self._cross_b(factors)
        kept = lam / (e[:, :, None] * self.mu[:, None] + lam)
        rest = lam / (e * self.mu_rest + lam)
        new = FactorPair(
            P=T @ self.own.P * kept, X_a=T * rest[:, :, None], S=factors.S @ Z, X_b=factors.X_b @ Z
        )
        return new, (Z, inverse)

    def _with_best_b(self, factors: FactorPair, lam: float) -> tuple[FactorPair, "_Whitening"]:
        e, (Z, inverse) = _joint(self.harmful(factors), self.benign(factors), self.singular)
        T = self._cross_a(factors) @ Z
        kept = lam / (self.gamma[:, :, None] * e[:, None] + lam)
        rest = lam / (self.gamma_rest[:, :, None] * e[:, None] + lam)
        new = FactorPair(
            P=Z.mT @ factors.P, X_a=Z.mT @ factors.X_a, S=self.own.S @ T * kept, X_b=T * rest
        )
        return new, (Z, inverse)

    def gram_b(self, factors: FactorPair) -> Tensor:
        """BᵀB, (modules, r, r)."""
        return factors.S.mT @ factors.S + factors.X_b.mT @ self.rest_b @ factors.X_b

    def sensitivity(self, factors: FactorPair) -> Tensor:
        """BᵀGB, (modules, r, r)."""
        rest = factors.X_b.mT @ self.rest_b @ factors.X_b
        leading = (factors.S * self.gamma[:, :, None]).mT @ factors.S
        return leading + self.gamma_rest[:, :, None] * rest

    def harmful(self, factors: FactorPair) -> Tensor:
        """A·C_h·Aᵀ, (modules, r, r)."""
        rest = factors.X_a @ self.rest_a @ factors.X_a.mT
        return (factors.P * self.mu[:, None]) @ factors.P.mT + self.mu_rest[:, :, None] * rest

    def benign(self, factors: FactorPair) -> Tensor:
        """A·C_b·Aᵀ, (modules, r, r)."""
        return factors.P @ factors.P.mT + factors.X_a @ self.rest_a @ factors.X_a.mT

    def lost(self, factors: FactorPair) -> Tensor:
        """`tr((ΔW' − ΔW)·C_b·(ΔW' − ΔW)ᵀ)` without scaling, (modules,)."""
        before = _trace(self.gram_b(self.own), self.benign(self.own))
        after = _trace(self.gram_b(factors), self.benign(factors))
        both = _trace(self._cross_b(factors), self._cross_a(factors))
        return (before + after - 2 * both).clamp_min(0.0)

    def _cross_b(self, factors: FactorPair) -> Tensor:
        """B'ᵀB, (modules, r, r)."""
        return factors.S.mT @ self.own.S + factors.X_b.mT @ self.rest_b

    def _cross_a(self, factors: FactorPair) -> Tensor:
        """A·C_b·A'ᵀ, (modules, r, r)."""
        return self.own.P @ factors.P.mT + self.rest_a @ factors.X_a.mT


def _trace(one: Tensor, other: Tensor) -> Tensor:
    """tr(one·other) of each module."""
    return (one * other.mT).sum((1, 2))


_Whitening = tuple[Tensor, Tensor]
"""Z and Z⁻¹ of modules, (modules, r, r)."""


def _joint(matrix: Tensor, metric: Tensor, singular: Tensor) -> tuple[Tensor, _Whitening]:
    """e (modules, r), and Z with `Zᵀ·metric·Z = I` and `Zᵀ·matrix·Z = diag(e)`."""
    sizes, directions = torch.linalg.eigh((metric + metric.mT) / 2)
    smallest = singular * sizes[:, -1:].clamp_min(torch.finfo(sizes.dtype).tiny)
    roots = sizes.clamp_min(smallest).sqrt()
    whitening = directions / roots[:, None]
    whitened = whitening.mT @ matrix @ whitening
    e, R = torch.linalg.eigh((whitened + whitened.mT) / 2)
    return e.clamp_min(0.0), (whitening @ R, R.mT @ (directions * roots[:, None]).mT)


def _changed(factors: FactorPair, W: Tensor) -> FactorPair:
    """`W·A` and `B·W⁻¹`: the same product. W's condition is bounded, so that none cancels."""
    left, sizes, right = torch.linalg.svd(W)
    sizes = sizes.clamp_min(sizes[:, :1] / CONDITION)
    W = (left * sizes[:, None]) @ right
    inverse = (right.mT / sizes[:, None]) @ left.mT
    return FactorPair(W @ factors.P, W @ factors.X_a, factors.S @ inverse, factors.X_b @ inverse)
