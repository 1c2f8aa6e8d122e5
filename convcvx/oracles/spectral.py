"""The exact oracle of networks without activation, at any rank and number of images: the largest singular value.

There responses are linear in the filter, φ_p(x_i; u) = x̄_ip·u with x̄_ip = Σ_k w_pk x_ik, so that

    g(u) = ‖M u‖,   M = Σ_i vec(x̄_i ⊗ Z_i)   (P·c, r),      max_{‖u‖≤1} g(u) = σ_max(M),

and Σ_j ‖V_j‖ over unit filters is the nuclear norm of Σ_j vec(V_j) u_jᵀ (Fazel 2002): the training problem is a
regression with a nuclear norm.

**Rounding.** Polynomials of degree one say all of such responses: the bound is that of `convcvx.oracles.polynomial`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from convcvx.budget import NEVER
from convcvx.oracles.base import Oracle, OracleResult, Wanted
from convcvx.oracles.needs import AVERAGES, UNACTIVATED, require
from convcvx.oracles.polynomial import PolynomialOracle
from convcvx.oracles.scope import Scope
from convcvx.problem import Problem


@dataclass(frozen=True)
class SpectralOracle(Oracle):
    """Every filter searched: the bound is a proof, tight to rounding, and the first filter attains it."""

    name = "spectral"

    def answer(self, problem: Problem, dual_point: Tensor, wanted: Wanted) -> OracleResult:
        """As `Oracle` says: singular vectors, those of the largest values.

        Raises
        ------
        InputError
            For an activation, or maximum pooling.
        """
        require("oracle 'spectral'", (UNACTIVATED, AVERAGES), problem)
        began = time.perf_counter()
        problem = problem.with_dtype(torch.float64)
        bound, _ = PolynomialOracle(degree=1).bound(problem, dual_point)
        axes = torch.eye(problem.responses.dim, dtype=torch.float64)
        columns = problem.until(NEVER).responses.correlate(axes, dual_point).flatten(1)  # Mᵀ
        vectors, sizes, _ = torch.linalg.svd(columns, full_matrices=False)
        stats = {"rank": len(sizes), "seconds": time.perf_counter() - began}
        best = slice(wanted.n_filters)
        return OracleResult(vectors.T[best].contiguous(), sizes[best], bound, Scope.GLOBAL, stats)
