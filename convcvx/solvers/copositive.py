"""The copositive relaxation as a solver: one convex program over all activation cones, its network, its bound.

The program (`convex_programs`) yields filters by a semi-nonnegative factorisation of each U_D; the master and one slide
polish them, and the objective reported is that of the real network. The lower bound is not the backend's word: the
copositive oracle bounds max g at the program's dual point anew, and `Problem.dual` scales it. The gap between the two
is how far the relaxation is from tight; it is tight in rank ≤ 2, for a single output without pooling cells, and often
beyond. Size is the limit: cells of the arrangement times images.
"""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from convcvx.budget import Budget, OutOfTime
from convcvx.oracles.base import Oracle, OracleResult
from convcvx.oracles.copositive import CopositiveOracle
from convcvx.problem import Problem
from convcvx.solution import Callback, Solution
from convcvx.solvers.master.table import solve_master
from convcvx.solvers.rounds import begin, predicted, record_of
from convcvx.solvers.slide.joint import slide
from convcvx.solvers.sparsify import sparsify

if TYPE_CHECKING:
    from convcvx.solvers.programs.convex import ProgramResult


PROGRAM = 0.7
"""Share of the time left that the program may take: its network is to be polished, its bound to be proved."""


def copositive(
    problem: Problem,
    oracle: Oracle,
    budget: Budget = Budget(),
    *,
    seed: int = 0,
    start: Solution | None = None,
    callback: Callback | None = None,
    backend: str = "clarabel",
) -> Solution:
    """Train by the relaxation, in a single round; parameters as for the other solvers.

    `oracle` is not asked: the bound is the relaxation's own. Filters of `start` join those of the program. Status
    "relaxation_gap" says that the relaxation is not tight to `budget.tol`, by the `rel_gap` of the record, whose
    `relaxation` is the value that the backend reported.

    Parameters
    ----------
    backend : {"clarabel", "scs"}
        What cvxpy solves the program with.

    Raises
    ------
    InputError
        For a problem with too many activation cones.
    """
    from convcvx.solvers.programs.convex import Cones, solve_program  # here: cvxpy is slow to import

    began = perf_counter()
    solution, earlier = begin(problem, start)
    problem = problem.until(budget.deadline(problem.deadline, earlier))
    dual_point = problem.dual_point(_predictions(problem, solution))
    bound, extra, status = OracleResult.unfinished(problem, "global", 0.0), {}, "relaxation_gap"
    try:
        cones = Cones.all(problem)
        accuracy = max(1e-3 * budget.tol, 1e-9)
        program = solve_program(problem.until(problem.deadline.share(PROGRAM)), cones, backend=backend, tol=accuracy)
        dual_point, extra = problem.in_domain(program.dual_point), {"relaxation": program.value}
        bound = CopositiveOracle()(
            problem, dual_point, starts=program.filters, n_filters=max(1, 2 * len(cones.cones)), seed=seed
        )
        solution = _polish(problem, solution, program, bound.filters, seed)
        kept = budget.room(0, solution.n_filters)
        if kept < solution.n_filters:
            status = "max_filters"
            largest = solution.weights.flatten(1).norm(dim=1).argsort(descending=True)[:kept]
            solution = _fit(problem, solution, solution.filters[largest], None)
    except OutOfTime:
        status = "time_limit"
    predictions = _predictions(problem, solution)
    if solution.n_filters == 0:
        solution = replace(solution, intercept=predictions[0].clone())
    objective, lower_bound = problem.primal(predictions, solution.weights), problem.dual(dual_point, bound.g_max)
    solution = replace(solution, rounds=1)
    seconds = earlier + perf_counter() - began
    record = record_of(solution, objective, lower_bound, bound.g_max, bound.scope, seconds)
    status = "converged" if record["rel_gap"] <= budget.tol else "time_limit" if problem.deadline.passed else status
    solution = replace(solution, history=[record | extra], status=status, dual_point=dual_point)
    if callback is not None:
        callback(solution)
    return solution


def _predictions(problem: Problem, solution: Solution) -> Tensor:
    return predicted(problem, solution) if solution.n_filters else problem.constant_predictions()


def _polish(problem: Problem, solution: Solution, program: ProgramResult, maximisers: Tensor, seed: int) -> Solution:
    """The program's network with optimal weights, slid if that lowers the objective, and made sparse.

    A factorisation may miss filters of the optimum; all of them maximise g at the program's dual point.
    """
    filters = torch.cat([solution.filters, program.filters, maximisers])
    idle = program.weights.new_zeros(len(maximisers), *program.weights.shape[1:])
    fitted = _fit(problem, solution, filters, torch.cat([solution.weights, program.weights, idle]))
    try:
        slid = slide(problem, fitted, seed, accuracy=1e-12)
        slid = _fit(problem, slid, slid.filters, slid.weights)
        best = min((fitted, slid), key=lambda network: _objective(problem, network))
    except OutOfTime:
        best = fitted
    return sparsify(problem, best) if best.n_filters > problem.targets.numel() else best


def _fit(problem: Problem, solution: Solution, filters: Tensor, weights: Tensor | None) -> Solution:
    """The solution with `filters` and optimal weights, starting from `weights`."""
    result = solve_master(problem, filters, weights, solution.intercept, tol=1e-9)
    return solution.with_parameters(filters, result.weights, result.intercept)


def _objective(problem: Problem, solution: Solution) -> float:
    return problem.primal(predicted(problem, solution), solution.weights)
