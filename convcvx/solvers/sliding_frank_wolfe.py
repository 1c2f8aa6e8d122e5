"""Sliding Frank-Wolfe: neurons on demand (Denoyelle, Duval, Peyré and Soubies 2019).

A round asks the oracle for filters with g(u) > β, solves the master over old and new filters, slides all of them
jointly, solves the master again, merges what coincides and drops what is zero. The objective never rises.

On many images the filters are first looked for on a sample of them, then on a larger one: a sample tells where filters
belong at a fraction of the cost, as long as a round gains more than what sampling hides. On all of them, where a proof
takes minutes, climbs look first: as long as they find much that is missing no proof is asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from convcvx.budget import Budget, OutOfTime
from convcvx.oracles.base import Oracle
from convcvx.problem import Problem, relative_gap
from convcvx.responses.passes import Responses
from convcvx.solution import Round, Solution
from convcvx.solvers.loop import Level, Look, Solver
from convcvx.solvers.master.table import solve_master
from convcvx.solvers.rounds import consult, predicted
from convcvx.solvers.slide.joint import slide
from convcvx.terms.scope import Scope
from convcvx.terms.status import Status


@dataclass(frozen=True)
class SlidingFrankWolfe(Solver):
    """Neurons on demand; no setting changes the optimum, only how soon it is reached."""

    name: ClassVar[str] = "sliding-fw"

    fewest: int = 16
    """Filters that the oracle is asked for at least, else as many as there are: networks grow in few rounds."""
    new_columns: int = 1152
    """But no more filters, times cells, than these join in a round: the weights of all take time that grows with the
    cube of their number, and of many at once most turn out to be of no use."""
    exact: float = 0.01
    """Share of the gap, and of tol, to which the weights are solved that a round ends with: they hide no progress."""
    after_fall: float = 0.1
    """The same, as a share of the fall of the objective in the last round, where the bound lags behind the network."""
    finest: float = 1e-12
    """Gap of the weights that is never asked for: rounding hides it."""
    rough: float = 0.1
    """Share of the gap to which weights are solved before filters slide: enough to slide from."""
    slide_accuracy: float = 1e-3
    """Share of the gap: a slide whose steps gain less is at its end."""
    merge_cosine: float = 1 - 1e-9
    """Filters closer than this are tried as one; the merge stands if the objective does not rise."""
    merge_slack: float = 1e-12
    """Share by which it may rise all the same: rounding."""

    patience: int = 3
    """Rounds within which there has to be progress."""
    stall: float = 1e-2
    """Progress is a fall of the objective by this share of the gap within them, or half the gap."""
    full: float = 0.75
    """Share of the filter budget from which on filters count as scarce: what cannot be many has to be good."""
    stall_full: float = 1e-1
    """With scarce filters each round has to lower the objective by this share of the gap."""
    full_steps: int = 1000
    """With scarce filters a slide on all images takes so many steps at least."""

    sample_factor: int = 4
    """Each sample of the images is so many times smaller than the next, the last than the data."""
    sample_size: int = 2000
    """No sample has fewer images: on 1,000 of MNIST sampling noise alone made g look 50 to 100 times β."""
    sample_rounds: int = 8
    """Rounds on a sample at most."""
    sample_tol: float = 0.03
    """Gap at which a sample is left: its optimum is not that of all images."""
    sample_time: float = 0.5
    """Share of the time that all samples may take together."""
    sample_noise: float = 2.0
    """Standard errors of the objective, as an estimate of that on all images, that a round on a sample has to gain."""
    refit_tol: float = 1e-3
    """Gap of the weights with which filters go over to other images or another β."""
    scout_size: int = 30_000
    """Images from which on climbs look first for what a proof takes minutes to find; with 8,000 they save nothing."""
    near: float = 0.5
    """Share of tol above which a gap that climbs show makes such a proof a waste: it would show more, and take the time
    of several rounds; the closer tol is, the more."""

    def levels(self, problem: Problem, budget: Budget, start: Solution | None, seed: int) -> list[Level]:
        """Samples to begin with, smallest first, and the problem itself, from where `start` left off."""
        sizes = [problem.n]
        while sizes[0] // self.sample_factor >= self.sample_size:
            sizes.insert(0, sizes[0] // self.sample_factor)
        sizes = [size for size in sizes[:-1] if size <= problem.largest_sample] + [problem.n]
        if start is not None:
            reached = start.history[-1].get("images", problem.n) if start.history else problem.n
            sizes = [size for size in sizes if size >= reached]
        order = torch.randperm(problem.n, generator=torch.Generator().manual_seed(seed))
        samples = [problem.sample(order[:size].sort().values) for size in sizes[:-1]]
        brief = replace(budget, tol=self.sample_tol, max_rounds=min(budget.max_rounds, self.sample_rounds))
        return [*(Level(sample, brief, self.sample_time) for sample in samples), Level(problem, budget)]

    def enter(self, level: Level, solution: Solution) -> Solution:
        """The weights that the filters of another problem have on this one: with stale ones an oracle is led astray."""
        solution = replace(solution, history=[], rounds=0, status=Status.RUNNING, dual_point=None)
        if solution.n_filters == 0:
            return solution
        try:
            return _best_weights(level.problem, solution, solution.filters, self.refit_tol)[1]
        except OutOfTime:
            return solution

    def look(self, level: Level, oracle: Oracle, solution: Solution, predictions: Tensor, seed: int) -> Look:
        """The record of a sample tells its size, and its gap is believed at once, proved or not."""
        problem, room, tol = level.problem, level.budget.room, level.budget.tol
        grown = min(solution.n_filters, self.new_columns // problem.responses.n_cells)
        wanted = max(1, room(solution.n_filters, max(self.fewest, grown)))
        asked: dict[str, Any] = {"n_filters": wanted, "tol": tol, "seed": seed}
        scout = getattr(oracle, "scout", oracle)  # any function may be an oracle
        provisional = not level.is_sample and scout is not oracle and self._scouts(problem)
        if level.is_sample or provisional:
            found, record, dual_point = consult(problem, scout, solution, predictions, confirm=False, **asked)
            provisional = provisional and record["rel_gap"] > self.near * tol and not found.cut_short
        if level.is_sample:
            record["images"] = problem.n
        elif provisional:
            record, dual_point = _with_last_proof(record, solution)
            provisional = not Scope(record["scope"]).lasting  # a gap that an earlier round has proved counts
        else:
            found, record, dual_point = consult(problem, oracle, solution, predictions, **asked)
        violating = found.filters[found.values > problem.beta]
        violating = violating[: room(solution.n_filters, len(violating))]
        short = Status.TIME_LIMIT if found.cut_short else None
        return Look(solution, predictions, record, dual_point, violating, short, provisional)

    def ended(self, level: Level, look: Look) -> Status | None:
        """As for all solvers; or for want of progress, or of any filter, be it that time cut the search short."""
        if not (look.solution.n_filters or len(look.candidates)):
            return super().ended(level, look) or look.short or Status.STALLED
        if level.is_sample:
            return level.limit(look.record) or self._drowned(level.problem, look)
        if (status := super().ended(level, look)) is not None:
            return status
        record, history = look.record, look.solution.history
        gap = record["rel_gap"] * record["objective"]
        falls = [earlier["objective"] - record["objective"] for earlier in history[-self.patience :]]
        if falls and self._scarce(level, look.solution) and falls[-1] <= self.stall_full * gap:
            return Status.MAX_FILTERS
        if len(falls) == self.patience and falls[0] <= self.stall * gap:
            halved = record["rel_gap"] <= 0.5 * history[-self.patience]["rel_gap"]
            return None if halved else Status.STALLED
        return None

    def step(self, level: Level, look: Look, seed: int) -> tuple[Solution, Tensor]:
        """The objective does not rise."""
        problem, solution, record = level.problem, look.solution, look.record
        objective, gap = record["objective"], record["objective"] - record["lower_bound"]
        # Far from the optimum the gap says how exact masters need to be; but the lower bound can lag behind a network
        # that is nearly optimal, and a master shows no fall of the objective that is smaller than its own error.
        fall = _last_fall(solution.history)
        accuracy = max(
            self.exact * level.budget.tol, min(self.exact * gap / objective, self.after_fall * fall), self.finest
        )
        rough = max(accuracy, min(self.rough * gap / objective, fall))
        steps = self.full_steps if self._scarce(level, solution) and not level.is_sample else 0
        best = _Best(objective, solution)
        try:
            best.offer(*_best_weights(problem, solution, torch.cat([solution.filters, look.candidates]), rough))
            slid = slide(
                problem, best.solution, seed + 1000 * solution.rounds, accuracy=self.slide_accuracy * gap, steps=steps
            )
            best.offer(*_best_weights(problem, slid, slid.filters, accuracy))
            merged = _merged(best.solution, self.merge_cosine, problem.responses)
            if merged.n_filters < best.solution.n_filters:
                best.offer(*_best_weights(problem, merged, merged.filters, accuracy), slack=self.merge_slack)
        except OutOfTime:
            pass  # the best network until then is what the round has led to
        solution = replace(best.solution, rounds=solution.rounds + 1)
        return solution, predicted(problem, solution)

    def _drowned(self, sample: Problem, look: Look) -> Status | None:
        """Whether another round on a sample would be wasted, as sampling hides what it gains."""
        history, record = look.solution.history, look.record
        losses = sample.loss.value(look.predictions, sample.targets)
        noise = self.sample_noise * sample.shares.standard_error(losses)
        gain = history[-1]["objective"] - record["objective"] if history else math.inf
        return Status.STALLED if min(gain, record["objective"] - record["lower_bound"]) <= noise else None

    def _scouts(self, problem: Problem) -> bool:
        """Whether climbs look first; not under a time limit, where the first rough proof may be the best there is."""
        return problem.n >= self.scout_size and problem.deadline.left == math.inf

    def _scarce(self, level: Level, solution: Solution) -> bool:
        most = level.budget.max_filters
        return most is not None and solution.n_filters >= self.full * most


def _best_weights(problem: Problem, solution: Solution, filters: Tensor, tol: float) -> tuple[float, Solution]:
    """The optimal weights over `filters`, of which the first are those of `solution`; its objective and solution."""
    weights = torch.zeros(len(filters), problem.responses.n_cells, problem.n_outputs, dtype=torch.float64)
    weights[: solution.n_filters] = solution.weights
    result = solve_master(problem, filters, weights, solution.intercept, tol=tol)
    return result.objective, solution.with_parameters(filters, result.weights, result.intercept)


def _with_last_proof(record: Round, solution: Solution) -> tuple[Round, Tensor | None]:
    """`record`, of climbs, with the bound that was proved in a round before it, if any, and the dual point of that."""
    last = solution.history[-1] if solution.history else None
    if last is None or solution.dual_point is None or not Scope(last["scope"]).lasting:
        return record, None
    objective, bound = record["objective"], last["lower_bound"]
    kept: Round = {**record, "lower_bound": min(bound, objective), "rel_gap": relative_gap(objective, bound)}
    kept["scope"] = Scope(last["scope"])  # records that a file has kept name it
    for name in ("g_max", "proved_g"):
        if name in last:
            kept[name] = last[name]
    return kept, solution.dual_point


def _last_fall(history: list[Round]) -> float:
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


def _merged(solution: Solution, cosine: float, responses: Responses) -> Solution:
    """Replace filters that coincide, closer than `cosine`, by their mean, weighted by the norms of their weights."""
    if solution.n_filters == 0:
        return solution
    filters, weights = solution.filters, solution.weights
    norms = weights.flatten(1).norm(dim=1)
    cosines = filters @ filters.T
    leader = (responses.alike(cosines) > cosine).long().argmax(dim=1)  # the first filter that each coincides with
    if responses.symmetric:  # φ(-u) = -slope φ(u)
        turned = cosines.gather(1, leader[:, None])[:, 0] < 0
        filters = torch.where(turned[:, None], -filters, filters)
        weights = torch.where(turned[:, None, None], -responses.activation.slope * weights, weights)
    merged = torch.zeros_like(filters).index_add_(0, leader, filters * norms[:, None])
    summed = torch.zeros_like(weights).index_add_(0, leader, weights)
    keep = leader.unique()
    merged = merged[keep] / merged[keep].norm(dim=1, keepdim=True)
    return solution.with_parameters(merged, summed[keep], solution.intercept)


sliding_frank_wolfe = SlidingFrankWolfe()
