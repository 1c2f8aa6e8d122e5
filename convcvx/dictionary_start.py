"""The start of a training from a dictionary: its filters, their optimal weights, the β that held-out images prefer."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter

from convcvx.config import DEFAULT_BETA_RATIO, TrainConfig
from convcvx.dictionary import dictionary
from convcvx.problem import Problem
from convcvx.progress import Report
from convcvx.runs import Run
from convcvx.shifts import VERSIONS
from convcvx.solution import Solution
from convcvx.solvers.dictionary_path import fit_dictionary

DICTIONARY_TOL = 1e-2
"""Relative gap over the dictionary to which its weights are fitted."""


def start_from_dictionary(
    config: TrainConfig, problem: Problem, run: Run, report: Report, began: float
) -> tuple[TrainConfig, Solution]:
    """The optimum over the dictionary that `config` asks for, as a checkpoint, and the options with its β."""
    filters = dictionary(
        problem.responses,
        config.dictionary or 0,
        source=config.dictionary_source,
        threshold=config.threshold,
        flips=config.flips,
        seed=config.seed,
    )
    ratio = config.beta_ratio if config.beta or config.tune or config.beta_ratio else DEFAULT_BETA_RATIO
    fit = fit_dictionary(
        problem,
        filters,
        beta=config.beta,
        beta_ratio=ratio,
        tune=config.tune,
        versions=VERSIONS if config.shifts else 1,
        flips=config.flips,
        tol=DICTIONARY_TOL,
    )
    for step in fit.path:
        report.begin(
            f"beta {step['beta']:.3g}: held-out error {step['held_out_error']:.2%}, loss {step['held_out_loss']:.5g}, "
            f"{step['n_filters']} filters"
        )
    report.begin(f"weights of the dictionary's filters optimal to {fit.rel_gap:.1e}; no other filter was looked at")
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
