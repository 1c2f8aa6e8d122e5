"""Layers with ternary filters, trained to an optimum that is proved: gap, accuracy and cost, each a process of its own.

    python benchmarks/ternary.py [--data-dir ../shared/data] [NAME ...]

Writes a row a run to benchmarks/results/ternary.md, and leaves the others there. On two cores that nobody else uses
`mnist-10000` takes three minutes, `mnist` half an hour.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import machine

MNIST = "--data mnist --kernel-size 3 --pool 4 --beta-ratio 0.0033333 --tol 0.01"
CIFAR10 = "--data cifar10 --kernel-size 3 --stride 2 --rank 9 --whiten --pool 3 --beta-ratio 0.01 --tol 0.01"
RUNS = {
    "mnist-10000": f"{MNIST} --limit 10000",
    "mnist": MNIST,
    "cifar10-5000": f"{CIFAR10} --limit 5000",
    "cifar10": CIFAR10,
}
RESULTS = Path(__file__).parent / "results" / "ternary.md"
HEAD = (
    "# Ternary filters, trained to a proved optimum",
    "",
    "`python benchmarks/ternary.py`: `convcvx train --filters ternary`, all filters of entries -1, 0, 1. The gap is a "
    "proof for networks over the family. Core-seconds are processor time over all cores.",
    "",
    "| run | family | gap | filters | test accuracy | training | core-seconds | seconds | MiB | machine |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


def measure(name: str, data_dir: str) -> dict[str, Any]:
    """What the command prints with --json."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "convcvx", "train", "--filters", "ternary", *RUNS[name].split()]
        options = ["--data-dir", data_dir, "--out", f"{folder}/run", "--json"]
        done = subprocess.run([*command, *options], stdout=subprocess.PIPE, check=False)
    return json.loads(done.stdout)


def row(name: str, m: dict[str, Any]) -> str:
    return (
        f"| {name} | {m['family_size']:,} {m['family']} | {m['family_gap']:.2%} | {m['n_filters']} | "
        f"{m['test_accuracy']:.2%} | {m['train_accuracy']:.2%} | {m['core_seconds']:.0f} | {m['seconds']:.0f} | "
        f"{m['peak_memory_mb']:.0f} | {machine()} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(RUNS), metavar="NAME", help=", ".join(RUNS))
    parser.add_argument("--data-dir", default="../shared/data")
    given = parser.parse_args()
    for name in given.names:
        line = row(name, measure(name, given.data_dir))
        print(line, flush=True)
        known = RESULTS.read_text().splitlines()[len(HEAD) :] if RESULTS.exists() else []
        rows = [other for other in known if not other.startswith(f"| {name} |")] + [line]
        RESULTS.write_text("\n".join([*HEAD, *rows]) + "\n")


if __name__ == "__main__":
    main()
