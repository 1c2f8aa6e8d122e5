"""How far SGD and Adam end from the global optimum on real images, where the optimum is proved.

    python experiments/certified_rivals.py --data-dir DIR

300 MNIST images, 3x3 filters in the first three principal directions of the patches, 4x4 pooling cells: branch
and bound proves the lower bound, so the distance of each rival to the optimum is known. Learning rates are tuned for
each row. Writes experiments/results/certified_rivals.md and .png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from convcvx.baseline import OPTIMIZERS, train_twin, tune_rate
from convcvx.budget import Budget
from convcvx.certificate import certify_parameters
from convcvx.data.datasets import load
from convcvx.patches import PatchSpec
from convcvx.report import CONVEX_COLOUR, TWIN_COLOUR, png
from convcvx.training.plan import build_problem, find_beta_max, solve_problem

RESULTS = Path(__file__).parent / "results"
N, EPOCHS, BATCH, SEEDS, TOL = 300, 50, 16, 3, 2e-3
RATIOS, WIDTHS = (0.1, 0.03, 0.01), (15, 60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    train, _ = load("mnist", parser.parse_args().data_dir, N)
    problem = build_problem(train.images, train.targets, spec=PatchSpec((3, 3), rank=3), pooling="4", n_classes=10)
    beta_max = find_beta_max(problem, "branch-and-bound")
    lines = [
        "# SGD and Adam against a proved optimum on real images",
        "",
        f"`python experiments/certified_rivals.py`: {N} MNIST images, 3x3 filters in the first 3 principal directions "
        f"of the patches, 4x4 pooling cells, squared loss; {EPOCHS} epochs of batch {BATCH}, {SEEDS} seeds at the best "
        "of the learning rates tried. Gap: relative distance of the objective to the proved lower bound.",
        "",
        "| beta/beta_max | optimum | its gap (global) | its filters | rival | m | rate | best gap | worst gap |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    colours = dict(zip(OPTIMIZERS, (TWIN_COLOUR, "#4d8a3a"), strict=True))
    for ratio in RATIOS:
        problem = problem.with_beta(ratio * beta_max)
        solution = solve_problem(problem, Budget(tol=TOL), oracle="branch-and-bound")
        bound = certify_parameters(problem, solution.filters, solution.weights, oracle="branch-and-bound", tol=TOL)
        axes.plot(
            [ratio], [bound.rel_gap], "*", color=CONVEX_COLOUR, ms=9, label="convex" if ratio == RATIOS[0] else None
        )
        for optimizer in OPTIMIZERS:
            for m in WIDTHS:
                options = {"epochs": EPOCHS, "batch": BATCH}
                first = tune_rate(problem, optimizer, m, **options)[0]
                others = [
                    train_twin(problem, optimizer, m, rate=first.rate, seed=seed, **options) for seed in range(1, SEEDS)
                ]
                gaps = sorted(1 - bound.dual / training.objective for training in (first, *others))
                lines.append(
                    f"| {ratio} | {bound.primal:.6f} | {bound.rel_gap:.1e} | {solution.n_filters} | {optimizer} "
                    f"| {m} | {first.rate:.2g} | {gaps[0]:.2%} | {gaps[-1]:.2%} |"
                )
                print(lines[-1], flush=True)
                axes.plot([ratio] * SEEDS, gaps, "os"[m == WIDTHS[1]], color=colours[optimizer], ms=4, alpha=0.7,
                          label=f"{optimizer}, m = {m}" if ratio == RATIOS[0] else None)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="β / β_max", ylabel="gap to the proved lower bound")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "certified_rivals.png").write_bytes(png(figure, dpi=90))
    lines += ["", "![gap of every training to the proved bound](certified_rivals.png)"]
    (RESULTS / "certified_rivals.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
