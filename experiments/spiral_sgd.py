"""Does SGD find the global optimum of the 60-point spiral? m neurons, several seeds, against the proved optimum.

    python experiments/spiral_sgd.py

The question of Sahiner et al. 2021. SGD with momentum, its learning rate tuned for each weight decay at 50
neurons. Beside the optimum stands the value of the copositive relaxation, which bounds it from below (tight in rank 2).
Writes experiments/results/spiral_sgd.md and .png.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from spiral import spiral

import convcvx
from convcvx.baseline import train_twin, tune_rate
from convcvx.patches import PatchSpec
from convcvx.report import BOUND_COLOUR, CONVEX_COLOUR, TWIN_COLOUR, png
from convcvx.solvers.programs.cones import Cones
from convcvx.solvers.programs.convex import solve_program
from convcvx.training.functional import patches_to_images
from convcvx.training.plan import build_problem

RESULTS = Path(__file__).parent / "results"
WIDTHS, SEEDS, EPOCHS, BATCH = (5, 15, 50, 100, 300), 5, 1000, 10
COLOURS = np.array([CONVEX_COLOUR, TWIN_COLOUR, "#4d8a3a"])


def main() -> None:
    torch.set_num_threads(1)  # the problems are too small for more
    x, y = spiral()
    figure = Figure(figsize=(10, 4), layout="constrained")
    spread, regions = figure.subplots(1, 2)
    lines = [
        "# SGD on the spiral against the proved optimum",
        "",
        f"`python experiments/spiral_sgd.py`: n = 60, three classes, squared loss, no intercept; SGD with momentum, "
        f"{EPOCHS} epochs of batch {BATCH}, {SEEDS} seeds. Excess: of the balanced objective over the optimum.",
        "",
        "| beta·n | optimum | its gap | its neurons | relaxation | SGD rate | m | best excess | median | worst "
        "| within 0.1 % |",
        "|---" * 11 + "|",
    ]
    for scaled, marker in ((0.1, "o"), (0.01, "s")):
        problem = build_problem(patches_to_images(x), y, scaled / len(x), spec=PatchSpec((1, 1)), intercept=False)
        optimum = convcvx.solve(x, y, problem.beta, intercept=False, tol=1e-6)
        certificate = optimum.certificate
        relaxation = solve_program(problem, Cones.all(problem), tol=1e-8).value
        rate = tune_rate(problem, "sgd", 50, epochs=EPOCHS, batch=BATCH)[0].rate
        for m in WIDTHS:
            options = {"rate": rate, "epochs": EPOCHS, "batch": BATCH}
            found = [train_twin(problem, "sgd", m, seed=seed, **options).objective for seed in range(SEEDS)]
            excess = np.sort(np.array(found) / certificate.primal - 1)
            colour = CONVEX_COLOUR if scaled == 0.1 else TWIN_COLOUR
            spread.plot([m] * SEEDS, excess, marker, color=colour, ms=4, alpha=0.7,
                        label=f"β·n = {scaled}" if m == WIDTHS[0] else None)  # fmt: skip
            lines.append(
                f"| {scaled} | {certificate.primal:.6f} | {certificate.rel_gap:.0e} | {optimum.n_filters} "
                f"| {relaxation:.6f} | {rate:.2g} | {m} | {excess[0]:.2%} | {np.median(excess):.2%} | {excess[-1]:.2%} "
                f"| {(excess < 1e-3).sum()} |"
            )
            print(lines[-1], flush=True)
    spread.set(xscale="log", yscale="log", xlabel="neurons", ylabel="excess over the proved optimum")
    spread.legend(frameon=False)
    spread.grid(alpha=0.3)
    draw_regions(regions, x, y, optimum)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "spiral_sgd.png").write_bytes(png(figure, dpi=90))
    lines += ["", "![excess of SGD; the optimum, its planes and decision regions](spiral_sgd.png)"]
    (RESULTS / "spiral_sgd.md").write_text("\n".join(lines) + "\n")


def draw_regions(axes: Axes, x: np.ndarray, y: np.ndarray, solution: convcvx.Solution) -> None:
    """The classes that the optimum predicts, and the plane of each of its neurons."""
    ticks = np.linspace(-1.1, 1.1, 300)
    grid = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
    filters, weights = solution.filters.numpy(), solution.weights[:, 0].numpy()
    scores = np.maximum(grid @ filters.T, 0) @ weights
    axes.contourf(
        ticks, ticks, scores.argmax(axis=1).reshape(300, 300), [-0.5, 0.5, 1.5, 2.5], colors=COLOURS, alpha=0.25
    )
    for u in filters:
        axes.axline((0, 0), (-u[1], u[0]), color=BOUND_COLOUR, lw=0.4)
    axes.scatter(*x.T, c=COLOURS[y], s=12)
    axes.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal", title="the proved optimum and its planes, β·n = 0.01")


if __name__ == "__main__":
    main()
