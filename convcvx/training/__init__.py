"""The main path: images → patch embedding → problem → solver ⇄ oracle → certificate, and run folders."""

from convcvx.training.plan import (
    TRAINING,
    Plan,
    beta_at,
    build_problem,
    find_beta_max,
    solve_problem,
    warn_short_of,
)

__all__ = [
    "TRAINING",
    "Plan",
    "beta_at",
    "build_problem",
    "find_beta_max",
    "solve_problem",
    "warn_short_of",
]
