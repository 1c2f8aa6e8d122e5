"""Where a training on all MNIST images spends its time, and what an incremental Gram matrix could save of it.

    python benchmarks/rounds.py [--data-dir ../shared/data] [--limit N]

The race's problem (5x5 filters, 4x4 cells, squared loss, beta = 1e-3) on one core, to a relative gap of 2 %, samples
and confirming searches included, under cProfile with a clock of CPU seconds. The master that new filters enter with
could keep the products of the old ones from the round before; their responses it needs all the same, for the
products with the new. What that would save at most is measured with the filters of the end: the time of their Gram
matrix less the time that it streams responses. Writes benchmarks/results/rounds.md.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
from pathlib import Path
from time import process_time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from machine import machine
from rivals import BETA, KERNEL, POOL

from convcvx.budget import Budget
from convcvx.data.datasets import load
from convcvx.patches import PatchSpec
from convcvx.training.plan import build_problem, solve_problem

RESULT = Path(__file__).parent / "results" / "rounds.md"
TOL = 2e-2
PARTS = {
    "search: values and gradients of g": ("passes.py", "ascent"),
    "search: values of g": ("passes.py", "correlate"),
    "slide: gradients": ("passes.py", "gradients"),
    "master: Gram matrices": ("passes.py", "gram"),
    "master: Newton steps": ("squared.py", "step"),
    "predictions": ("passes.py", "predict"),
}
"""The parts of a training, disjoint: the module and function of each."""


def spent(stats: pstats.Stats) -> dict[str, tuple[int, float]]:
    """Calls and CPU seconds of each part."""
    totals = {}
    for part, (module, function) in PARTS.items():
        entries = [
            (calls, seconds)
            for (file, _, name), (_, calls, _, seconds, _) in stats.stats.items()
            if name == function and Path(file).name == module and "convcvx" in file
        ]
        ((calls, seconds),) = entries
        totals[part] = calls, seconds
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="../shared/data")
    parser.add_argument("--limit", type=int, help="the first N images only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train, _ = load("mnist", arguments.data_dir, arguments.limit)
    spec = PatchSpec((KERNEL, KERNEL))
    problem = build_problem(
        train.images, train.targets, BETA, spec=spec, pooling=POOL, intercept=False, dtype=torch.float32
    )
    profile = cProfile.Profile(process_time)
    began = process_time()
    solution = profile.runcall(solve_problem, problem, Budget(tol=TOL))
    total = process_time() - began
    parts = spent(pstats.Stats(profile))
    rest = total - sum(seconds for _, seconds in parts.values())

    began = process_time()
    problem.responses.gram(solution.filters, problem.targets)
    whole = process_time() - began
    began = process_time()
    for _ in problem.responses.blocks(solution.filters):
        pass
    saving = max(0.0, 1 - (process_time() - began) / whole)
    share = parts["master: Gram matrices"][1] / total

    last = solution.history[-1]
    lines = [
        "# Where the time goes",
        "",
        f"`python benchmarks/rounds.py` on {machine()}: {problem.n:,} MNIST images, {KERNEL}x{KERNEL} filters, "
        f"{POOL}x{POOL} cells, squared loss, beta {BETA:g}, to a gap of {TOL:g}: {total:.0f} CPU seconds, "
        f"{solution.n_filters} filters, objective {last['objective']:.5f}, gap {last['rel_gap']:.1%} (estimate), "
        f"{solution.status}.",
        "",
        "| part | calls | CPU seconds | share |",
        "|---|---|---|---|",
        *(f"| {part} | {calls:,} | {s:.1f} | {s / total:.1%} |" for part, (calls, s) in parts.items()),
        f"| the rest | | {rest:.1f} | {rest / total:.1%} |",
        "",
        f"A Gram matrix of all {solution.n_filters} filters takes {whole:.1f} CPU seconds, {1 - saving:.0%} of them "
        "for the responses, which products of new filters with old ones need as well. Every second or third of them "
        "is the one that filters enter with; to keep what is known of the old ones would save less than "
        f"{0.5 * saving * share:.1%} of the training.",
    ]
    RESULT.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
