"""Solvers: each is a record that `drive` takes a problem, an oracle and a budget with, and gives a `Solution`."""

from convcvx.solvers.loop import Solver, drive
from convcvx.solvers.table import SOLVERS, pick_solver

__all__ = ["SOLVERS", "Solver", "drive", "pick_solver"]
