"""The squared hinge: one output a class against all others, or several labels an image; no pull beyond a margin."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from convcvx.losses.intercepts import best_shifts
from convcvx.losses.shares import Shares
from convcvx.losses.squared import scaled_dual, sizes_of_sums
from convcvx.rounding import SAFE, UNIT


class SquaredHinge:
    """ℓ(f, y) = Σ_k (1 - t_k f_k)_+², t_k = 2 y_k - 1 = ±1 for labels y_k of 1 and 0; no half before the square.

    That of scikit-learn's `LinearSVC`, whose C weighs a sum over images: β is 1 / (n C). ℓ*(s) = t·s + ¼‖s‖² where
    t_k s_k <= 0 for all k. At a dual point that is 2 (s'<Z, t> - ½ s'²‖Z‖²) with s' = s/2: twice the dual value of the
    squared loss with targets t, where t_ik Z_ik >= 0.
    """

    name = "squared-hinge"
    curvature = 2.0
    takes_real = False
    rough_steps = False
    width = 0.0
    """Over which its corner is rounded: not at all."""

    def value(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return _short(predictions, targets).square().sum(dim=1)

    def gradient(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return -2 * _signs(targets) * _short(predictions, targets)

    def hessian(self, predictions: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor]:
        return (2.0 * (_short(predictions, targets) > 0)).mul

    def conjugate(self, slopes: Tensor, targets: Tensor) -> Tensor:
        agreed = _signs(targets) * slopes
        inside = (agreed <= 1e-12).all(dim=1)
        return torch.where(inside, agreed.sum(dim=1) + 0.25 * slopes.square().sum(dim=1), torch.inf)

    def best_intercept(
        self, predictions: Tensor, targets: Tensor, shares: Shares, start: Tensor | None = None
    ) -> Tensor:
        """Output by output; see `best_shifts`. A label that all images have, or none, is beyond every margin."""
        signs = _signs(targets)
        wanted = signs - predictions
        start = wanted.new_zeros(wanted.shape[1]) if start is None else start.to(wanted)

        def slopes(shift: Tensor) -> tuple[Tensor, Tensor]:
            at = predictions + shift
            bent = self.hessian(at, targets)(torch.ones_like(at))
            return shares.mean(self.gradient(at, targets)), shares.mean(bent)

        low, high = wanted.amin(dim=0) - 1 - self.width, wanted.amax(dim=0) + 1 + self.width
        first = torch.where((signs > 0).all(dim=0), high, torch.where((signs < 0).all(dim=0), low, start))
        found = best_shifts(slopes, low, high, first)
        values = [shares.mean(self.value(predictions + b, targets)) for b in (found, start)]
        return found if values[0] <= values[1] else start

    def value_error(self, errors: Tensor, predictions: Tensor, targets: Tensor) -> Tensor:
        """ℓ(f + e) <= ℓ(f) + ‖∇ℓ‖‖e‖ + ‖e‖²; the terms of ℓ are >= 0 and round a few times each."""
        slopes = self.gradient(predictions, targets).norm(dim=1) * (1 + 16 * predictions.shape[1] * UNIT)
        terms = self.value(predictions, targets)
        return slopes * errors + errors.square() + (predictions.shape[1] + 16) * UNIT * terms

    def in_domain(self, dual_point: Tensor, targets: Tensor, shares: Shares, intercept: bool) -> Tensor:
        """Every t_ik Z_ik >= 0; of each output the side of t with the larger sum is scaled to the other's."""
        signs = _signs(targets)
        inside = signs * (signs * dual_point).clamp_min(0)
        if not intercept:
            return inside
        sums = [(side * inside).clamp_min(0).sum(dim=0) for side in (1, -1)]
        least = torch.minimum(*sums)
        ahead, back = (torch.where(side > least, least / side.clamp_min(1e-300), 1.0) for side in sums)
        return torch.where(inside > 0, ahead, back) * inside

    def dual_error(self, dual_point: Tensor, targets: Tensor, shares: Shares, intercept: bool) -> Tensor:
        """Ẑ is Z with the larger side of each output, at least half of Σ_i |Z_ik|, scaled to the other exactly."""
        if not intercept:
            return torch.zeros(len(dual_point), dtype=torch.float64)
        sizes = dual_point.abs()
        halves = 0.5 * sizes.sum(dim=0) * (1 - 2 * len(sizes) * UNIT)
        off = torch.tensor(sizes_of_sums(dual_point), dtype=torch.float64)
        cut = torch.where(off < halves, off / halves * SAFE, 1.0)
        return (cut * sizes).sum(dim=1) * (1 + (sizes.shape[1] + 4) * UNIT)

    def dual(self, dual_point: Tensor, targets: Tensor, shares: Shares, limit: float, intercept: bool) -> float:
        """Twice that of the squared loss at half the scaling: ‖Ẑ‖ <= ‖Z‖, and <Ẑ, t> = <Z, t> - Σ_k |Σ_i Z_ik|."""
        signs = _signs(targets)
        if not bool((signs * dual_point >= 0).all()):  # nor for what is no number
            return 0.0
        lost = math.fsum(sizes_of_sums(dual_point)) * SAFE if intercept else 0.0
        return 2 * scaled_dual(dual_point, signs, shares, math.nextafter(limit / 2, 0.0), lost)


def _signs(targets: Tensor) -> Tensor:
    """(n, c): t of +1 for a label, -1 for its absence."""
    return 2 * targets - 1


def _short(predictions: Tensor, targets: Tensor) -> Tensor:
    """(n, c): by how much each output falls short of the margin."""
    return (1 - _signs(targets) * predictions).clamp_min(0)
