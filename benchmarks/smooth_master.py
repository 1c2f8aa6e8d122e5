"""The master problem under smooth losses, as rounds of a training ask for it: CPU seconds, Newton steps, gaps.

    python benchmarks/smooth_master.py [--data-dir ../shared/data] [--images 1000] [--losses cross-entropy,bce,...]

Filters are 48 directions spread over four subspaces of rank 2 of MNIST's 7x7 patches, 4x4 cells, beta a hundredth of
the largest g among them. Weights of 16 of them are found from zero; of 32 and 48 from where the last ones ended, new
filters at zero; then all again to smaller gaps. To time a change run it at both commits, by turns. Writes
benchmarks/results/smooth_master.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import process_time

import torch
from machine import machine
from torch import Tensor

from convcvx.data.datasets import load
from convcvx.patches import PatchSpec
from convcvx.solvers.master.table import solve_master
from convcvx.training.plan import build_problem

RESULT = Path(__file__).parent / "results" / "smooth_master.md"
LOSSES = "cross-entropy,bce,huber:0.3,squared-hinge"
SUBSPACES, ANGLES = 4, 12
"""Subspaces of rank 2, and directions in each."""
STAGES = ((16, 1e-2), (32, 1e-2), (48, 1e-2), (48, 1e-3), (48, 1e-6))
"""Filters, and the gap to reach."""


def directions() -> Tensor:
    """(48, 8) unit filters in an order drawn with seed 0."""
    angle = 2 * torch.pi * (torch.arange(ANGLES, dtype=torch.float64) + 0.5) / ANGLES
    circle = torch.stack([angle.cos(), angle.sin()], dim=1)
    order = torch.randperm(SUBSPACES * ANGLES, generator=torch.Generator().manual_seed(0))
    return torch.block_diag(*[circle] * SUBSPACES)[order]


def rows(loss: str, images: Tensor, targets: Tensor) -> list[str]:
    labels = torch.eye(10, dtype=torch.float64)[targets] if loss == "bce" else targets
    spec = PatchSpec((7, 7), stride=2, padding=1, rank=2, subspaces=SUBSPACES, contrast=1.5e-4)
    problem, filters = build_problem(images, labels, loss=loss, spec=spec, pooling=4), directions()
    constant = problem.dual_point(problem.constant_predictions())
    problem = problem.with_beta(
        0.01 * float(problem.responses.correlate(filters, constant).flatten(1).norm(dim=1).max())
    )
    cells, c = problem.responses.n_cells, problem.n_outputs
    weights, intercept = torch.zeros(0, cells, c, dtype=torch.float64), torch.zeros(c, dtype=torch.float64)
    lines = []
    for m, tol in STAGES:
        start = torch.cat([weights, torch.zeros(m - len(weights), cells, c, dtype=torch.float64)])
        began = process_time()
        found = solve_master(problem, filters[:m], start, intercept, tol=tol)
        seconds, weights, intercept = process_time() - began, found.weights, found.intercept
        reached = f"{found.objective:.7f} | {found.rel_gap:.1e} | {found.iterations}"
        lines.append(f"| {loss} | {m} | {tol:g} | {reached} | {seconds:.1f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--losses", default=LOSSES)
    arguments = parser.parse_args()
    train, _ = load("mnist", arguments.data_dir, arguments.images)
    lines = [
        "# The master problem under smooth losses",
        "",
        f"`python benchmarks/smooth_master.py --images {arguments.images} --losses {arguments.losses}` on {machine()}.",
        "Each line goes on from where the one above ended; CPU seconds.",
        "",
        "| loss | filters | gap to reach | objective | gap | Newton steps | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for loss in arguments.losses.split(","):
        lines += rows(loss, train.images, train.targets)
    RESULT.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
