"""The squared loss."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from convcvx.losses.shares import Shares
from convcvx.rounding import BLOCK, SAFE, TINY, UNIT, total, totals


class Squared:
    """ℓ(f, y) = ½‖f - y‖², with one-hot or real targets; ℓ*(s) = ½‖s‖² + s·y."""

    name = "squared"
    curvature = 1.0
    takes_real = True
    rough_steps = True

    def value(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (predictions - targets).square().sum(dim=1)

    def gradient(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return predictions - targets

    def hessian(self, predictions: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda direction: direction

    def conjugate(self, slopes: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * slopes.square().sum(dim=1) + (slopes * targets).sum(dim=1)

    def best_intercept(
        self, predictions: Tensor, targets: Tensor, shares: Shares, start: Tensor | None = None
    ) -> Tensor:
        return shares.mean(targets - predictions)

    def value_error(self, errors: Tensor, predictions: Tensor, targets: Tensor) -> Tensor:
        """½‖r + e‖² - ½‖r‖² <= ‖r‖‖e‖ + ½‖e‖²; forming ½‖r‖² rounds c + 2 times, relatively."""
        lengths = (predictions - targets).norm(dim=1)
        return lengths * errors + 0.5 * errors.square() + (predictions.shape[1] + 4) * UNIT * lengths.square()

    def in_domain(self, dual_point: Tensor, targets: Tensor, shares: Shares, intercept: bool) -> Tensor:
        return shares.centred(dual_point) if intercept else dual_point

    def dual_error(self, dual_point: Tensor, targets: Tensor, shares: Shares, intercept: bool) -> Tensor:
        """Ẑ_i is Z_i less its share of the exact sum."""
        shift = length_of_sum(dual_point) / shares.total if intercept else 0.0
        return shift * SAFE * shares.counts

    def dual(self, dual_point: Tensor, targets: Tensor, shares: Shares, limit: float, intercept: bool) -> float:
        """-Ẑ is as feasible as Ẑ; ‖Ẑ‖ <= ‖Z‖, and <Ẑ, Y> = <Z, Y> - <Σ Z_i, mean Y>."""
        lost = 0.0
        if intercept:
            # targets that cancel have a mean of the size of rounding, and so has its error
            sums = length_of_sum(targets * shares.counts[:, None], shares.roundings)
            lost = length_of_sum(dual_point) * sums / shares.total * SAFE
        return scaled_dual(dual_point, targets, shares, limit, lost)


def dual_in_gram_form(loss: float, overlap: float, penalty: float, largest: float) -> float:
    """The dual value of the residual Z, scaled so that g <= `penalty`, where sums of products are all that is at hand.

    `loss` is ½ Σ ‖Z_i‖² / s_i, `overlap` <Z, Y>, `largest` the largest g at Z. Rounding is not allowed for: a solver
    may go by it, a certificate computes `scaled_dual` from the rows.
    """
    if not loss > 0:
        return 0.0
    limit = penalty / largest if largest > 0 else math.inf
    scale = min(max(0.5 * overlap / loss, -limit), limit)
    return scale * overlap - scale**2 * loss


def scaled_dual(dual_point: Tensor, targets: Tensor, shares: Shares, limit: float, lost: float) -> float:
    """A lower bound on max_s s |<Ẑ, Y>| - ½ s² ‖Ẑ‖², with ‖Z‖² := Σ_i ‖Z_i‖² / s_i, over scalings up to `limit`.

    For any exact Ẑ with ‖Ẑ‖ <= ‖Z‖ and |<Ẑ, Y>| >= |<Z, Y>| - `lost`. It is largest at s = <Ẑ, Y> / ‖Ẑ‖². Products and
    targets round once each: 2ε Σ|Z||Y|.
    """
    products = dual_point * targets
    overlap, error = total(products)
    error += 2 / BLOCK * error + products.numel() * TINY + lost
    square, off = total(dual_point * (dual_point / shares.counts[:, None]))
    square = square + off + (1 + shares.roundings) * UNIT * square + dual_point.numel() * TINY
    square = shares.total * square * SAFE
    overlap = abs(overlap) - error * SAFE
    if not (overlap > 0 and square > 0):
        return 0.0
    scale = min(overlap / square, limit)
    return scale * overlap * (1 - 4 * UNIT) - 0.5 * scale * scale * square * (1 + 4 * UNIT)


def length_of_sum(rows: Tensor, roundings: int = 0) -> float:
    """At least ‖Σ_i rows_i‖, for rows (n, c) whose entries may have been rounded so many times."""
    return math.hypot(*sizes_of_sums(rows, roundings)) * SAFE  # whose squares do not underflow


def sizes_of_sums(rows: Tensor, roundings: int = 0) -> list[float]:
    """At least |Σ_i rows_ik| for each column k."""
    return [abs(value) + error + roundings / BLOCK * error for value, error in totals(rows)]
