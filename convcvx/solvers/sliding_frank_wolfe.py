"""Sliding Frank-Wolfe: neurons on demand (Denoyelle, Duval, Peyré and Soubies 2019).

A round asks the oracle for filters with g(u) > β, solves the master over old and new filters, slides all of them
jointly, solves the master again, merges what coincides and drops what is zero. The objective never rises. A round
is a function of the solution before it and of the seed alone: a run resumed from a checkpoint repeats exactly
what the uninterrupted one would have done.

On many images the filters are first looked for on a sample of them, then on a larger one: a sample tells where filters
belong at a fraction of the cost, as long as a round gains more than what sampling hides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor

from convcvx.budget import Budget, OutOfTime
from convcvx.oracles.base import Oracle, OracleResult
from convcvx.problem import Problem
from convcvx.solution import Callback, Solution
from convcvx.solvers.master.table import solve_master
from convcvx.solvers.rounds import begin, consult, predicted
from convcvx.solvers.slide.joint import slide

SAMPLE_FACTOR, SAMPLE_SIZE = 4, 2000
"""Each sample is so many times smaller than the next, the last than the data; none has fewer images than this."""
SAMPLE_ROUNDS, SAMPLE_TOL, SAMPLE_TIME = 8, 0.03, 0.5
"""Rounds on a sample at most, the gap to which they could lead, and the share of the time that all samples may take."""
SAMPLE_NOISE = 2.0
"""Standard errors of the objective, as an estimate of that on all images, that a round on a sample has to gain."""
REFIT_TOL = 1e-3
"""Gap of the weights with which filters go over to other images or another β."""
MERGE_COSINE = 1 - 1e-9
"""Filters closer than this are tried as one; the merge stands if the objective does not rise."""
STALL, PATIENCE = 1e-2, 3
"""Progress is a fall of the objective by this share of the gap, or half the gap, within this many rounds."""
FULL, STALL_FULL, FULL_STEPS = 0.75, 1e-1, 1000
"""With this share of the filter budget in use, each round must lower the objective by this share of the gap, and on all
images slides for so many steps at least: filters that cannot be many have to be good."""


def sliding_frank_wolfe(
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
    problem : Problem
    oracle : Oracle
    budget : Budget
    seed : int
    start : Solution, optional
        Warm start or checkpoint; a checkpoint goes on with its round numbers and history.
    callback : callable, optional
        Called with the solution after every round.
    """
    began = perf_counter()
    levels = _levels(problem, start, seed)
    solution, earlier = begin(levels[0], start)
    deadline = budget.deadline(problem.deadline, earlier)
    rehearsal = deadline.share(SAMPLE_TIME)
    resumed = earlier > 0
    for images in levels:
        sampled = images is not problem
        level = images.until(rehearsal if sampled else deadline)
        if not resumed:
            solution = _refit(level, solution)
        resumed = False
        allowed = _on_sample(budget) if sampled else budget
        while True:
            predictions = predicted(level, solution)
            if solution.n_filters == 0:
                predictions = level.constant_predictions()
                solution = replace(solution, intercept=predictions[0].clone())
            # As many as there are: growing with the network, so that few rounds suffice.
            wanted = max(1, budget.room(solution.n_filters, max(16, solution.n_filters)))
            found, record, point = consult(
                level, oracle, solution, predictions, n_filters=wanted, tol=allowed.tol, seed=seed, confirm=not sampled
            )
            record["seconds"] = earlier + perf_counter() - began
            if sampled:
                record["images"], status = level.n, "running"
                done = _sample_spent(record, solution, level, predictions, allowed)
            else:
                status = _status(record, solution, allowed, level)
                done = status != "running"
            solution = replace(solution, history=[*solution.history, record], status=status, dual_point=point)
            if callback is not None:
                callback(solution)
            if done:
                break
            solution = _round(level, solution, found, allowed, seed)
    return solution


