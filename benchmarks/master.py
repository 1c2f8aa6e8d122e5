"""The master problem against first-order methods: seconds to a relative duality gap on real, correlated responses.

    python benchmarks/master.py [--data-dir ../shared/data]

Random patches of 8,000 MNIST images as 5x5 filters, 4x4 cells, squared loss, ten outputs, an intercept. All methods
start from zero and work on the same Gram matrix in float64, which is not timed: our projected Newton method, FISTA
with adaptive restart, exact block coordinate descent in numba, and iteratively reweighted ridge regressions
(η = ‖W‖). CPU seconds; a method is stopped at --limit. Writes benchmarks/results/master.md.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from time import process_time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numba
import numpy as np
import torch
from machine import machine
from torch import Tensor

from convcvx.data.datasets import load
from convcvx.patches import PatchSpec
from convcvx.problem import Problem
from convcvx.solvers.dictionary.filters import dictionary
from convcvx.solvers.master.squared import GramNewton
from convcvx.training.plan import build_problem, find_beta_max

RESULT = Path(__file__).parent / "results" / "master.md"
IMAGES, CASES, GAPS = 8000, ((50, 1e-2), (50, 1e-3), (200, 1e-2), (200, 1e-3)), (1e-2, 1e-4, 1e-6)
"""Images, (filters, β / β_max), and gaps to reach."""


def newton(model: GramNewton) -> Iterator[Tensor]:
    matrix = torch.zeros_like(model.linear)
    sizes = model.norms(matrix)
    while True:
        matrix, sizes = model.step(matrix, sizes)
        yield matrix


def fista(model: GramNewton) -> Iterator[Tensor]:
    """Beck and Teboulle 2009, with the gradient restart of O'Donoghue and Candès 2015."""
    hessian, linear = model.hessian, model.linear
    vector = torch.randn(len(hessian), 1, dtype=torch.float64)
    for _ in range(50):
        vector = hessian @ (vector / vector.norm())
    step = 1 / (1.01 * float(vector.norm()))
    matrix = ahead = torch.zeros_like(linear)
    momentum = 1.0
    while True:
        trial = ahead + step * (linear - hessian @ ahead)
        norms = model.norms(trial).clamp_min(1e-300)
        shrink = (1 - step * model.beta / norms).clamp_min(0).repeat_interleave(model.cells)
        following = shrink[:, None] * trial
        if float(((ahead - following) * (following - matrix)).sum()) > 0:
            momentum = 1.0
        faster = 0.5 * (1 + (1 + 4 * momentum**2) ** 0.5)
        ahead = following + (momentum - 1) / faster * (following - matrix)
        matrix, momentum = following, faster
        yield matrix


def descent(model: GramNewton) -> Iterator[Tensor]:
    """Block coordinate descent: each block to its own optimum, by its eigenvalues and a scalar Newton iteration."""
    m = len(model.linear) // model.cells
    blocks = model.hessian.view(m, model.cells, m, model.cells).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    values, vectors = torch.linalg.eigh(blocks)
    matrix = torch.zeros_like(model.linear)
    slack = model.linear.clone()
    parts = (model.hessian, values.contiguous(), vectors.contiguous(), matrix, slack)
    arrays = [part.numpy() for part in parts]
    _sweep(*arrays, model.beta, 0)  # compiles
    while True:
        _sweep(*arrays, model.beta, m)
        yield matrix


@numba.njit(cache=True)
def _sweep(hessian, values, vectors, matrix, slack, beta, m):  # pragma: no cover - compiled
    """Once over the first `m` blocks; `slack` is linear - hessian @ matrix throughout."""
    cells = values.shape[1]
    for j in range(m):
        rows = slice(j * cells, (j + 1) * cells)
        old = matrix[rows].copy()
        right = vectors[j].T @ (slack[rows] + hessian[rows, rows] @ old)
        squares = (right**2).sum(axis=1)
        new = np.zeros_like(old)
        if squares.sum() > beta**2:
            # ‖(Λ + β/s)⁻¹ right‖ = s: Σ squares / (λ s + β)² = 1 falls in s and is convex.
            size = 0.0
            for _ in range(100):
                below = values[j].clip(0.0) * size + beta
                value = (squares / below**2).sum()
                slope = -2.0 * (squares * values[j].clip(0.0) / below**3).sum()
                if value - 1.0 <= 1e-14 or slope == 0.0:
                    break
                size += (1.0 - value) / slope
            new = vectors[j] @ (right / (values[j].clip(0.0) + beta / size).reshape(-1, 1))
        change = new - old
        if np.abs(change).max() > 0.0:
            matrix[rows] = new
            slack -= hessian[:, rows] @ change


