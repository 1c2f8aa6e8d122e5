"""Kinks at which filters stay while they slide.

Where x·u = 0 the objective is not smooth. A row x whose response could only raise the loss, Z_i·V < 0, keeps a filter
on its kink, and at an optimum over few rows each filter is on the kinks of about r of them: a descent along gradients
crosses one kink after the other, back and forth, and its line searches fail. So a filter that has come to a kink of
that kind slides along it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from convcvx.problem import Problem
from convcvx.responses.small import SmallRows
from convcvx.solution import Solution
from convcvx.solvers.slide.coordinates import Coordinates

NEAR = 1e-2
"""Cosine of filter and row below which the filter is at the kink: where the last descent has left it, by its zigzags.
Between random directions such a cosine is rare, and a kink held in vain is free again in the next slide."""
RIDGE = 1e-12
"""Share of the rows' mean square by which their Gram matrix is made regular: rows may be alike."""


class Kinks:
    """The rows at whose kinks each filter stays, in the coordinates of a descent: (m, k, r), whitened, zeros for none."""

    def __init__(self, problem: Problem, solution: Solution, coordinates: Coordinates) -> None:
        small = SmallRows.of(problem.responses)
        rows = small.flat
        dual_point = problem.dual_point(
            problem.responses.predict(solution.filters, solution.weights, solution.intercept)
        )
        towards = small.pool.T @ solution.weights.numpy()  # (m, K, c)
        slopes = np.einsum("mkc,ic->mik", towards, dual_point.numpy()).reshape(len(towards), -1)
        lengths = np.linalg.norm(rows, axis=1)
        at_kink = np.abs(solution.filters.numpy() @ rows.T) <= NEAR * lengths
        held = at_kink & (slopes < 0) & (lengths > 0)  # (m, n·K)
        most = max(1, int(held.sum(axis=1).max()))
        order = np.argsort(~held, axis=1, kind="stable")[:, :most]
        chosen = np.take_along_axis(held, order, axis=1)
        seen = coordinates.seen(torch.from_numpy(rows))[torch.from_numpy(order)] * torch.from_numpy(chosen)[:, :, None]
        gram = seen @ seen.transpose(1, 2)
        scale = gram.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-300)
        gram.diagonal(dim1=1, dim2=2).add_(RIDGE * scale[:, None] + torch.from_numpy(~chosen))
        self._rows = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), seen, upper=False)

    def along(self, filters: Tensor) -> Tensor:
        """Filters (m, r) in the coordinates, or steps of them, without what would leave a kink."""
        across = self._rows @ filters[:, :, None]
        return filters - (self._rows.transpose(1, 2) @ across)[:, :, 0]
