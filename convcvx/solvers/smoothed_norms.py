"""The penalty of the weights as Newton's method wants it: norms of groups, smoothed.

    β Σ_j √(‖W_j‖² + ε²)

Its Hessian is linearised with dual variables, as Chan, Golub and Mulet (1999) do for total variation: plain Newton on a
smoothed norm takes tiny steps, the primal-dual form full ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

IDLE = 1 - 1e-3
"""Share of β below which the pull on a group is one that it withstands. Smoothed, W_j / √(‖W_j‖² + ε²) is its pull over
β, so that such a group is no longer than 22 ε."""


def idle_groups(norms: Tensor, pulls: Tensor, size: float, epsilon: float) -> Tensor:
    """(m,) bool: the groups with these `norms` and `pulls` (m,) that are as small as smoothing by ε leaves what it does
    not need, and dual feasible with room, at a weight decay of `size`."""
    return (pulls < IDLE * size) & (norms > 0) & (norms <= IDLE / math.sqrt(1 - IDLE**2) * epsilon)


class Groups:
    """The rows of weights W (D, c) that belong together: as many as `sizes` (m,) says, group after group."""

    def __init__(self, sizes: Tensor) -> None:
        self.n, self._sizes = len(sizes), sizes
        self._even = self.n > 0 and bool((sizes == sizes[0]).all())

    @cached_property
    def of(self) -> Tensor:
        """(D,) int64: the group of each row."""
        return torch.arange(self.n, device=self._sizes.device).repeat_interleave(self._sizes)

    def sums(self, rows: Tensor) -> Tensor:
        """(m,) of all entries of the `rows` (D, c) of each group."""
        if self._even:
            return rows.reshape(self.n, -1).sum(dim=1)
        each = rows.sum(dim=1)
        return each.new_zeros(self.n).index_add_(0, self.of, each)

    def spread(self, values: Tensor) -> Tensor:
        """(D, 1): for each row that of its group among `values` (m,)."""
        return values[self.of, None]

    def norms(self, matrix: Tensor) -> Tensor:
        """(m,) Frobenius norms of the groups of `matrix` (D, c)."""
        return self.sums(matrix.double().square()).sqrt()

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        """(D, 1): for each row the inner product of its group's rows of `left` and `right` (D, c)."""
        return self.spread(self.sums(left * right))


@dataclass(frozen=True)
class SmoothedNorms:
    """`size` Σ_j √(‖W_j‖² + ε²) about W = `matrix`.

    Attributes
    ----------
    groups : Groups
    size, epsilon : float
        β and ε.
    matrix, duals : Tensor (D, c)
        W, and dual variables, of norm one at most in each group.
    """

    groups: Groups
    size: float
    epsilon: float
    matrix: Tensor
    duals: Tensor

    def value(self, matrix: Tensor) -> float:
        """At `matrix` instead of W."""
        return self.size * float(self._radii(matrix).sum())

    def _radii(self, matrix: Tensor) -> Tensor:
        """(m,)"""
        return (self.groups.norms(matrix).square() + self.epsilon**2).sqrt()

    @cached_property
    def radii(self) -> Tensor:
        """(D, 1): for each row the smoothed norm of its group."""
        return self.groups.spread(self._radii(self.matrix))

    @cached_property
    def ridges(self) -> Tensor:
        """(D, 1): the slope at W is these times W."""
        return self.size / self.radii

    @cached_property
    def units(self) -> Tensor:
        """(D, c): W over the radii."""
        return self.matrix / self.radii

    def curved(self, step: Tensor) -> Tensor:
        """The Hessian times a `step` (D, c)."""
        inner = self.groups.inner
        bent = self.duals * inner(self.units, step) + self.units * inner(self.duals, step)
        return self.ridges * (step - 0.5 * bent)

    def duals_after(self, step: Tensor) -> Tensor:
        """The dual variables after a Newton step (D, c) of W."""
        inner = self.groups.inner
        duals = self.units + (step - self.duals * inner(self.units, step)) / self.radii
        return duals / inner(duals, duals).sqrt().clamp_min(1.0)
