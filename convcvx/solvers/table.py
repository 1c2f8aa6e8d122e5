"""The table of solvers: what `solver=` and `--solver` take, and which one "auto" stands for.

A new solver is a file with its record and a line here.
"""

from __future__ import annotations

from convcvx.errors import check_choice
from convcvx.oracles.needs import require
from convcvx.problem import Problem
from convcvx.solvers.closed_form import closed_form
from convcvx.solvers.column_generation import column_generation
from convcvx.solvers.copositive import copositive
from convcvx.solvers.frank_wolfe import frank_wolfe
from convcvx.solvers.gated import gated
from convcvx.solvers.loop import Solver
from convcvx.solvers.sliding_frank_wolfe import sliding_frank_wolfe

ANYWHERE = sliding_frank_wolfe
"""What "auto" takes where no other solver suits: it reaches the optimum at any size."""
SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (sliding_frank_wolfe, column_generation, frank_wolfe, copositive, gated, closed_form)
}


def pick_solver(name: str, problem: Problem) -> tuple[str, str]:
    """The solver that `name` stands for on `problem`, and why.

    Raises
    ------
    InputError
        For a name that is none, or a problem that lacks what the solver needs.
    """
    check_choice("solver", name, ("auto", *SOLVERS))
    if name != "auto":
        require(f"solver {name}", SOLVERS[name].needs, problem)
        return name, "as asked"
    for solver in SOLVERS.values():
        if (why := solver.suits(problem)) is not None:
            return solver.name, why
    return ANYWHERE.name, "no closed form holds on these data, and no other solver reaches the optimum at any size"
