"""What is proved of networks, for filters of full rank: kernel, cells, images, beta, gap proved, seconds of all cores.

    python benchmarks/proofs.py --data-dir ../shared/data [--rows mnist:3:1:600:0.5 ...] [--section full-rank]

A network is trained by sliding Frank-Wolfe with the local oracle (at most --solve-seconds); what counts for the proof
is its objective alone. Then lower bounds are proved from the data: by polynomials of degree two in the filter at the
network's residual, then at a dual point chosen for the bound; then by branch and bound over the filters in the first
--directions principal directions with the rest as a remainder (0: not at all); at last in --cylinders cylinders of the
first --divided directions (0: not at all). Seconds are those of all cores.

    python benchmarks/proofs.py --section low-rank [--rows mnist:3:1:200:0.01:4] [--tol 0.01] [--search-seconds 60]

proves such networks' gaps over filters of a low rank, the last number of a row, by branch and bound.

    python benchmarks/proofs.py --section checked [--problems 1000]

compares every rigorous oracle with the exact maximum on small random problems, and exits with 1 if a bound is below it.

Each section of benchmarks/results/proofs.md is written by one function of `SECTIONS`; a run replaces its own alone.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from machine import machine, write_section

from convcvx.budget import Budget, Deadline
from convcvx.certificate import certify_parameters
from convcvx.data.datasets import load
from convcvx.oracles.base import Oracle
from convcvx.oracles.beside import best, best_proof, proofs_beside
from convcvx.oracles.branch_and_bound import BranchAndBoundOracle
from convcvx.oracles.cylinders import CylinderOracle
from convcvx.oracles.enumerate import ExactOracle
from convcvx.oracles.family import FamilyOracle, Ternary
from convcvx.oracles.local import LocalOracle
from convcvx.oracles.polynomial import PolynomialOracle
from convcvx.oracles.remainder import RemainderOracle
from convcvx.patches import PatchSpec
from convcvx.problem import Problem, relative_gap
from convcvx.solvers.sliding_frank_wolfe import sliding_frank_wolfe
from convcvx.terms.scope import Scope
from convcvx.training.plan import build_problem, find_beta_max

RESULTS = Path(__file__).parent / "results" / "proofs.md"
FULL_RANK = [
    "mnist:3:1:600:0.5",
    "mnist:3:1:200:0.2",
    "mnist:3:1:200:0.1",
    "mnist:3:4:300:0.333333",
    "mnist:5:1:200:0.5",
    "cifar10:3:1:200:0.5",
    "cifar10:3:1:200:0.2",
]
CYLINDERS = ["mnist:3:1:200:0.2", "mnist:3:1:200:0.1"]
WHOLE = ["mnist:3:1:60000:0.5", "mnist:3:1:60000:0.2"]
LOW_RANK = ["mnist:3:1:1000:0.01:3", "mnist:3:1:200:0.01:4"]
HEADER = (
    "| data | kernel | cells | images | beta / beta_max | objective | gap at the residual | chosen | seconds "
    "| searched | seconds | cylinders | seconds |"
)
WARMING = 1.0
"""Seconds of a search before the one that counts, in which functions are compiled, or read from the cache."""
EQUAL = 1 - 1e-12
"""Least ratio of a bound to the maximum found that counts as no less: the maximum itself is rounded."""
CHECKED: dict[str, Oracle] = {
    "polynomial": PolynomialOracle(),
    "remainder": RemainderOracle(2, BranchAndBoundOracle(0.1, max_cones=100)),
    "cylinders": CylinderOracle(2, max_cylinders=60),
    "branch-and-bound": BranchAndBoundOracle(0.05, max_cones=300),
    "family": FamilyOracle(Ternary()),
}
"""Every rigorous oracle but those that are exact, made to stop early: a bound has to hold then too."""


@dataclass(frozen=True)
class Case:
    """`data:kernel:pool:images:ratio` as given on the command line, with `:rank` if it is not the full one."""

    data: str
    kernel: int
    pool: int
    images: int
    ratio: float
    rank: int | None = None

    @classmethod
    def parse(cls, text: str) -> Case:
        data, kernel, pool, images, ratio, *rank = text.split(":")
        return cls(data, int(kernel), int(pool), int(images), float(ratio), *map(int, rank))

    def problem(self, data_dir: str) -> Problem:
        train, _ = load(self.data, data_dir, self.images)
        spec = PatchSpec((self.kernel, self.kernel), rank=self.rank)
        problem = build_problem(train.images, train.targets, spec=spec, pooling=str(self.pool))
        return problem.with_beta(self.ratio * find_beta_max(problem, "local"))


def full_rank(arguments: argparse.Namespace) -> str:
    """Filters of full rank: polynomials of degree two, and a search over the first directions."""
    return table(FULL_RANK, arguments)


def cylinders(arguments: argparse.Namespace) -> str:
    """Filters of full rank: cones in the first directions, quadratics in all others."""
    arguments.directions = 0
    return table(CYLINDERS, arguments)


def whole(arguments: argparse.Namespace) -> str:
    """Filters of full rank on all images: polynomials alone."""
    arguments.directions = arguments.cylinders = 0
    return table(WHOLE, arguments)


def low_rank(arguments: argparse.Namespace) -> str:
    """Filters of low rank: branch and bound, until a gap of --tol is proved or --search-seconds are over."""
    lines = [
        "| data | kernel | cells | images | rank | beta / beta_max | objective | gap proved | seconds | core-seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in map(Case.parse, arguments.rows or LOW_RANK):
        problem = case.problem(arguments.data_dir)
        budget = Budget(tol=1e-3, time_limit=arguments.solve_seconds)
        solution = sliding_frank_wolfe(problem, LocalOracle(), budget)
        network = solution.filters, solution.weights, solution.intercept
        certify_parameters(problem.until(Deadline.after(WARMING)), *network, oracle="branch-and-bound")
        began, cores = time.perf_counter(), time.process_time()
        in_time = problem.until(Deadline.after(arguments.search_seconds))
        found = certify_parameters(in_time, *network, oracle="branch-and-bound", tol=arguments.tol)
        assert found.scope is Scope.GLOBAL
        lines.append(
            f"| {case.data} | {case.kernel}x{case.kernel} | {case.pool}x{case.pool} | {case.images} | {case.rank} "
            f"| {case.ratio:.3g} | {found.primal:.6g} | {found.rel_gap:.2%} | {time.perf_counter() - began:.1f} "
            f"| {time.process_time() - cores:.1f} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines)


def checked(arguments: argparse.Namespace) -> str:
    """Bounds on small random problems of all kinds, beside the exact maximum."""
    ratios: dict[str, list[float]] = {name: [] for name in CHECKED}
    for seed in range(arguments.problems):
        problem, point = small_problem(seed)
        for name, ratio in looseness(problem, point).items():
            ratios[name].append(ratio)
    lines = [
        "| oracle | problems | bounds below the maximum | bound / maximum, median | largest |",
        "|---|---|---|---|---|",
    ]
    below = {name: sum(not ratio >= EQUAL for ratio in found) for name, found in ratios.items()}
    for name, found in ratios.items():
        lines.append(f"| {name} | {len(found)} | {below[name]} | {np.median(found):.3f} | {max(found):.3f} |")
    print("\n".join(lines), flush=True)
    if any(below.values()):
        raise SystemExit("a bound is below the maximum")
    return "\n".join(lines)


def small_problem(seed: int) -> tuple[Problem, torch.Tensor]:
    """Few images of few patches, of rank 1 to 4, in 1 to 3 cells; the residual of random or constant predictions."""
    random = np.random.default_rng(seed)
    d, cells, c = 1 + seed % 4, int(random.integers(1, 4)), int(random.integers(2, 4))
    n, k = int(random.integers(2, 6)), int(random.integers(1, 3))
    x = random.standard_normal((n, 1, k, d)) + random.choice([0.0, 2.0]) * random.standard_normal(d)
    loss = ("squared", "cross-entropy")[seed // 4 % 2]
    y = random.permutation(np.arange(n) % c) if loss == "cross-entropy" else random.standard_normal((n, c))
    pool = random.random((cells, k)) + 0.1
    images = torch.from_numpy(rearrange(x, "n h w c -> n c h w").copy())
    spec, options = PatchSpec((1, 1)), {"pooling": pool, "loss": loss, "n_classes": c}
    problem = build_problem(images, y, spec=spec, intercept=bool(seed // 8 % 2), dtype=torch.float64, **options)
    predictions = torch.from_numpy(random.standard_normal((n, c)))
    return problem, problem.dual_point(predictions if seed // 16 % 2 else problem.constant_predictions())


def looseness(problem: Problem, point: torch.Tensor) -> dict[str, float]:
    """Each bound over the maximum that it is a bound on, that over the family being found by a scan of its own."""
    maximum = float(ExactOracle()(problem, point).values.max())
    filters = torch.cat(list(Ternary().blocks(problem.responses.dim)))
    over_family = problem.responses.correlate(torch.cat([filters, -filters]), point).flatten(1).norm(dim=1)
    most = dict.fromkeys(CHECKED, maximum) | {"family": float(over_family.max())}
    return {name: oracle(problem, point).upper_bound / most[name] for name, oracle in CHECKED.items() if most[name] > 0}


def table(rows: list[str], arguments: argparse.Namespace) -> str:
    """The rows given, or these."""
    lines = [HEADER, "|" + "---|" * (HEADER.count("|") - 1)]
    print(HEADER, flush=True)
    for case in map(Case.parse, arguments.rows or rows):
        problem = case.problem(arguments.data_dir)
        budget = Budget(tol=1e-3, time_limit=arguments.solve_seconds)
        solution = sliding_frank_wolfe(problem, LocalOracle(), budget)
        predictions = problem.responses.predict(solution.filters, solution.weights, solution.intercept)
        primal, residual = problem.primal(predictions, solution.weights), problem.dual_point(predictions)
        began = time.process_time()
        plain = problem.dual(residual, PolynomialOracle().bound(problem, residual)[0])
        proof = best(proofs_beside(problem, [residual]))
        seconds = time.process_time() - began
        searched, longer = math.nan, 0.0
        if arguments.directions:
            began = time.process_time()
            search = BranchAndBoundOracle(1e-2, arguments.search_seconds)
            searched = best_proof(problem, [residual], RemainderOracle(arguments.directions, search)).value
            longer = time.process_time() - began
        divided, longest = math.nan, 0.0
        if arguments.cylinders:
            began = time.process_time()
            oracle = CylinderOracle(arguments.divided, time_limit=None, max_cylinders=arguments.cylinders)
            divided = best_proof(problem, [residual], oracle).value
            longest = time.process_time() - began
        gaps = " | ".join(f"{relative_gap(primal, value):.2%}" for value in (plain, proof.value))
        by_search = f"{relative_gap(primal, searched):.2%} | {longer:.1f}" if arguments.directions else "- | -"
        by_search += f" | {relative_gap(primal, divided):.2%} | {longest:.0f}" if arguments.cylinders else " | - | -"
        lines.append(
            f"| {case.data} | {case.kernel}x{case.kernel} | {case.pool}x{case.pool} | {case.images} | {case.ratio:.3g} "
            f"| {primal:.6g} | {gaps} | {seconds:.2f} | {by_search} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines)


SECTIONS: dict[str, Callable[[argparse.Namespace], str]] = {
    "full-rank": full_rank,
    "cylinders": cylinders,
    "whole": whole,
    "low-rank": low_rank,
    "checked": checked,
}
"""What a section of the results is made by; its docstring is the heading."""


def write(name: str, body: str) -> None:
    """Put a section in its place among the results."""
    heading = str(SECTIONS[name].__doc__).rstrip(".")
    write_section(RESULTS, "# Proofs", name, f"## {heading}\n\n{body}\n\nMeasured on {machine()}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="../shared/data")
    parser.add_argument("--rows", nargs="*")
    parser.add_argument("--solve-seconds", type=float, default=60.0)
    parser.add_argument("--directions", type=int, default=4)
    parser.add_argument("--search-seconds", type=float, default=60.0, help="of each of three searches, at most")
    parser.add_argument("--divided", type=int, default=3)
    parser.add_argument("--cylinders", type=int, default=5000, help="of the search at the best dual point, at most")
    parser.add_argument("--tol", type=float, default=0.01, help="gap at which section low-rank may stop")
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--section", choices=SECTIONS, default="full-rank")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(" ".join(sys.argv), flush=True)
    body = SECTIONS[arguments.section](arguments)
    options = re.sub(r"--data-dir[ =]\S+ ?", "", " ".join(sys.argv[1:]))
    command = f"    python benchmarks/proofs.py {options}".rstrip()
    write(arguments.section, f"{command}\n\n{body}")


if __name__ == "__main__":
    main()
