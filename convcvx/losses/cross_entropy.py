"""The softmax cross-entropy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from convcvx.losses.intercepts import best_shift
from convcvx.losses.shares import Shares
from convcvx.rounding import SAFE, TINY, UNIT, total


class CrossEntropy:
    """ℓ(f, y) = log Σ_k exp f_k - y·f for y in the simplex; ℓ*(s) = Σ_k q_k log q_k, q = s + y in the simplex.

    A confident network has probabilities near 0 and 1, losses and slopes far smaller than 1: nothing here is formed as
    a difference from 1. In each row the largest entry, the *pivot*, is what the others leave: q_p = 1 - Σ_{k≠p} q_k.
    """

    name = "cross-entropy"
    curvature = 0.5  # Böhning 1992: diag(p) - ppᵀ ⪯ ½(I - 11ᵀ/c)
    takes_real = False
    rough_steps = True

    def value(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """log1p Σ_{k≠p} exp(f_k - f_p) + Σ_k y_k (f_p - f_k): a sum of terms >= 0."""
        top, pivot = predictions.max(dim=1, keepdim=True)
        below = top - predictions
        others = torch.exp(-below).scatter(1, pivot, 0.0)
        return torch.log1p(others.sum(dim=1)) + (targets * below).sum(dim=1)

    def gradient(self, predictions: Tensor, targets: Tensor) -> Tensor:
        probabilities = torch.softmax(predictions, dim=1)
        return _balanced(probabilities - targets, probabilities.argmax(dim=1, keepdim=True))

    def hessian(self, predictions: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor]:
        probabilities = torch.softmax(predictions, dim=1)

        def product(direction: Tensor) -> Tensor:
            weighted = probabilities * direction
            return weighted - probabilities * weighted.sum(dim=1, keepdim=True)

        return product

    def conjugate(self, slopes: Tensor, targets: Tensor) -> Tensor:
        q = slopes + targets
        inside = (q >= -1e-12).all(dim=1) & ((q.sum(dim=1) - 1).abs() <= 1e-9)
        entropy = torch.special.xlogy(q.clamp_min(0), q.clamp_min(0)).sum(dim=1)
        return torch.where(inside, entropy, torch.inf)

    def best_intercept(
        self, predictions: Tensor, targets: Tensor, shares: Shares, start: Tensor | None = None
    ) -> Tensor:
        """By Newton's method; see `best_shift`."""
        return best_shift(self, predictions, targets, shares, start)

    def value_error(self, errors: Tensor, predictions: Tensor, targets: Tensor) -> Tensor:
        """ℓ(f + e) <= ℓ(f) + ‖p - y‖‖e‖ + ¼‖e‖²; the terms of ℓ are >= 0 and round a few times each."""
        slopes = self.gradient(predictions, targets).norm(dim=1) * (1 + 16 * predictions.shape[1] * UNIT)
        terms = self.value(predictions, targets)
        return slopes * errors + 0.5 * self.curvature * errors.square() + (2 * predictions.shape[1] + 8) * UNIT * terms

    def in_domain(self, dual_point: Tensor, targets: Tensor, shares: Shares, intercept: bool) -> Tensor:
        """Every q_i = y_i - Z_i/s_i in the simplex; a mixture with the class frequencies makes room for the mean shift.

        The frequencies' own residual sums to zero.
        """
        frequencies = shares.mean(targets)
        q = (targets - shares.quotients(dual_point)).clamp_min(0)
        if intercept:  # a class that no target has any of drives its intercept to -infinity
            q = q * (frequencies > 0)
        mass = q.sum(dim=1, keepdim=True)
        q = torch.where(mass > 0, q / mass.clamp_min(1e-300), frequencies)
        pivot = q.argmax(dim=1, keepdim=True)
        surplus = _balanced(q - targets, pivot)
        if not intercept:
            return -shares.times(surplus)
        excess = shares.mean(surplus)
        mixture = min(1.0, float((2 * excess.abs() / frequencies.clamp_min(1e-300)).max()))
        surplus = (1 - mixture) * (surplus - excess) + mixture * (frequencies - targets)
        return -shares.times(_balanced(surplus, pivot))

    def dual_error(self, dual_point: Tensor, targets: Tensor, shares: Shares, intercept: bool) -> Tensor:
        """Ẑ differs from Z in the pivots, by the sums of the rows, and by a mixture: see `_mixture`."""
        mixed = 2**0.5 * self._mixture(dual_point, targets, shares) / shares.total if intercept else 0.0
        return (_row_defects(dual_point) + mixed * shares.counts) * SAFE

    def dual(self, dual_point: Tensor, targets: Tensor, shares: Shares, limit: float, intercept: bool) -> float:
        """Σ_i s_i H(q_i(s)), q(s) = (1 - s) y + s q: concave in s; the best 0 <= s <= 1 is found by bisection.

        By concavity the mixture leaves at least its share 1 - λ of the value.
        """
        kept = self.kept(dual_point, targets, shares) if intercept else 1.0
        return self.scaled_dual(dual_point, targets, shares, limit, kept)

    def kept(self, dual_point: Tensor, targets: Tensor, shares: Shares) -> float:
        """The share of the dual value that the mixture leaves, with an intercept."""
        return 1 - self._mixture(dual_point, targets, shares) * SAFE

    def scaled_dual(self, dual_point: Tensor, targets: Tensor, shares: Shares, limit: float, kept: float) -> float:
        """The share `kept` of the largest value over scalings."""
        if not kept > 0:
            return 0.0
        # Below 1, so that (1 - s) y_k outweighs what rounding, of targets too, could leave of a q_k below 0.
        largest = min(1 - (4 + shares.roundings + 2 * targets.shape[1] ** 2) * UNIT, limit)
        ratios = dual_point / shares.counts[:, None]
        scales = self._scales(dual_point, targets, shares, largest)
        values = (self._mean_entropy(s * shares.total * ratios, targets, shares) for s in scales)
        return kept * max(values) * (1 - 2 * UNIT)

    def _mixture(self, dual_point: Tensor, targets: Tensor, shares: Shares) -> float:
        """λ such that (1 - λ) q_i + λ t, for one t in the simplex, have the mean of the targets; 1 where none is less.

        With e = mean(q) - mean(y), t = mean(y) - e (1 - λ)/λ does it, and is >= 0 for λ >= |e_k| / mean(y)_k.
        """
        defects = float(_row_defects(dual_point).sum()) * (1 + len(targets) * UNIT)
        n, c = targets.shape
        soft = float(((targets != 0).sum(dim=1) != 1).any())  # rows that sum to one but for c roundings
        slack = (n + 2 + shares.roundings) * UNIT
        frequencies = (shares.mean(targets) * (1 - slack) - soft * c * UNIT).tolist()
        worst = 0.0
        for column, frequency in zip(dual_point.T, frequencies, strict=True):
            if frequency > 0:
                sum_, error = total(column)
                worst = max((abs(sum_) + error + defects) / frequency * SAFE, worst)  # in this order NaN stays
            elif bool((column != 0).any()):
                return 1.0
            if not worst < 1:
                return 1.0
        return worst

    def _mean_entropy(self, surplus: Tensor, targets: Tensor, shares: Shares) -> float:
        """A lower bound on Σ_i s_i H(q_i) for q = y - `surplus`, pivots exactly what the other entries leave.

        q_k ≠ pivot is formed with an error of at most δ = ε(4|surplus_k| + 2 q_k), or 8|surplus_k| with weights. With
        -q log q =: η(q), that changes a term by at most η(δ), and by at most δ (1 + log 2/q) if δ < q/2. log and log1p
        are good to 4ε.
        """
        n, c = targets.shape
        q = (targets - surplus).clamp_min(0)
        pivot = q.argmax(dim=1, keepdim=True)
        one_hot = (targets != 0).sum(dim=1, keepdim=True) == 1
        error = UNIT * (
            (4 + shares.roundings) * surplus.abs() + 2 * q + 2 * c * ~one_hot
        )  # other targets sum to one but for rounding
        q, error = q.scatter(1, pivot, 0.0), error.scatter(1, pivot, 0.0)
        rest = q.sum(dim=1)
        left = (1 - rest).clamp_min(UNIT)
        terms = torch.cat(
            [-torch.special.xlogy(q, q), (-left * torch.log1p(-rest.clamp_max(1 - UNIT)))[:, None]], dim=1
        )
        uncertain = torch.where(
            error < 0.5 * q,
            error * (1 + (2 / q.clamp_min(TINY)).log()),
            -torch.special.xlogy(error, error.clamp_max(0.3)),
        )
        off = error.sum(dim=1) + (c + 2) * UNIT * rest
        uncertain = torch.cat([uncertain, (off * (1 + left.log().abs()))[:, None]], dim=1)
        counts = shares.counts[:, None]
        value, rounding = total(terms * counts)
        allowance = float((uncertain * counts).sum()) * (1 + n * c * UNIT)
        allowance += (8 + shares.roundings) * UNIT * abs(value) + rounding + n * c * TINY
        return max(0.0, (value - allowance * SAFE) / shares.total * (1 - (2 + shares.roundings) * UNIT))

    def _scales(self, dual_point: Tensor, targets: Tensor, shares: Shares, largest: float) -> list[float]:
        """Scalings in [0, largest] to try: the end points and, by bisection on the slope, the best inner one."""
        scaled, surplus = shares.total * dual_point, shares.quotients(dual_point)

        def slope(scale: float) -> float:
            q = (targets - scale * surplus).clamp_min(1e-300)
            return float((scaled * (q.log() + 1)).sum())

        low, high = 0.0, largest
        if slope(largest) >= 0:
            return [largest]
        for _ in range(60):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if slope(middle) > 0 else (low, middle)
        return [low, largest]


def _row_defects(rows: Tensor) -> Tensor:
    """(n,): at least |Σ_k rows_ik|."""
    return rows.sum(dim=1).abs() + rows.shape[1] * UNIT * rows.abs().sum(dim=1)


def _balanced(rows: Tensor, pivot: Tensor) -> Tensor:
    """The same rows (n, c) with the entry at `pivot` (n, 1) minus the sum of the others: they sum to zero."""
    others = rows.scatter(1, pivot, 0.0)
    return others.scatter(1, pivot, -others.sum(dim=1, keepdim=True))
