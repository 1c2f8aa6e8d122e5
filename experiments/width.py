"""Accuracy and objective against the number of filters: convex training and its Adam twin, at one weight decay.

    python experiments/width.py --data-dir DIR

2,000 MNIST images, 5x5 filters, 4x4 pooling cells, tested on the 10,000 test images. The budget of filters stops the
convex training short; the twin has the width that it ended with and a learning rate tuned once, at the middle width.
Writes experiments/results/width.md and .png.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter

from matplotlib.figure import Figure

from convcvx.baseline import train_twin, tune_rate
from convcvx.budget import Budget
from convcvx.certificate import certify_parameters, judged
from convcvx.data.datasets import load
from convcvx.network.evaluate import accuracy, predict
from convcvx.network.two_layer import TwoLayerCNN
from convcvx.patches import PatchSpec
from convcvx.report import BOUND_COLOUR, CONVEX_COLOUR, TWIN_COLOUR, png
from convcvx.training.plan import build_problem, find_beta_max, solve_problem
from convcvx.training.resolve import image_shape

RESULTS = Path(__file__).parent / "results"
N, EPOCHS, RATIO = 2000, 15, 1e-3
BUDGETS = (8, 16, 32, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    train, test = load("mnist", parser.parse_args().data_dir, N)
    problem = build_problem(train.images, train.targets, spec=PatchSpec((5, 5)), pooling="4", n_classes=10)
    problem = problem.with_beta(RATIO * find_beta_max(problem))
    rate = tune_rate(problem, "adam", BUDGETS[2], epochs=EPOCHS)[0].rate
    rows = []
    for budget in BUDGETS:
        began = perf_counter()
        solution = solve_problem(problem, Budget(tol=2e-2, max_filters=budget))
        seconds = perf_counter() - began
        _, weights, predictions = judged(problem, solution.filters, solution.weights)
        twin = train_twin(problem, "adam", solution.n_filters, rate=rate, epochs=EPOCHS)
        ours = TwoLayerCNN.from_solution(solution, solution.embedding, solution.pooling, image_shape(train))
        scores = [accuracy(predict(net, test.images), test.targets) for net in (ours, twin.twin.network())]
        rows.append(
            (solution.n_filters, problem.primal(predictions, weights), scores[0], seconds, twin.objective, scores[1],
             twin.seconds)
        )  # fmt: skip
        print(rows[-1], flush=True)
    bound = certify_parameters(problem, solution.filters, solution.weights, oracle="local").dual
    write(rows, bound, problem.beta, rate)


def write(rows: list[tuple], bound: float, beta: float, rate: float) -> None:
    lines = [
        "# Accuracy against the number of filters",
        "",
        f"`python experiments/width.py`: {N} MNIST images, 5x5 filters, 4x4 pooling cells, squared loss, beta "
        f"{beta:.3g} ({RATIO:g} of beta_max); Adam: {EPOCHS} epochs of batch 64, rate {rate:.2g}. Lower bound "
        f"over all networks, estimated by the local oracle: {bound:.4f} (scope heuristic).",
        "",
        "| filters | convex objective | test accuracy | seconds | Adam objective | test accuracy | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for m, objective, score, seconds, rival, rival_score, rival_seconds in rows:
        lines.append(
            f"| {m} | {objective:.4f} | {score:.2%} | {seconds:.0f} | {rival:.4f} | {rival_score:.2%} | "
            f"{rival_seconds:.0f} |"
        )
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    objectives, accuracies = figure.subplots(1, 2)
    widths = [row[0] for row in rows]
    for axes, columns in ((objectives, (1, 4)), (accuracies, (2, 5))):
        for column, name, colour in zip(columns, ("convex", "Adam"), (CONVEX_COLOUR, TWIN_COLOUR), strict=True):
            axes.plot(widths, [row[column] for row in rows], "o-", color=colour, ms=4, label=name)
        axes.set(xscale="log", xlabel="filters")
        axes.grid(alpha=0.3, which="both")
    objectives.axhline(bound, color=BOUND_COLOUR, ls="--", lw=1, label="lower bound (heuristic)")
    objectives.set(title="objective", yscale="log")
    accuracies.set(title="test accuracy")
    objectives.legend(frameon=False)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "width.png").write_bytes(png(figure, dpi=90))
    lines += ["", "![objective and accuracy against filters](width.png)"]
    (RESULTS / "width.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
