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

from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import Tensor

from convcvx.budget import NEVER, Budget, OutOfTime
from convcvx.errors import InputError
from convcvx.oracles.base import Oracle
from convcvx.oracles.contradiction import binds, check_proof
from convcvx.oracles.needs import AVERAGES, DEGREE_ONE, ONE_SPACE, Need
from convcvx.oracles.pattern_cones import PatternCones
from convcvx.oracles.sampled import SampledOracle
from convcvx.problem import Problem
from convcvx.solution import Callback, Solution
from convcvx.solvers.loop import Level, Look, Solver, drive
from convcvx.solvers.master.table import solve_master
from convcvx.solvers.programs.gated import GatedResult, solve_gated
from convcvx.solvers.rounds import predicted, record_of
from convcvx.terms.names import N_GATES
from convcvx.terms.status import Status

NEGLIGIBLE = 1e-6
"""Share of the largest singular value of a gated network below which one is rounding."""


@dataclass(frozen=True)
class Gated(Solver):
    """A ReLU network by the convex program over sampled patterns.

    The patterns are those of the `oracle` if that is a `SampledOracle`, else `n_gates` drawn with `seed`; another
    oracle then judges the result, whose status is "sampled" when the sampled program is solved and the network is not.
    `start` is ignored: the program is convex. The objective in the history is that of the ReLU network; the first
    record also holds `gated_primal` and `gated_dual` of the gated program.
    """

    name: ClassVar[str] = "gated"
    needs: ClassVar[tuple[Need, ...]] = (DEGREE_ONE, AVERAGES, ONE_SPACE)
    asks_oracle: ClassVar[bool] = False
    resumes: ClassVar[bool] = False

    n_gates: int = N_GATES
    """Patterns to sample."""
    max_filters: int = 256
    """Filters that the decomposition hands on where the budget has no limit, the largest first: more only cost time."""
    relaxed: float = 0.5
    """Share of the time left that the gated program may take."""
    exact: float = 0.01
    """Share of tol to which weights are solved: they leave no gap of their own."""
    target: float = 0.1
    """Share of tol by which g may be above β: no filter is added for less."""
    asked: int = 64
    """Filters that the cones are asked for in a round."""
    patience: int = 5
    """Rounds within which the objective has to fall by `stall`."""
    stall: float = 1e-2
    """Share of tol times the objective: what is gained by less is not worth the rounds."""

    def __call__(
        self,
        problem: Problem,
        oracle: Oracle,
        budget: Budget = Budget(),
        *,
        seed: int = 0,
        start: Solution | None = None,
        callback: Callback | None = None,
        **settings: Any,
    ) -> Solution:
        """Solve the program; then ask the `oracle` what its network is worth, if that looks at other patterns."""
        solver = replace(self, **settings)
        sample = oracle if isinstance(oracle, SampledOracle) else SampledOracle(solver.n_gates, seed)
        sample = SampledOracle(seed=sample.seed, gates=sample.gates(problem.until(NEVER)))
        problem = problem.until(budget.deadline(problem.deadline))
        solution = drive(solver, problem, sample, budget, seed=seed, callback=callback)
        if isinstance(oracle, SampledOracle):
            return solution
        solution = _judged(problem, oracle, solution, budget.tol, seed)
        if callback is not None:
            callback(solution)
        return solution

    def look(self, level: Level, oracle: Oracle, solution: Solution, predictions: Tensor, seed: int) -> Look:
        """What the sampled patterns say; in the first round after the gated program."""
        if not isinstance(oracle, SampledOracle):
            raise InputError(f"solver gated needs a SampledOracle in its rounds; got {oracle.name}; call it, not drive")
        problem, budget, relaxed = level.problem, level.budget, None
        if not solution.history:
            gates = oracle.gates(problem)
            try:
                relaxed = solve_gated(problem.until(problem.deadline.share(self.relaxed)), gates, tol=budget.tol)
                solution = decompose(problem, gates, relaxed, budget.max_filters or self.max_filters)
            except OutOfTime:
                pass
            solution, predictions = self._optimal(level, solution)
        dual_point = problem.dual_point(predictions)
        target = problem.beta * (1 + self.target * budget.tol)
        found = oracle(problem, dual_point, n_filters=self.asked, target=target)
        # The gated optimum is a lower bound of the same program, whatever this dual point gives; no loss is negative.
        proved = relaxed.dual if relaxed is not None else 0.0
        if solution.history:
            proved = solution.history[0].get("gated_dual", 0.0)
        lower_bound = max(problem.dual(dual_point, found.g_max), proved)
        record = record_of(
            solution, problem.primal(predictions, solution.weights), lower_bound, found.g_max, found.scope
        )
        if relaxed is not None:
            record["gated_primal"], record["gated_dual"] = relaxed.primal, relaxed.dual
            record["gated_iterations"] = relaxed.iterations
        violating = found.filters[found.values > target]
        violating = violating[: budget.room(solution.n_filters, len(violating))]
        return Look(solution, predictions, record, None, violating)

    def ended(self, level: Level, look: Look) -> Status | None:
        """As for all solvers; or for want of filters or progress."""
        if (status := super().ended(level, look)) is not None:
            return status
        if not len(look.candidates):
            return Status.STALLED if level.budget.room(look.solution.n_filters, 1) else Status.MAX_FILTERS
        record = look.record
        falls = [earlier["objective"] - record["objective"] for earlier in look.solution.history[-self.patience :]]
        slow = len(falls) == self.patience and falls[0] <= self.stall * level.budget.tol * record["objective"]
        return Status.STALLED if slow else None

    def step(self, level: Level, look: Look, seed: int) -> tuple[Solution, Tensor]:
        """Add the filters of the cones, at their optimal weights."""
        solution, new = look.solution, look.candidates
        filters = torch.cat([solution.filters, new])
        weights = torch.cat([solution.weights, solution.weights.new_zeros(len(new), *solution.weights.shape[1:])])
        solution = replace(solution, filters=filters, weights=weights, rounds=solution.rounds + 1)
        return self._optimal(level, solution)

    def _optimal(self, level: Level, solution: Solution) -> tuple[Solution, Tensor]:
        """The same filters at their optimal weights, and the predictions with them."""
        problem, tol = level.problem, self.exact * level.budget.tol
        if solution.n_filters:
            try:
                result = solve_master(problem, solution.filters, solution.weights, solution.intercept, tol=tol)
                solution = solution.with_parameters(solution.filters, result.weights, result.intercept)
            except OutOfTime:
                pass  # weights that are not optimal are weights
        return solution, predicted(problem, solution)


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


def _judged(problem: Problem, oracle: Oracle, solution: Solution, tol: float, seed: int) -> Solution:
    """One more record by the oracle that was asked for: the sampled gap is no statement about the network."""
    began = perf_counter()
    predictions = predicted(problem, solution)
    dual_point = problem.dual_point(predictions)
    target = problem.beta * (1 + 0.5 * tol)
    found = oracle(problem, dual_point, starts=solution.filters, n_filters=1, seed=seed, target=target)
    objective, lower_bound = problem.primal(predictions, solution.weights), problem.dual(dual_point, found.g_max)
    if binds(found.scope, oracle, solution.filters):
        check_proof(problem, lower_bound, objective, predictions, solution.weights)
    seconds = solution.history[-1]["seconds"] + perf_counter() - began
    record = record_of(solution, objective, lower_bound, found.g_max, found.scope, seconds)
    status = solution.status
    if record["rel_gap"] <= tol:
        status = Status.CONVERGED
    elif status == Status.CONVERGED:
        status = Status.SAMPLED
    return replace(solution, history=[*solution.history, record], status=status)


gated = Gated()
