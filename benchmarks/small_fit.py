"""What a fit of few rows costs beside scikit-learn's MLPClassifier: CPU seconds, estimators with their defaults.

    python benchmarks/small_fit.py [--repeats R] [--seeds S]

50 rows of 64 numbers, random (Gaussian rows, arbitrary classes: as hard as they come) and of scikit-learn's digits, of
2 and 3 classes. Both estimators take turns on the same rows, after a fit of each that does not count; a seed's time is
the median of its repeats, a table entry the median over seeds. beta_max and the certificate are part of the fit.
Writes benchmarks/results/small_fit.md.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from time import process_time

import numpy as np
from machine import machine
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

from convcvx import ConvexCNNClassifier

RESULT = Path(__file__).parent / "results" / "small_fit.md"
ROWS, COLUMNS = 50, 64


def rows(kind: str, n_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, d) rows and their (n,) classes."""
    random = np.random.default_rng(seed)
    if kind == "random":
        return random.normal(size=(ROWS, COLUMNS)), np.arange(ROWS) % n_classes
    X, y = load_digits(return_X_y=True)
    chosen = random.permutation(np.flatnonzero(y < n_classes))[:ROWS]
    return X[chosen] / 16, y[chosen]


def seconds(estimator: ConvexCNNClassifier | MLPClassifier, X: np.ndarray, y: np.ndarray) -> float:
    """CPU seconds of a fit."""
    began = process_time()
    estimator.fit(X, y)
    return process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # MLPClassifier stops short of convergence, and a second search may find more
    lines = [
        "# A small fit",
        "",
        f"`python benchmarks/small_fit.py` on {machine()}: {ROWS} rows of {COLUMNS} numbers, CPU seconds of a fit with "
        f"default options, medians of {arguments.repeats} fits by turns and over {arguments.seeds} seeds.",
        "",
        "| rows | classes | convcvx | MLPClassifier | ratio | rounds | objective | gap (estimate) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in ("random", "digits"):
        for n_classes in (2, 3):
            table = []
            for seed in range(arguments.seeds):
                X, y = rows(kind, n_classes, seed)
                ours, theirs = ConvexCNNClassifier(random_state=seed), MLPClassifier(random_state=seed)
                times = [(seconds(ours, X, y), seconds(theirs, X, y)) for _ in range(1 + arguments.repeats)]
                certificate, solution = ours.certificate_, ours.solution_
                found = solution.rounds, certificate.primal, certificate.rel_gap
                table.append([*np.median(times[1:], axis=0), *found])
            mine, other, n_rounds, primal, gap = np.median(table, axis=0)
            lines.append(
                f"| {kind} | {n_classes} | {mine:.2f} | {other:.2f} | {mine / other:.1f} | {n_rounds:.0f} "
                f"| {primal:.5f} | {gap:.1%} |"
            )
    RESULT.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
