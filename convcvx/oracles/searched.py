"""The lower bound that an oracle shows, or proves, of a problem from dual points at hand: for a certificate."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from convcvx.budget import Deadline
from convcvx.oracles.base import Oracle, OracleResult
from convcvx.oracles.local import LocalOracle
from convcvx.oracles.sampled import SampledOracle
from convcvx.problem import Problem

HALF = 0.5
"""Share of the time left for the network's own dual point, where there is another one to try."""
ESTIMATING = 0.8
"""Share of the time left for a search that proves nothing: the rest is for the proof beside it."""


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
) -> tuple[OracleResult, float, Tensor]:
    """What the oracle finds at the residual, first of `points`, or proves at another; its lower bound; which point."""
    residual, target = points[0], problem.beta * (1 + 0.5 * tol)
    # A heuristic may search in the arithmetic at hand: what it finds is measured in float64 below.
    guesses = isinstance(search, LocalOracle | SampledOracle)
    own = deadline.share(ESTIMATING) if guesses else deadline if len(points) == 1 else deadline.share(HALF)
    found = search(
        (given if search.name == "local" else problem).until(own),
        residual,
        starts=starts,
        n_filters=16 + len(starts) * (search.name == "family"),  # a scan knows all that are active
        seed=seed,
        target=target,
    )
    point = residual
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
        if found.scope.lasting and primal - dual > tol * primal:
            again = search(problem.until(deadline), other, starts=starts, n_filters=1, seed=seed, target=target)
            if again.scope is found.scope and problem.dual(other, again.g_max) > dual:
                found, dual, point = again, problem.dual(other, again.g_max), other
    return found, dual, point
