"""Which network of a proved small gap recognises most images, and what does the proof cost? Chooses `mnist-proof`.

    python experiments/proved_accuracy.py [--data cifar10] --data-dir DIR

Each case is trained by branch and bound on the first images and scored on the last 10,000 training images, which no
training sees; the test images are left alone. Cases on the command line, options of `convcvx.fit` as TOML has them,
are run instead: "kernel_size=7 stride=2 rank=3 pool=6 beta_ratio=0.01". A row a case is added to
experiments/results/proved_accuracy.md, so that a long sweep can be made in parts.

A proof takes minutes. With --survey cases of rank 2 or 3 are compared in seconds before, with no proof: filters are
directions spread over the circle or sphere of each subspace, 12 or 48, and weights the optimal ones. Rows go to
experiments/results/accuracy_survey.md.
"""

from __future__ import annotations

import argparse
import math
import time
import tomllib
from pathlib import Path

import torch
from torch import Tensor

import convcvx
from convcvx.data.datasets import load
from convcvx.network.evaluate import accuracy, predict
from convcvx.solvers.master.table import solve_master
from convcvx.training.options import TrainConfig
from convcvx.training.plan import build_problem

OUT = Path(__file__).parent / "results" / "proved_accuracy.md"
SURVEY = OUT.with_name("accuracy_survey.md")
HELD_OUT = 10_000
"""Training images for scoring: an accuracy is known to a quarter of a per cent."""
CASES = [
    "kernel_size=7 stride=2 rank=3 pool=4 beta_ratio=0.01",
    "kernel_size=7 stride=2 rank=3 pool=6 beta_ratio=0.01",
    "kernel_size=7 stride=2 rank=3 pool=6 contrast=true beta_ratio=0.01",
    "kernel_size=5 stride=2 rank=3 pool=6 contrast=true beta_ratio=0.01",
    "kernel_size=5 stride=2 rank=3 pool=6 whiten=true beta_ratio=0.01",
    "kernel_size=7 stride=2 rank=4 pool=4 beta_ratio=0.01",
]
"""What matters, one thing changed at a time."""
INTRODUCTION = """# Accuracy of networks with a proved gap

`python experiments/proved_accuracy.py [--data cifar10] OPTIONS`: oracle branch-and-bound, squared loss unless the
options say another; accuracy on 10,000 training images held out. A gap is a proof where the scope is global;
core-seconds are those of training and proof together.

| data | options | images | filters | held-out accuracy | gap | scope | core-seconds | status |
|---|---|---|---|---|---|---|---|---|
"""


DIRECTIONS = {2: 12, 3: 48}
"""Filters of the survey in a subspace of this rank, about 30 degrees from one another: an optimum has as many."""
SURVEY_TOL = 5e-3
"""Gap of the survey's weights: it moves accuracies by less than the images held out tell apart."""
SURVEYED = [
    "kernel_size=7 stride=2 rank=3 pool=4 beta_ratio=0.003",
    "kernel_size=7 stride=2 rank=3 pool=6 beta_ratio=0.0015",
    "kernel_size=7 stride=2 padding=1 rank=3 pool=6 beta_ratio=0.003",
    "kernel_size=7 stride=2 padding=1 rank=3 pool=6 beta_ratio=0.0015",
    "kernel_size=7 stride=2 padding=1 rank=3 pool=6 beta_ratio=0.001",
    "kernel_size=7 stride=2 padding=1 rank=3 pool=6 contrast=true beta_ratio=0.003",
    "kernel_size=7 stride=3 rank=3 pool=8 beta_ratio=0.0015",
    "kernel_size=5 stride=2 rank=3 pool=6 contrast=true beta_ratio=0.005",
    "kernel_size=7 stride=2 padding=1 rank=2 subspaces=4 pool=6 contrast=true beta_ratio=0.001",
    "kernel_size=7 stride=2 padding=1 rank=2 subspaces=6 pool=6 contrast=true beta_ratio=0.0005",
    "kernel_size=7 stride=2 padding=1 rank=2 subspaces=8 pool=6 contrast=true beta_ratio=0.0005",
]
"""What reaches most: the preset of old first."""
SURVEY_INTRODUCTION = """# Accuracy that filters of rank 2 and 3 can reach

`python experiments/proved_accuracy.py --survey --images 8000 [--data cifar10]`: squared loss, 48 filters spread over
the sphere of each subspace of rank 3, or 12 over the circle of each of rank 2, optimal weights; accuracy on 10,000
training images held out.
Nothing is proved here, and filters do not slide: it says which cases are worth a proof. beta_ratio is a share of the
largest g among these filters. Entries: what the pooling sums of an image, on which the cost of a proof depends.
Rows of more images: `--images` with their number, `--data` and the options of the row.

| data | options | images | cells | entries | filters used | held-out accuracy | objective | weights' part | CPU s |
|---|---|---|---|---|---|---|---|---|---|
"""


