"""Solvers: each takes a `Problem` and an oracle and gives a `Solution`; one file a solver, one table of them all."""

from __future__ import annotations

from typing import Protocol

from convcvx.budget import Budget
from convcvx.errors import check_choice
from convcvx.oracles.base import Oracle
from convcvx.problem import Problem
from convcvx.solution import Callback, Solution
from convcvx.solvers.closed_form import closed_form, closed_form_holds
from convcvx.solvers.copositive import copositive
from convcvx.solvers.frank_wolfe import frank_wolfe
from convcvx.solvers.gated import gated
from convcvx.solvers.sliding_frank_wolfe import sliding_frank_wolfe


class Solver(Protocol):
    """Trains a network on a problem as far as `budget` goes; the certificate is left to the caller."""

    def __call__(
        self,
        problem: Problem,
        oracle: Oracle,
        budget: Budget = Budget(),
        *,
        seed: int = 0,
        start: Solution | None = None,
        callback: Callback | None = None,
    ) -> Solution: ...


SOLVERS: dict[str, Solver] = {
    "sliding-fw": sliding_frank_wolfe,
    "frank-wolfe": frank_wolfe,
    "copositive": copositive,
    "gated": gated,
    "closed-form": closed_form,
}
"""What `solver=` and `--solver` take, beside "auto"."""


def pick_solver(name: str, problem: Problem) -> tuple[str, str]:
    """The solver that `name` stands for on `problem`, and why."""
    check_choice("solver", name, ("auto", *SOLVERS))
    if name != "auto":
        return name, "as asked"
    if closed_form_holds(problem):
        return "closed-form", "XXᵀ ∝ I and the signs fit: the soft-thresholded SVD is the optimum of these data"
    return "sliding-fw", "no closed form holds on these data, and no other solver reaches the optimum at any size"
