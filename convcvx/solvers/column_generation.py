"""Column generation: filters of the oracle's choice, as they are, and the optimal weights over all of them.

A round asks the oracle for filters with g(u) > β and solves the master over old and new ones. No filter slides: where
they are to belong to a family, such as that of ternary filters, each stays in it, and the rounds end at the optimum
over the family (Bach 2017, sec. 2.5, with the weights fully corrected).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from convcvx.budget import OutOfTime
from convcvx.problem import Problem
from convcvx.responses.passes import Responses
from convcvx.solution import Solution
from convcvx.solvers.loop import Level, Look
from convcvx.solvers.master.table import solve_master
from convcvx.solvers.rounds import predicted
from convcvx.solvers.sliding_frank_wolfe import SlidingFrankWolfe


@dataclass(frozen=True)
class ColumnGeneration(SlidingFrankWolfe):
    """Sliding Frank-Wolfe that does not slide: samples, candidates and its end are those of that."""

    name: ClassVar[str] = "column-generation"

    fewest: int = 64
    """A scan costs more than the weights of many filters: those that turn out to be of no use are dropped."""
    same: float = 1 - 1e-12
    """Cosine from which on a candidate is a filter that the network has."""

    def suits(self, problem: Problem) -> str | None:
        """Nowhere by itself: filters that may slide reach the optimum with fewer."""
        return None

    def step(self, level: Level, look: Look, seed: int) -> tuple[Solution, Tensor]:
        """The objective does not rise."""
        problem, solution, record = level.problem, look.solution, look.record
        new = self._new(look, problem.responses)
        filters = torch.cat([solution.filters, new])
        weights = torch.zeros(len(filters), *solution.weights.shape[1:], dtype=torch.float64)
        weights[: solution.n_filters] = solution.weights
        # Where no filter is missing, weights are what keeps the gap open.
        wanted = max(level.budget.tol, record["rel_gap"]) if len(new) else level.budget.tol
        tol = max(self.exact * wanted, self.finest)
        try:
            result = solve_master(problem, filters, weights, solution.intercept, tol=tol)
        except OutOfTime:
            return replace(solution, rounds=solution.rounds + 1), look.predictions
        if result.objective <= record["objective"]:
            solution = solution.with_parameters(filters, result.weights, result.intercept)
        solution = replace(solution, rounds=solution.rounds + 1)
        return solution, predicted(problem, solution)

    def _new(self, look: Look, responses: Responses) -> Tensor:
        """The candidates that the network does not have."""
        if look.solution.n_filters == 0:
            return look.candidates
        return look.candidates[(responses.alike(look.candidates @ look.solution.filters.T) < self.same).all(dim=1)]


column_generation = ColumnGeneration()
