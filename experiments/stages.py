"""Accuracy against stages and filters: greedy convex stages beside greedy stages trained by Adam.

    python experiments/stages.py --data-dir DIR

2,000 MNIST images, tested on the 10,000 test images. Stage 1 has 5x5 filters and 4x4 cells; stage 2 3x3 filters and 3x3
cells on what stage 1 makes of the images: its maps averaged down to 12x12, 16 principal channels, the first 32
principal directions of their whitened patches. Either method trains stage 2 on features of its own stage 1, both at
the same shares of beta_max; Adam has the width that convex training ended with, and its rate is tuned at each stage and
width. Writes experiments/results/stages.md and .png.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import process_time

import torch
from matplotlib.figure import Figure

from convcvx.baseline import tune_rate
from convcvx.budget import Budget
from convcvx.certificate import judged
from convcvx.data.datasets import Dataset, load
from convcvx.network.evaluate import accuracy, predict
from convcvx.network.two_layer import TwoLayerCNN
from convcvx.patches import PatchSpec
from convcvx.problem import Problem
from convcvx.report import CONVEX_COLOUR, TWIN_COLOUR, png
from convcvx.stack.features import fit_link, stream_features
from convcvx.training.plan import build_problem, find_beta_max, solve_problem
from convcvx.training.resolve import image_shape

RESULTS = Path(__file__).parent / "results"
N, EPOCHS, CHANNELS, DOWNSAMPLE = 2000, 15, 16, 2
SPECS = (PatchSpec((5, 5)), PatchSpec((3, 3), padding=(1, 1), rank=32, whiten=0.01))
POOLS, RATIOS = ("4", "3"), (1e-3, 2e-3)
BUDGETS = (8, 16, 32, 64)
COLOURS = {"convex": CONVEX_COLOUR, "adam": TWIN_COLOUR}
Train = Callable[[Problem, int, Dataset], tuple[TwoLayerCNN, float]]


@dataclass(frozen=True)
class Row:
    """One stage: its objective on its own features, and the test accuracy of its head."""

    method: str
    stage: int
    filters: int
    objective: float
    accuracy: float
    core_seconds: float


def convex(problem: Problem, width: int, train: Dataset) -> tuple[TwoLayerCNN, float]:
    solution = solve_problem(problem, Budget(tol=2e-2, max_filters=width))
    _, weights, predictions = judged(problem, solution.filters, solution.weights)
    responses = problem.responses
    network = TwoLayerCNN.from_solution(solution, responses.embedding, responses.pooling, image_shape(train))
    return network, problem.primal(predictions, weights)


def adam(problem: Problem, width: int, train: Dataset) -> tuple[TwoLayerCNN, float]:
    best = tune_rate(problem, "adam", width, epochs=EPOCHS)[0]
    return best.twin.network(), best.objective


def stages(method: str, fit: Train, widths: tuple[int, ...], train: Dataset, test: Dataset) -> list[Row]:
    """Train the stages one after the other, with at most so many filters."""
    rows = []
    for stage, (spec, pool, ratio, width) in enumerate(zip(SPECS, POOLS, RATIOS, widths, strict=True), start=1):
        problem = build_problem(train.images, train.targets, spec=spec, pooling=pool, n_classes=10)
        problem = problem.with_beta(ratio * find_beta_max(problem))
        began = process_time()
        network, objective = fit(problem, width, train)
        seconds = process_time() - began
        score = accuracy(predict(network, test.images), test.targets)
        rows.append(Row(method, stage, network.architecture.n_filters, objective, score, seconds))
        print(rows[-1], flush=True)
        link = fit_link(network, train.images, CHANNELS, DOWNSAMPLE)
        train, test = (
            replace(part, images=torch.cat(list(stream_features(network, link, part.images))).float())
            for part in (train, test)
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    train, test = load("mnist", parser.parse_args().data_dir, N)
    rows = []
    for budget in BUDGETS:
        ours = stages("convex", convex, (budget, budget), train, test)
        rows += ours + stages("adam", adam, (ours[0].filters, ours[1].filters), train, test)
    lines = [
        "# Accuracy against stages and filters",
        "",
        f"`python experiments/stages.py`: {N:,} MNIST images, squared loss, weight decay {RATIOS[0]:g} and "
        f"{RATIOS[1]:g} of beta_max. Stages are trained greedily, each on the frozen features of its own method's "
        f"stage before. Adam: {EPOCHS} epochs of batch 64, the best of its rates by training objective; its "
        "core-seconds are those of all rates tried. Objectives of stage 2 are of different problems, as the features "
        "differ.",
        "",
        "| filters at most | method | stage | filters | objective | test accuracy | core-seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    per_budget = len(rows) // len(BUDGETS)
    for k, row in enumerate(rows):
        lines.append(
            f"| {BUDGETS[k // per_budget]} | {row.method} | {row.stage} | {row.filters} | {row.objective:.4f} | "
            f"{row.accuracy:.2%} | {row.core_seconds:.0f} |"
        )
    (RESULTS / "stages.png").write_bytes(png(draw(rows), dpi=90))
    lines += ["", "![test accuracy against filters](stages.png)"]
    (RESULTS / "stages.md").write_text("\n".join(lines) + "\n")


def draw(rows: list[Row]) -> Figure:
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    for method, colour in COLOURS.items():
        for stage, style in ((1, "o--"), (2, "o-")):
            mine = [row for row in rows if (row.method, row.stage) == (method, stage)]
            axes.plot(
                BUDGETS, [row.accuracy for row in mine], style, color=colour, ms=4, label=f"{method}, stage {stage}"
            )
    axes.set(xscale="log", xlabel="filters a stage, at most", ylabel="test accuracy")
    axes.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
