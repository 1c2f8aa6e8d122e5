"""Is the lower objective worth it? Test accuracy against training objective, across methods, weight decays and seeds.

    python experiments/worth.py --data-dir DIR

2,000 MNIST images, 5x5 filters, 4x4 pooling cells, the 10,000 test images. At each weight decay convex training (its
seeds differ in the search), and SGD and Adam of the same width with their learning rates tuned there. The rank
correlation of objective and test error within a weight decay is the answer. Writes experiments/results/worth.md, .png.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from time import process_time

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from convcvx.baseline import train_twin, tune_rate
from convcvx.budget import Budget
from convcvx.certificate import judged
from convcvx.data.datasets import load
from convcvx.network.evaluate import accuracy, predict
from convcvx.network.two_layer import TwoLayerCNN
from convcvx.patches import PatchSpec
from convcvx.report import BOUND_COLOUR, CONVEX_COLOUR, TWIN_COLOUR, png
from convcvx.training.plan import build_problem, find_beta_max, solve_problem
from convcvx.training.resolve import image_shape

RESULTS = Path(__file__).parent / "results"
N, SEEDS, EPOCHS, MAX_FILTERS = 2000, 3, 15, 48
RATIOS = (1e-2, 1e-3, 1e-4)
COLOURS = {"convex": CONVEX_COLOUR, "adam": TWIN_COLOUR, "sgd": BOUND_COLOUR}


@dataclass(frozen=True)
class Run:
    """One training: what it minimised and what came of it."""

    ratio: float
    method: str
    seed: int
    filters: int
    objective: float
    error: float
    core_seconds: float


def runs_at(ratio: float, data_dir: str | None) -> list[Run]:
    """All trainings at one weight decay."""
    train, test = load("mnist", data_dir, N)
    problem = build_problem(train.images, train.targets, spec=PatchSpec((5, 5)), pooling="4", n_classes=10)
    problem = problem.with_beta(ratio * find_beta_max(problem))
    found = []
    for seed in range(SEEDS):
        began = process_time()
        solution = solve_problem(problem, Budget(tol=2e-2, max_filters=MAX_FILTERS), seed=seed)
        seconds = process_time() - began
        _, weights, predictions = judged(problem, solution.filters, solution.weights)
        network = TwoLayerCNN.from_solution(solution, solution.embedding, solution.pooling, image_shape(train))
        error = 1 - accuracy(predict(network, test.images), test.targets)
        value = problem.primal(predictions, weights)
        found.append(Run(ratio, "convex", seed, solution.n_filters, value, error, seconds))
    width = max(run.filters for run in found)
    for method in ("adam", "sgd"):
        tuned = tune_rate(problem, method, width, epochs=EPOCHS)[0]
        others = [train_twin(problem, method, width, rate=tuned.rate, epochs=EPOCHS, seed=s) for s in range(1, SEEDS)]
        for training in [tuned, *others]:
            error = 1 - accuracy(predict(training.twin.network(), test.images), test.targets)
            found.append(Run(ratio, method, training.seed, width, training.objective, error, training.core_seconds))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    data_dir = parser.parse_args().data_dir
    lines = [
        "# Is the lower objective worth it?",
        "",
        f"`python experiments/worth.py`: {N:,} MNIST images, 5x5 filters, 4x4 cells, squared loss, at most "
        f"{MAX_FILTERS} filters; {SEEDS} seeds; Adam and SGD with {EPOCHS} epochs of batch 64 at their best "
        "rate for seed 0. Medians over seeds, ranges in brackets. ρ: rank correlation of objective and test error "
        f"over the {3 * SEEDS} trainings at that β.",
        "",
        "| β / β_max | method | filters | objective | test error | core-seconds | ρ |",
        "|---|---|---|---|---|---|---|",
    ]
    everything = []
    for ratio in RATIOS:
        runs = runs_at(ratio, data_dir)
        everything += runs
        correlation = spearmanr([run.objective for run in runs], [run.error for run in runs]).statistic
        for method in COLOURS:
            mine = [run for run in runs if run.method == method]
            values, errors = np.array([run.objective for run in mine]), np.array([run.error for run in mine])
            lines.append(
                f"| {ratio:g} | {method} | {mine[0].filters} | {np.median(values):.4f} ({values.min():.4f}-"
                f"{values.max():.4f}) | {np.median(errors):.2%} ({errors.min():.2%}-{errors.max():.2%}) | "
                f"{np.median([run.core_seconds for run in mine]):.0f} | {correlation:+.2f} |"
            )
            print(lines[-1], flush=True)
    (RESULTS / "worth.png").write_bytes(png(draw(everything), dpi=90))
    lines += ["", "![test error against objective](worth.png)"]
    (RESULTS / "worth.md").write_text("\n".join(lines) + "\n")


def draw(runs: list[Run]) -> Figure:
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for axes, ratio in zip(figure.subplots(1, len(RATIOS)), RATIOS, strict=True):
        for method, colour in COLOURS.items():
            mine = [run for run in runs if run.method == method and run.ratio == ratio]
            axes.plot([run.objective for run in mine], [run.error for run in mine], "o", color=colour, label=method)
        axes.set(xlabel="training objective", title=f"β = {ratio:g} β_max")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("test error")
    figure.axes[0].legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
