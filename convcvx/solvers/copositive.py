"""The copositive relaxation as a solver: one convex program over all activation cones, its network, its bound.

The program (`solvers.programs.convex`) yields filters by a semi-nonnegative factorisation of each U_D; the master and
one slide polish them, and the objective reported is that of the real network. The lower bound is not the backend's
word: the copositive oracle bounds max g at the program's dual point anew, and `Problem.dual` scales it. The gap between
the two is how far the relaxation is from tight; it is tight in rank ≤ 2, for a single output without pooling cells, and
often beyond. Size is the limit: cells of the arrangement times images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from convcvx.budget import OutOfTime
from convcvx.oracles.base import Oracle, OracleResult
from convcvx.oracles.contradiction import check_proof
from convcvx.oracles.copositive import CopositiveOracle
from convcvx.oracles.needs import AVERAGES, CONIC_LOSS, ONE_SPACE, RECTIFIED, Need
from convcvx.problem import Problem
from convcvx.solution import Solution
from convcvx.solvers.loop import Level, Look, Solver
from convcvx.solvers.master.table import solve_master
from convcvx.solvers.programs.cones import Cones
from convcvx.solvers.rounds import predicted, record_of
from convcvx.solvers.slide.joint import slide
from convcvx.solvers.sparsify import sparsify
from convcvx.terms.scope import Scope
from convcvx.terms.status import Status

if TYPE_CHECKING:
    from convcvx.solvers.programs.convex import ProgramResult

ACCURACY = 1e-9
"""Gap of the weights of the network at hand, and of the program at least: all that an interior point gives."""
SLID = 1e-12
"""Fall of the objective in a step below which the slide ends: nothing follows that could do better."""


@dataclass(frozen=True)
class Copositive(Solver):
    """A single round: the program, its network, its bound.

    The `oracle` is not asked: the bound is the relaxation's own. Filters of `start` join those of the program. Status
    "relaxation_gap" says that the relaxation is not tight to the budget's `tol`, by the `rel_gap` of the record, whose
    `relaxation` is the value that the backend reported. A problem with too many activation cones is an `InputError`.
    """

    name: ClassVar[str] = "copositive"
    needs: ClassVar[tuple[Need, ...]] = (AVERAGES, RECTIFIED, CONIC_LOSS, ONE_SPACE)
    asks_oracle: ClassVar[bool] = False

    backend: str = "clarabel"
    """What cvxpy solves the program with: clarabel, an interior point, or scs, ADMM."""
    program: float = 0.7
    """Share of the time left that the program may take: its network is to be polished, its bound to be proved."""
    exact: float = 1e-3
    """Share of tol that is the backend's own tolerance: its network is to leave no gap of its own."""

    def look(self, level: Level, oracle: Oracle, solution: Solution, predictions: Tensor, seed: int) -> Look:
        """Solve the program; the record is of its network."""
        from convcvx.solvers.programs.convex import solve_program  # here: cvxpy is slow to import

        problem, budget = level.problem, level.budget
        dual_point, bound = problem.dual_point(predictions), OracleResult.unfinished(problem, Scope.GLOBAL, 0.0)
        value, short = None, Status.RELAXATION_GAP
        try:
            cones = Cones.all(problem)
            in_time = problem.until(problem.deadline.share(self.program))
            accuracy = max(self.exact * budget.tol, ACCURACY)
            program = solve_program(in_time, cones, backend=self.backend, tol=accuracy)
            dual_point, value = problem.in_domain(program.dual_point), program.value
            bound = CopositiveOracle()(
                problem, dual_point, starts=program.filters, n_filters=max(1, 2 * len(cones.cones)), seed=seed
            )
            solution = _polish(problem, solution, program, bound.filters, seed)
            if (kept := budget.room(0, solution.n_filters)) < solution.n_filters:
                short = Status.MAX_FILTERS
                largest = solution.weights.flatten(1).norm(dim=1).argsort(descending=True)[:kept]
                solution = _fit(problem, solution, solution.filters[largest], None)
        except OutOfTime:
            short = Status.TIME_LIMIT
        predictions = predicted(problem, solution)
        objective, lower_bound = problem.primal(predictions, solution.weights), problem.dual(dual_point, bound.g_max)
        check_proof(problem, lower_bound, objective, predictions, solution.weights)
        solution = replace(solution, rounds=1, history=[])
        record = record_of(solution, objective, lower_bound, bound.g_max, bound.scope)
        if value is not None:
            record["relaxation"] = value
        return Look(solution, predictions, record, dual_point, solution.filters[:0], short)

    def ended(self, level: Level, look: Look) -> Status | None:
        """The first round is the last."""
        if look.record["rel_gap"] <= level.budget.tol:
            return Status.CONVERGED
        return Status.TIME_LIMIT if level.problem.deadline.passed else look.short


def _polish(problem: Problem, solution: Solution, program: ProgramResult, maximisers: Tensor, seed: int) -> Solution:
    """The program's network with optimal weights, slid if that lowers the objective, and made sparse.

    A factorisation may miss filters of the optimum; all of them maximise g at the program's dual point.
    """
    filters = torch.cat([solution.filters, program.filters, maximisers])
    idle = program.weights.new_zeros(len(maximisers), *program.weights.shape[1:])
    fitted = _fit(problem, solution, filters, torch.cat([solution.weights, program.weights, idle]))
    try:
        slid = slide(problem, fitted, seed, accuracy=SLID)
        slid = _fit(problem, slid, slid.filters, slid.weights)
        best = min((fitted, slid), key=lambda network: _objective(problem, network))
    except OutOfTime:
        best = fitted
    return sparsify(problem, best) if best.n_filters > problem.targets.numel() else best


def _fit(problem: Problem, solution: Solution, filters: Tensor, weights: Tensor | None) -> Solution:
    """The solution with `filters` and optimal weights, starting from `weights`."""
    result = solve_master(problem, filters, weights, solution.intercept, tol=ACCURACY)
    return solution.with_parameters(filters, result.weights, result.intercept)


def _objective(problem: Problem, solution: Solution) -> float:
    return problem.primal(predicted(problem, solution), solution.weights)


copositive = Copositive()
