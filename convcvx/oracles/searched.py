"""The lower bound that an oracle shows, or proves, of a problem from dual points at hand: for a certificate."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from convcvx.budget import Deadline
from convcvx.oracles.base import Oracle, OracleResult
from convcvx.oracles.local import LocalOracle
from convcvx.problem import Problem

HALF = 0.5
"""Share of the time left for the network's own dual point, where there is another one to try."""


def searched(
    problem: Problem,
    given: Problem,
    search: Oracle,
    starts: Tensor,
    points: list[Tensor],
    primal: float,
    *,
    tol: float,
    seed: int,
    deadline: Deadline,
) -> tuple[OracleResult, float]:
    """What the oracle finds at the residual, the first of `points`, or proves at another, and the lower bound."""
    residual, target = points[0], problem.beta * (1 + 0.5 * tol)
    # A heuristic may search in the arithmetic at hand: what it finds is measured in float64 below.
    own = deadline if len(points) == 1 or search.name == LocalOracle.name else deadline.share(HALF)
    found = search(
        (given if search.name == LocalOracle.name else problem).until(own),
        residual,
        starts=starts,
        n_filters=16,
        seed=seed,
        target=target,
    )
    if not found.scope.proved and len(found.values):
        candidates = torch.cat([found.filters, starts])
        values = problem.responses.correlate(candidates, residual).flatten(1).norm(dim=1)
        found = replace(found, filters=candidates, values=values)
    dual = problem.dual(residual, found.g_max)
    if found.scope.for_all and found.g_max <= target and primal - dual > tol * primal:
        # The proof stopped where Z is feasible; where g stays below β a longer Z would be too, and bound better.
        again = search(problem.until(deadline), residual, starts=starts, n_filters=16, seed=seed, target=0.0)
        if again.scope.for_all and again.g_max < found.g_max:
            found, dual = again, problem.dual(residual, again.g_max)
    for other in points[1:]:
        if found.scope.for_all and primal - dual > tol * primal:
            again = search(problem.until(deadline), other, starts=starts, n_filters=1, seed=seed, target=target)
            if again.scope.for_all and problem.dual(other, again.g_max) > dual:
                found, dual = again, problem.dual(other, again.g_max)
    return found, dual
