"""How the cost of one training round grows with images, positions, filter size and filters: fitted exponents.

    python benchmarks/scaling.py [--data-dir ../shared/data] [--train]

One quantity varies at a time around 5x5 filters on MNIST, 4x4 cells. A round is what sliding Frank-Wolfe does on all
images: predictions, a step of 32 climbing filters, an epoch of gradients, the Gram matrix and the Newton steps of the
master. CPU seconds (the machine is shared), the best of three alternating rounds; the exponent is the slope of log
seconds on log quantity. With --train also whole trainings to a relative gap, samples and oracle included. Writes
benchmarks/results/scaling.md and .png.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from time import process_time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from machine import machine
from matplotlib.figure import Figure

from convcvx.budget import Budget
from convcvx.data.datasets import load
from convcvx.patches import PatchSpec
from convcvx.problem import Problem
from convcvx.solvers.master.table import solve_master
from convcvx.training.plan import build_problem, solve_problem

RESULTS = Path(__file__).parent / "results"
IMAGES, KERNEL, FILTERS, SIDE = 8000, 5, 64, 28
SWEEPS: dict[str, tuple[int, ...]] = {
    "images": (2000, 4000, 8000, 16000, 32000, 60000),
    "positions": (12, 16, 20, 24, 28),  # sides of the images, which are cropped
    "filter entries": (3, 5, 7, 9, 11),  # sides of the filters, on images padded to as many positions
    "filters": (16, 32, 64, 128, 256),
}
REPEATS = 3
TRAIN_GAP, TRAIN_IMAGES = 0.05, (3750, 7500, 15000, 30000, 60000)
"""Relative gap of the whole trainings, at β = 1e-3, and their sizes."""


def problem_of(data_dir: str, n: int, side: int, kernel: int) -> Problem:
    """MNIST, cropped to its middle, padded so that filters of any size have as many positions."""
    train, _ = load("mnist", data_dir, n)
    first = (SIDE - side) // 2
    images = train.images[:, :, first : first + side, first : first + side].contiguous()
    spec = PatchSpec((kernel, kernel), padding=(kernel // 2, kernel // 2))
    return build_problem(images, train.targets, 1e-3, spec=spec, pooling=4, intercept=False, dtype=torch.float32)


def training_round(problem: Problem, m: int) -> Callable[[], None]:
    """A round with `m` filters."""
    random = torch.Generator().manual_seed(0)
    responses = problem.responses
    filters = torch.nn.functional.normalize(torch.randn(m, responses.dim, generator=random, dtype=torch.float64))
    weights = 0.01 * torch.randn(m, responses.n_cells, problem.n_outputs, generator=random, dtype=torch.float64)
    zero = torch.zeros(problem.n_outputs)

    def run() -> None:
        dual_point = problem.dual_point(responses.predict(filters, weights, zero))
        responses.ascent(filters[:32], dual_point, weights[:32])
        responses.gradients(filters, weights, zero, lambda outputs, images: outputs)
        solve_master(problem, filters, tol=1e-2)

    return run


def sweep(name: str, data_dir: str) -> list[tuple[float, float]]:
    """(quantity, CPU seconds) of a round, for each value of the sweep."""
    jobs = []
    for value in SWEEPS[name]:
        n, side, kernel, m = IMAGES, SIDE, KERNEL, FILTERS
        match name:
            case "images":
                n = value
            case "positions":
                side = value
            case "filter entries":
                kernel = value
            case "filters":
                m = value
        problem = problem_of(data_dir, n, side, kernel)
        quantity = {"positions": problem.responses.n_positions, "filter entries": problem.responses.dim}.get(
            name, value
        )
        jobs.append((float(quantity), training_round(problem, m)))
    best = [math.inf] * len(jobs)
    for _ in range(REPEATS):
        for k, (_, job) in enumerate(jobs):
            began = process_time()
            job()
            best[k] = min(best[k], process_time() - began)
    return [(quantity, seconds) for (quantity, _), seconds in zip(jobs, best, strict=True)]


def trainings(data_dir: str) -> list[tuple[float, float]]:
    """(images, CPU seconds) of trainings to `TRAIN_GAP`."""
    points = []
    for n in TRAIN_IMAGES:
        train, _ = load("mnist", data_dir, n)
        began = process_time()
        spec = PatchSpec((KERNEL, KERNEL))
        problem = build_problem(
            train.images, train.targets, 1e-3, spec=spec, pooling=4, intercept=False, dtype=torch.float32
        )
        solution = solve_problem(problem, Budget(tol=TRAIN_GAP))
        points.append((float(n), process_time() - began))
        print(n, points[-1], solution.status, solution.history[-1], flush=True)
    return points


def exponent(points: list[tuple[float, float]]) -> float:
    """Slope of log seconds on log quantity."""
    quantities, seconds = np.log(np.array(points)).T
    return float(np.polyfit(quantities, seconds, 1)[0])


def draw(curves: dict[str, list[tuple[float, float]]]) -> Figure:
    figure = Figure(figsize=(3 * len(curves), 3), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(1, len(curves), sharey=True), curves.items(), strict=True):
        axes.loglog(*zip(*points, strict=True), "o-", color="black", ms=3)
        quantities = [quantity for quantity, _ in points]
        axes.set_xticks(quantities, [f"{quantity:,.0f}" for quantity in quantities], rotation=45)
        axes.minorticks_off()
        axes.set_yticks((1, 3, 10, 30, 100), ("1", "3", "10", "30", "100"))
        axes.set_xlabel(name)
        axes.set_title(f"exponent {exponent(points):.2f}")
    figure.axes[0].set_ylabel("CPU seconds")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="../shared/data")
    parser.add_argument("--train", action="store_true", help="whole trainings too; several minutes")
    arguments = parser.parse_args()
    curves = {}
    for name in SWEEPS:
        curves[name] = sweep(name, arguments.data_dir)
        print(name, curves[name], flush=True)
    if arguments.train:
        curves[f"images, training to a gap of {TRAIN_GAP:g}"] = trainings(arguments.data_dir)
    lines = [
        "# Growth of the cost",
        "",
        f"`python benchmarks/scaling.py{' --train' if arguments.train else ''}` on {machine()}. CPU seconds of a "
        f"training round around {IMAGES:,} images of MNIST, {KERNEL}x{KERNEL} filters, {FILTERS} filters, 4x4 cells; "
        "the exponent is fitted to all points. Filters: the Gram matrix and the Newton steps make the end of the "
        "curve steeper.",
        "",
        "| quantity | values | CPU seconds | exponent |",
        "|---|---|---|---|",
    ]
    for name, points in curves.items():
        values, seconds = zip(*points, strict=True)
        lines.append(
            f"| {name} | {', '.join(f'{v:,.0f}' for v in values)} | {', '.join(f'{s:.2f}' for s in seconds)} "
            f"| {exponent(points):.2f} |"
        )
    (RESULTS / "scaling.md").write_text("\n".join(lines) + "\n")
    draw(curves).savefig(RESULTS / "scaling.png", dpi=120)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
