"""A finished run beside its SGD or Adam twin: objective, distance to the lower bound, accuracy, cost.

The distance of the twin from the global optimum is known up to the gap of the run's certificate, and with its scope.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch

from convcvx.baseline import BATCH, OPTIMIZERS, Training, train_twin, tune_rate
from convcvx.data.datasets import Dataset
from convcvx.errors import InputError, RunError
from convcvx.machine.memory import check_memory
from convcvx.problem import Problem
from convcvx.solution import Solution
from convcvx.stack.jobs import stage_data
from convcvx.training.fit import score
from convcvx.training.option import check_options, option, same_as
from convcvx.training.options import MOST_FILTERS, OPTIONS
from convcvx.training.progress import peak_memory_mb
from convcvx.training.resolve import run_data, training_problem, with_run_settings
from convcvx.training.run import Run

TWIN = "Options"
"""Panel of `convcvx compare --help`."""


@dataclass(frozen=True)
class CompareConfig:
    """The options of `convcvx compare`; each says what it is."""

    optimizer: str = option("adam", TWIN, f"{' or '.join(OPTIMIZERS)}; SGD has momentum 0.9.", choices=OPTIMIZERS)
    epochs: int = option(
        10, TWIN, "Epochs of every training; the learning rate falls as a cosine.", low=1, high=1_000_000
    )
    seeds: int = option(3, TWIN, "Trainings at the best learning rate.", low=1, high=1000)
    batch: int = option(BATCH, TWIN, "Images a step.", low=1, high=1_000_000)
    filters: int | None = option(None, TWIN, "Width of the twin. [default: that of the run]", low=1, high=MOST_FILTERS)
    finetune: bool = option(False, TWIN, "Also start the optimiser from the convex solution.")
    device: str = same_as(OPTIONS["device"])

    def check(self) -> None:
        """Raises `InputError` for a value out of range."""
        check_options(self)


def compare_job(run: Run, config: CompareConfig) -> dict[str, Any]:
    """Train the twin of `run` from several seeds at its best learning rate; returns what `--json` prints."""
    from convcvx.report import comparison_figure, png  # matplotlib: the command line does not wait for it

    began = perf_counter()
    config.check()
    convex = _convex(run)
    settings = replace(with_run_settings(run), device=config.device)
    data = run_data(run, settings)
    train, test, _ = stage_data(run, data) or data
    assert settings.beta is not None  # the run's own
    problem = training_problem(settings, train, run.load_embedding()).with_beta(settings.beta)
    n_filters = config.filters or max(1, convex["n_filters"])
    batch = min(config.batch, problem.n)
    check_memory(
        3 * 4 * batch * problem.responses.n_positions * n_filters,  # responses, rectified, and their slopes
        f"a step on {batch} images with {n_filters} filters",
        "lower filters or batch",
    )
    twin, trainings = _twin(problem, config, n_filters, convex, train, test)
    finetune = None
    if config.finetune and convex["n_filters"]:
        finetune, _ = _twin(problem, config, n_filters, convex, train, test, start=run.load_state())
    result = {
        "convex": convex,
        "twin": twin,
        "finetune": finetune,
        "objective_ratio": twin["objective"] / convex["objective"],
        "time_ratio": twin["seconds"] / convex["seconds"],
        "seconds_until_twin_reaches_convex": reached(trainings[0].history, convex["objective"]),
        "seconds_until_convex_reaches_twin": reached(run.history, twin["objective"]),
        "beta": problem.beta,
        "loss": settings.loss,
        "seconds": perf_counter() - began,
        "peak_memory_mb": peak_memory_mb(),
        "threads": torch.get_num_threads(),
        "status": "done",
    }
    histories = [training.history for training in trainings]
    plot = png(comparison_figure(run.history, histories, convex["dual"], convex["scope"], config.optimizer))
    if _convex(run) != convex:
        raise RunError(f"{run.folder} is another run than it was when the comparison began: compare it again")
    run.save_comparison(config.optimizer, result, plot, trainings[0].twin.network())
    return result


def _convex(run: Run) -> dict[str, Any]:
    """What the run has: its certificate and its metrics."""
    metrics = run.metrics
    kept = ("dual", "rel_gap", "scope", "meaning", "n_filters", "train_accuracy", "test_accuracy", "seconds")
    return (
        {"objective": metrics["primal"]}
        | {name: metrics[name] for name in kept}
        | {"core_seconds": metrics.get("core_seconds")}
    )


def _twin(
    problem: Problem,
    config: CompareConfig,
    n_filters: int,
    convex: dict[str, Any],
    train: Dataset,
    test: Dataset | None,
    start: Solution | None = None,
) -> tuple[dict[str, Any], list[Training]]:
    """Tune the rate with seed 0, train from the other seeds at the best one, judge; the best seed comes first."""
    began = perf_counter()
    options: dict[str, Any] = {"epochs": config.epochs, "batch": config.batch, "start": start}
    tried = tune_rate(problem, config.optimizer, n_filters, **options)
    tuning = perf_counter() - began
    trainings = [tried[0]] + [
        train_twin(problem, config.optimizer, n_filters, rate=tried[0].rate, seed=seed, **options)
        for seed in range(1, config.seeds)
    ]
    trainings.sort(key=lambda training: training.objective)
    best = trainings[0]
    if not math.isfinite(best.objective):
        raise InputError(
            f"{config.optimizer} diverged from every seed in {config.epochs} epochs; try other epochs or batch"
        )
    runs = [_seed_summary(training, train, test) for training in trainings]
    summary = {
        "optimizer": config.optimizer,
        "objective": best.objective,
        "objective_median": statistics.median(training.objective for training in trainings),
        "lower_bound": convex["dual"],
        "rel_gap": (best.objective - convex["dual"]) / best.objective,
        "scope": convex["scope"],
        **{name: runs[0][name] for name in ("train_accuracy", "test_accuracy", "seconds", "core_seconds")},
        "n_filters": len(best.twin.filters),
        "filters_used": best.twin.filters_used,
        "learning_rate": best.rate,
        "learning_rates": [{"rate": t.rate, "objective": _finite(t.objective)} for t in tried],
        "tuning_seconds": tuning,
        "epochs": config.epochs,
        "batch": config.batch,
        "seeds": runs,
    }
    return summary, trainings


def _seed_summary(training: Training, train: Dataset, test: Dataset | None) -> dict[str, Any]:
    network = training.twin.network()

    return {
        "seed": training.seed,
        "objective": _finite(training.objective),
        "objective_as_trained": _finite(training.objective_as_trained),
        "train_accuracy": score(network, train),
        "test_accuracy": score(network, test),
        "seconds": training.seconds,
        "core_seconds": training.core_seconds,
        "history": training.history,
    }


def reached(history: list[dict[str, Any]], objective: float) -> float | None:
    """The seconds after which `history` is at or below `objective`; None if it never is."""
    known = (record for record in history if record["objective"] is not None)
    return next((record["seconds"] for record in known if record["objective"] <= objective), None)


def _finite(value: float) -> float | None:
    """None for an objective that diverged: JSON knows no infinity."""
    return value if math.isfinite(value) else None
