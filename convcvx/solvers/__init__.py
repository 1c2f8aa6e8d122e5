"""Solvers: each is a record that `drive` takes a problem, an oracle and a budget with, and gives a `Solution`."""

from convcvx.solvers.closed_form import closed_form
from convcvx.solvers.copositive import copositive
from convcvx.solvers.frank_wolfe import frank_wolfe
from convcvx.solvers.gated import gated
from convcvx.solvers.loop import Solver, drive
from convcvx.solvers.sliding_frank_wolfe import sliding_frank_wolfe
from convcvx.solvers.table import SOLVERS, pick_solver

__all__ = [
    "SOLVERS",
    "Solver",
    "closed_form",
    "copositive",
    "drive",
    "frank_wolfe",
    "gated",
    "pick_solver",
    "sliding_frank_wolfe",
]
