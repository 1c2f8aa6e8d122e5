"""Test accuracy, time and memory of the presets for whole data sets, each a process of its own.

    python benchmarks/presets.py [--data-dir ../shared/data] [PRESET ...]

Writes benchmarks/results/presets.md; needs the whole machine for up to half an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

PRESETS = ("mnist", "cifar10-fast", "cifar10")
RESULT = Path(__file__).parent / "results" / "presets.md"


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
    lines = [
        "# Presets for whole data sets",
        "",
        f"`python benchmarks/presets.py {' '.join(arguments.presets)}` on {os.cpu_count()} cores, "
        f"{platform.machine()}, Python {platform.python_version()}. β was chosen on a tenth of the training images.",
        "",
        "| preset | test accuracy | training accuracy | seconds | peak memory, MiB | filters | β | objective | gap |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for preset in arguments.presets:
        m = measure(preset, arguments.data_dir)
        lines.append(
            f"| {preset} | {m['test_accuracy']:.2%} | {m['train_accuracy']:.2%} | {m['seconds']:.0f} | "
            f"{m['peak_memory_mb']:.0f} | {m['n_filters']} | {m['beta']:.3g} | {m['primal']:.5f} | "
            f"{m['rel_gap']:.0%} ({m['scope']}) |"
        )
        RESULT.write_text("\n".join(lines) + "\n")
        print(lines[-1], flush=True)


if __name__ == "__main__":
    main()
