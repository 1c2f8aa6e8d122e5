"""What filters are measured by as they climb: how long a step is, which way is uphill, which filters are the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convcvx.patches import Moments
from convcvx.responses.passes import Responses

Array = npt.NDArray[np.float64]

LINEAR_FROM = 6.0
"""Deviations of far rows along a filter, of which it has their mean on its positive side, from which on it counts as
linear: hardly a row is as far from the mean."""
LINEAR_STARTS = 4
"""Starts of a batch that are linear on far rows: what is linear has few maxima."""


class Metric:
    """In which filters climb: preconditioned by S^(-1/2), and in coordinates w of u = w F where rows are far from zero.

    S and F are those of `Moments.damped` and `Moments.nearer`. Far rows lie on one side of most filters, which are
    linear on them then, and climb as they are.
    """

    def __init__(self, patches: Moments, alike: Callable[[Any], Any]) -> None:
        self._precondition = patches.preconditioner().numpy()
        self._frame, self._inverse = (part.numpy() for part in patches.nearer())
        self._alike = alike
        self._mean, self._covariance, self._far = patches.mean.numpy(), patches.covariance.numpy(), patches.far

    @classmethod
    def of(cls, responses: Responses) -> Metric:
        """That of the patches, worked out once."""
        if "metric" not in responses.kept:
            responses.kept["metric"] = cls(responses.patch_moments(), responses.alike)
        return responses.kept["metric"]

    def starts(self, patches: Tensor, directions: Tensor) -> Tensor:
        """(q, r) unit starts from patches, of either sign, and from random directions; of far rows some are linear."""
        ends = patches.numpy() @ self._frame.T if self._far else patches.numpy()
        starts = np.concatenate([ends, directions.numpy()]) @ self._precondition
        if self._far:
            starts = starts @ self._frame
            linear = directions[-LINEAR_STARTS:].numpy()
            starts[-LINEAR_STARTS:] = linear * np.sign(linear @ self._mean)[:, None]
        return torch.from_numpy(unit(starts))

    def uphill(self, filters: Array, gradients: Array) -> Array:
        """Steps (q, r) along the sphere: as long as from the filter to its normed gradient, and preconditioned."""
        if not self._far:
            return _along_sphere(filters, gradients, self._precondition)
        spread = np.sqrt(np.maximum(np.einsum("ij,ij->i", filters @ self._covariance, filters), 0.0))
        linear = (filters @ self._mean > LINEAR_FROM * spread)[:, None]
        nearer = filters @ self._inverse
        steps = _along_sphere(unit(nearer), gradients @ self._frame.T, self._precondition) @ self._frame
        plain = _along_sphere(filters, gradients, np.eye(len(self._frame)))
        return np.where(linear, plain, norms(nearer)[:, None] * steps)

    def distinct(self, filters: Tensor, values: Tensor, limit: int, cosine: float) -> Tensor:
        """Indices of up to `limit` filters, best first, no two of them closer than `cosine`; see `Responses.alike`.

        On far rows, where filters may differ in their bias alone, they are if they are so in the coordinates w.
        """
        groups = islice(self._groups(filters.numpy(), values.numpy(), cosine), limit)
        return torch.as_tensor([best for best, _ in groups], dtype=torch.long)

    def leaders(self, filters: Array, values: Array, cosine: float) -> npt.NDArray[np.intp]:
        """For each filter the index of the best one that it is closer to than `cosine`: its own where none is."""
        leaders = np.arange(len(filters))
        for best, group in self._groups(filters, values, cosine):
            leaders[group] = best
        return leaders

    def _groups(self, rows: Array, values: Array, cosine: float) -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
        """The best filter of those that are left, and which of them are as close to it as `cosine`, until none is."""
        nearer = unit(rows @ self._inverse) if self._far else rows
        free = np.ones(len(rows), dtype=bool)
        for index in np.argsort(-values, kind="stable").tolist():
            if free[index]:
                close = self._alike(rows @ rows[index]) >= cosine
                group = free & (close & (self._alike(nearer @ nearer[index]) >= cosine) if self._far else close)
                group[index] = True
                free &= ~group
                yield index, group


def _along_sphere(filters: Array, gradients: Array, precondition: Array) -> Array:
    power = _tangent(unit(gradients), filters)
    step = _tangent(power @ precondition, filters)
    return step * (norms(power) / np.maximum(norms(step), 1e-300))[:, None]


def _tangent(steps: Array, filters: Array) -> Array:
    return steps - np.einsum("ij,ij->i", steps, filters)[:, None] * filters


def unit(arrays: Array) -> Array:
    """(q, r) filters or (q, P, c) correlations, scaled to norm one each."""
    return arrays / np.maximum(norms(arrays), 1e-300).reshape(-1, *[1] * (arrays.ndim - 1))


def norms(arrays: Array) -> Array:
    """(q,) norms of (q, r) filters or (q, P, c) correlations."""
    flat = arrays.reshape(len(arrays), math.prod(arrays.shape[1:]))
    return np.sqrt(np.einsum("ij,ij->i", flat, flat))
