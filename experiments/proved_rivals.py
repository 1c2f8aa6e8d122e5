"""How far SGD and Adam end from a proved optimum at an accuracy worth having, and whether coming closer helps.

    convcvx train --preset mnist-proof --out RUN  # or cifar10-proof
    python experiments/proved_rivals.py RUN [--epochs 5 20] [--widths 1 4] [--seeds 3]

The run has a proved bound on all of its training images. Each rival is the same network, as wide as the run's and
several times as wide, its learning rate tuned for every row, its neurons balanced and its intercept at its best before
it is judged, as `convcvx compare` does. Test images are scored and choose nothing. Writes
experiments/results/proved_rivals-DATA.md and .png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from convcvx.baseline import OPTIMIZERS
from convcvx.comparison import compare_job
from convcvx.report import CONVEX_COLOUR, TWIN_COLOUR, png
from convcvx.terms.scope import Scope
from convcvx.training.presets import in_flags
from convcvx.training.run import Run
from convcvx.training.twin import CompareConfig

RESULTS = Path(__file__).parent / "results"
COLOURS = dict(zip(OPTIMIZERS, (TWIN_COLOUR, "#4d8a3a"), strict=True))
MARKERS = "osD^v"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--epochs", type=int, nargs="+", default=[5, 20])
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 4], help="in widths of the run's network")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=CompareConfig.batch)
    arguments = parser.parse_args()
    run = Run(arguments.run)
    metrics = run.metrics
    if metrics["scope"] != Scope.GLOBAL:
        parser.error(f"the bound of {arguments.run} is no proof for all networks: scope {metrics['scope']}")
    lines = [
        "# SGD and Adam against a proved optimum at a useful accuracy",
        "",
        f"`convcvx train --data {run.config.data} {in_flags(run.config.chosen)}` proves a gap of "
        f"{metrics['rel_gap']:.2%} for its {metrics['n_filters']} filters, which recognise "
        f"{metrics['test_accuracy']:.2%} of the test images, in {metrics['core_seconds']:.0f} core-seconds. Rivals: "
        f"`python experiments/proved_rivals.py RUN --epochs {' '.join(map(str, arguments.epochs))} --widths "
        f"{' '.join(map(str, arguments.widths))} --seeds {arguments.seeds}`, batches of {arguments.batch}, at the best "
        "of the learning rates tried. Gap: distance to the proved lower bound, as a share of the rival's objective.",
        "",
        "| rival | filters | epochs | rate | best gap | worst gap | test accuracies, in that order | core-seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    star = {"color": CONVEX_COLOUR, "ms": 12, "label": "convcvx, proved"}
    axes.plot(100 * metrics["test_accuracy"], metrics["rel_gap"], "*", **star)
    for optimizer in OPTIMIZERS:
        for marker, width in zip(MARKERS, arguments.widths, strict=False):
            for epochs in arguments.epochs:
                filters = width * metrics["n_filters"]
                options = {"epochs": epochs, "seeds": arguments.seeds, "batch": arguments.batch, "filters": filters}
                twin = compare_job(run, CompareConfig(optimizer, **options))["twin"]
                seeds = sorted(twin["seeds"], key=lambda seed: seed["objective"])
                gaps = [1 - twin["lower_bound"] / seed["objective"] for seed in seeds]
                scores = [seed["test_accuracy"] for seed in seeds]
                lines.append(
                    f"| {optimizer} | {filters} | {epochs} | {twin['learning_rate']:.2g} | {gaps[0]:.2%} "
                    f"| {gaps[-1]:.2%} | {', '.join(f'{score:.2%}' for score in scores)} "
                    f"| {twin['core_seconds']:.0f} |"
                )
                print(lines[-1], flush=True)
                name = f"{optimizer}, {filters} filters, {epochs} epochs"
                faint = {"alpha": 0.4 + 0.6 * epochs / max(arguments.epochs), "color": COLOURS[optimizer]}
                axes.plot([100 * score for score in scores], gaps, marker, ms=5, label=name, **faint)
    axes.set(yscale="log", xlabel="test accuracy, %", ylabel="gap to the proved lower bound")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    RESULTS.mkdir(exist_ok=True)
    name = f"proved_rivals-{run.config.data}"
    (RESULTS / f"{name}.png").write_bytes(png(figure, dpi=90))
    lines += ["", f"![gap to the proved bound against test accuracy]({name}.png)"]
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
