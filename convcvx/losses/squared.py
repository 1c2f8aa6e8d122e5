"""The squared loss."""

from __future__ import annotations

import math

from torch import Tensor

from convcvx.rounding import SAFE, TINY, UNIT, total


class Squared:
    """ℓ(f, y) = ½‖f - y‖², with one-hot or real targets; ℓ*(s) = ½‖s‖² + s·y."""

    name = "squared"
    curvature = 1.0

    def value(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (predictions - targets).square().sum(dim=1)

    def gradient(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return predictions - targets

    def hessian_product(self, predictions: Tensor, direction: Tensor) -> Tensor:
        return direction

    def conjugate(self, slopes: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * slopes.square().sum(dim=1) + (slopes * targets).sum(dim=1)

    def best_intercept(self, predictions: Tensor, targets: Tensor, start: Tensor | None = None) -> Tensor:
        return (targets - predictions).mean(dim=0)

    def value_error(self, errors: Tensor, predictions: Tensor, targets: Tensor) -> Tensor:
        """½‖r + e‖² - ½‖r‖² <= ‖r‖‖e‖ + ½‖e‖²; forming ½‖r‖² rounds c + 2 times, relatively."""
        lengths = (predictions - targets).norm(dim=1)
        return lengths * errors + 0.5 * errors.square() + (predictions.shape[1] + 4) * UNIT * lengths.square()

    def in_domain(self, dual_point: Tensor, targets: Tensor, intercept: bool) -> Tensor:
        return dual_point - dual_point.mean(dim=0) * intercept

    def dual_error(self, dual_point: Tensor, targets: Tensor, intercept: bool) -> Tensor:
        """Ẑ is Z less its exact mean."""
        shift = _length_of_sum(dual_point) / len(dual_point) if intercept else 0.0
        return dual_point.new_full((len(dual_point),), shift * SAFE)

    def dual(self, dual_point: Tensor, targets: Tensor, limit: float, intercept: bool) -> float:
        """s<Ẑ, Y> - ½ s² n‖Ẑ‖², largest at s = <Ẑ, Y> / (n‖Ẑ‖²); -Ẑ is as feasible as Ẑ.

        ‖Ẑ‖ <= ‖Z‖, and <Ẑ, Y> = <Z, Y> - <Σ Z_i, mean Y>. Products and targets round once each: 2ε Σ|Z||Y|.
        """
        products = dual_point * targets
        overlap, error = total(products)
        error += 2 * UNIT * float(products.abs().sum()) * SAFE + products.numel() * TINY
        if intercept:  # targets that cancel have a mean of the size of rounding, and so has its error
            error += _length_of_sum(dual_point) * _length_of_sum(targets) / len(targets) * SAFE
        square, off = total(dual_point.square())
        square = len(dual_point) * (square + off + UNIT * square + dual_point.numel() * TINY) * SAFE
        overlap = abs(overlap) - error * SAFE
        if not (overlap > 0 and square > 0):
            return 0.0
        scale = min(overlap / square, limit)
        return scale * overlap * (1 - 4 * UNIT) - 0.5 * scale * scale * square * (1 + 4 * UNIT)


def _length_of_sum(rows: Tensor) -> float:
    """At least ‖Σ_i rows_i‖, for rows (n, c)."""
    sums = (total(column) for column in rows.T)
    return math.hypot(*(abs(value) + error for value, error in sums)) * SAFE  # whose squares do not underflow
