"""What a loss ℓ(f, y) of a prediction f in R^c offers: row by row, and in the dual problem.

Derivations of its rounding: docs/certificates.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from convcvx.losses.shares import Shares


class Loss(Protocol):
    """A convex, differentiable loss. Arrays are (n, c); `value` and `conjugate` give (n,).

    The last three methods are its part of the dual problem, max -Σ_i s_i ℓ*(-Z_i / s_i, y_i), s_i the images' `shares`
    of the mean loss. A dual point in floating point meets its linear constraints only nearly. It stands for an exact
    one beside it, Ẑ, which meets them all: `dual_error` bounds how far away that is, and `dual` bounds the dual value
    of Ẑ.
    """

    name: str
    curvature: float
    """A bound on the largest eigenvalue of the Hessian in f, anywhere."""
    takes_real: bool
    """Whether targets may be any real values: the loss then depends on f - y alone."""
    rough_steps: bool
    """Whether rough Newton steps get ahead on it. On several quadratic pieces they go back and forth between these."""

    def value(self, predictions: Tensor, targets: Tensor) -> Tensor: ...

    def gradient(self, predictions: Tensor, targets: Tensor) -> Tensor: ...

    def hessian(self, predictions: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor]:
        """The Hessian in f as a map of directions (n, c); what it takes of the predictions is worked out once."""
        ...

    def conjugate(self, slopes: Tensor, targets: Tensor) -> Tensor:
        """ℓ*(s) = sup_f s·f - ℓ(f, y); infinite outside its domain."""
        ...

    def best_intercept(
        self, predictions: Tensor, targets: Tensor, shares: Shares, start: Tensor | None = None
    ) -> Tensor:
        """The (c,) shift of all predictions that minimises the mean loss, which is never above that at `start` (c,)."""
        ...

    def value_error(self, errors: Tensor, predictions: Tensor, targets: Tensor) -> Tensor:
        """(n,): how much `value` is off at most, for predictions that are off by at most `errors` (n,) in norm."""
        ...

    def in_domain(self, dual_point: Tensor, targets: Tensor, shares: Shares, intercept: bool) -> Tensor:
        """A point near Z = `dual_point` whose dual value is finite, with Σ_i Z_i = 0 if there is an intercept."""
        ...

    def dual_error(self, dual_point: Tensor, targets: Tensor, shares: Shares, intercept: bool) -> Tensor:
        """(n,): bounds on ‖Ẑ_i - Z_i‖, where Ẑ is the exact dual point that Z stands for."""
        ...

    def dual(self, dual_point: Tensor, targets: Tensor, shares: Shares, limit: float, intercept: bool) -> float:
        """A lower bound on the largest dual value of s·Ẑ over scalings 0 <= s <= `limit`, rounding allowed for."""
        ...
