"""Oracles: the search for the filter that violates dual feasibility most."""

from __future__ import annotations

from convcvx.errors import check_choice
from convcvx.oracles.base import MAX_BYTES, ChargedRows, Oracle, OracleResult
from convcvx.oracles.branch_and_bound import BranchAndBoundOracle
from convcvx.oracles.enumerate import ExactOracle
from convcvx.oracles.local import LocalOracle
from convcvx.problem import Problem

ORACLES = ("auto", "exact", "branch-and-bound", "local")
"""What `oracle=` and `--oracle` take."""
CALL_SECONDS = 120.0
"""Time limit of one branch-and-bound call; the best bound proved by then is used."""

__all__ = [
    "ORACLES",
    "BranchAndBoundOracle",
    "ChargedRows",
    "ExactOracle",
    "LocalOracle",
    "Oracle",
    "OracleResult",
    "get_oracle",
]


def get_oracle(name: str, problem: Problem, *, tol: float = 1e-4, thorough: bool = False) -> Oracle:
    """The oracle called `name`, for a relative gap of `tol`.

    `auto` proves where it can, exactly for patches of rank <= 2, by branch and bound for rank 3, and falls back to
    local search beyond, or where the patches do not fit in memory.
    `thorough` asks the local search for its full effort, as a certificate does.
    """
    check_choice("oracle", name, ORACLES)
    rank = problem.responses.embedding.patch_rank
    if name == "auto" and ChargedRows.size(problem) > MAX_BYTES:
        name = "local"
    if name == "exact" or (name == "auto" and rank <= 2):
        return ExactOracle()
    if name == "branch-and-bound" or (name == "auto" and rank == 3):
        return BranchAndBoundOracle(rel_tol=max(0.25 * tol, 1e-8), time_limit=CALL_SECONDS)
    return LocalOracle(thorough=thorough)
