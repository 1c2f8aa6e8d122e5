"""A finished run beside its SGD or Adam twin: objective, distance to the lower bound, accuracy, cost.

The distance of the twin from the global optimum is known up to the gap of the run's certificate, and with its scope.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch

from convcvx.baseline import Training, train_twin, tune_rate
from convcvx.certificate.record import Certificate
from convcvx.data.datasets import Dataset
from convcvx.data.given import given_dataset
from convcvx.errors import InputError, RunError
from convcvx.machine.memory import check_memory
from convcvx.machine.watch import watching
from convcvx.network.two_layer import TwoLayerCNN
from convcvx.oracles.contradiction import check_proof
from convcvx.problem import Problem
from convcvx.solution import Solution
from convcvx.stack.jobs import stage_data
from convcvx.terms.scope import Scope
from convcvx.terms.status import Status
from convcvx.training.entry import announce, limited
from convcvx.training.finish import score
from convcvx.training.fit import Fit, load_fit
from convcvx.training.option import check_names, parameters
from convcvx.training.options import TrainConfig
from convcvx.training.origin import Origin
from convcvx.training.progress import peak_memory_mb
from convcvx.training.resolve import arranged, found_in, run_data, training_problem, with_run_settings
from convcvx.training.run import Run
from convcvx.training.twin import CompareConfig

SETTLED = 0.01
"""Share by which the objective of a twin may fall in the second half of its epochs, the learning rate falling too, for
it to count as converged: where four times the epochs bring a per cent or more, it falls by more."""
LONGER = 4
"""So many times the epochs are worth a try where a twin had not converged."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """A convex fit beside its twin.

    Attributes
    ----------
    network : TwoLayerCNN
        The best twin.
    metrics : dict
        What `convcvx compare --json` prints.
    trainings : list of Training
        Of the twin, one a seed, the best first.
    """

    network: TwoLayerCNN
    metrics: dict[str, Any]
    trainings: list[Training]


def compare(
    fit: Fit,
    images: Any,
    targets: Any = None,
    *,
    sample_weight: Any = None,
    test: tuple[Any, Any] | None = None,
    verbose: bool = False,
    **options: Any,
) -> Comparison:
    """Train the twin of a fit with SGD or Adam, and say how far from the optimum it ends.

    Same data, architecture, width and objective; the learning rate is tuned on full trainings, and the objective
    recomputed in float64. The same as `convcvx compare`.

    Parameters
    ----------
    fit : Fit
    images, targets, sample_weight
        Those that it was fitted on, as `convcvx.fit` takes them.
    test : (images, targets), optional
        To score both on.
    verbose : bool
        Show what goes on.
    {options}

    Returns
    -------
    Comparison
        `.metrics`, with "convex", "twin", "objective_ratio" and "time_ratio"; `.network`, the twin.

    Raises
    ------
    InputError
        For options out of range.
    DataError
        When the images are not those of the fit, or the test set has labels that it does not know.
    """
    check_names(options, [parameter.name for parameter in PARAMETERS])
    config = CompareConfig(**options)
    config.check()
    form = fit.config.image_form
    train, test_set, validation = given_dataset(images, targets, sample_weight, form=form)
    if test is not None:
        test_set = given_dataset(*test, form=form, classes=fit.network.meta.get("classes"))[0]
    settings = replace(fit.config, beta=fit.certificate.beta, beta_ratio=None, device=config.device)
    train, test_set, _ = arranged(settings, limited(train, settings.limit), test_set, validation)
    if fit.origin is not None:
        known = {name: part for name, part in fit.origin.sets.items() if name == "train"}
        replace(fit.origin, sets=known).check(Origin.of(fit.config, (train, None, None)), "the fit")
    convex = _convex(fit.metrics, fit.certificate) | {"test_accuracy": score(fit.network, test_set)}
    with watching(verbose):
        return compare_on(settings, config, convex, fit.solution, train, test_set)


def compare_job(run: Run, config: CompareConfig) -> dict[str, Any]:
    """Train the twin of `run` from several seeds at its best learning rate; returns what `--json` prints."""
    from convcvx.report import comparison_figure, png  # matplotlib: the command line does not wait for it

    config.check()
    convex, solution = _convex(run.metrics, run.certificate), load_fit(run).solution
    settings = found_in(replace(with_run_settings(run), device=config.device), config.data_dir)
    data = run_data(run, settings)
    train, test, _ = stage_data(run, data) or data
    found = compare_on(settings, config, convex, solution, train, test)
    histories = [training.history for training in found.trainings]
    plot = png(comparison_figure(run.history, histories, convex["dual"], convex["scope"], config.optimizer))
    if _convex(run.metrics, run.certificate) != convex:
        raise RunError(f"{run.folder} is another run than it was when the comparison began: compare it again")
    run.save_comparison(config.optimizer, found.metrics, plot, found.network)
    return found.metrics


def compare_on(
    settings: TrainConfig,
    config: CompareConfig,
    convex: dict[str, Any],
    solution: Solution,
    train: Dataset,
    test: Dataset | None,
) -> Comparison:
    """Train the twin of a `solution` of which `convex` says what it has, by `settings`, on `train`."""
    began = perf_counter()
    assert settings.beta is not None  # the fit's own
    problem = training_problem(settings, train, solution.embedding).with_beta(settings.beta)
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
        start = solution.shifted(-problem.offset)
        finetune, _ = _twin(problem, config, n_filters, convex, train, test, start=start)
    metrics = {
        "convex": convex,
        "twin": twin,
        "finetune": finetune,
        "objective_ratio": twin["objective"] / convex["objective"] if convex["objective"] else None,
        "time_ratio": twin["seconds"] / convex["seconds"],
        "seconds_until_twin_reaches_convex": reached(trainings[0].history, convex["objective"]),
        "seconds_until_convex_reaches_twin": reached(solution.history, twin["objective"]),
        "beta": problem.beta,
        "loss": settings.loss,
        "seconds": perf_counter() - began,
        "peak_memory_mb": peak_memory_mb(),
        "threads": torch.get_num_threads(),
        "status": Status.DONE,
    }
    return Comparison(trainings[0].twin.network(), metrics, trainings)


def _convex(metrics: dict[str, Any], certificate: Certificate) -> dict[str, Any]:
    """Of the metrics of a fit, with this certificate, what a comparison has."""
    kept = ("dual", "rel_gap", "scope", "meaning", "n_filters", "train_accuracy", "test_accuracy", "seconds")
    found = {"objective": metrics["primal"], "core_seconds": metrics.get("core_seconds")}
    found |= {name: metrics[name] for name in kept}
    if Scope(metrics["scope"]) is Scope.FAMILY:
        # The twin's filters are free: what is proved over a family does not bind it.
        proved = certificate.of_all_networks
        found |= {name: getattr(proved, name) for name in ("dual", "rel_gap", "scope", "meaning")}
    return found


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
    if Scope(convex["scope"]).for_all:
        precise = problem.with_dtype(torch.float64)
        check_proof(precise, convex["dual"], best.objective, *best.twin.judged(precise))
    runs = [_seed_summary(training, train, test) for training in trainings]
    summary = {
        "optimizer": config.optimizer,
        "objective": best.objective,
        "objective_median": statistics.median(training.objective for training in trainings),
        "lower_bound": convex["dual"],
        # Below zero where an estimate was too high.
        "rel_gap": (best.objective - convex["dual"]) / best.objective if best.objective else 0.0,
        "scope": convex["scope"],
        **{name: runs[0][name] for name in ("train_accuracy", "test_accuracy", "seconds", "core_seconds")},
        "n_filters": len(best.twin.filters),
        "filters_used": best.twin.filters_used,
        "learning_rate": best.rate,
        "learning_rates": [{"rate": t.rate, "objective": _finite(t.objective)} for t in tried],
        "tuning_seconds": tuning,
        "epochs": config.epochs,
        "steps": config.epochs * math.ceil(problem.n / config.batch),
        "late_fall": (fall := late_fall(best.history)),
        "epochs_to_try": LONGER * config.epochs if fall > SETTLED else None,
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


def reached(history: Sequence[Mapping[str, Any]], objective: float) -> float | None:
    """The seconds after which `history` is at or below `objective`; None if it never is."""
    known = (record for record in history if record["objective"] is not None)
    return next((record["seconds"] for record in known if record["objective"] <= objective), None)


def late_fall(history: Sequence[Mapping[str, Any]]) -> float:
    """By what share the objective fell in the second half of the epochs, or in the only one."""
    begin, end = history[-1 - max(1, (len(history) - 1) // 2)]["objective"], history[-1]["objective"]
    return float(1 - end / begin) if begin > 0 else 0.0


def _finite(value: float) -> float | None:
    """None for an objective that diverged: JSON knows no infinity."""
    return value if math.isfinite(value) else None


PARAMETERS = parameters(CompareConfig)
announce(compare, (CompareConfig,), PARAMETERS)
