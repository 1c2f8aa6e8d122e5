"""Sliding: a joint local descent of filters and weights, started from the convex solution.

Small problems slide by L-BFGS to high precision, large ones by mini-batches. Either way the master then re-optimises
the weights exactly, and within a solver the result counts only if the objective fell.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from convcvx.problem import Problem
from convcvx.responses.small import SmallRows
from convcvx.solution import Solution
from convcvx.solvers.slide.coordinates import Coordinates, balanced_gradients
from convcvx.solvers.slide.descent import BATCH, descend
from convcvx.solvers.slide.kinks import Kinks

DETERMINISTIC_FLOPS = 1e9
"""Cost of a full gradient below which sliding is deterministic."""
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

    coordinates = Coordinates(problem, solution, torch.Generator().manual_seed(0))
    small = SmallRows.of(problem.responses) if problem.is_small else None
    kinks = Kinks(problem, solution, coordinates) if small is not None and small.are_few else None
    gradients = None if small is None else small.gradients
    start = coordinates.start
    if kinks is not None:
        start = [kinks.along(start[0]), *start[1:]]
    shapes, sizes = [part.shape for part in start], [part.numel() for part in start]

    def unpack(point: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        pieces = torch.from_numpy(point).to(start[0]).split(sizes)
        return coordinates.network([piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)])

    def flat(parts: list[Tensor]) -> np.ndarray:
        return torch.cat([part.flatten() for part in parts]).double().cpu().numpy()

    def value_and_gradient(point: np.ndarray) -> tuple[float, np.ndarray]:
        value, slopes = balanced_gradients(problem, unpack(point), gradients)
        parts = coordinates.pullback(*slopes)
        if kinks is not None:
            parts[0] = kinks.along(parts[0])
        return value, flat(parts)

    options = {
        "maxiter": max_iter,
        "maxfun": 2 * max_iter,
        "ftol": max(accuracy, 1e-15),
        "gtol": 1e-13,
        "maxcor": 30 if small is None else 10,
    }
    result = minimize(value_and_gradient, flat(start), jac=True, method="L-BFGS-B", options=options)
    return solution.with_parameters(*(part.double().cpu() for part in unpack(result.x)))
