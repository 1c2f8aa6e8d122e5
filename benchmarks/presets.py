"""Test accuracy, time and memory of the presets for whole data sets, and of stacks, each a process of its own.

    python benchmarks/presets.py [--data-dir ../shared/data] [--device cuda] [NAME ...]

Writes benchmarks/results/presets.md, or presets-cuda.md. On two cores the presets need the whole machine for up to half
an hour, the stacks for an hour and a half.
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

RUNS = {
    "mnist": "train --preset mnist",
    "cifar10-fast": "train --preset cifar10-fast",
    "cifar10": "train --preset cifar10",
    "mnist-stack": "stack --preset mnist --stages 2 --heads joint --kernel-size 5,5 --padding 2,2 --whiten-epsilon 0.1 "
    "--dictionary 400,400 --slide 0,5 --crops 0,1 --channels 64 --downsample 2",
    "cifar10-stack": "stack --preset cifar10-fast --stages 3 --heads joint --kernel-size 5,3,3 --padding 0,1,1 "
    "--contrast yes,no,no --contrast-epsilon 0.001 --dictionary 600,512,1024 --slide 5,8,8 --crops 2,1,1 "
    "--channels 128,192 --downsample 2,2",
}
RESULTS = Path(__file__).parent / "results"
HEAD = (
    "# Presets for whole data sets, and stacks",
    "",
    "`python benchmarks/presets.py`, a row a run. β was chosen on a tenth of the training images. Core-seconds are "
    "processor time over all cores: half of them is what two cores take that nobody else uses. Of a stack: the sum "
    "over its stages; filters, accuracies and seconds of the whole; β and objective of its joint heads.",
    "",
    "| run | test accuracy | training | seconds | core-seconds | MiB | filters | β | objective | gap | machine |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)


def measure(name: str, data_dir: str, device: str) -> dict[str, Any]:
    """What the command prints with --json."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "convcvx.cli", *RUNS[name].split(), "--data-dir", data_dir, "--device", device]
        done = subprocess.run([*command, "--out", f"{folder}/run", "--json"], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def row(name: str, m: dict[str, Any], where: str) -> str:
    stages = [stage for stage in m.get("stages", [m]) if stage.get("kept", True)]
    last = stages[-1]
    beta, objective = (last["joint_beta"], last["joint_objective"]) if "stages" in m else (m["beta"], m["primal"])
    gap = f"{m['rel_gap']:.0%} ({m['scope']})" if "rel_gap" in m else ""
    return (
        f"| {name} | {m['test_accuracy']:.2%} | {m['train_accuracy']:.2%} | {m['seconds']:.0f} | "
        f"{sum(stage['core_seconds'] for stage in stages):.0f} | {m['peak_memory_mb']:.0f} | "
        f"{' + '.join(str(stage['n_filters']) for stage in stages)} | {beta:.3g} | {objective:.5f} | {gap} | {where} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["mnist", "cifar10-fast", "cifar10"], metavar="NAME")
    parser.add_argument("--data-dir", default="../shared/data")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    result = RESULTS / ("presets.md" if arguments.device == "cpu" else "presets-cuda.md")
    rows, where = earlier_rows(result), machine(arguments.device)  # before a table that differs is written
    for name in arguments.names:
        rows[name] = row(name, measure(name, arguments.data_dir, arguments.device), where)
        result.write_text("\n".join([*HEAD, *(rows[name] for name in RUNS if name in rows)]) + "\n")
        print(rows[name], flush=True)


def earlier_rows(result: Path) -> dict[str, str]:
    """The rows of the table that is there, by name: one may be measured anew without the others."""
    lines = result.read_text().splitlines() if result.exists() else []
    return {line.split()[1]: line for line in lines if line.startswith("| ") and line.split()[1] in RUNS}


if __name__ == "__main__":
    main()