def _levels(problem: Problem, start: Solution | None, seed: int) -> list[Problem]:
    """Samples to begin with, smallest first, and the problem itself, from where `start` left off."""
    sizes = [problem.n]
    while sizes[0] // SAMPLE_FACTOR >= SAMPLE_SIZE:
        sizes.insert(0, sizes[0] // SAMPLE_FACTOR)
    sizes = [size for size in sizes[:-1] if size <= problem.largest_sample] + [problem.n]
    if start is not None:
        reached = start.history[-1].get("images", problem.n) if start.history else problem.n
        sizes = [size for size in sizes if size >= reached]
    order = torch.randperm(problem.n, generator=torch.Generator().manual_seed(seed))
    return [problem.sample(order[:size].sort().values) for size in sizes[:-1]] + [problem]


def _refit(problem: Problem, solution: Solution) -> Solution:
    """The weights that the filters of another problem have on this one: with stale ones an oracle is led astray."""
    solution = replace(solution, history=[], rounds=0, status="running", dual_point=None)
    if solution.n_filters == 0:
        return solution
    try:
        return _master(problem, solution, solution.filters, REFIT_TOL)[1]
    except OutOfTime:
        return solution


def _on_sample(budget: Budget) -> Budget:
    """What rounds on a sample may use of it."""
    return replace(budget, tol=SAMPLE_TOL, max_rounds=min(budget.max_rounds, SAMPLE_ROUNDS))


def _sample_spent(record: dict, solution: Solution, sample: Problem, predictions: Tensor, budget: Budget) -> bool:
    """Whether another round on a sample would be wasted, as sampling hides what it gains."""
    if budget.exhausted(record, sample.deadline):
        return True
    losses = sample.loss.value(predictions, sample.targets)
    noise = SAMPLE_NOISE * float(losses.std()) / sample.n**0.5
    gain = solution.history[-1]["objective"] - record["objective"] if solution.history else float("inf")
    return min(gain, record["objective"] - record["lower_bound"]) <= noise


def _nearly_full(solution: Solution, budget: Budget) -> bool:
    return budget.max_filters is not None and solution.n_filters >= FULL * budget.max_filters


def _status(record: dict, solution: Solution, budget: Budget, problem: Problem) -> str:
    """ "running", or why to stop."""
    if status := budget.ends(record, problem.deadline):
        return status
    gap = record["rel_gap"] * record["objective"]
    falls = [earlier["objective"] - record["objective"] for earlier in solution.history[-PATIENCE:]]
    if falls and _nearly_full(solution, budget) and falls[-1] <= STALL_FULL * gap:
        return "max_filters"
    if len(falls) == PATIENCE and falls[0] <= STALL * gap:
        halved = record["rel_gap"] <= 0.5 * solution.history[-PATIENCE]["rel_gap"]
        return "running" if halved else "stalled"
    return "running"


def _round(problem: Problem, solution: Solution, found: OracleResult, budget: Budget, seed: int) -> Solution:
    """One round from `solution`, whose last record says how far it is; the objective does not rise."""
    record = solution.history[-1]
    objective, gap = record["objective"], record["objective"] - record["lower_bound"]
    # Far from the optimum the gap says how exact masters need to be; but the lower bound can lag behind a network that
    # is nearly optimal, and a master shows no fall of the objective that is smaller than its own error.
    fall = _last_fall(solution.history)
    accuracy = max(0.01 * budget.tol, min(0.01 * gap / objective, 0.1 * fall), 1e-12)
    best = _Best(objective, solution)
    violating = found.filters[found.values > problem.beta]
    violating = violating[: budget.room(solution.n_filters, len(violating))]
    # Rough weights are enough for new filters to slide from.
    rough = max(accuracy, min(0.1 * gap / objective, fall))
    steps = FULL_STEPS if _nearly_full(solution, budget) and "images" not in record else 0
    try:
        best.offer(*_master(problem, solution, torch.cat([solution.filters, violating]), rough))
        slid = slide(problem, best.solution, seed + 1000 * solution.rounds, accuracy=1e-3 * gap, steps=steps)
        best.offer(*_master(problem, slid, slid.filters, accuracy))
        merged = _merge(best.solution)
        if merged.n_filters < best.solution.n_filters:
            best.offer(*_master(problem, merged, merged.filters, accuracy), slack=1e-12)
    except OutOfTime:
        pass  # the best network until then is what the round has led to
    return replace(best.solution, rounds=solution.rounds + 1)


def _last_fall(history: list[dict]) -> float:
    """Fall of the objective in the last round, relative; 1 before there was one."""
    if len(history) < 2:
        return 1.0
    before, now = (record["objective"] for record in history[-2:])
    return (before - now) / max(before, 1e-300)


@dataclass
class _Best:
    """The best solution of a round so far."""

    objective: float
    solution: Solution

    def offer(self, objective: float, solution: Solution, slack: float = 0.0) -> None:
        if objective <= self.objective * (1 + slack):
            self.objective, self.solution = objective, solution


def _master(problem: Problem, solution: Solution, filters: Tensor, tol: float) -> tuple[float, Solution]:
    """The optimal weights over `filters`, of which the first are those of `solution`; its objective and solution."""
    weights = torch.zeros(len(filters), problem.responses.n_cells, problem.n_outputs, dtype=torch.float64)
    weights[: solution.n_filters] = solution.weights
    result = solve_master(problem, filters, weights, solution.intercept, tol=tol)
    return result.objective, solution.with_parameters(filters, result.weights, result.intercept)


def _merge(solution: Solution) -> Solution:
    """Replace filters that coincide by their mean, weighted by the norms of their weights."""
    if solution.n_filters == 0:
        return solution
    filters, weights = solution.filters, solution.weights
    norms = weights.flatten(1).norm(dim=1)
    close = filters @ filters.T > MERGE_COSINE
    leader = close.long().argmax(dim=1)  # the first filter that each coincides with
    merged = torch.zeros_like(filters).index_add_(0, leader, filters * norms[:, None])
    summed = torch.zeros_like(weights).index_add_(0, leader, weights)
    keep = leader.unique()
    merged = merged[keep] / merged[keep].norm(dim=1, keepdim=True)
    return solution.with_parameters(merged, summed[keep], solution.intercept)
