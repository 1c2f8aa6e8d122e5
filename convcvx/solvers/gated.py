"""Sampled convex programs: the gated program first, then the ReLU program over the same activation patterns.

1. The gated program of the sampled patterns is convex for any number of outputs; its optimum bounds the sampled ReLU
   program from below, because it drops the cones K_s = {u : (2 D_s - I) X u >= 0}.
2. *Cone decomposition* (Mishkin, Sahiner, Pilanci 2022): each singular vector of W_s is u = u₊ - u₋ with both
   in K_s, where gate and ReLU agree: two ReLU neurons that predict what the gated one does, at a higher norm.
3. The master re-optimises the output weights, and conditional gradients add the best filters of the cones until the
   duality gap of the ReLU program closes. With one cell and one output the oracle is a projection and the gap does
   close; otherwise the maximum over a cone is not convex, the bound drops it, and part of the gap stays.

With many patch rows a cone is a sliver around its gate: what is left of the ReLU program is then the choice among
random filters, and sliding Frank-Wolfe the better solver.
"""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter

import torch
from torch import Tensor

from convcvx.budget import NEVER, Budget, Deadline, OutOfTime
from convcvx.oracles.base import Oracle
from convcvx.oracles.pattern_cones import PatternCones
from convcvx.oracles.sampled import N_GATES, SampledOracle
from convcvx.problem import Problem
from convcvx.solution import Callback, Solution
from convcvx.solvers.master.table import solve_master
from convcvx.solvers.programs.gated import GatedResult, solve_gated
from convcvx.solvers.rounds import predicted, record_of

MAX_FILTERS = 256
"""Filters that the decomposition hands to the master, those of the largest singular values first."""
RELAXED = 0.5
"""Share of the time left that the gated program may take."""
NEGLIGIBLE = 1e-6
"""Singular values below this share of the largest are rounding."""


def gated(
    problem: Problem,
    oracle: Oracle,
    budget: Budget = Budget(),
    *,
    seed: int = 0,
    start: Solution | None = None,
    callback: Callback | None = None,
    n_gates: int = N_GATES,
) -> Solution:
    """Train a ReLU network by the convex program over sampled patterns.

    Parameters as for `sliding_frank_wolfe`. The patterns are those of `oracle` if that is a `SampledOracle`, else
    `n_gates` drawn with `seed`; another oracle then judges the result, whose status is "sampled" when the sampled
    program is solved and the network is not. `start` is ignored: the program is convex.

    Returns
    -------
    Solution
        A ReLU network; the objective in its history is the network's own. The first record also holds
        `gated_primal` and `gated_dual` of the gated program.
    """
    began = perf_counter()
    sample = oracle if isinstance(oracle, SampledOracle) else SampledOracle(n_gates, seed)
    gates = sample.gates(problem.until(NEVER))
    sample = SampledOracle(seed=sample.seed, gates=gates)
    problem = problem.until(budget.deadline(problem.deadline))
    solution = Solution.empty(problem.responses.dim, problem.responses.n_cells, problem.n_outputs)
    proved, extra = 0.0, {}  # no loss is negative
    try:
        relaxed = solve_gated(problem.until(problem.deadline.share(RELAXED)), gates, tol=budget.tol)
        proved = relaxed.dual
        extra = {"gated_primal": relaxed.primal, "gated_dual": relaxed.dual, "gated_iterations": relaxed.iterations}
        solution = decompose(problem, gates, relaxed, budget.max_filters or MAX_FILTERS)
    except OutOfTime:
        pass
    while True:
        solution, predictions = _master(problem, solution, 0.01 * budget.tol)
        dual_point = problem.dual_point(predictions)
        target = problem.beta * (1 + 0.1 * budget.tol)
        found = sample(problem, dual_point, n_filters=64, target=target)
        # The gated optimum is a lower bound of the same program, whatever this dual point gives.
        lower_bound = max(problem.dual(dual_point, found.g_max), proved)
        objective = problem.primal(predictions, solution.weights)
        record = record_of(solution, objective, lower_bound, found.g_max, found.scope, perf_counter() - began) | extra
        violating = found.filters[found.values > target]
        violating = violating[: budget.room(solution.n_filters, len(violating))]
        solution = replace(solution, history=[*solution.history, record])
        status = _status(record, solution, violating, budget, problem.deadline)
        solution = replace(solution, status=status)
        if status != "running":
            break
        if callback is not None:
            callback(solution)
        filters = torch.cat([solution.filters, violating])
        weights = torch.cat([solution.weights, solution.weights.new_zeros(len(violating), *solution.weights.shape[1:])])
        solution = replace(solution, filters=filters, weights=weights, rounds=solution.rounds + 1)
        extra = {}
    if not isinstance(oracle, SampledOracle):
        solution = _judged(problem, oracle, solution, budget.tol, seed, began)
    if callback is not None:
        callback(solution)
    return solution


