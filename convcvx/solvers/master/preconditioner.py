"""What a Newton step for weights is preconditioned by: the Gram matrix, and the penalty's Hessian."""

from __future__ import annotations

import torch
from torch import Tensor

from convcvx.solvers.smoothed_norms import SmoothedNorms

DAMPINGS = 20
"""Tenfold increases, at most, of a damping that does not make a matrix positive definite."""


class Preconditioner:
    """Solves with G + diag(ridges) - Σ_j q_j q_jᵀ, the last of rank one in each of groups of one size.

    A norm does not bend along its own direction: with dual variables d and u = W / r the penalty's Hessian there is a
    ridge times 1 - <d, u>, next to nothing for a group that is clearly in or clearly out. q_j = √(ridge <d, u>) u/‖u‖
    takes the rest away. Without it conjugate gradients need hundreds of passes once ε is small.

    Both matrices factored here are positive definite but for rounding, the second because no q_j takes away more than
    its group's ridge. In float32 the Gram matrix of correlated responses has eigenvalues at about minus `noise`: where
    the ridges are smaller, damping makes up for it. Conjugate gradients find the same step, if later.
    """

    def __init__(self, gram: Tensor, noise: float, penalty: SmoothedNorms) -> None:
        self._groups = groups = penalty.groups
        damping = max(1e-7 * float(gram.diagonal().max()), noise) if len(gram) else 0.0
        factor = _damped_factor(gram + torch.diag(penalty.ridges[:, 0]), damping)
        self._inverse = torch.cholesky_inverse(factor)
        units, shares = penalty.units, groups.inner(penalty.duals, penalty.units).clamp_min(0)
        self._missing = (penalty.ridges * shares).sqrt() * units / groups.inner(units, units).sqrt().clamp_min(1e-300)
        cells = len(gram) // max(1, groups.n)
        coupled = self._inverse * (self._missing @ self._missing.T)
        coupling = coupled.view(groups.n, cells, groups.n, cells).sum(dim=(1, 3))
        self._small = _damped_factor(torch.eye(groups.n, dtype=gram.dtype) - coupling, 1e-12)

    def __call__(self, rows: Tensor) -> Tensor:
        sums = self._groups.sums(self._missing * self._plain(rows))[:, None]
        return self._plain(rows + self._missing * self._groups.spread(torch.cholesky_solve(sums, self._small)[:, 0]))

    def _plain(self, rows: Tensor) -> Tensor:
        """Of the matrix without what is of rank one."""
        return (rows.T @ self._inverse).T  # half the time of two triangular solves


def _damped_factor(matrix: Tensor, damping: float) -> Tensor:
    """Cholesky factor of `matrix` with `damping`, or as much more as it takes, added to its diagonal in place."""
    for _ in range(DAMPINGS):
        matrix.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            return factor
        damping *= 10
    return torch.linalg.cholesky(matrix)