def reweighted(model: GramNewton) -> Iterator[Tensor]:
    """W(η) by a ridge regression, then η = ‖W‖ (Bach et al. 2012, sec. 5.2)."""
    sizes = torch.ones(len(model.linear) // model.cells, dtype=torch.float64)
    while True:
        matrix = model.ridge(sizes)
        sizes = model.norms(matrix)
        sizes[sizes < 1e-10 * sizes.max()] = 0.0
        yield matrix


Method = Callable[[GramNewton], Iterator[Tensor]]
METHODS: dict[str, Method] = {
    "Newton in η (convcvx)": newton,
    "FISTA, restarted": fista,
    "block coordinate descent": descent,
    "reweighted ridge": reweighted,
}


def model_of(problem: Problem, filters: Tensor) -> GramNewton:
    return GramNewton(problem, *problem.responses.gram(filters, problem.targets))


def race(
    model: GramNewton, method: Callable[[GramNewton], Iterator[Tensor]], limit: float
) -> tuple[dict[float, float], int]:
    """CPU seconds to each gap, the judging left out, and the iterations made."""
    times: dict[float, float] = {}
    spent, best, iterations = 0.0, float("inf"), 0
    steps = method(model)
    check = 1
    while spent < limit and len(times) < len(GAPS):
        began = process_time()
        matrix = next(steps)
        spent += process_time() - began
        iterations += 1
        if iterations < check:
            continue
        check = max(iterations + 1, int(1.05 * iterations))
        objective, dual = model.primal_dual(matrix)
        best = min(best, objective)
        for gap in GAPS:
            if (best - dual) <= gap * best:
                times.setdefault(gap, spent)
    return times, iterations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="../shared/data")
    parser.add_argument("--limit", type=float, default=30.0)
    arguments = parser.parse_args()
    train, _ = load("mnist", arguments.data_dir, IMAGES)
    problem = build_problem(train.images, train.targets, spec=PatchSpec((5, 5)), pooling=4, dtype=torch.float64)
    beta_max = find_beta_max(problem)
    lines = [
        "# The master problem",
        "",
        f"`python benchmarks/master.py` on {machine()}. {IMAGES:,} images, 16 cells a filter; CPU seconds from zero "
        f"to a relative duality gap, without the Gram matrix; {arguments.limit:g} s each.",
        "",
        f"| filters | responses | β / β_max | in use | method | {' | '.join(f'{g:g}' for g in GAPS)} | iterations |",
        "|---" * (6 + len(GAPS)) + "|",
    ]
    for m, ratio in CASES:
        filters = dictionary(problem.responses, m)
        model = model_of(problem.with_beta(ratio * beta_max), filters)
        used = 0
        for name, method in METHODS.items():
            times, iterations = race(model, method, arguments.limit)
            if method is newton:
                used = _in_use(model)
            cells = [f"{times[gap]:.2f}" if gap in times else "not reached" for gap in GAPS]
            lines.append(
                f"| {m} | {m * model.cells:,} | {ratio:g} | {used} | {name} | {' | '.join(cells)} | {iterations} |"
            )
            print(lines[-1], flush=True)
        RESULT.write_text("\n".join(lines) + "\n")


def _in_use(model: GramNewton) -> int:
    """Filters with weight at the optimum."""
    steps = newton(model)
    for _ in range(30):
        matrix = next(steps)
    return int((model.norms(matrix) > 0).sum())


if __name__ == "__main__":
    main()
