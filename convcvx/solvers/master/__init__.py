"""The master: optimal output weights for the filters at hand."""

from convcvx.solvers.master.table import (
    MasterResult,
    solve_master,
)

__all__ = [
    "MasterResult",
    "solve_master",
]
