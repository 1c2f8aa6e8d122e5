"""The program that earlier software solves for vector outputs, one scalar network a class, against the true optimum.

    python experiments/one_vs_all.py

One network a class is a vector-output network whose neurons each serve a single class: the penalty of its filters
is β Σ_j Σ_k |V_jk| instead of β Σ_j ‖V_j‖. Both optima are proved. Writes experiments/results/one_vs_all.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from spiral import spiral

import convcvx

RESULT = Path(__file__).parent / "results" / "one_vs_all.md"
TOL = 1e-3


def gaussian(n: int = 60, d: int = 3, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """n Gaussian points (n, d) and the nearest of `classes` random directions, one label in five replaced."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    y = (x @ rng.normal(size=(d, classes))).argmax(axis=1)
    return x, np.where(rng.random(n) < 0.2, rng.integers(classes, size=n), y)


def main() -> None:
    x, y = spiral()
    data = {
        "spiral": (x, y),
        "spiral and a constant": (np.c_[x, np.full(len(x), 0.5)], y),
        "Gaussian": gaussian(),
    }
    lines = [
        "# One network a class against the vector-output optimum",
        "",
        f"`python experiments/one_vs_all.py`; n = 60, three classes, squared loss, no intercept, tol {TOL:g}; every "
        "optimum is proved (scope global). Excess: of the one-vs-all objective over that of the vector-output optimum.",
        "",
        "| data | d | beta·n | vector optimum | filters | one-vs-all | filters | excess |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (x, y) in data.items():
        for scaled in (0.3, 0.1, 0.03):
            joint = solve(x, y, scaled / len(x))
            single = [solve(x, (y == k).astype(float), scaled / len(x)) for k in range(3)]
            total = sum(solution.certificate.primal for solution in single)
            excess = total / joint.certificate.primal - 1
            lines.append(
                f"| {name} | {x.shape[1]} | {scaled} | {joint.certificate.primal:.6f} | {joint.n_filters} "
                f"| {total:.6f} | {sum(s.n_filters for s in single)} | {excess:.1%} |"
            )
            print(lines[-1], flush=True)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text("\n".join(lines) + "\n")


def solve(x: np.ndarray, y: np.ndarray, beta: float) -> convcvx.Solution:
    """The proved optimum."""
    solution = convcvx.solve(x, y, beta, intercept=False, tol=TOL)
    assert solution.certificate.scope == "global"
    return solution


if __name__ == "__main__":
    main()
