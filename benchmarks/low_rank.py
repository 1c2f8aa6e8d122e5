"""What trainings at low rank gain: passes over maps of the patches, and weights whitened by triangular solves.

    python benchmarks/low_rank.py

Passes: random images of the shape of MNIST, the patches of `--preset mnist-proof`, in the coordinates of the filters
(`Maps`) and from the pixels, as before. Whitening: ten columns times an inverse, and its transpose, or solved for, as a
step of a slide needs both. Rivals alternate on all cores; the best of ten rounds of CPU time counts. Writes
benchmarks/results/low_rank.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import process_time
from unittest.mock import patch

import torch
from machine import machine

from convcvx.patches import PatchEmbedding, PatchSpec
from convcvx.pooling import Pooling
from convcvx.responses.maps import Maps
from convcvx.responses.passes import Responses

IMAGES = 2048
SPEC = PatchSpec(7, stride=2, padding=1, contrast=1e-2)
RANKS = 2, 3, 5
FILTERS = 8, 120
N_OUTPUTS = 10
SIZES = 512, 2048, 4428
"""Pooled responses of networks: the last of 123 filters and 36 cells, about what `mnist-proof` ends with."""
RESULT = Path(__file__).parent / "results" / "low_rank.md"


def best(jobs: dict[str, Callable[[], object]], rounds: int = 10) -> dict[str, float]:
    """CPU seconds of each job, the least of alternating rounds."""
    seconds = dict.fromkeys(jobs, float("inf"))
    for number in range(rounds + 1):  # the first warms up
        for name, job in jobs.items():
            began = process_time()
            job()
            if number:
                seconds[name] = min(seconds[name], process_time() - began)
    return seconds


def passes(rank: int, m: int) -> dict[str, float]:
    """Seconds of `correlate` and of `gradients`, over maps and over pixels."""
    random = torch.Generator().manual_seed(0)
    images = torch.rand(IMAGES, 1, 28, 28, generator=random)
    embedding = PatchEmbedding.fit(images, PatchSpec(**{**vars(SPEC), "rank": rank}))
    mapped = Responses(images, embedding, Pooling.of("6"), dtype=torch.float32)
    with patch.object(Maps, "suit", return_value=False):
        pixels = Responses(images, embedding, Pooling.of("6"), dtype=torch.float32)
    assert (mapped.mapped, pixels.mapped) == (True, False)
    filters = torch.randn(m, rank, generator=random, dtype=torch.float64)
    weights = torch.randn(m, mapped.n_cells, N_OUTPUTS, generator=random, dtype=torch.float64)
    dual_point = torch.randn(IMAGES, N_OUTPUTS, generator=random, dtype=torch.float64)
    intercept = torch.zeros(N_OUTPUTS, dtype=torch.float64)
    return best(
        {
            "correlate, maps": lambda: mapped.correlate(filters, dual_point),
            "correlate, pixels": lambda: pixels.correlate(filters, dual_point),
            "gradients, maps": lambda: mapped.gradients(filters, weights, intercept, lambda f, _: f),
            "gradients, pixels": lambda: pixels.gradients(filters, weights, intercept, lambda f, _: f),
        }
    )


def whitening(size: int) -> dict[str, float]:
    """Seconds of B⁻¹X and B⁻ᵀX for a triangular B."""
    random = torch.Generator().manual_seed(0)
    factor = torch.randn(size, size, generator=random).tril(-1) / size + torch.eye(size)
    inverse = torch.linalg.solve_triangular(factor, torch.eye(size), upper=False)
    columns = torch.randn(size, N_OUTPUTS, generator=random)
    return best(
        {
            "solves": lambda: (
                torch.linalg.solve_triangular(factor, columns, upper=False),
                torch.linalg.solve_triangular(factor.T, columns, upper=True),
            ),
            "products": lambda: (inverse @ columns, inverse.T @ columns),
        }
    )


def main() -> None:
    lines = [
        "# Trainings at low rank",
        "",
        f"`python benchmarks/low_rank.py` on {machine()}. CPU milliseconds; {IMAGES:,} images, float32.",
        "",
        "| rank | filters | correlate: pixels | maps | ratio | gradients: pixels | maps | ratio |",
        "|---" * 8 + "|",
    ]
    for rank in RANKS:
        for m in FILTERS:
            found = passes(rank, m)
            cells = [str(rank), str(m)]
            for name in "correlate", "gradients":
                slow, fast = (1e3 * found[f"{name}, {way}"] for way in ("pixels", "maps"))
                cells += [f"{slow:.0f}", f"{fast:.0f}", f"{slow / fast:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    lines += ["", "| pooled responses | products with an inverse | solves | ratio |", "|---|---|---|---|"]
    for size in SIZES:
        found = whitening(size)
        slow, fast = 1e3 * found["products"], 1e3 * found["solves"]
        lines.append(f"| {size:,} | {slow:.1f} | {fast:.1f} | {slow / fast:.1f} |")
        print(lines[-1], flush=True)
    RESULT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
