"""The balanced objective of a slide as a function of one vector, as scipy's minimisers want it.

`PassObjective` goes over the images. `FewRowsObjective` has the rows in the coordinates of the slide, and writes the
same out in numpy, as calls are what costs there; its filters slide along `Kinks`.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convcvx.problem import Problem
from convcvx.responses.few import FewRows
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
        self._shapes = [tuple(part.shape) for part in start]
        ends = accumulate((part.numel() for part in start), initial=0)
        self._places = [slice(*pair) for pair in pairwise(ends)]
        self.start = _flat(start)

    def __call__(self, point: Array) -> tuple[float, Array]:
        value, slopes = balanced_gradients(self._problem, self.network(point))
        return value, _flat(self._coordinates.pullback(*slopes))

    def network(self, point: Array) -> tuple[Tensor, Tensor, Tensor]:
        """Filters (m, r), weights (m, P, c), intercept (c,)."""
        parts = [torch.from_numpy(part).to(self._coordinates.start[0]) for part in self._parts(point)]
        return self._coordinates.network(parts)

    def _parts(self, point: Array) -> list[Array]:
        """u' (m, r), V' (m·P, c) and b' (c,)."""
        return [point[place].reshape(shape) for place, shape in zip(self._places, self._shapes, strict=True)]


class FewRowsObjective(PassObjective):
    """The same from few rows, position by position: pooling is one product then. The gradient is that along kinks."""

    def __init__(self, problem: Problem, few: FewRows, solution: Solution) -> None:
        super().__init__(problem, solution)
        coordinates = self._coordinates
        inverse = coordinates.filter_inverse.numpy()
        seen = few.rows @ inverse.T  # (n, K, r)
        self._rows, self._pool = seen.transpose(1, 0, 2).reshape(-1, seen.shape[2]), few.pool
        self._decay = problem.beta * (inverse @ inverse.T)
        self._weight_inverse, self._mean = coordinates.weight_inverse.numpy(), coordinates.mean.numpy()
        self._kinks = Kinks(problem, few, solution, torch.from_numpy(seen).flatten(0, 1))
        filters, *rest = coordinates.start
        self.start = _flat([torch.from_numpy(self._kinks.along(filters.numpy())), *rest])

    def __call__(self, point: Array) -> tuple[float, Array]:
        problem, pool = self._problem, self._pool
        (cells, n_positions), n, beta = pool.shape, problem.n, problem.beta
        filters, weights, intercept = self._parts(point)
        m, c = len(filters), len(intercept)
        matrix = self._weight_inverse.T @ weights  # (m·P, c)
        by_cell = matrix.reshape(m, cells, c).transpose(1, 0, 2)
        active = np.maximum(self._rows @ filters.T, 0.0)  # (K·n, m)
        pooled = (pool @ active.reshape(n_positions, -1)).reshape(cells, n, m)
        shift = intercept - self._mean[:, 0] @ matrix
        predictions = torch.from_numpy((pooled @ by_cell).sum(axis=0) + shift)
        slopes = problem.shares.times(problem.loss.gradient(predictions, problem.targets)).numpy()
        decay = filters @ self._decay
        value = problem.mean_loss(predictions) + 0.5 * float(np.vdot(filters, decay) + beta * np.vdot(matrix, matrix))
        total = slopes.sum(axis=0) * problem.intercept
        pulls = (pooled.transpose(0, 2, 1) @ slopes).transpose(1, 0, 2).reshape(-1, c)
        weight_slopes = self._weight_inverse @ (pulls + beta * matrix - self._mean * total)
        back = pool.T @ (slopes @ by_cell.transpose(0, 2, 1)).reshape(cells, -1)
        filter_slopes = (back.reshape(-1, m) * (active > 0)).T @ self._rows + decay
        filter_slopes = self._kinks.along(filter_slopes)
        return value, np.concatenate([filter_slopes.ravel(), weight_slopes.ravel(), total])


def _flat(parts: list[Tensor]) -> Array:
    return torch.cat([part.flatten() for part in parts]).double().cpu().numpy()
