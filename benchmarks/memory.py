"""Peak memory of the streamed passes against the number of images: only the images themselves may grow.

    python benchmarks/memory.py [--data-dir ../shared/data]

Each size runs in a process of its own: the passes of one training round (predict, Gram, ascent, gradients) with
64 filters of 5x5 on real MNIST. Writes benchmarks/results/memory.md and .png.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from machine import machine
from matplotlib.figure import Figure

SIZES = (1000, 2000, 4000, 8000, 16000, 30000, 60000)
RESULT = Path(__file__).parent / "results" / "memory"


def measure(data_dir: str, n: int) -> None:
    """Print the resident size with the images loaded, and the peak of the passes, in MiB."""
    import torch

    from convcvx.data.datasets import load
    from convcvx.patches import PatchSpec
    from convcvx.training.plan import build_problem
    from convcvx.training.progress import peak_memory_mb

    train, _ = load("mnist", data_dir, n)
    problem = build_problem(train.images, train.targets, spec=PatchSpec((5, 5)), pooling=4, dtype=torch.float32)
    responses = problem.responses
    filters = torch.randn(64, responses.dim, generator=torch.Generator().manual_seed(0)).double()
    weights, intercept = torch.zeros(64, responses.n_cells, 10), torch.zeros(10)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of loading, is forgotten
    before = peak_memory_mb()
    predictions = responses.predict(filters, weights, intercept)
    dual_point = problem.dual_point(predictions)
    responses.gram(filters, problem.targets)
    responses.ascent(filters, dual_point, weights)
    responses.gradients(filters, weights, intercept, lambda outputs, images: outputs)
    rows = n * responses.n_positions
    print(before, peak_memory_mb(), train.images.numel() * 4 / 2**20, rows * responses.dim * 4 / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", default="../shared/data")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.data_dir, arguments.measure)
        return
    lines = [
        "# Peak memory against the number of images",
        "",
        f"`python benchmarks/memory.py` on {machine()}; MNIST, 5x5 patches, 64 filters, 16 cells, float32. Unrolled "
        "patches would need the last column.",
        "",
        "| images | images, MiB | before the passes, MiB | added at their peak, MiB | all patches, MiB |",
        "|---|---|---|---|---|",
    ]
    points: dict[str, list[float]] = {"all patches": [], "images": [], "added by the passes": []}
    for n in SIZES:
        command = [sys.executable, __file__, "--data-dir", arguments.data_dir, "--measure", str(n)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        before, after, images, patches = map(float, output.split())
        lines.append(f"| {n:,} | {images:.0f} | {before:.0f} | {after - before:.0f} | {patches:,.0f} |")
        print(lines[-1], flush=True)
        for name, value in zip(points, (patches, images, after - before), strict=True):
            points[name].append(value)
    RESULT.with_suffix(".md").write_text("\n".join(lines) + "\n")
    draw(points).savefig(RESULT.with_suffix(".png"), dpi=120)


def draw(points: dict[str, list[float]]) -> Figure:
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for (name, values), style in zip(points.items(), (":", "--", "o-"), strict=True):
        axes.loglog(SIZES, values, style, color="black", ms=3, label=name)
    axes.set_xticks(SIZES, [f"{n:,}" for n in SIZES], rotation=45)
    axes.minorticks_off()
    axes.set_xlabel("images")
    axes.set_ylabel("MiB")
    axes.legend()
    return figure


if __name__ == "__main__":
    main()
