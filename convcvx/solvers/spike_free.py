"""Whether data are spike-free, {C(Xu)₊ : ‖u‖ <= 1} ⊆ {CXu : ‖u‖ <= 1}: no neuron does what a linear one cannot."""

from __future__ import annotations

import torch
from torch import Tensor

from convcvx.oracles.base import Oracle
from convcvx.problem import Problem

EXACT = 1e-7
"""Relative deviation that passes for rounding in the tests of the conditions; the bound is lowered by four times it."""
PROBES = 512
"""Random filters, and as many rows of either sign at most, that try to refute before an oracle is asked."""
MAX_OUTPUTS = 512
"""Samples up to which an oracle is asked if all responses lie in the range of the data: that has as many outputs."""


def spike_free(
    problem: Problem,
    rows: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    whitened: bool,
    oracle: Oracle | None,
    seed: int,
) -> tuple[bool | None, float]:
    """Whether {C(Xu)₊} ⊆ {CXu} over the unit ball, and the largest ratio of norms found.

    Random filters may refute it; XXᵀ ∝ I proves it; else it is a question to the oracle: ‖(CX)^†C(Xu)₊‖ is g(u) at
    the dual point C(CX)^†ᵀ, what the range misses is g(u) at the projection to its complement; with weights, rows
    of both times √w_i.
    """
    left, sizes, right = parts
    if not len(sizes):
        return True, 0.0
    random = torch.Generator().manual_seed(seed)
    probes = torch.randn(PROBES, rows.shape[1], generator=random, dtype=torch.float64)
    probes = torch.nn.functional.normalize(torch.cat([probes @ right.T @ right, rows[:PROBES], -rows[:PROBES]]))
    responses = centred(problem, (rows @ probes.T).clamp_min(0))
    inside = left.T @ responses
    ratio = float((inside / sizes[:, None]).norm(dim=0).max())
    outside = float((responses - left @ inside).norm(dim=0).max())
    if outside > EXACT * float(sizes[0]):
        return False, float("inf")
    if ratio > 1 + EXACT:
        return False, ratio
    if whitened:
        return True, ratio
    if oracle is None:
        return None, ratio
    full = len(sizes) == problem.n - problem.intercept
    found = oracle(problem, roots(problem) * centred(problem, left / sizes), n_filters=1, seed=seed, target=1.0)
    ratio = max([ratio, *found.values.tolist()])
    if ratio > 1 + EXACT:
        return False, ratio
    proved = found.scope.for_all and found.upper_bound <= 1 + EXACT
    if proved and not full:
        if problem.n > MAX_OUTPUTS:
            return None, ratio
        complement = centred(problem, torch.eye(problem.n, dtype=torch.float64)) - left @ left.T
        beyond = oracle(problem, roots(problem) * complement, n_filters=1, seed=seed, target=EXACT * float(sizes[0]))
        if any(value > EXACT * float(sizes[0]) for value in beyond.values.tolist()):
            return False, float("inf")
        proved = beyond.scope.for_all and beyond.upper_bound <= EXACT * float(sizes[0])
    return (True if proved else None), ratio


def centred(problem: Problem, matrix: Tensor) -> Tensor:
    """C times a matrix (n, q), whose rows are times √w_i: less the weighted means, if there is an intercept."""
    w = roots(problem)
    return matrix - w * ((matrix * w).sum(dim=0) / problem.shares.total) * problem.intercept


def roots(problem: Problem) -> Tensor:
    """(n, 1) √w_i, of what images count for."""
    return problem.shares.roots[:, None]
