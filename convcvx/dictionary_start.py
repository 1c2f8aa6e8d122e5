"""The start of a training from a dictionary: its filters, their optimal weights, the β that held-out images prefer.

On request the filters then slide: some epochs of mini-batch descent on filters and weights together, from the optimal
weights, which leaves filters that no clustering of patches finds. Their weights are optimal again in the end, at a β
chosen anew. The images held out are held out of the descent as well, though the weights it starts from have seen them.
"""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter
from typing import Any

from torch.nn.functional import normalize

from convcvx.config import DEFAULT_BETA_RATIO, TrainConfig
from convcvx.dictionary import dictionary
from convcvx.mirror import MirrorPairs
from convcvx.problem import Problem
from convcvx.progress import Report
from convcvx.runs import Run
from convcvx.shifts import VERSIONS
from convcvx.solution import Solution
from convcvx.solvers.dictionary_path import DictionaryFit, fit_dictionary, held_out
from convcvx.solvers.slide import slide_adam

DICTIONARY_TOL = 1e-2
"""Relative gap over the dictionary to which its weights are fitted."""
SLIDE_DECAY = 5.0
"""The β of the descent over the one that held-out images chose for the dictionary: filters that slide fit closer than
drawn ones do. A β that was asked for is kept."""


def start_from_dictionary(
    config: TrainConfig, problem: Problem, run: Run, report: Report, began: float
) -> tuple[TrainConfig, Solution]:
    """The optimum over the dictionary that `config` asks for, as a checkpoint, and the options with its β."""
    ratio = config.beta_ratio if config.beta or config.tune or config.beta_ratio else DEFAULT_BETA_RATIO
    versions = VERSIONS if config.shifts else 1
    options: dict[str, Any] = {
        "tune": config.tune,
        "versions": versions,
        "flips": config.flips,
        "tol": DICTIONARY_TOL,
    }
    filters = dictionary(
        problem.responses,
        config.dictionary or 0,
        source=config.dictionary_source,
        threshold=config.threshold,
        flips=config.flips,
        seed=config.seed,
    )
    fit = fit_dictionary(problem, filters, beta=config.beta, beta_ratio=ratio, **options)
    _tell(fit, report)
    if config.slide:
        report.begin(f"{config.slide:g} epochs of descent on {fit.solution.n_filters} filters and their weights")
        seen = ~held_out(problem.n, config.tune if fit.path else 0.0, versions)
        slid = slide_adam(
            problem.with_beta(fit.beta * (SLIDE_DECAY if fit.path else 1.0)),
            fit.solution,
            config.seed,
            config.slide,
            images=seen.nonzero().flatten(),
            pairs=MirrorPairs(problem.responses) if config.flips else None,
            crops=config.crops,
            tell=report.begin,
        )
        fit = fit_dictionary(problem, normalize(slid.filters), beta=None if fit.path else fit.beta, **options)
        _tell(fit, report)
    report.begin(f"weights of these filters optimal to {fit.rel_gap:.1e}; no other filter was looked at")
    record = {
        "round": 0,
        "objective": fit.objective,
        "lower_bound": 0.0,  # of networks with other filters nothing is known yet
        "rel_gap": 1.0,
        "dictionary_gap": fit.rel_gap,
        "g_max": fit.beta,  # over the dictionary
        "scope": "heuristic",
        "n_filters": fit.solution.n_filters,
        "seconds": perf_counter() - began,
    }
    solution = replace(fit.solution, history=[record], status="max_rounds")
    config = replace(config, beta=fit.beta, beta_ratio=None)
    run.save_beta_max(fit.beta_max)
    run.save_config(config)
    run.save_state(solution)
    report(solution, fit.beta)
    return config, solution


def _tell(fit: DictionaryFit, report: Report) -> None:
    """Say what was tried on the way to β."""
    for step in fit.path:
        report.begin(
            f"beta {step['beta']:.3g}: held-out error {step['held_out_error']:.2%}, loss {step['held_out_loss']:.5g}, "
            f"{step['n_filters']} filters"
        )
