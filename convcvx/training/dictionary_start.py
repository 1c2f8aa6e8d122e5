"""The start of a training from a dictionary: its filters, their optimal weights, the β that held-out images prefer.

On request the filters then slide: some epochs of mini-batch descent on filters and weights together, from the optimal
weights, which leaves filters that no clustering of patches finds. Their weights are optimal again in the end, at a β
chosen anew. The images held out are held out of the descent as well, though the weights it starts from have seen them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from time import perf_counter

from torch import Tensor
from torch.nn.functional import normalize

from convcvx.budget import OutOfTime
from convcvx.data.augment import VERSIONS
from convcvx.display.words import held_out_scores
from convcvx.errors import InputError
from convcvx.machine.memory import check_memory
from convcvx.problem import Problem
from convcvx.responses.mirror import MirrorPairs
from convcvx.solution import Solution
from convcvx.solvers.dictionary.filters import dictionary
from convcvx.solvers.dictionary.path import DictionaryFit, Score, by_error, by_loss, fit_dictionary, held_out
from convcvx.solvers.rounds import record_of
from convcvx.solvers.slide.descent import State, descend
from convcvx.terms.scope import Scope
from convcvx.terms.status import Status
from convcvx.training.journal import Descent, Journal
from convcvx.training.options import TrainConfig
from convcvx.training.panels.model import DEFAULT_BETA_RATIO
from convcvx.training.progress import Report

DICTIONARY_TOL = 1e-2
"""Relative gap over the dictionary to which its weights are fitted."""
SLIDE_TIME = 0.7
"""Share of the time left that the descent may take: the weights of its filters are to be fitted."""
SLIDE_DECAY = 5.0
"""The β of the descent over the one at which the dictionary has the least loss on held-out images: filters that slide
fit closer than drawn ones do. A β that was asked for is kept."""


@dataclass(frozen=True)
class DictionaryStart:
    """The optimum over a dictionary, its β, and the β from which on no filter of the dictionary helps."""

    solution: Solution
    beta: float
    beta_max: float


def start_from_dictionary(
    config: TrainConfig,
    problem: Problem,
    journal: Journal,
    report: Report,
    descent: Descent | None = None,
    began: float = 0.0,
) -> DictionaryStart:
    """The optimum over the dictionary that `config` asks for.

    `journal` keeps it as a solution to go on from, and `descent` is one to go on with. The seconds of the history count
    from `began`.
    """
    state: State | None = None
    if descent is None:
        # Where filters go on to slide, the loss chooses: the error is all but flat over decades of β.
        score = by_loss if config.slide else by_error
        try:
            drawn = drawn_filters(config, problem)
        except OutOfTime:
            raise InputError("time_limit ended before the filters of the dictionary were drawn; raise it") from None
        fit = _fit(drawn, config, problem, report, score=score)
        start, beta = fit.solution, fit.beta
    else:
        start, beta, state = descent
    if config.slide:
        in_time = problem.until(problem.deadline.share(SLIDE_TIME))
        slid = _slide(config, in_time, start, beta, state, journal, report)
        fit = _fit(normalize(slid.filters), config, problem, report, beta=None if _tuned(config) else beta)
    report.begin(f"weights of these filters optimal to {fit.rel_gap:.1e}; no other filter was looked at")
    # Over the dictionary max g is beta; of networks with other filters nothing is known yet.
    record = record_of(fit.solution, fit.objective, 0.0, fit.beta, Scope.HEURISTIC, perf_counter() - began)
    record["dictionary_gap"] = fit.rel_gap
    solution = replace(fit.solution, history=[record], status=Status.MAX_ROUNDS)
    journal.save_beta_max(fit.beta_max)
    journal.save_chosen_beta(fit.beta)
    journal.save_path(fit.path)
    journal.save_state(solution)
    if report(solution.shifted(problem.offset), fit.beta, problem.deadline.left) is True:
        solution = replace(solution, status=Status.CALLBACK)
    return DictionaryStart(solution, fit.beta, fit.beta_max)


def drawn_filters(config: TrainConfig, problem: Problem) -> Tensor:
    """(m, r) filters of the dictionary that `config` asks for, before any of them slides; they go by the seed."""
    assert config.dictionary is not None
    responses = problem.responses
    size = config.dictionary // (2 if config.flips else 1) * responses.n_cells
    if responses.device.type == "cpu":
        check_memory(
            2 * responses.dtype.itemsize * size**2 * responses.share_here,  # the Gram matrix and its factor
            f"a dictionary of {config.dictionary} filters pooled to {responses.n_cells} cells",
            "ask for fewer filters or cells",
        )
    return dictionary(
        problem.responses,
        config.dictionary,
        source=config.dictionary_source,
        threshold=config.threshold,
        flips=config.flips,
        seed=config.seed,
    )


def _versions(config: TrainConfig) -> int:
    return VERSIONS if config.shifts else 1


def _tuned(config: TrainConfig) -> bool:
    """Whether held-out images choose β."""
    return bool(config.tune) and config.beta is None and config.beta_ratio is None


def _fit(
    filters: Tensor,
    config: TrainConfig,
    problem: Problem,
    report: Report,
    *,
    beta: float | None = None,
    score: Score = by_error,
) -> DictionaryFit:
    """The optimum over `filters`, at the β that is asked for, or at the one that `config` leads to."""
    ratio = config.beta_ratio if _tuned(config) or config.beta_ratio else DEFAULT_BETA_RATIO
    beta = beta or config.beta
    fit = fit_dictionary(
        problem,
        filters,
        beta=beta,
        beta_ratio=None if beta else ratio,
        tune=config.tune,
        versions=_versions(config),
        flips=config.flips,
        tol=DICTIONARY_TOL,
        score=score,
    )
    for step in fit.path:
        report.begin(f"beta {step['beta']:.3g}: {held_out_scores(step)}, {step['n_filters']} filters")
    return fit


def _slide(
    config: TrainConfig,
    problem: Problem,
    start: Solution,
    beta: float,
    state: State | None,
    journal: Journal,
    report: Report,
) -> Solution:
    """Descend from the optimum `start` over a dictionary at `beta`, or go on from `state`."""
    report.begin(
        f"{config.slide:g} epochs of descent on {start.n_filters} filters and their weights"
        + ("" if state is None else ", from where it was")
    )

    def after_epoch(state: State, text: str) -> None:
        journal.save_descent(start, beta, state)
        report.begin(text)

    seen = ~held_out(problem.n, config.tune if _tuned(config) else 0.0, _versions(config))
    return descend(
        problem.with_beta(beta * (SLIDE_DECAY if _tuned(config) else 1.0)),
        start,
        config.seed,
        config.slide,
        images=seen.nonzero().flatten(),
        pairs=MirrorPairs(problem.responses) if config.flips else None,
        crops=config.crops,
        shared=True,
        state=state,
        after_epoch=after_epoch,
    )
