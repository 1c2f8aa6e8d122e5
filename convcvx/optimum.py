"""What an optimum tells besides its value: how it changes with β, and whether other filters would do as well.

The optimal value p(β) = min loss + β R over networks, R = Σ_j ‖V_j‖ at unit filters, is a minimum of linear functions:
concave, with the R of an optimal network as its derivative (Danskin). For a network whose value at β is P, and dual
values D(β') <= p(β'),

    p'(β) >= (D(β') - P) / (β' - β)  for β' > β,        p'(β) <= (P - D(β')) / (β - β')  for β' < β,

and D is known at every β', as a dual point is scaled to whatever β is. The error is about √(2 gap · curvature) / β.
Under the cross-entropy dual points only get shorter, and the lower bound says little.

A direction in which g reaches β may carry weight in an optimal network, and no other does. If a network uses all of
them no other filters do as well; else there may be other optima.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from convcvx.oracles.base import OracleResult
from convcvx.oracles.local import DISTINCT
from convcvx.oracles.metric import Metric
from convcvx.problem import Problem, relative_gap
from convcvx.rounding import SAFE

STEPS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Relative changes of β by which the derivative is bounded, over the root of the relative gap: the best one is that but
for a factor between 1 and 2 or so, and 40 % beside it costs 6 % of the error."""
SHORTEST = 1e-7
"""Least such root: rounding of the objective divided by a shorter change of β would outweigh what is gained."""
ACTIVE = 1e-2
"""Share of β that g may fall short of it in a direction that counts as active: weights are optimal but nearly."""
NEAR = 1e-2
"""Relative gap up to which active directions are told: beyond, the network is not at an optimum."""


def derivative(problem: Problem, dual_point: Tensor, g_max: float, primal: float) -> tuple[float, float]:
    """Bounds on p'(β), for a `primal` that p(β) is not above and max g <= `g_max` at Z = `dual_point` (n, c)."""
    beta, low, high = problem.beta, 0.0, primal / problem.beta * SAFE
    root = math.sqrt(relative_gap(primal, problem.dual(dual_point, g_max)))
    for share in STEPS:
        step = min(share * max(root, SHORTEST), 1.0)
        more, less = problem.with_beta(beta * (1 + step)), problem.with_beta(beta * (1 - step / 2))
        low = max(low, (more.dual(dual_point, g_max) - primal) / (more.beta - beta) / SAFE)
        high = min(high, (primal - less.dual(dual_point, g_max)) / (beta - less.beta) * SAFE)
    return low, max(low, high)


def active_directions(
    problem: Problem, filters: Tensor, dual_point: Tensor, found: OracleResult
) -> tuple[Tensor, Tensor]:
    """Distinct filters (q, r), among those of the network and those `found`, with g >= β but for `ACTIVE`.

    And (q,) bool: whether the network, which has unit `filters`, uses them.
    """
    filters, candidates, values = filters.double(), found.filters, found.values
    if found.scope.proved:  # else those of the network are among what was found
        own = problem.responses.correlate(filters, dual_point).flatten(1).norm(dim=1)
        candidates, values = torch.cat([filters, candidates]), torch.cat([own, values])
    reach = values >= problem.beta * (1 - ACTIVE)
    candidates, values = candidates[reach], values[reach]
    active = candidates[Metric.of(problem.responses).distinct(candidates, values, len(candidates), DISTINCT)]
    return active, (problem.responses.alike(active @ filters.T) > DISTINCT).any(dim=1)


def optimum_of(
    problem: Problem,
    filters: Tensor,
    weights: Tensor,
    dual_point: Tensor,
    found: OracleResult,
    *,
    primal: float,
    rel_gap: float,
) -> dict[str, Any]:
    """What `Certificate.optimum` has; `primal` is not below the objective of the network."""
    low, high = derivative(problem, dual_point, found.g_max, primal)
    slope = float(weights.flatten(1).norm(dim=1).sum())
    told = {"slope": slope, "slope_low": low, "slope_high": high, "proved": found.scope.proved}
    if not rel_gap <= NEAR:
        return {**told, "active": None, "active_used": None}
    active, used = active_directions(problem, filters, dual_point, found)
    return {**told, "active": len(active), "active_used": int(used.sum())}
