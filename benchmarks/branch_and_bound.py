"""How long branch and bound takes to prove max g to 1 %, on real MNIST: rank, images, beta, bound, cones, seconds.

    python benchmarks/branch_and_bound.py --data-dir ../shared/data

The dual point is the residual where sliding Frank-Wolfe with the local oracle stops (at most --solve-seconds); the
bound is timed alone, from the charged rows being built to the proof, after a run that compiles. A search that reaches
--time-limit still has proved the bound that is shown, and the gap of the certificate that follows from it.
beta_max is the largest g found at zero, and shown with what is proved about it: the true one is larger by this share
at most. bound / beta tells how near the optimum the dual point was (1 there): far from it, the task is easier.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from machine import machine

from convcvx.budget import Budget
from convcvx.data.datasets import load
from convcvx.oracles.base import OracleResult
from convcvx.oracles.branch_and_bound import BranchAndBoundOracle
from convcvx.oracles.local import LocalOracle
from convcvx.patches import PatchEmbedding, PatchSpec
from convcvx.problem import Problem
from convcvx.responses.passes import Responses
from convcvx.solvers.sliding_frank_wolfe import sliding_frank_wolfe

CASES = [
    "3:1000:0.1",
    "3:1000:0.01",
    "4:200:0.1",
    "4:200:0.01",
    "5:50:0.5",
    "6:50:0.5",
    "7:20:0.5",
    "9:20:0.5",
]
HEADER = (
    "| rank | images | beta / beta_max | beta | beta_max within | best g / beta | bound / beta | certificate gap "
    "| cones | seconds | stopped |"
)


@dataclass(frozen=True)
class Case:
    """`rank:images:ratio` as given on the command line."""

    rank: int
    images: int
    ratio: float

    @classmethod
    def parse(cls, text: str) -> Case:
        rank, images, ratio = text.split(":")
        return cls(int(rank), int(images), float(ratio))


def measure(case: Case, data_dir: str, rel_tol: float, solve_seconds: float, time_limit: float, device: str) -> str:
    train, _ = load("mnist", data_dir, case.images)
    images = train.images
    embedding = PatchEmbedding.fit(images, PatchSpec(3, rank=case.rank))
    problem = Problem.build(Responses(images, embedding, dtype=torch.float64), train.targets, 1.0)
    oracle = BranchAndBoundOracle(rel_tol, time_limit, device=device)
    at_zero = oracle(problem, problem.dual_point(problem.constant_predictions()))
    problem = problem.with_beta(case.ratio * float(at_zero.values[0]))
    head = f"| {case.rank} | {case.images:,} | {case.ratio:g} | {problem.beta:.3e} | {excess(at_zero):.2g} |"
    solution = sliding_frank_wolfe(problem, LocalOracle(), Budget(tol=1e-3, time_limit=solve_seconds))
    if not len(solution.filters):  # the constant predictor's dual point would be another, easier problem
        return f"{head} no master in time ||||||"
    predictions = problem.responses.predict(solution.filters, solution.weights, solution.intercept)
    dual_point = problem.dual_point(predictions)
    began = time.perf_counter()
    result = oracle(problem, dual_point, starts=solution.filters)
    seconds = time.perf_counter() - began
    primal = problem.primal(predictions, solution.weights)
    gap = 1 - problem.dual(dual_point, result.upper_bound) / primal
    return (
        f"{head} {float(result.values[0]) / problem.beta:.4f} | {result.upper_bound / problem.beta:.4f} | {gap:.2g} | "
        f"{result.stats['cones']:,} | {seconds:.1f} | {result.stats['stopped'].replace('_', ' ')} |"
    )


def excess(result: OracleResult) -> float:
    """By what share the proved bound exceeds the best g found."""
    return result.upper_bound / float(result.values[0]) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="../shared/data")
    parser.add_argument("--cases", nargs="+", default=CASES, help="rank:images:beta_ratio")
    parser.add_argument("--rel-tol", type=float, default=1e-2)
    parser.add_argument("--solve-seconds", type=float, default=40.0)
    parser.add_argument("--time-limit", type=float, default=30.0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the bound is computed")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "branch_and_bound.md")
    parser.add_argument("--append", action="store_true", help="add rows to the table in --out")
    arguments = parser.parse_args()
    budget = arguments.rel_tol, arguments.solve_seconds, arguments.time_limit, arguments.device
    measure(Case(3, 50, 0.1), arguments.data_dir, 0.1, 1.0, 60.0, arguments.device)  # compiles
    lines = [
        "# Branch and bound on MNIST",
        "",
        "Non-zero 3x3 patches, global average pooling, squared loss; stopped at a bound within "
        f"{arguments.rel_tol:g} of the best g found, or after {arguments.time_limit:g} s. {machine(arguments.device)}.",
        "",
        HEADER,
        "|---" * HEADER.count(" | ") + "|---|",
    ]
    if arguments.append:
        lines = arguments.out.read_text().splitlines()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for text in arguments.cases:
        lines.append(measure(Case.parse(text), arguments.data_dir, *budget))
        print(lines[-1], file=sys.stderr, flush=True)
        arguments.out.write_text("\n".join(lines) + "\n")  # a long run that is cut short keeps what it has
    print("\n".join(lines))


if __name__ == "__main__":
    main()
