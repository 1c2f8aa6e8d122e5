"""Dictionaries under every loss for classes: what held-out images say of them, and what they cost.

    python benchmarks/dictionary_losses.py [--data-dir ../shared/data] [--sizes mnist=4000,cifar10=3000]
        [--filters 100] [--to dictionary_losses.md]

The filters, pooling and normalisation of the presets, fewer of them; β is chosen on a tenth of the images, as the
presets choose it, and the least error and loss there are what is compared: no test image is looked at. CPU seconds are
those of one fit; features and Gram matrix, which are the same for all, come off. Writes
benchmarks/results/dictionary_losses.md, or what `--to` names there.
"""

from __future__ import annotations

from time import process_time

from by_size import write_page
from torch import Tensor

from convcvx.data.datasets import load
from convcvx.problem import Problem
from convcvx.solvers.dictionary.path import fit_dictionary
from convcvx.training.dictionary_start import drawn_filters
from convcvx.training.options import TrainConfig
from convcvx.training.presets import preset_options
from convcvx.training.resolve import training_problem

PRESETS = {"mnist": "mnist", "cifar10": "cifar10-fast"}
LOSSES = ("squared", "cross-entropy", "bce", "squared-hinge")
HELD = 0.1
"""Share of the images that choose β."""


def prepared(name: str, size: int, m: int, folder: str) -> tuple[dict[str, Problem], Tensor, bool]:
    """The problem under each loss, the filters, and whether these come in mirror pairs."""
    train, _ = load(name, folder, limit=size)
    options = preset_options(PRESETS[name]) | {"dictionary": m}
    configs = {loss: TrainConfig.of(options | {"loss": loss}) for loss in LOSSES}
    problems = {loss: training_problem(config, train) for loss, config in configs.items()}
    return problems, drawn_filters(configs["squared"], problems["squared"]), configs["squared"].flips


def compare(name: str, size: int, m: int, folder: str) -> list[str]:
    problems, filters, flips = prepared(name, size, m, folder)
    lines = [
        f"## {name}, {size:,} training images, {m} filters, preset `{PRESETS[name]}`",
        "",
        "| loss | held-out error | held-out loss | beta | gap over the dictionary | beta tried | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    fit_dictionary(problems["squared"], filters, beta=1e3, flips=flips)  # which compiles
    began = process_time()
    fit_dictionary(problems["squared"], filters, beta=1e3, flips=flips)  # nothing but features and Gram matrix
    once = process_time() - began
    for loss, problem in problems.items():
        began = process_time()
        fit = fit_dictionary(problem, filters, tune=HELD, flips=flips)
        seconds = process_time() - began - once
        best = min(fit.path, key=lambda record: (record["held_out_error"], record["held_out_loss"]))
        scores = f"{best['held_out_error']:.2%} | {best['held_out_loss']:.4f} | {fit.beta:.2g} | {fit.rel_gap:.1e}"
        lines.append(f"| {loss} | {scores} | {len(fit.path)} | {seconds:.0f} |")
        print(lines[-1], flush=True)
    return [*lines, ""]


if __name__ == "__main__":
    write_page(
        __doc__,
        "dictionary_losses",
        "Dictionaries under other losses",
        compare,
        sizes="mnist=4000,cifar10=3000",
        filters=100,
    )
