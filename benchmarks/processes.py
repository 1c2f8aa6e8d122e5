"""Seconds of one training against the number of processes that share its images.

    python benchmarks/processes.py [--data-dir ../shared/data] [--limit 10000] [--rounds 2]
    python benchmarks/processes.py --preset mnist [--limit 10000] [--dictionary 300]

Each run is `convcvx train` on MNIST, 5x5 patches, 4x4 cells, or a whole preset; the certificate is part of it. One
thread a process, and for comparison one process with as many threads. Writes benchmarks/results/processes.md, or
processes-PRESET.md. The seconds that process 0 computed are those of its core: on a busy machine they, not the clock,
say what the others took off it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import machine

RUNS = ((1, 1), (2, 1), (1, 2))
"""Processes, and threads of each."""
TURNS = 2
"""Runs of a preset in one process and in two, by turns."""
RESULTS = Path(__file__).parent / "results"


def train(processes: int, threads: int, options: list[str]) -> tuple[dict, list[dict]]:
    """Metrics and history of one run."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        launch += ["--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [*launch, "-m", "convcvx.cli", "train", *options, "--out", str(out), "--json"]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment).stdout
        return json.loads(output), json.loads((out / "history.json").read_text())


def rounds_table(arguments: argparse.Namespace) -> list[str]:
    """Rounds of the solver, and the whole run."""
    model = ["--kernel-size", "5", "--pool", "4", "--beta-ratio", "0.001", "--max-filters", "64"]
    size = ["--limit", str(arguments.limit), "--max-rounds", str(arguments.rounds)]
    options = ["--data", "mnist", "--data-dir", arguments.data_dir, *model, *size]
    lines = [
        "# Seconds against the number of processes",
        "",
        f"`python benchmarks/processes.py --limit {arguments.limit} --rounds {arguments.rounds}` on "
        f"{machine()}; MNIST, 5x5 patches, 4x4 cells, beta_max/1000. Rounds: {arguments.rounds}, oracle, master and "
        "sliding; whole run: with loading, beta_max and certificate.",
        "",
        "| processes | threads each | rounds, s | whole run, s | objective | lower bound |",
        "|---|---|---|---|---|---|",
    ]
    for processes, threads in RUNS:
        metrics, history = train(processes, threads, options)
        lines.append(
            f"| {processes} | {threads} | {history[-1]['seconds']:.1f} | {metrics['seconds']:.1f} | "
            f"{metrics['primal']!r} | {metrics['dual']!r} |"
        )
        print(lines[-1], flush=True)
    return lines


def preset_table(arguments: argparse.Namespace) -> list[str]:
    """A whole preset on part of its images, one process and two by turns."""
    size = ["--limit", str(arguments.limit), "--dictionary", str(arguments.dictionary)]
    options = ["--preset", arguments.preset, "--data-dir", arguments.data_dir, *size]
    lines = [
        f"# Preset {arguments.preset} against the number of processes",
        "",
        f"`python benchmarks/processes.py --preset {arguments.preset} {' '.join(size)}` on {machine()}; one thread a "
        f"process, {TURNS} turns. Process 0 waits for the others without computing: its seconds are those of a machine "
        "with a core for each, but for messages. A small size: imports and the search for a bound weigh more than at "
        "full size.",
        "",
        "| processes | process 0 computed, s | to one process | all computed, imports too, s | by the clock, s | "
        "peak memory of process 0, MB | objective |",
        "|---|---|---|---|---|---|---|",
    ]
    alone = []
    for turn in range(TURNS):
        for processes in (1, 2):
            before = children_seconds()
            metrics, _ = train(processes, 1, options)
            together = children_seconds() - before
            if processes == 1:
                alone.append(metrics["core_seconds"])
            lines.append(
                f"| {processes} | {metrics['core_seconds']:.1f} | {alone[turn] / metrics['core_seconds']:.2f} | "
                f"{together:.1f} | {metrics['seconds']:.1f} | {metrics['peak_memory_mb']:.0f} | {metrics['primal']!r} |"
            )
            print(lines[-1], flush=True)
    return lines


def children_seconds() -> float:
    """What the processes that have ended computed so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", default="../shared/data")
    parser.add_argument("--limit", type=int, default=10000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--preset")
    parser.add_argument("--dictionary", type=int, default=300)
    arguments = parser.parse_args()
    lines = rounds_table(arguments) if arguments.preset is None else preset_table(arguments)
    name = "processes" if arguments.preset is None else f"processes-{arguments.preset}"
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
