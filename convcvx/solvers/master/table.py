"""The master: the optimal output weights for the filters at hand, by whichever method suits the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from convcvx.problem import Problem
from convcvx.solvers.master.result import MasterResult
from convcvx.solvers.master.smooth import solve_smooth
from convcvx.solvers.master.squared import solve_squared


def solve_master(
    problem: Problem,
    filters: Tensor,
    weights: Tensor | None = None,
    intercept: Tensor | None = None,
    *,
    tol: float = 1e-6,
) -> MasterResult:
    """Optimise weights and intercept for `filters` (m, r), warm-started, to the relative duality gap `tol`."""

    c = problem.n_outputs
    if weights is None:
        weights = torch.zeros(len(filters), problem.responses.n_cells, c, dtype=torch.float64)
    if problem.loss.name == "squared":
        return solve_squared(problem, filters, weights, tol=tol)
    if intercept is None:
        intercept = torch.zeros(c, dtype=torch.float64)
    return solve_smooth(problem, filters, weights, intercept, tol=tol)
