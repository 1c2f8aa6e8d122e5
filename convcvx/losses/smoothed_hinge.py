"""The squared hinge with a rounded corner, for Newton's method: a loss that bends everywhere.

Beyond the margin the squared hinge is flat: at a small β all images end up about there, its Hessian at hand tells
nothing of the images that a step will bring back, and Newton's steps go too far. With a width w > 0,

    h(m)² for m_+²,    h(m) = ½ (m + (m² + 4w²)^½),    h² - m_+² between 0 and 2w²

(Chen & Mangasarian, *Math. Program.* 1995): as h (h - m) = w², a central path with h for the slack, which w ↓ 0 ends.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from convcvx.losses.base import Loss
from convcvx.losses.squared_hinge import SquaredHinge


class SmoothedHinge(SquaredHinge):
    """Σ_k h(1 - t_k f_k)² at some `width` w: value, gradient and Hessian for a solver, nothing of the dual problem."""

    name = "smoothed squared-hinge"

    def __init__(self, width: float) -> None:
        self.width = width

    def value(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return self._parts(predictions, targets)[0].square().sum(dim=1)

    def gradient(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """h h' = h²/r with r = (m² + 4w²)^½."""
        h, r = self._parts(predictions, targets)
        return -2 * (2 * targets - 1) * h.square() / r

    def hessian(self, predictions: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor]:
        """h'² + h h'' = h²/r² + 2h w²/r³."""
        h, r = self._parts(predictions, targets)
        return (2 * (h.square() / r.square() + 2 * h * self.width**2 / r**3)).mul

    def _parts(self, predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """h and r, (n, c) each; far beyond the margin h is w²/|m|, which the difference would lose."""
        m = 1 - (2 * targets - 1) * predictions
        r = (m.square() + 4 * self.width**2).sqrt()
        return torch.where(m > 0, 0.5 * (m + r), 2 * self.width**2 / (r + m.abs())), r


def smoothed(loss: Loss, width: float) -> Loss:
    """`loss`, or one near it that bends everywhere: by 2w² an output at most, w = `width`, above it."""
    return SmoothedHinge(width) if isinstance(loss, SquaredHinge) and width > 0 else loss
