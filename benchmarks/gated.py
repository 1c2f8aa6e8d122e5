"""The gated program against pyscnn's R-FISTA: 10,000 flattened MNIST images, one objective, judged in float64.

    python benchmarks/gated.py --data-dir ../shared/data

    min  (1/2nc) ‖Σ_s D_s X W_s - Y‖² + λ Σ_s Σ_k ‖W_s[:, k]‖,      100 sampled gates, λ = 1e-4, one-hot Y

pyscnn (pip install pyscnn) is run in the same process when it is importable, on the same gates; else ours is printed
alone against the anchor, what pyscnn reached after 240 s. Our times include building the problem; pyscnn's are those of
its own log, without its data preparation. The judge gets gates and weights only, and computes the objective anew.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine

from convcvx.data.datasets import load
from convcvx.patches import PatchSpec
from convcvx.solvers.programs.gated import solve_gated
from convcvx.training.plan import build_problem

try:
    import scnn
    import scnn.activations
    import scnn.metrics
    import scnn.models
    import scnn.optimize
    import scnn.regularizers
    import scnn.solvers
except ImportError:
    scnn = None

ANCHOR = 0.00856, 240.0


def mnist(data_dir: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The first n training images, (n, 784) float32 in [0, 1], and their one-hot classes (n, 10)."""
    train, _ = load("mnist", data_dir, n)
    return train.images.flatten(1).numpy(), np.eye(10)[train.targets]


def judge(images: np.ndarray, targets: np.ndarray, gates: np.ndarray, weights: np.ndarray, lam: float) -> float:
    """The objective in float64, for gates (q, d) and weights (q, d, c)."""
    x = images.astype(np.float64)
    residual = -targets
    for gate, matrix in zip(gates, weights.astype(np.float64), strict=True):
        residual = residual + (images @ gate >= 0)[:, None] * (x @ matrix)
    penalty = np.linalg.norm(weights.astype(np.float64), axis=1).sum()
    return float((residual**2).sum() / (2 * targets.size) + lam * penalty)


def run_ours(
    images: np.ndarray, targets: np.ndarray, gates: np.ndarray, lam: float, seconds: float
) -> tuple[list[tuple[float, float]], list[float], np.ndarray]:
    """(seconds, objective) by iteration, lower bounds, and the weights."""
    began, c = time.perf_counter(), targets.shape[1]
    problem = build_problem(
        torch.from_numpy(images).view(-1, 1, 28, 28),
        torch.from_numpy(targets),
        c * lam,
        spec=PatchSpec(28),
        intercept=False,
        dtype=torch.float32,
    )
    setup = time.perf_counter() - began
    result = solve_gated(
        problem, torch.from_numpy(gates).double(), norm="columns", tol=1e-4, time_limit=seconds - setup
    )
    path = [(setup + elapsed, primal / c) for elapsed, primal, _ in result.history]
    return path, [dual / c for *_, dual in result.history], result.weights[:, :, 0].numpy()


def run_pyscnn(
    images: np.ndarray, targets: np.ndarray, gates: np.ndarray, lam: float, seconds: float
) -> tuple[list[tuple[float, float]], np.ndarray, np.ndarray]:
    """(seconds, objective) by logged iteration, and gates (in its own order) and weights after about `seconds`."""

    def optimise(iterations: int) -> tuple[list[tuple[float, float]], np.ndarray, np.ndarray]:
        model = scnn.models.ConvexGatedReLU(gates.T.astype(np.float32), c=targets.shape[1])
        solver = scnn.solvers.RFISTA(model, max_iters=iterations, tol=1e-12)
        metrics = scnn.metrics.Metrics(metric_freq=5, objective=True, time=True)
        arguments: dict[str, Any] = {"return_convex": True, "unitize_data": False, "verbose": False}
        model, metrics = scnn.optimize.optimize_model(
            model,
            solver,
            metrics,
            images,
            targets.astype(np.float32),
            regularizer=scnn.regularizers.NeuronGL1(lam),
            **arguments,
        )
        path = list(zip(np.ravel(metrics.time).tolist(), np.ravel(metrics.objective).tolist(), strict=True))
        return path, np.asarray(model.G).T, np.asarray(model.parameters[0]).transpose(1, 2, 0)  # (c, q, d) to (q, d, c)

    began = time.perf_counter()
    optimise(5)
    pace = (time.perf_counter() - began) / 5
    return optimise(max(5, int(seconds / pace)))


def first_below(path: list[tuple[float, float]], level: float) -> str:
    return next((f"{seconds:.1f}" for seconds, objective in path if objective <= level), "not reached")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="../shared/data")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--gates", type=int, default=100)
    parser.add_argument("--lam", type=float, default=1e-4)
    parser.add_argument("--seconds", type=float, default=60.0, help="ours")
    parser.add_argument("--rival-seconds", type=float, default=ANCHOR[1])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gated.md")
    arguments = parser.parse_args()
    images, targets = mnist(arguments.data_dir, arguments.images)
    gates = np.random.default_rng(0).standard_normal((arguments.gates, 784)).astype(np.float32)

    run_ours(images[:500], targets[:500], gates, arguments.lam, 5.0)  # warms up
    path, bounds, weights = run_ours(images, targets, gates, arguments.lam, arguments.seconds)
    rows = [("convcvx", path, judge(images, targets, gates, weights, arguments.lam))]
    level = ANCHOR[0]
    if scnn is not None:
        rival, rival_gates, rival_weights = run_pyscnn(images, targets, gates, arguments.lam, arguments.rival_seconds)
        rows.append(("pyscnn R-FISTA", rival, judge(images, targets, rival_gates, rival_weights, arguments.lam)))
        level = min(objective for _, objective in rival)

    lines = [
        f"# The gated program on {arguments.images:,} MNIST images",
        "",
        f"{arguments.gates} gates, lambda {arguments.lam:g}, objective (1/2nc)‖f - Y‖² + λ Σ‖w‖. {machine()}.",
        "",
        f"| solver | seconds to {ANCHOR[0]} | seconds to {level:.5f} | iterations | seconds | objective | judged |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, steps, judged in rows:
        lines.append(
            f"| {name} | {first_below(steps, ANCHOR[0])} | {first_below(steps, level)} | {len(steps) - 1} | "
            f"{steps[-1][0]:.1f} | {steps[-1][1]:.6f} | {judged:.6f} |"
        )
    lines += [
        "",
        f"Anchor: pyscnn, {ANCHOR[0]} after {ANCHOR[1]:g} s on this problem. Our lower bound on the optimum after "
        f"{path[-1][0]:.0f} s: {max(bounds):.6f}.",
    ]
    if scnn is None:
        lines += ["", "pyscnn is not installed here: ours alone."]
    print("\n".join(lines))
    arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
