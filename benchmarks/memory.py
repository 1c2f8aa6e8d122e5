"""Peak memory of the streamed passes against the number of images: only the images themselves may grow.

    python benchmarks/memory.py [--data-dir ../shared/data]

Each size runs in a process of its own: the passes of one training round (predict, Gram, ascent, gradients) with
64 filters of 5x5 on real MNIST. Writes benchmarks/results/memory.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from machine import machine

SIZES = (1000, 4000, 16000, 60000)
RESULT = Path(__file__).parent / "results" / "memory.md"


def measure(data_dir: str, n: int) -> None:
    """Print the resident size with the images loaded, and the peak after the passes, in MiB."""
    import torch

    from convcvx.data import load
    from convcvx.patches import PatchSpec
    from convcvx.progress import peak_memory_mb
    from convcvx.training import build_problem

    train, _ = load("mnist", data_dir, n)
    problem = build_problem(train.images, train.targets, spec=PatchSpec((5, 5)), pooling=4, dtype=torch.float32)
    responses = problem.responses
    filters = torch.randn(64, responses.dim, generator=torch.Generator().manual_seed(0)).double()
    weights, intercept = torch.zeros(64, responses.n_cells, 10), torch.zeros(10)
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
        "| images | images, MiB | peak before the passes, MiB | added by the passes, MiB | all patches, MiB |",
        "|---|---|---|---|---|",
    ]
    for n in SIZES:
        command = [sys.executable, __file__, "--data-dir", arguments.data_dir, "--measure", str(n)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        before, after, images, patches = map(float, output.split())
        lines.append(f"| {n:,} | {images:.0f} | {before:.0f} | {after - before:.0f} | {patches:,.0f} |")
        print(lines[-1])
    RESULT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
