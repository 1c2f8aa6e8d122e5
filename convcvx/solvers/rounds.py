"""What the rounds of all solvers share: where to begin, what the oracle says, the record of it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from convcvx.budget import NEVER
from convcvx.errors import InputError
from convcvx.oracles.base import Oracle, OracleResult
from convcvx.oracles.contradiction import binds, check_proof
from convcvx.oracles.local import DISTINCT, LocalOracle
from convcvx.oracles.metric import Metric
from convcvx.oracles.searched import target_of
from convcvx.problem import Problem, relative_gap
from convcvx.solution import Round, Solution
from convcvx.terms.scope import Scope

CONFIRMATIONS = 2
"""Persistent searches before a gap that a heuristic oracle shows is believed: what one finds depends on the
seed."""
SAME_OBJECTIVE = 1e-6
"""Relative difference of objectives up to which a start is a checkpoint of the same problem, not a warm start
from another: room for passes in float32 that round in another way."""


def begin(problem: Problem, start: Solution | None) -> tuple[Solution, float]:
    """Where to begin, and the seconds already spent.

    A checkpoint comes without its last record, which is taken again; of another problem's solution only the
    network counts.

    Raises
    ------
    InputError
        When the network does not fit the problem.
    """
    if start is None:
        return Solution.empty(problem.responses.dim, problem.responses.n_cells, problem.n_outputs), 0.0
    _check_shapes(problem, start)
    its_images = start.dual_point is None or start.dual_point.shape == problem.targets.shape
    if start.history and its_images:
        predictions = predicted(problem, start)
        last = start.history[-1]
        if math.isclose(problem.primal(predictions, start.weights), last["objective"], rel_tol=SAME_OBJECTIVE):
            kept = start.history[:-1]
            # The dual point is that of the last record, which is taken again, unless an earlier one was better.
            older = kept and kept[-1]["lower_bound"] == last["lower_bound"]
            return replace(start, history=kept, dual_point=start.dual_point if older else None), last["seconds"]
    return replace(start, history=[], rounds=0, dual_point=None), 0.0


def predicted(problem: Problem, solution: Solution) -> Tensor:
    """(n, c), without filters those of the best constant; however late it is: nothing is known of a network without."""
    if solution.n_filters == 0:
        return problem.constant_predictions()
    network = solution.filters, solution.weights, solution.intercept
    return problem.until(NEVER).responses.predict(*network)


def _check_shapes(problem: Problem, start: Solution) -> None:
    m, dim, cells, c = start.n_filters, problem.responses.dim, problem.responses.n_cells, problem.n_outputs
    expected = (m, dim), (m, cells, c), (c,)
    found = tuple(tuple(part.shape) for part in (start.filters, start.weights, start.intercept))
    if found != expected:
        needed, got = (", ".join(map(str, shapes)) for shapes in (expected, found))
        raise InputError(
            f"start must have filters (m, r), weights (m, P, c) and intercept (c,) that fit the problem, {needed}; got "
            f"{got}"
        )


def consult(
    problem: Problem,
    oracle: Oracle,
    solution: Solution,
    predictions: Tensor,
    *,
    n_filters: int,
    tol: float,
    seed: int,
    confirm: bool = True,
) -> tuple[OracleResult, Round, Tensor | None]:
    """The oracle's answer at `solution`, whose `predictions` (n, c) are given; the round's record, seconds open; Z.

    A proved bound stays when a later round proves a worse one: Z is the dual point of the best, None where nothing is
    proved. A sampled or heuristic bound counts for its round only, lest a wrong one stay for ever; a gap within `tol`
    that a heuristic one shows is believed only after persistent searches from other starts have not changed it, unless
    `confirm` is false.
    """
    objective = problem.primal(predictions, solution.weights)
    dual_point = problem.dual_point(predictions)
    where: dict[str, Any] = {"starts": solution.filters, "n_filters": n_filters}
    seed += 1000 * solution.rounds
    target = target_of(oracle, problem, dual_point, objective, tol)
    found = oracle(problem, dual_point, **where, target=target, seed=seed)
    claim = (1 - tol) * objective
    for attempt in range(CONFIRMATIONS if confirm else 0):
        if found.scope.proved or problem.dual(dual_point, found.g_max) < claim or problem.deadline.passed:
            break
        refuting = _refuting(problem, dual_point, claim, found.g_max)
        again = _persistent(oracle)(problem, dual_point, **where, target=refuting, seed=seed + 1 + attempt)
        found = _united(problem, found, again, n_filters)
    lower_bound = problem.dual(dual_point, found.g_max)
    best_point, proved_g = (dual_point, found.g_max) if found.scope.lasting else (None, None)
    if best_point is not None and solution.dual_point is not None and solution.history:
        last = solution.history[-1]
        if Scope(last["scope"]) is found.scope and last["lower_bound"] > lower_bound:
            lower_bound, best_point, proved_g = last["lower_bound"], solution.dual_point, last.get("proved_g")
    if binds(found.scope, oracle, solution.filters):
        check_proof(problem, lower_bound, objective, predictions, solution.weights)
    record = record_of(solution, objective, lower_bound, found.g_max, found.scope)
    if proved_g is not None:
        record["proved_g"] = proved_g
    return found, record, best_point


def record_of(
    solution: Solution, objective: float, lower_bound: float, g_max: float, scope: Scope, seconds: float = 0.0
) -> Round:
    """What the history keeps of a round that led to `solution`."""
    return {
        "round": solution.rounds,
        "objective": objective,
        "lower_bound": min(lower_bound, objective),
        "rel_gap": relative_gap(objective, lower_bound),
        "g_max": g_max,
        "scope": scope,
        "n_filters": solution.n_filters,
        "seconds": seconds,
    }


def _persistent(oracle: Oracle) -> Oracle:
    return replace(oracle, persistent=True) if isinstance(oracle, LocalOracle) else oracle


def _united(problem: Problem, one: OracleResult, other: OracleResult, n_filters: int) -> OracleResult:
    """What two heuristic searches at one point found."""
    filters, values = torch.cat([one.filters, other.filters]), torch.cat([one.values, other.values])
    best = Metric.of(problem.responses).distinct(filters, values, n_filters, DISTINCT)
    return replace(one, filters=filters[best], values=values[best])


def _refuting(problem: Problem, dual_point: Tensor, claim: float, g_max: float) -> float:
    """A g at which the dual value is just below the `claim`, as it is not at `g_max`; at most twice that, or 2β."""
    low, high = g_max, 2 * max(g_max, problem.beta)
    for _ in range(8):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if problem.dual(dual_point, middle) >= claim else (low, middle)
    return high
