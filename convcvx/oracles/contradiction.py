"""A proof that contradicts a network: one of the two is wrong, and neither may pass for a gap of zero."""

from __future__ import annotations

import torch
from torch import Tensor

from convcvx.errors import RunError
from convcvx.oracles.base import Oracle
from convcvx.oracles.family import FamilyOracle
from convcvx.problem import Problem
from convcvx.terms.scope import Scope

CONTRADICTION = 1e-9
"""Share of the objective by which a proved bound above it is no rounding."""


def binds(scope: Scope, oracle: Oracle, filters: Tensor) -> bool:
    """Whether a bound of this `scope` is a proof for a network of these unit `filters` (m, r).

    They are the `starts` of the oracle's search, which makes their patterns part of a sample.
    """
    if scope is Scope.FAMILY:
        return isinstance(oracle, FamilyOracle) and bool(oracle.family.contains(filters).all())
    return scope.proved


def check_proof(problem: Problem, bound: float, objective: float, predictions: Tensor, weights: Tensor) -> None:
    """Raise for a `bound` that is a proof for a network and above its `objective` by more than rounding.

    Parameters
    ----------
    objective : float
        Of `predictions` (n, c), in the arithmetic of the passes of `problem`, and `weights` (m, P, c), as
        `Problem.primal` has it.

    Raises
    ------
    RunError
    """
    if not bound > objective * (1 + CONTRADICTION):
        return
    coarser = torch.finfo(problem.responses.dtype).eps / torch.finfo(torch.float64).eps
    most = objective + coarser * problem.primal_error(predictions, weights)
    if bound > most * (1 + CONTRADICTION):
        raise contradiction(bound, objective)


def contradiction(bound: float, objective: float) -> RunError:
    """What to raise for a proof above a network."""
    return RunError(
        f"the lower bound {bound!r} is above the objective {objective!r} of a network: a fault of convcvx, which "
        "proves nothing here; please report it"
    )
