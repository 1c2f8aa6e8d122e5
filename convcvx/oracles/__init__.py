"""Oracles: the search for the filter that violates dual feasibility most."""

from __future__ import annotations

from convcvx.errors import check_choice
from convcvx.oracles.base import ChargedRows, Oracle, OracleResult
from convcvx.oracles.enumerate import ExactOracle
from convcvx.oracles.local import LocalOracle
from convcvx.problem import Problem

ORACLES = ("auto", "exact", "local")
"""What `oracle=` and `--oracle` take."""

__all__ = ["ORACLES", "ChargedRows", "ExactOracle", "LocalOracle", "Oracle", "OracleResult", "get_oracle"]


def get_oracle(name: str, problem: Problem, *, thorough: bool = False) -> Oracle:
    """The oracle called `name`; `auto` is exact where the patches have rank <= 2, and local search otherwise.

    `thorough` asks the local search for its full effort, as a certificate does.
    """
    check_choice("oracle", name, ORACLES)
    if name == "exact" or (name == "auto" and problem.responses.embedding.patch_rank <= 2):
        return ExactOracle()
    return LocalOracle(thorough=thorough)