def decompose(problem: Problem, gates: Tensor, relaxed: GatedResult, max_filters: int) -> Solution:
    """A ReLU network that predicts what the gated network does, but for what `max_filters` leave no room for.

    A component gives up to two filters. Those of the largest singular values come first, then the largest weights.
    """
    vectors, sizes, outputs = torch.linalg.svd(relaxed.weights.flatten(2), full_matrices=False)
    solution = Solution.empty(problem.responses.dim, problem.responses.n_cells, problem.n_outputs)
    kept = (sizes > NEGLIGIBLE * float(sizes.max())) if sizes.numel() else sizes > 0
    which = kept.nonzero()[sizes[kept].argsort(descending=True)][: -(-max_filters // 2)]
    if not len(which):
        return replace(solution, intercept=relaxed.intercept)
    patterns, place = which[:, 0].unique(return_inverse=True)
    width = int(which[:, 1].max()) + 1
    cones = PatternCones(problem.responses, gates[patterns])
    plus, minus = cones.split(vectors[patterns].transpose(1, 2)[:, :width])
    weights = (outputs * sizes[..., None])[which[:, 0], which[:, 1]]
    weights = weights.unflatten(1, (-1, problem.n_outputs))
    filters = torch.cat([plus[place, which[:, 1]], minus[place, which[:, 1]]])
    solution = solution.with_parameters(filters, torch.cat([weights, -weights]), relaxed.intercept)
    largest = solution.weights.flatten(1).norm(dim=1).argsort(descending=True)[:max_filters].sort().values
    return replace(solution, filters=solution.filters[largest], weights=solution.weights[largest])


def _master(problem: Problem, solution: Solution, tol: float) -> tuple[Solution, Tensor]:
    """The optimal weights of the filters at hand, and the predictions with them."""
    if solution.n_filters:
        try:
            result = solve_master(problem, solution.filters, solution.weights, solution.intercept, tol=tol)
            solution = solution.with_parameters(solution.filters, result.weights, result.intercept)
        except OutOfTime:
            pass  # weights that are not optimal are weights
    if not solution.n_filters:
        predictions = problem.constant_predictions()
        return replace(solution, intercept=predictions[0].clone()), predictions
    return solution, predicted(problem, solution)


def _status(record: dict, solution: Solution, violating: Tensor, budget: Budget, deadline: Deadline) -> str:
    """ "running", or why to stop."""
    if status := budget.ends(record, deadline):
        return status
    if not len(violating):
        return "stalled" if budget.room(solution.n_filters, 1) else "max_filters"
    falls = [earlier["objective"] - record["objective"] for earlier in solution.history[-6:-1]]
    slow = len(falls) == 5 and falls[0] <= 1e-2 * budget.tol * record["objective"]
    return "stalled" if slow else "running"


def _judged(problem: Problem, oracle: Oracle, solution: Solution, tol: float, seed: int, began: float) -> Solution:
    """One more record by the oracle that was asked for: the sampled gap is no statement about the network."""
    predictions = predicted(problem, solution)
    if not solution.n_filters:
        predictions = problem.constant_predictions()
    dual_point = problem.dual_point(predictions)
    target = problem.beta * (1 + 0.5 * tol)
    found = oracle(problem, dual_point, starts=solution.filters, n_filters=1, seed=seed, target=target)
    objective, lower_bound = problem.primal(predictions, solution.weights), problem.dual(dual_point, found.g_max)
    record = record_of(solution, objective, lower_bound, found.g_max, found.scope, perf_counter() - began)
    status = solution.status
    if record["rel_gap"] <= tol:
        status = "converged"
    elif status == "converged":
        status = "sampled"
    return replace(solution, history=[*solution.history, record], status=status)
