"""The oracle of networks whose g is a singular value or an eigenvalue, at any rank and number of images.

*Without activation* responses are linear in the filter, φ_p(x_i; u) = x̄_ip·u with x̄_ip = Σ_k w_pk x_ik, so that

    g(u) = ‖M u‖,   M = Σ_i vec(x̄_i ⊗ Z_i)   (P·c, r),      max_{‖u‖≤1} g(u) = σ_max(M),

and Σ_j ‖V_j‖ over unit filters is the nuclear norm of Σ_j vec(V_j) u_jᵀ (Fazel 2002): the training problem is a
regression with a nuclear norm.

*Squares* of one cell and one output make g(u) = |uᵀ A u|: max g is the largest modulus of an eigenvalue. Here
Σ_j v_j u_j u_jᵀ is any symmetric matrix, and Σ_j |v_j| its nuclear norm. See `convcvx.oracles.forms`.

**Rounding.** Polynomials of degree one and two say all of such responses: the bound is that of
`convcvx.oracles.polynomial`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from convcvx.budget import NEVER
from convcvx.oracles.base import Oracle, OracleResult, Wanted
from convcvx.oracles.forms import forms
from convcvx.oracles.needs import AVERAGES, ONE_MATRIX, require
from convcvx.oracles.polynomial import PolynomialOracle
from convcvx.problem import Problem
from convcvx.terms.scope import Scope


@dataclass(frozen=True)
class SpectralOracle(Oracle):
    """Every filter searched: the bound is a proof, tight to rounding, and the first filter attains it."""

    name = "spectral"

    def answer(self, problem: Problem, dual_point: Tensor, wanted: Wanted) -> OracleResult:
        """As `Oracle` says: singular vectors or eigenvectors, those of the largest values.

        Raises
        ------
        InputError
            For an activation, several forms or maximum pooling.
        """
        require("oracle 'spectral'", (ONE_MATRIX, AVERAGES), problem)
        began = time.perf_counter()
        problem = problem.with_dtype(torch.float64)
        degree = problem.responses.activation.degree
        bound, _ = PolynomialOracle(degree=degree).bound(problem, dual_point)
        filters, sizes = (_singular_vectors if degree == 1 else _eigenvectors)(problem, dual_point)
        stats = {"rank": len(sizes), "seconds": time.perf_counter() - began}
        best = slice(wanted.n_filters)
        return OracleResult(filters[best].contiguous(), sizes[best], bound, Scope.GLOBAL, stats)


def _singular_vectors(problem: Problem, dual_point: Tensor) -> tuple[Tensor, Tensor]:
    """Of M: filters (q, r) and their g (q,), largest first."""
    axes = torch.eye(problem.responses.dim, dtype=torch.float64)
    columns = problem.until(NEVER).responses.correlate(axes, dual_point).flatten(1)  # Mᵀ
    vectors, sizes, _ = torch.linalg.svd(columns, full_matrices=False)
    return vectors.T, sizes


def _eigenvectors(problem: Problem, dual_point: Tensor) -> tuple[Tensor, Tensor]:
    """Of Σ_c A_c²: those of A, for a Z of one column or two opposite ones. Filters (r, r) and their g (r,)."""
    matrices = forms(problem, dual_point).flatten(0, 1)
    filters = torch.linalg.eigh((matrices @ matrices).sum(dim=0)).eigenvectors.T
    sizes = torch.einsum("mr,krs,ms->mk", filters, matrices, filters).norm(dim=1)
    order = sizes.argsort(descending=True)
    return filters[order], sizes[order]
