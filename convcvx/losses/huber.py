"""Huber's loss: squared near the target, linear far from it, so that outliers pull no harder than others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from convcvx.losses.intercepts import best_shifts
from convcvx.losses.shares import Shares
from convcvx.losses.squared import Squared, sizes_of_sums
from convcvx.rounding import SAFE, UNIT

SQUARED = Squared()
"""The loss that this one is near the target."""


class Huber:
    """ℓ(f, y) = Σ_k h(f_k - y_k), h(r) = ½r² for |r| <= δ, else δ|r| - ½δ²; ℓ*(s) = ½‖s‖² + s·y, |s_k| <= δ.

    The dual problem is that of the squared loss with |Z_ik| <= δ s_i, in which its scaling keeps a dual point.

    Parameters
    ----------
    delta : float
        δ, in units of the targets.
    """

    curvature = 1.0
    takes_real = True
    rough_steps = False

    def __init__(self, delta: float = 1.0) -> None:
        self.delta = delta
        self.name = "huber" if delta == 1 else f"huber:{delta!r}"

    def value(self, predictions: Tensor, targets: Tensor) -> Tensor:
        sizes = (predictions - targets).abs()
        far = self.delta * (sizes - 0.5 * self.delta)
        return torch.where(sizes <= self.delta, 0.5 * sizes.square(), far).sum(dim=1)

    def gradient(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return (predictions - targets).clamp(-self.delta, self.delta)

    def hessian(self, predictions: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor]:
        return ((predictions - targets).abs() <= self.delta).to(predictions).mul

    def conjugate(self, slopes: Tensor, targets: Tensor) -> Tensor:
        inside = (slopes.abs() <= self.delta * (1 + 1e-12)).all(dim=1)
        return torch.where(inside, SQUARED.conjugate(slopes, targets), torch.inf)

    def best_intercept(
        self, predictions: Tensor, targets: Tensor, shares: Shares, start: Tensor | None = None
    ) -> Tensor:
        """Between the least and the largest residual of each output; see `best_shifts`."""
        wanted = targets - predictions
        start = wanted.new_zeros(wanted.shape[1]) if start is None else start.to(wanted)

        def slopes(shift: Tensor) -> tuple[Tensor, Tensor]:
            left = shift - wanted
            return shares.mean(left.clamp(-self.delta, self.delta)), shares.mean((left.abs() <= self.delta).double())

        found = best_shifts(slopes, wanted.amin(dim=0), wanted.amax(dim=0), start)
        values = [shares.mean(self.value(predictions + b, targets)) for b in (found, start)]
        return found if values[0] <= values[1] else start

    def value_error(self, errors: Tensor, predictions: Tensor, targets: Tensor) -> Tensor:
        """h(r + e) <= h(r) + |h'(r) e| + ½e²; the terms of ℓ are >= 0 and round a few times each."""
        slopes = self.gradient(predictions, targets).norm(dim=1) * (1 + 16 * predictions.shape[1] * UNIT)
        terms = self.value(predictions, targets)
        return slopes * errors + 0.5 * errors.square() + (predictions.shape[1] + 16) * UNIT * terms

    def in_domain(self, dual_point: Tensor, targets: Tensor, shares: Shares, intercept: bool) -> Tensor:
        """In the box |Z_ik| <= δ s_i but for the shift that makes sums zero: `dual` scales for that."""
        largest = self.delta * shares.counts[:, None] / shares.total
        inside = torch.minimum(torch.maximum(dual_point, -largest), largest)
        return SQUARED.in_domain(inside, targets, shares, intercept)

    def dual_error(self, dual_point: Tensor, targets: Tensor, shares: Shares, intercept: bool) -> Tensor:
        return SQUARED.dual_error(dual_point, targets, shares, intercept)

    def dual(self, dual_point: Tensor, targets: Tensor, shares: Shares, limit: float, intercept: bool) -> float:
        """That of the squared loss at scalings s with s |Ẑ_ik| <= δ s_i, where |Ẑ_ik| <= |Z_ik| + s_i |Σ Z_k|."""
        sums = sizes_of_sums(dual_point) if intercept else [0.0] * dual_point.shape[1]
        ratios = shares.quotients(dual_point).abs().amax(dim=0).tolist()
        reach = max(
            ratio * (1 + (2 + shares.roundings) * UNIT) + total for ratio, total in zip(ratios, sums, strict=True)
        )
        inside = self.delta / (reach * SAFE) * (1 - 2 * UNIT) if reach > 0 else float("inf")
        if not inside > 0:
            return 0.0
        return SQUARED.dual(dual_point, targets, shares, min(limit, inside), intercept)
