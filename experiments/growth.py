"""How the cost of a proof grows with the number of patches, and how many neurons an optimum has, beside the theory.

    OMP_NUM_THREADS=1 python experiments/growth.py

Real patches: 3x3 patches, stride 2, of the embedded digits in their first r = 2, 3, 4 principal directions, global
average pooling, ten classes. For each r one dual point, the residual of the best constant, is searched by the exact
oracle and by branch and bound (to 1 %) while the number N of distinct patch rows grows. Exponents are least-squares
slopes over the larger half of the N. Then small problems are solved to a proved optimum, and neurons that the optimum
does not need are removed. Writes experiments/results/growth.md and .png.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import process_time

import numpy as np
import torch
from matplotlib.figure import Figure

from convcvx.arrangements.cells import count_cells
from convcvx.budget import Budget
from convcvx.certificate import certify_parameters
from convcvx.data.datasets import load
from convcvx.oracles.branch_and_bound import BranchAndBoundOracle
from convcvx.oracles.charged_rows import ChargedRows
from convcvx.oracles.enumerate import ExactOracle
from convcvx.patches import PatchSpec
from convcvx.report import BOUND_COLOUR, CONVEX_COLOUR, TWIN_COLOUR, png
from convcvx.solvers.sliding_frank_wolfe import sliding_frank_wolfe
from convcvx.solvers.sparsify import sparsify
from convcvx.training.plan import build_problem, find_beta_max

RESULTS = Path(__file__).parent / "results"
IMAGES = {2: (8, 16, 32, 64, 128, 256, 512, 1024, 1437), 3: (4, 8, 16, 32, 64, 128), 4: (2, 3, 4, 5, 6, 8)}
OPTIMA = [(6, 1, 1), (6, 4, 1), (6, 4, 10), (24, 1, 1), (24, 1, 10)]
"""Images, pooling cells and outputs of the problems whose optima are counted."""
TOL = 1e-6
Sizes = list[tuple[int, int, int, float, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    train, _ = load("digits")
    images, classes = train.images, torch.as_tensor(train.targets)
    for rank in IMAGES:
        measure(images[:4], classes[:4], rank)  # compiles
    growth = {rank: [measure(images[:n], classes[:n], rank) for n in sizes] for rank, sizes in IMAGES.items()}
    lines = [
        "# What theory predicts, measured",
        "",
        "`python experiments/growth.py`: 3x3 patches, stride 2, of the embedded digits in their first r principal "
        "directions, global average pooling, ten classes, N distinct patch rows; one dual point each, the residual of "
        "the best constant, searched by the exact oracle and by branch and bound to 1 %. CPU seconds of one thread, "
        "because other work may share the machine.",
        "",
        "| r | N | cells of the arrangement | cells and arcs visited | exact, CPU s | branch and bound, CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for rank, sizes in growth.items():
        for n, cells, visited, exact, rival in sizes:
            lines.append(f"| {rank} | {n:,} | {cells:,} | {visited:,} | {exact:.4f} | {rival:.4f} |")
    lines += [
        "",
        "Exponents of N: least-squares slopes over the larger half of the N. Theory: cells N^(r-1), the paper's "
        "algorithm O(N^r).",
        "",
        "| r | cells | theory | exact, CPU s | theory, at most | branch and bound, CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for rank, sizes in growth.items():
        cells, exact, rival = (slope(sizes, column) for column in (1, 3, 4))
        lines.append(f"| {rank} | {cells:.2f} | {rank - 1} | {exact:.2f} | {rank} | {rival:.2f} |")
    lines += [
        "",
        f"Neurons at optima proved to {TOL:g}, r = 2, as the solver found them and after `sparsify`; n·P·c + 1 is the "
        "paper's bound.",
        "",
        "| n | P | c | beta/beta_max | proved gap | neurons found | after sparsify | its gap | n·P·c + 1 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in OPTIMA:
        lines.append(count_neurons(images, classes, *case))
        print(lines[-1], flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "growth.png").write_bytes(png(draw(growth), dpi=90))
    lines += ["", "![seconds and cells against the number of patches](growth.png)"]
    (RESULTS / "growth.md").write_text("\n".join(lines) + "\n")


def measure(images: torch.Tensor, classes: torch.Tensor, rank: int) -> tuple[int, int, int, float, float]:
    """N, cells, cells and arcs visited, CPU seconds of the exact oracle and of branch and bound."""
    problem = build_problem(images, classes, spec=PatchSpec((3, 3), (2, 2), rank=rank), n_classes=10)
    charged = ChargedRows.build(problem, problem.dual_point(problem.constant_predictions()))
    began = process_time()
    exact = ExactOracle().maximise(charged)
    middle = process_time()
    rival = BranchAndBoundOracle(1e-2).maximise(charged)
    end = process_time()
    if not exact.values[0] <= rival.upper_bound <= 1.01 * exact.upper_bound * (1 + 1e-9):
        raise SystemExit(f"the oracles disagree: {exact} {rival}")
    row = len(charged.rows), count_cells(charged.rows), exact.stats["cells"], middle - began, end - middle
    print(rank, *row, flush=True)
    return row


def slope(sizes: Sizes, column: int) -> float:
    """Exponent of N in a column, over the larger half of the N."""
    table = np.log(np.array(sizes)[len(sizes) // 2 :])
    return float(np.polyfit(table[:, 0], table[:, column], 1)[0])


def count_neurons(images: torch.Tensor, classes: torch.Tensor, n: int, n_cells: int, n_outputs: int) -> str:
    """Solve a small problem to a proved optimum; the neurons found, and those that are left of them."""
    images, classes = images[:n].double(), classes[:n]
    targets = torch.eye(10, dtype=torch.float64)[classes] if n_outputs == 10 else classes[:, None].double() / 9
    pooling = {1: "1", 4: "2"}[n_cells]
    problem = build_problem(images, targets, spec=PatchSpec((3, 3), (2, 2), rank=2), pooling=pooling)
    ratio = 1e-3
    problem = problem.with_beta(ratio * find_beta_max(problem, "exact"))
    solution = sliding_frank_wolfe(problem, ExactOracle(), Budget(tol=TOL, time_limit=40))
    fewer = sparsify(problem, solution)
    gaps = [
        certify_parameters(problem, each.filters, each.weights, oracle="exact").rel_gap for each in (solution, fewer)
    ]
    return (
        f"| {n} | {n_cells} | {n_outputs} | {ratio:g} | {gaps[0]:.1e} | {solution.n_filters} | {fewer.n_filters} | "
        f"{gaps[1]:.1e} | {n * n_cells * n_outputs + 1} |"
    )


def draw(growth: dict[int, Sizes]) -> Figure:
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    seconds, cells = figure.subplots(1, 2)
    for (rank, sizes), marker in zip(growth.items(), "os^", strict=True):
        n, count, _, exact, rival = np.array(sizes).T
        seconds.plot(n, exact, marker + "-", color=CONVEX_COLOUR, ms=4, label="exact" if rank == 2 else None)
        seconds.plot(n, rival, marker + "--", color=TWIN_COLOUR, ms=4, label="branch and bound" if rank == 2 else None)
        cells.plot(n, count, marker, color=CONVEX_COLOUR, ms=4, label=f"r = {rank}")
        cells.plot(n, count[-1] * (n / n[-1]) ** (rank - 1), color=BOUND_COLOUR, lw=1, ls=":")
        seconds.plot(n, exact[-1] * (n / n[-1]) ** (rank - 1), color=BOUND_COLOUR, lw=1, ls=":")
    for axes in (seconds, cells):
        axes.plot([], [], color=BOUND_COLOUR, lw=1, ls=":", label="slope r - 1")
    for axes, title in ((seconds, "CPU seconds for a proved maximum"), (cells, "cells of the arrangement")):
        axes.set(xscale="log", yscale="log", xlabel="distinct patch rows N", title=title)
        axes.grid(alpha=0.3, which="major")
        axes.set_ylim(top=1e3 if axes is seconds else None)  # room for the legend
        axes.legend(frameon=False, fontsize=8, loc="upper right" if axes is seconds else "lower right")
    return figure


if __name__ == "__main__":
    main()
