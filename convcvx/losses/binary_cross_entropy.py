"""The binary cross-entropy, summed over outputs: several labels an image, or one class against all others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from convcvx.losses.cross_entropy import CrossEntropy
from convcvx.losses.shares import Shares
from convcvx.rounding import UNIT

TWO = CrossEntropy()
"""The loss of two classes, a label and its absence."""


class BinaryCrossEntropy:
    """ℓ(f, y) = Σ_k log(1 + exp f_k) - y_k f_k for y_k in [0, 1].

    ℓ*(s) = Σ_k q_k log q_k + (1 - q_k) log(1 - q_k) for q = s + y in [0, 1]^c.

    Each output is a cross-entropy of two classes, with logits (f_k, 0), targets (y_k, 1 - y_k) and a dual point
    (Z_k, -Z_k): what that has of proofs and roundings holds here, output by output. Only the scaling of a dual point is
    one for all.
    """

    name = "bce"
    curvature = 0.25  # p (1 - p)
    takes_real = False
    rough_steps = True

    def value(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return self._terms(predictions, targets).sum(dim=1)

    def gradient(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """p - y; of a confident prediction the smaller of p and 1 - p, which is not formed as a difference from 1."""
        ahead, back = torch.sigmoid(predictions), torch.sigmoid(-predictions)
        return torch.where(predictions < 0, ahead - targets, (1 - targets) - back)

    def hessian(self, predictions: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor]:
        return (torch.sigmoid(predictions) * torch.sigmoid(-predictions)).mul

    def conjugate(self, slopes: Tensor, targets: Tensor) -> Tensor:
        q = slopes + targets
        inside = ((q >= -1e-12) & (q <= 1 + 1e-12)).all(dim=1)
        q = q.clamp(0, 1)
        entropy = (torch.special.xlogy(q, q) + torch.special.xlogy(1 - q, 1 - q)).sum(dim=1)
        return torch.where(inside, entropy, torch.inf)

    def best_intercept(
        self, predictions: Tensor, targets: Tensor, shares: Shares, start: Tensor | None = None
    ) -> Tensor:
        """Output by output, that of two classes."""
        start = predictions.new_zeros(predictions.shape[1]) if start is None else start.to(predictions)
        shifts = []
        for logits, labels, own in zip(_logits(predictions).unbind(1), _both(targets).unbind(1), start, strict=True):
            shift = TWO.best_intercept(logits, labels, shares, torch.stack([0.5 * own, -0.5 * own]))
            shifts.append(shift[0] - shift[1])
        found = torch.stack(shifts)
        # Each is no worse than the start but for the rounding of that difference.
        values = [shares.mean(self._terms(predictions + b, targets)) for b in (found, start)]
        return torch.where(values[0] <= values[1], found, start)

    def value_error(self, errors: Tensor, predictions: Tensor, targets: Tensor) -> Tensor:
        """ℓ(f + e) <= ℓ(f) + ‖p - y‖‖e‖ + ⅛‖e‖²; the terms of ℓ are >= 0 and round a few times each."""
        slopes = self.gradient(predictions, targets).norm(dim=1) * (1 + 16 * predictions.shape[1] * UNIT)
        terms = self.value(predictions, targets)
        return slopes * errors + 0.5 * self.curvature * errors.square() + (predictions.shape[1] + 16) * UNIT * terms

    def in_domain(self, dual_point: Tensor, targets: Tensor, shares: Shares, intercept: bool) -> Tensor:
        """Every q_ik = y_ik - Z_ik/s_i in [0, 1]."""
        pairs = zip(_opposed(dual_point).unbind(1), _both(targets).unbind(1), strict=True)
        return torch.stack([TWO.in_domain(pair, labels, shares, intercept)[:, 0] for pair, labels in pairs], dim=1)

    def dual_error(self, dual_point: Tensor, targets: Tensor, shares: Shares, intercept: bool) -> Tensor:
        pairs = zip(_opposed(dual_point).unbind(1), _both(targets).unbind(1), strict=True)
        errors = [TWO.dual_error(pair, labels, shares, intercept) for pair, labels in pairs]
        return torch.stack(errors, dim=1).norm(dim=1) * (1 + (len(errors) + 2) * UNIT)

    def dual(self, dual_point: Tensor, targets: Tensor, shares: Shares, limit: float, intercept: bool) -> float:
        """Σ_i s_i Σ_k H(q_ik(s)) at one scaling s for all outputs; a mixture leaves of each output its own share.

        As rows of two classes, c of them an image, each counts for what the image does.
        """
        pairs, labels = _opposed(dual_point), _both(targets)
        rows = Shares(shares.counts.repeat_interleave(dual_point.shape[1]), shares.total)
        least = 1.0
        if intercept:
            columns = zip(pairs.unbind(1), labels.unbind(1), strict=True)
            least = min(TWO.kept(pair, own, shares) for pair, own in columns)
        return TWO.scaled_dual(pairs.flatten(0, 1), labels.flatten(0, 1), rows, limit, least)

    def _terms(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """(n, c): the loss of each output."""
        terms = TWO.value(_logits(predictions).flatten(0, 1), _both(targets).flatten(0, 1))
        return terms.view(predictions.shape)


def _logits(predictions: Tensor) -> Tensor:
    """(n, c, 2)."""
    return torch.stack([predictions, torch.zeros_like(predictions)], dim=2)


def _both(targets: Tensor) -> Tensor:
    """(n, c, 2): a label and its absence."""
    return torch.stack([targets, 1 - targets], dim=2)


def _opposed(dual_point: Tensor) -> Tensor:
    """(n, c, 2): rows that sum to zero."""
    return torch.stack([dual_point, -dual_point], dim=2)
