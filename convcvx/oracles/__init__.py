"""Oracles: the search for the filter that violates dual feasibility most."""

from __future__ import annotations

import math

from convcvx.arrangements.cells import count_bound
from convcvx.errors import check_choice
from convcvx.oracles._patch_rows import MAX_BYTES, PatchRows
from convcvx.oracles.base import Oracle, OracleResult
from convcvx.oracles.branch_and_bound import BranchAndBoundOracle, check_rank
from convcvx.oracles.charged_rows import ChargedRows
from convcvx.oracles.copositive import CopositiveOracle
from convcvx.oracles.enumerate import ExactOracle
from convcvx.oracles.local import LocalOracle
from convcvx.oracles.sampled import N_GATES, SampledOracle
from convcvx.problem import Problem

ORACLES = ("auto", "exact", "branch-and-bound", "copositive", "sampled", "local")
"""What `oracle=` and `--oracle` take."""
FEW_CELLS, FEW_DIMENSIONS = 5_000, 6
"""Cells up to which, and rank up to which, `auto` searches the whole arrangement: about a second a call."""
CALL_SECONDS, CALL_SHARE = 600.0, 0.25
"""Time limit of one branch-and-bound call, gathering included; the best bound proved by then is used. And the share of
what is left of a training's own limit that a call takes: its bound comes step by step, and rounds are to follow."""

__all__ = [
    "ORACLES",
    "BranchAndBoundOracle",
    "ChargedRows",
    "CopositiveOracle",
    "ExactOracle",
    "LocalOracle",
    "Oracle",
    "OracleResult",
    "SampledOracle",
    "get_oracle",
    "pick_oracle",
]


def pick_oracle(name: str, problem: Problem) -> tuple[str, str]:
    """The oracle that `name` stands for on `problem`, and why: `auto` proves where a proof is affordable."""
    check_choice("oracle", name, ORACLES)
    rank = problem.responses.embedding.patch_rank
    if name == "branch-and-bound":
        check_rank(rank)
    if name != "auto":
        return name, "as asked"
    if PatchRows.size(problem.responses, problem.n_outputs) > MAX_BYTES:
        return "local", f"a proof would gather more than {MAX_BYTES >> 30} GiB of patches"
    if rank <= 2:
        return "exact", f"patches of rank {rank} are swept completely"
    rows = problem.n * problem.responses.n_positions
    most = count_bound(rows, rank) if rank <= FEW_DIMENSIONS else math.inf
    if most <= FEW_CELLS:
        return (
            "exact",
            f"{rows:,} patches of rank {rank} have at most {most:,} activation patterns, searched completely",
        )
    if rank == 3:
        return "branch-and-bound", "patches of rank 3 can be bounded in seconds"
    return "local", f"patches of rank {rank}: the cost of a proof grows exponentially in the rank"


def get_oracle(
    name: str, problem: Problem, *, tol: float = 1e-4, thorough: bool = False, gates: int = N_GATES
) -> Oracle:
    """The oracle called `name`, for a relative gap of `tol`.

    `thorough` asks for full effort, as a certificate does: otherwise a search may be rougher far from the optimum.
    `gates` are what `sampled` samples.
    """
    name, _ = pick_oracle(name, problem)
    if name == "exact":
        return ExactOracle()
    if name == "branch-and-bound":
        far_tol, share = (0.0, 1.0) if thorough else (0.1, CALL_SHARE)
        return BranchAndBoundOracle(max(0.25 * tol, 1e-8), CALL_SECONDS, far_tol=far_tol, share=share)
    if name == "copositive":
        return CopositiveOracle()
    if name == "sampled":
        return SampledOracle(gates)
    return LocalOracle(thorough=thorough)
