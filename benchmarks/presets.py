"""Test accuracy, time and memory of the presets for whole data sets, each a process of its own.

    python benchmarks/presets.py [--data-dir ../shared/data] [PRESET ...]

Writes benchmarks/results/presets.md; needs the whole machine for up to half an hour.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import machine

PRESETS = ("mnist", "cifar10-fast", "cifar10")
RESULT = Path(__file__).parent / "results" / "presets.md"
HEAD = (
    "# Presets for whole data sets",
    "",
    "`python benchmarks/presets.py`, a row a run. β was chosen on a tenth of the training images. Core-seconds are "
    "processor time over all cores: half of them is what two cores take that nobody else uses.",
    "",
    "| preset | test accuracy | training | seconds | core-seconds | MiB | filters | β | objective | gap | machine |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)


def measure(preset: str, data_dir: str) -> dict:
    """What `convcvx train --preset` prints with --json."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "convcvx.cli", "train", "--preset", preset, "--data-dir", data_dir]
        done = subprocess.run([*command, "--out", f"{folder}/run", "--json"], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="*", default=list(PRESETS))
    parser.add_argument("--data-dir", default="../shared/data")
    arguments = parser.parse_args()
    rows, where = earlier_rows(), machine()  # before a table that differs from the commit's is written
    for preset in arguments.presets:
        m = measure(preset, arguments.data_dir)
        rows[preset] = (
            f"| {preset} | {m['test_accuracy']:.2%} | {m['train_accuracy']:.2%} | {m['seconds']:.0f} | "
            f"{m['core_seconds']:.0f} | {m['peak_memory_mb']:.0f} | {m['n_filters']} | {m['beta']:.3g} | "
            f"{m['primal']:.5f} | {m['rel_gap']:.0%} ({m['scope']}) | {where} |"
        )
        RESULT.write_text("\n".join([*HEAD, *(rows[name] for name in PRESETS if name in rows)]) + "\n")
        print(rows[preset], flush=True)


def earlier_rows() -> dict[str, str]:
    """The rows of the table that is there, by preset: one may be measured anew without the others."""
    lines = RESULT.read_text().splitlines() if RESULT.exists() else []
    return {line.split()[1]: line for line in lines if line.startswith("| ") and line.split()[1] in PRESETS}


if __name__ == "__main__":
    main()
