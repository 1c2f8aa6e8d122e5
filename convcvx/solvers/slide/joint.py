"""Sliding: a joint local descent of filters and weights, started from the convex solution.

Small problems slide by L-BFGS to high precision, large ones by mini-batches. Either way the master then re-optimises
the weights exactly, and within a solver the result counts only if the objective fell.
"""

from __future__ import annotations

from convcvx.problem import Problem
from convcvx.responses.few import FewRows
from convcvx.solution import Solution
from convcvx.solvers.slide.descent import BATCH, descend
from convcvx.solvers.slide.objective import FewRowsObjective, PassObjective

DETERMINISTIC_FLOPS = 1e9
"""Cost of a full gradient below which sliding is deterministic."""
MEMORY = 30
"""Steps by which L-BFGS knows the curvature: more save passes over the images."""
MEMORY_FEW = 10
"""The same among few rows, where passes are cheap: more would cost more than they save."""
EPOCHS = 2.0
"""Of a descent by mini-batches, unless it is to take more steps."""


def slide(problem: Problem, solution: Solution, seed: int, *, accuracy: float, steps: int = 0) -> Solution:
    """Descend from `solution`; the objective is not guaranteed to fall.

    A deterministic descent stops when its steps gain less than `accuracy`, one by mini-batches after `EPOCHS`, or
    `steps` if those are more.
    """
    if solution.n_filters == 0:
        return solution
    responses = problem.responses
    flops = 6.0 * problem.n * responses.n_positions * responses.dim * solution.n_filters
    if flops <= DETERMINISTIC_FLOPS:
        return slide_lbfgs(problem, solution, accuracy)
    return descend(problem, solution, seed, max(EPOCHS, steps * BATCH / problem.n))


def slide_lbfgs(problem: Problem, solution: Solution, accuracy: float = 0.0, max_iter: int = 200) -> Solution:
    """Full-batch L-BFGS: kinks of the ReLU can stop it, the oracle then steps over them; among few rows filters slide
    along the kinks that they have come to."""
    from scipy.optimize import minimize  # here: `import convcvx` does not wait for it

    few = FewRows.of(problem.responses)
    objective = PassObjective(problem, solution) if few is None else FewRowsObjective(problem, few, solution)
    options = {
        "maxiter": max_iter,
        "maxfun": 2 * max_iter,
        "ftol": max(accuracy, 1e-15),
        "gtol": 1e-13,
        "maxcor": MEMORY if few is None else MEMORY_FEW,
    }
    result = minimize(objective, objective.start, jac=True, method="L-BFGS-B", options=options)
    return solution.with_parameters(*(part.double().cpu() for part in objective.network(result.x)))
