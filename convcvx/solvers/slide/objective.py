"""The balanced objective of a slide as a function of one vector, as scipy's minimisers want it.

`PassObjective` goes over the images; `SmallObjective` has the rows of a small problem in the coordinates of the slide
and writes the same out in numpy, as calls are all that costs there. Where rows are few filters stay at `Kinks`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convcvx.problem import Problem
from convcvx.responses.small import SmallRows
from convcvx.solution import Solution
from convcvx.solvers.slide.coordinates import Coordinates, balanced_gradients
from convcvx.solvers.slide.kinks import Kinks

Array = npt.NDArray[np.float64]


class PassObjective:
    """Value and gradient by passes over the images.

    Attributes
    ----------
    start : array (D,)
        The coordinates of `solution`, one after the other.
    """

    def __init__(self, problem: Problem, solution: Solution) -> None:
        self._problem, self._coordinates = problem, Coordinates(problem, solution, torch.Generator().manual_seed(0))
        start = self._coordinates.start
        self._shapes, self._sizes = [part.shape for part in start], [part.numel() for part in start]
        self.start = _flat(start)

    def __call__(self, point: Array) -> tuple[float, Array]:
        value, slopes = balanced_gradients(self._problem, self.network(point))
        return value, _flat(self._coordinates.pullback(*slopes))

    def _parts(self, point: Array) -> list[Tensor]:
        pieces = torch.from_numpy(point).to(self._coordinates.start[0]).split(self._sizes)
        return [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]

    def network(self, point: Array) -> tuple[Tensor, Tensor, Tensor]:
        """Filters (m, r), weights (m, P, c), intercept (c,)."""
        return self._coordinates.network(self._parts(point))


class SmallObjective(PassObjective):
    """The same of a small problem, from its rows."""

    def __init__(self, problem: Problem, solution: Solution) -> None:
        super().__init__(problem, solution)
        small = SmallRows.of(problem.responses)
        coordinates = self._coordinates
        inverse = coordinates.filter_inverse.double().numpy()
        self._rows, self._pool = small.flat @ inverse.T, small.pool
        self._decay = problem.beta * (inverse @ inverse.T)
        self._weight_inverse, self._mean = coordinates.weight_inverse.double().numpy(), coordinates.mean.double().numpy()
        self._kinks = None
        if small.are_few:
            self._kinks = Kinks(problem, solution, torch.from_numpy(self._rows))
            filters, *rest = self._parts(self.start)
            self.start = _flat([self._kinks.along(filters.double()), *rest])

    def __call__(self, point: Array) -> tuple[float, Array]:
        problem, pool = self._problem, self._pool
        filters, weights, intercept = (part.numpy() for part in self._parts(point))
        n, m, (cells, n_positions) = problem.n, len(filters), pool.shape
        matrix = self._weight_inverse.T @ weights  # (m·P, c)
        active = np.maximum(self._rows @ filters.T, 0.0)
        pooled = (pool @ active.reshape(n, n_positions, m)).transpose(0, 2, 1).reshape(n, -1)
        predictions = torch.from_numpy(pooled @ matrix + (intercept - self._mean[:, 0] @ matrix))
        slopes = problem.shares.times(problem.loss.gradient(predictions, problem.targets)).numpy()
        decay = filters @ self._decay
        value = problem.mean_loss(predictions)
        value += 0.5 * float(np.vdot(filters, decay) + problem.beta * np.vdot(matrix, matrix))
        shift = slopes.sum(axis=0) * problem.intercept
        matrix_slopes = pooled.T @ slopes + problem.beta * matrix - self._mean * shift
        back = (slopes @ matrix.T).reshape(n, m, cells).transpose(0, 2, 1)
        back = (pool.T @ back).reshape(-1, m) * (active > 0)
        filter_slopes = back.T @ self._rows + decay
        if self._kinks is not None:
            filter_slopes = self._kinks.along(torch.from_numpy(filter_slopes)).numpy()
        parts = filter_slopes, self._weight_inverse @ matrix_slopes, shift
        return value, np.concatenate([part.ravel() for part in parts])


def _flat(parts: list[Tensor]) -> Array:
    return torch.cat([part.flatten() for part in parts]).double().cpu().numpy()