def spread(rank: int) -> Tensor:
    """(m, rank) unit vectors, nearly evenly spread: on a circle, or a sphere along a spiral with the golden angle."""
    m = DIRECTIONS[rank]
    k = torch.arange(m, dtype=torch.float64) + 0.5
    if rank == 2:
        return torch.stack([(2 * math.pi * k / m).cos(), (2 * math.pi * k / m).sin()], dim=1)
    height, turn = 1 - 2 * k / m, math.pi * (1 + math.sqrt(5)) * k
    radius = (1 - height**2).sqrt()
    return torch.stack([radius * turn.cos(), radius * turn.sin(), height], dim=1)


def surveyed(data: str, case: str, n: int, data_dir: str | None) -> str:
    """A row of the survey."""
    began = time.process_time()
    config = TrainConfig.of(tomllib.loads("\n".join(case.split())))
    train, _ = load(data, data_dir)
    problem = build_problem(train.images[:n], train.targets[:n], spec=config.patch_spec(), pooling=config.pool)
    responses, filters = problem.responses, torch.block_diag(*[spread(config.rank or 0)] * config.subspaces)
    constant = problem.dual_point(problem.constant_predictions())
    largest = float(responses.correlate(filters, constant).flatten(1).norm(dim=1).max())
    problem = problem.with_beta((config.beta_ratio or 1.0) * largest)
    nothing = torch.zeros(len(filters), responses.n_cells, problem.n_outputs), torch.zeros(problem.n_outputs)
    best = solve_master(problem, filters, *(part.double() for part in nothing), tol=SURVEY_TOL)
    norms = best.weights.flatten(1).norm(dim=1)
    held_out = type(responses)(train.images[-HELD_OUT:], responses.embedding, responses.pooling)
    classes = held_out.predict(filters, best.weights, best.intercept).argmax(dim=1)
    right = float((classes == torch.as_tensor(train.targets[-HELD_OUT:])).double().mean())
    entries = responses.pooling.cells(*responses.map_size)
    return (
        f"| {data} | {case} | {n:,} | {responses.n_cells} | "
        f"{responses.n_positions if entries is None else int(entries.count_nonzero())} | {int((norms > 0).sum())} | "
        f"{right:.2%} | {best.objective:.4f} | {problem.beta * float(norms.sum()) / best.objective:.1%} | "
        f"{time.process_time() - began:.0f} |"
    )


def row(data: str, case: str, n: int, tol: float, time_limit: float | None, data_dir: str | None) -> str:
    """Train one case on the first `n` images."""
    train, _ = load(data, data_dir)
    options = {"tol": tol, "time_limit": time_limit, "oracle": "branch-and-bound"}
    options |= tomllib.loads("\n".join(case.split()))
    fit = convcvx.fit(train.images[:n], train.targets[:n], preset="plain", verbose=True, **options)
    scored = accuracy(predict(fit.network, train.images[-HELD_OUT:]), train.targets[-HELD_OUT:])
    certificate, metrics = fit.certificate, fit.metrics
    return (
        f"| {data} | {case} | {n:,} | {certificate.n_filters} | {scored:.2%} | {certificate.rel_gap:.2%} | "
        f"{certificate.scope} | {metrics['core_seconds']:.0f} | {metrics['status'].replace('_', ' ')} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="OPTIONS")
    parser.add_argument("--survey", action="store_true", help="accuracy alone, in seconds")
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--data-dir")
    parser.add_argument("--images", type=int, default=3000, help="to train on")
    parser.add_argument("--tol", type=float, default=0.01)
    parser.add_argument("--time-limit", type=float, help="seconds; with one, rounds do without climbs before a proof")
    arguments = parser.parse_args()
    survey, data, n = arguments.survey, arguments.data, arguments.images
    out = SURVEY if survey else OUT
    if not out.exists():
        out.write_text(SURVEY_INTRODUCTION if survey else INTRODUCTION)
    for case in arguments.cases or (SURVEYED if survey else CASES):
        line = (
            surveyed(data, case, n, arguments.data_dir)
            if survey
            else row(data, case, n, arguments.tol, arguments.time_limit, arguments.data_dir)
        )
        print(line, flush=True)
        with out.open("a") as table:
            table.write(line + "\n")


if __name__ == "__main__":
    main()
