"""What filters are measured by as they climb: how long a step is, which way is uphill, which filters are the same."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from convcvx.patches import Moments
from convcvx.responses.passes import Responses

LINEAR = 6.0
"""Deviations of far rows along a filter, of which it has their mean on its positive side, from which on it counts as
linear: hardly a row is as far from the mean."""
LINEAR_STARTS = 4
"""Starts of a batch that are linear on far rows: what is linear has few maxima."""


class Metric:
    """In which filters climb: preconditioned by S^(-1/2), and in coordinates w of u = w F where rows are far from zero.

    S and F are those of `Moments.damped` and `Moments.nearer`. Far rows lie on one side of most filters, which are
    linear on them then, and climb as they are.
    """

    def __init__(self, patches: Moments) -> None:
        values, vectors = torch.linalg.eigh(patches.damped())
        self._precondition = vectors * values.rsqrt() @ vectors.T
        self._patches = patches
        self._frame, self._inverse = patches.nearer()

    @classmethod
    def of(cls, responses: Responses) -> Metric:
        """That of the patches, worked out once."""
        if "metric" not in responses.kept:
            responses.kept["metric"] = cls(responses.patch_moments())
        return responses.kept["metric"]

    def starts(self, patches: Tensor, directions: Tensor) -> Tensor:
        """(q, r) unit starts from patches, of either sign, and from random directions; of far rows some are linear."""
        starts = torch.cat([patches @ self._frame.T, directions]) @ self._precondition @ self._frame
        if self._patches.far:
            linear = directions[-LINEAR_STARTS:]
            starts[-LINEAR_STARTS:] = linear * (linear @ self._patches.mean).sign()[:, None]
        return unit(starts)

    def uphill(self, filters: Tensor, gradients: Tensor) -> Tensor:
        """Steps (q, r) along the sphere: as long as from the filter to its normed gradient, and preconditioned."""
        if not self._patches.far:
            return _along_sphere(filters, gradients, self._precondition)
        spread = ((filters @ self._patches.covariance) * filters).sum(dim=1).clamp_min(0).sqrt()
        linear = (filters @ self._patches.mean > LINEAR * spread)[:, None]
        nearer = self.nearer(filters)
        steps = _along_sphere(unit(nearer), gradients @ self._frame.T, self._precondition) @ self._frame
        plain = _along_sphere(filters, gradients, torch.eye(len(self._frame), dtype=filters.dtype))
        return torch.where(linear, plain, norms(nearer)[:, None] * steps)

    def nearer(self, filters: Tensor) -> Tensor:
        """Filters in the coordinates w."""
        return filters @ self._inverse

    def distinct(self, filters: Tensor, values: Tensor, limit: int, cosine: float) -> Tensor:
        """Indices of up to `limit` filters, best first, no two of them closer than `cosine`.

        On far rows, where filters may differ in their bias alone, they are if they are so in the coordinates w.
        """
        rows, nearer = filters.numpy(), unit(self.nearer(filters)).numpy()
        free = np.ones(len(filters), dtype=bool)
        chosen: list[int] = []
        for index in values.argsort(descending=True).tolist():
            if len(chosen) == limit:
                break
            if free[index]:
                chosen.append(index)
                close = rows @ rows[index] >= cosine
                free &= ~(close & (nearer @ nearer[index] >= cosine) if self._patches.far else close)
        return torch.as_tensor(chosen, dtype=torch.long)


def _along_sphere(filters: Tensor, gradients: Tensor, precondition: Tensor) -> Tensor:
    power = _tangent(unit(gradients), filters)
    step = _tangent(power @ precondition, filters)
    return step * (norms(power) / norms(step).clamp_min(1e-300))[:, None]


def _tangent(steps: Tensor, filters: Tensor) -> Tensor:
    return steps - (steps * filters).sum(dim=1, keepdim=True) * filters


def unit(tensors: Tensor) -> Tensor:
    """(q, r) filters or (q, P, c) correlations, scaled to norm one each."""
    return tensors / norms(tensors).clamp_min(1e-300).view(-1, *[1] * (tensors.ndim - 1))


def norms(tensors: Tensor) -> Tensor:
    """(q,) norms of (q, r) filters or (q, P, c) correlations; `Tensor.norm` takes longer to call than to compute."""
    return torch.linalg.vector_norm(tensors.flatten(1), dim=1)
