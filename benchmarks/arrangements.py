"""How long it takes to list every cell of N Gaussian rows of rank r, in batches that are counted and dropped.

    python benchmarks/arrangements.py

One thread; on a machine that others use too, CPU seconds say what the work takes. Peak memory is that of arrays
(tracemalloc), in a second run of its own, above the rows themselves.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from pathlib import Path

import numpy as np
from machine import machine

from convcvx.arrangements.cells import cell_batches, count_bound

CASES = [(2000, 2), (20_000, 2), (500, 3), (1000, 3), (2000, 3), (60, 4), (20, 5), (14, 6)]
RESULTS = Path(__file__).parent / "results"


def count(rows: np.ndarray) -> int:
    return sum(len(batch.packed) for batch in cell_batches(rows))


def measure(n: int, rank: int) -> str:
    rows = np.random.default_rng(0).standard_normal((n, rank))
    began, worked = time.perf_counter(), time.process_time()
    found = count(rows)
    seconds, worked = time.perf_counter() - began, time.process_time() - worked
    tracemalloc.start()
    count(rows)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    if found != count_bound(n, rank):
        raise SystemExit(f"{found} cells of {count_bound(n, rank)} found for N = {n}, r = {rank}")
    return f"| {n:,} | {rank} | {found:,} | {seconds:.2f} | {worked:.2f} | {1e6 * worked / found:.2f} | {peak:.0f} |"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    count(np.eye(3))  # compiles
    lines = [
        "# Every activation pattern",
        "",
        "`python benchmarks/arrangements.py`: all cells of N Gaussian rows of rank r, with an interior point each; as "
        "many as 2 Σ_{k<r} C(N-1, k) were found.",
        f"{machine()}; one thread.",
        "",
        "| N | r | cells | seconds | CPU seconds | CPU µs/cell | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        lines.append(measure(*case))
        print(lines[-1], flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "arrangements.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
