"""The one loop of all solvers: ask the oracle, keep the record, see whether that is the end, take a step.

A solver is a record: its settings are its fields, `step` is what it does in a round, and the other methods of `Solver`
are what it may do in a way of its own. A round is a function of the solution before it and of the seed alone: a
training resumed from a checkpoint repeats exactly what the uninterrupted one would have done.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, ClassVar

from torch import Tensor

from convcvx.budget import Budget, Deadline, OutOfTime
from convcvx.oracles.base import Oracle
from convcvx.oracles.needs import Need, require
from convcvx.problem import Problem
from convcvx.solution import Callback, Round, Solution
from convcvx.solvers.rounds import begin, consult, predicted
from convcvx.terms.status import Status


@dataclass(frozen=True)
class Level:
    """What rounds are made on, until the deadline of the problem: all images, or before that a sample of them."""

    problem: Problem
    budget: Budget
    share: float | None = None
    """Of the time left as the training begins, what all levels up to this one may take; None for all of it."""

    @property
    def is_sample(self) -> bool:
        return self.share is not None

    def until(self, deadline: Deadline) -> Level:
        """The same level, of a training that has to be over by `deadline`."""
        return replace(self, problem=self.problem.until(deadline if self.share is None else deadline.share(self.share)))

    def limit(self, record: Round) -> Status | None:
        """What has run out with the round of `record`, if anything."""
        if self.problem.deadline.passed:
            return Status.TIME_LIMIT
        return Status.MAX_ROUNDS if record["round"] >= self.budget.max_rounds else None


@dataclass(frozen=True)
class Look:
    """What a look at a solution showed.

    Attributes
    ----------
    solution : Solution
    predictions : Tensor (n, c)
        Its own.
    record : Round
        Of this round, the seconds still open.
    dual_point : Tensor (n, c) or None
        Z of the best lower bound proved by now.
    candidates : Tensor (q, r)
        Filters that may join, best first.
    short : Status, optional
        What kept this round from doing all that it was to do.
    provisional : bool
        Whether the gap in the record is of a first look only, by which no training ends.
    """

    solution: Solution
    predictions: Tensor
    record: Round
    dual_point: Tensor | None
    candidates: Tensor
    short: Status | None = None
    provisional: bool = False

    def recorded(self, seconds: float, status: Status) -> Solution:
        """The solution with this round in its history; without filters it is the best constant."""
        intercept = self.solution.intercept if self.solution.n_filters else self.predictions[0].clone()
        record: Round = {**self.record, "seconds": seconds}
        history = [*self.solution.history, record]
        return replace(self.solution, intercept=intercept, history=history, status=status, dual_point=self.dual_point)


@dataclass(frozen=True)
class Solver:
    """Trains a network on a problem as far as a budget goes; the certificate is left to the caller."""

    name: ClassVar[str]
    """What `solver=` and `--solver` take."""
    needs: ClassVar[tuple[Need, ...]] = ()
    """What a problem must be like."""
    asks_oracle: ClassVar[bool] = True
    """Whether the bounds in its records are what an oracle proves of a dual point, rounding included."""
    resumes: ClassVar[bool] = True
    """Whether a solution to start from, such as a checkpoint, is of use."""

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
        """As `drive` says, with some `settings` changed."""
        return drive(replace(self, **settings), problem, oracle, budget, seed=seed, start=start, callback=callback)

    def suits(self, problem: Problem) -> str | None:
        """Why this is the solver for `problem`; None where others may be better."""
        return None

    def levels(self, problem: Problem, budget: Budget, start: Solution | None, seed: int) -> list[Level]:
        """Where rounds are made, one level after another; the last is the problem itself."""
        return [Level(problem, budget)]

    def enter(self, level: Level, solution: Solution) -> Solution:
        """What a solution of another problem, such as the level before, is on this one."""
        return solution

    def look(self, level: Level, oracle: Oracle, solution: Solution, predictions: Tensor, seed: int) -> Look:
        """What the oracle says of the solution at hand, and which filters it would add."""
        found, record, dual_point = consult(
            level.problem, oracle, solution, predictions, n_filters=1, tol=level.budget.tol, seed=seed
        )
        return Look(solution, predictions, record, dual_point, found.filters)

    def ended(self, level: Level, look: Look) -> Status | None:
        """Why this is the last round of the level; None if it is not."""
        # What a search that was cut short did not find is no sign of an optimum.
        believed = look.record["scope"].proved or not level.problem.deadline.passed
        if look.record["rel_gap"] <= level.budget.tol and believed and not look.provisional:
            return Status.CONVERGED
        return level.limit(look.record)

    def step(self, level: Level, look: Look, seed: int) -> tuple[Solution, Tensor]:
        """The solution after one more round, and its predictions (n, c)."""
        raise NotImplementedError(f"solver {self.name} ends with its first round")


def drive(
    solver: Solver,
    problem: Problem,
    oracle: Oracle,
    budget: Budget = Budget(),
    *,
    seed: int = 0,
    start: Solution | None = None,
    callback: Callback | None = None,
) -> Solution:
    """Train as far as `budget` goes, the gap as the oracle sees it.

    Parameters
    ----------
    solver : Solver
    problem : Problem
    oracle : Oracle
    budget : Budget
    seed : int
    start : Solution, optional
        Warm start or checkpoint; a checkpoint goes on with its round numbers and history.
    callback : callable, optional
        Called with the solution after every round; the training ends where it returns True.

    Raises
    ------
    InputError
        For a problem that lacks what the solver needs, or a `start` of other dimensions.
    """
    began = perf_counter()
    require(f"solver {solver.name}", solver.needs, problem)
    start = start if solver.resumes else None
    levels = solver.levels(problem, budget, start, seed)
    solution, earlier = begin(levels[0].problem, start)
    deadline, resumed = budget.deadline(problem.deadline, earlier), earlier > 0
    levels = [level.until(deadline) for level in levels]
    for level in levels:
        if not resumed:
            solution = solver.enter(level, solution)
        resumed = False
        predictions = predicted(level.problem, solution)
        while True:
            look = solver.look(level, oracle, solution, predictions, seed)
            end = solver.ended(level, look)
            status = Status.RUNNING if end is None or level is not levels[-1] else end
            solution = look.recorded(earlier + perf_counter() - began, status)
            if callback is not None and callback(solution) is True and status == Status.RUNNING:
                point = solution.dual_point if level is levels[-1] else None  # one of a sample proves nothing here
                return replace(solution, status=Status.CALLBACK, dual_point=point)
            if end is not None:
                break
            try:
                solution, predictions = solver.step(level, replace(look, solution=solution), seed)
            except OutOfTime:
                return replace(solution, status=Status.TIME_LIMIT)
    return solution
