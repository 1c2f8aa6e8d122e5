"""Fewer neurons for the same network: Carathéodory's theorem, as a computation.

The predictions of a network without its intercept are Σ_j λ_j a_j, with λ_j = ‖V_j‖ > 0 and atoms a_j in R^{n·c}, what
neuron j predicts at unit weights. While the atoms are linearly dependent, Σ_j δ_j a_j = 0 for some δ ≠ 0, of either
sign; moving λ along the δ with Σ_j δ_j ≤ 0 keeps every prediction, does not raise the penalty β Σ_j λ_j, and ends when
a neuron is gone. At most n·c neurons are left: an optimum has one with no more than these. (The paper, Sahiner et al.
2021, counts n·P·c + 1, from the convex hull of pooled responses.)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from convcvx.problem import Problem
from convcvx.solution import Solution

RANK_TOLERANCE = 1e-13
"""Singular values of the atoms below this share of the largest one count as zero."""


def sparsify(problem: Problem, solution: Solution) -> Solution:
    """The same predictions by at most n·c of the solution's filters; the objective does not rise beyond rounding.

    For small problems: the atoms of all neurons are held at once, (n·c, m).
    """
    if solution.n_filters < 2:
        return solution
    sizes = solution.weights.flatten(1).norm(dim=1)
    units = solution.weights / sizes[:, None, None]
    responses = problem.responses.matrix(solution.filters).double().cpu()
    atoms = torch.einsum("nmp,mpc->ncm", responses, units).flatten(0, 1)
    reduced = _reduce(sizes, _null_space(atoms))
    keep = reduced > 0
    return replace(
        solution,
        filters=solution.filters[keep],
        weights=units[keep] * reduced[keep, None, None],
    )


def _null_space(atoms: Tensor) -> Tensor:
    """(m, q) orthonormal basis of {δ : atoms (n·c, m) δ = 0}."""
    _, values, vectors = torch.linalg.svd(atoms, full_matrices=True)
    rank = int((values > RANK_TOLERANCE * values[0].clamp_min(1e-300)).sum())
    return vectors[rank:].T.contiguous()


def _reduce(sizes: Tensor, free: Tensor) -> Tensor:
    """Move `sizes` (m,) > 0 along the columns of `free` (m, q) until q of them are zero, never raising their sum."""
    sizes = sizes.clone()
    while free.shape[1]:
        step = free[:, 0] * (-1.0 if float(free[:, 0].sum()) > 0 else 1.0)
        ratios = torch.where(step < 0, sizes / -step, torch.inf)
        gone = int(ratios.argmin())
        sizes = (sizes + ratios[gone] * step).clamp_min(0)
        sizes[gone] = 0
        # Turn the basis so that only its first column moves the neuron that is gone; then drop that column.
        mirror = free[gone].clone()
        mirror[0] += torch.copysign(mirror.norm(), mirror[0])
        mirror = mirror / mirror.norm()
        free = (free - 2 * torch.outer(free @ mirror, mirror))[:, 1:]
        free[gone] = 0
    return sizes
