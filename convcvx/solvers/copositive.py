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

from convcvx.budget import Budget
from convcvx.oracles.base import Oracle
from convcvx.oracles.copositive import CopositiveOracle
from convcvx.problem import Problem
from convcvx.solution import Callback, Solution
from convcvx.solvers.master import solve_master
from convcvx.solvers.rounds import begin, record_of
from convcvx.solvers.slide import slide
from convcvx.solvers.sparsify import sparsify

if TYPE_CHECKING:
    from convcvx.solvers.convex_programs import ProgramResult


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
    from convcvx.solvers.convex_programs import Cones, solve_program  # here: cvxpy is slow to import

    began = perf_counter()
    solution, earlier = begin(problem, start)
    cones = Cones.all(problem)
    accuracy = max(1e-3 * budget.tol, 1e-9)
    program = solve_program(problem, cones, backend=backend, tol=accuracy, time_limit=budget.time_limit)
    dual_point = problem.in_domain(program.dual_point)
    bound = CopositiveOracle()(
        problem, dual_point, starts=program.filters, n_filters=max(1, 2 * len(cones.cones)), seed=seed
    )
    solution = _polish(problem, solution, program, bound.filters, seed)
    kept = budget.room(0, solution.n_filters)
    cut = kept < solution.n_filters
    if cut:
        largest = solution.weights.flatten(1).norm(dim=1).argsort(descending=True)[:kept]
        solution = _fit(problem, solution, solution.filters[largest], None)
    predictions = problem.responses.predict(solution.filters, solution.weights, solution.intercept)
    objective, lower_bound = problem.primal(predictions, solution.weights), problem.dual(dual_point, bound.g_max)
    solution = replace(solution, rounds=1)
    seconds = earlier + perf_counter() - began
    record = record_of(solution, objective, lower_bound, bound.g_max, bound.scope, seconds)
    status = "converged" if record["rel_gap"] <= budget.tol else "max_filters" if cut else "relaxation_gap"
    history = [record | {"relaxation": program.value}]
    solution = replace(solution, history=history, status=status, dual_point=dual_point)
    if callback is not None:
        callback(solution)
    return solution


def _polish(problem: Problem, solution: Solution, program: ProgramResult, maximisers: Tensor, seed: int) -> Solution:
    """The program's network with optimal weights, slid if that lowers the objective, and made sparse.

    A factorisation may miss filters of the optimum; all of them maximise g at the program's dual point.
    """
    filters = torch.cat([solution.filters, program.filters, maximisers])
    idle = program.weights.new_zeros(len(maximisers), *program.weights.shape[1:])
    fitted = _fit(problem, solution, filters, torch.cat([solution.weights, program.weights, idle]))
    slid = slide(problem, fitted, seed, accuracy=1e-12)
    slid = _fit(problem, slid, slid.filters, slid.weights)
    best = min((fitted, slid), key=lambda network: _objective(problem, network))
    return sparsify(problem, best) if best.n_filters > problem.targets.numel() else best


def _fit(problem: Problem, solution: Solution, filters: Tensor, weights: Tensor | None) -> Solution:
    """The solution with `filters` and optimal weights, starting from `weights`."""
    result = solve_master(problem, filters, weights, solution.intercept, tol=1e-9)
    return solution.with_parameters(filters, result.weights, result.intercept)


def _objective(problem: Problem, solution: Solution) -> float:
    predictions = problem.responses.predict(solution.filters, solution.weights, solution.intercept)
    return problem.primal(predictions, solution.weights)
