"""Losses ℓ(f, y) of a prediction f in R^c: value, gradient, curvature and conjugate row by row, and their part of the
dual problem, with an allowance for rounding. Derivations: docs/certificates.md."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from convcvx.data.arrays import as_array
from convcvx.errors import InputError, check_choice
from convcvx.losses.intercepts import best_shift
from convcvx.rounding import SAFE, TINY, UNIT, total

LARGEST_WHOLE = 2**53
"""Whole numbers up to this one are float64 as they are: a proof about others would be one about their neighbours."""


class Loss(Protocol):
    """A convex, differentiable loss. Arrays are (n, c); `value` and `conjugate` give (n,).

    The last three methods are its part of the dual problem, max -(1/n) Σ ℓ*(-n Z_i, y_i). A dual point in floating
    point meets its linear constraints only nearly. It stands for an exact one beside it, Ẑ, which meets them all:
    `dual_error` bounds how far away that is, and `dual` bounds the dual value of Ẑ.
    """

    name: str
    curvature: float
    """A bound on the largest eigenvalue of the Hessian in f, anywhere."""

    def value(self, predictions: Tensor, targets: Tensor) -> Tensor: ...

    def gradient(self, predictions: Tensor, targets: Tensor) -> Tensor: ...

    def hessian_product(self, predictions: Tensor, direction: Tensor) -> Tensor: ...

    def conjugate(self, slopes: Tensor, targets: Tensor) -> Tensor:
        """ℓ*(s) = sup_f s·f - ℓ(f, y); infinite outside its domain."""
        ...

    def best_intercept(self, predictions: Tensor, targets: Tensor, start: Tensor | None = None) -> Tensor:
        """The (c,) shift of all predictions that minimises the mean loss, which is never above that at `start` (c,)."""
        ...

    def value_error(self, errors: Tensor, predictions: Tensor, targets: Tensor) -> Tensor:
        """(n,): how much `value` is off at most, for predictions that are off by at most `errors` (n,) in norm."""
        ...

    def in_domain(self, dual_point: Tensor, targets: Tensor, intercept: bool) -> Tensor:
        """A point near Z = `dual_point` whose dual value is finite, with Σ_i Z_i = 0 if there is an intercept."""
        ...

    def dual_error(self, dual_point: Tensor, targets: Tensor, intercept: bool) -> Tensor:
        """(n,): bounds on ‖Ẑ_i - Z_i‖, where Ẑ is the exact dual point that Z stands for."""
        ...

    def dual(self, dual_point: Tensor, targets: Tensor, limit: float, intercept: bool) -> float:
        """A lower bound on the largest dual value of s·Ẑ over scalings 0 <= s <= `limit`, rounding allowed for."""
        ...


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


class CrossEntropy:
    """ℓ(f, y) = log Σ_k exp f_k - y·f for y in the simplex; ℓ*(s) = Σ_k q_k log q_k, q = s + y in the simplex.

    A confident network has probabilities near 0 and 1, losses and slopes far smaller than 1: nothing here is formed as
    a difference from 1. In each row the largest entry, the *pivot*, is what the others leave: q_p = 1 - Σ_{k≠p} q_k.
    """

    name = "cross-entropy"
    curvature = 0.5  # Böhning 1992: diag(p) - ppᵀ ⪯ ½(I - 11ᵀ/c)

    def value(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """log1p Σ_{k≠p} exp(f_k - f_p) + Σ_k y_k (f_p - f_k): a sum of terms >= 0."""
        top, pivot = predictions.max(dim=1, keepdim=True)
        below = top - predictions
        others = torch.exp(-below).scatter(1, pivot, 0.0)
        return torch.log1p(others.sum(dim=1)) + (targets * below).sum(dim=1)

    def gradient(self, predictions: Tensor, targets: Tensor) -> Tensor:
        probabilities = torch.softmax(predictions, dim=1)
        return _balanced(probabilities - targets, probabilities.argmax(dim=1, keepdim=True))

    def hessian_product(self, predictions: Tensor, direction: Tensor) -> Tensor:
        probabilities = torch.softmax(predictions, dim=1)
        weighted = probabilities * direction
        return weighted - probabilities * weighted.sum(dim=1, keepdim=True)

    def conjugate(self, slopes: Tensor, targets: Tensor) -> Tensor:
        q = slopes + targets
        inside = (q >= -1e-12).all(dim=1) & ((q.sum(dim=1) - 1).abs() <= 1e-9)
        entropy = torch.special.xlogy(q.clamp_min(0), q.clamp_min(0)).sum(dim=1)
        return torch.where(inside, entropy, torch.inf)

    def best_intercept(self, predictions: Tensor, targets: Tensor, start: Tensor | None = None) -> Tensor:
        """By Newton's method; see `best_shift`."""
        return best_shift(self, predictions, targets, start)

    def value_error(self, errors: Tensor, predictions: Tensor, targets: Tensor) -> Tensor:
        """ℓ(f + e) <= ℓ(f) + ‖p - y‖‖e‖ + ¼‖e‖²; the terms of ℓ are >= 0 and round a few times each."""
        slopes = self.gradient(predictions, targets).norm(dim=1) * (1 + 16 * predictions.shape[1] * UNIT)
        terms = self.value(predictions, targets)
        return slopes * errors + 0.5 * self.curvature * errors.square() + (2 * predictions.shape[1] + 8) * UNIT * terms

    def in_domain(self, dual_point: Tensor, targets: Tensor, intercept: bool) -> Tensor:
        """Every q_i = y_i - n Z_i in the simplex; a mixture with the class frequencies makes room for the mean shift.

        The frequencies' own residual sums to zero.
        """
        n, frequencies = len(targets), targets.mean(dim=0)
        q = (targets - n * dual_point).clamp_min(0)
        if intercept:  # a class that no target has any of drives its intercept to -infinity
            q = q * (frequencies > 0)
        mass = q.sum(dim=1, keepdim=True)
        q = torch.where(mass > 0, q / mass.clamp_min(1e-300), frequencies)
        pivot = q.argmax(dim=1, keepdim=True)
        surplus = _balanced(q - targets, pivot)
        if not intercept:
            return surplus / -n
        excess = surplus.mean(dim=0)
        mixture = min(1.0, float((2 * excess.abs() / frequencies.clamp_min(1e-300)).max()))
        surplus = (1 - mixture) * (surplus - excess) + mixture * (frequencies - targets)
        return _balanced(surplus, pivot) / -n

    def dual_error(self, dual_point: Tensor, targets: Tensor, intercept: bool) -> Tensor:
        """Ẑ differs from Z in the pivots, by the sums of the rows, and by a mixture: see `_mixture`."""
        mixed = 2**0.5 * self._mixture(dual_point, targets) / len(targets) if intercept else 0.0
        return (_row_defects(dual_point) + mixed) * SAFE

    def dual(self, dual_point: Tensor, targets: Tensor, limit: float, intercept: bool) -> float:
        """(1/n) Σ H(q_i(s)), q(s) = (1 - s) y + s q: concave in s; the best 0 <= s <= 1 is found by bisection.

        By concavity the mixture leaves at least its share 1 - λ of the value.
        """
        kept = 1 - self._mixture(dual_point, targets) * SAFE if intercept else 1.0
        if not kept > 0:
            return 0.0
        # Below 1, so that (1 - s) y_k outweighs what rounding, of targets too, could leave of a q_k below 0.
        largest = min(1 - (4 + 2 * targets.shape[1] ** 2) * UNIT, limit)
        scales = self._scales(dual_point, targets, largest)
        return kept * max(self._mean_entropy(s * len(targets) * dual_point, targets) for s in scales) * (1 - 2 * UNIT)

    def _mixture(self, dual_point: Tensor, targets: Tensor) -> float:
        """λ such that (1 - λ) q_i + λ t, for one t in the simplex, have the mean of the targets; 1 where none is less.

        With e = mean(q) - mean(y), t = mean(y) - e (1 - λ)/λ does it, and is >= 0 for λ >= |e_k| / mean(y)_k.
        """
        defects = float(_row_defects(dual_point).sum()) * (1 + len(targets) * UNIT)
        n, c = targets.shape
        soft = float(((targets != 0).sum(dim=1) != 1).any())  # rows that sum to one but for c roundings
        shares = (targets.mean(dim=0) * (1 - (n + 2) * UNIT) - soft * c * UNIT).tolist()
        worst = 0.0
        for column, share in zip(dual_point.T, shares, strict=True):
            if share > 0:
                sum_, error = total(column)
                worst = max((abs(sum_) + error + defects) / share * SAFE, worst)  # in this order NaN stays
            elif bool((column != 0).any()):
                return 1.0
            if not worst < 1:
                return 1.0
        return worst

    def _mean_entropy(self, surplus: Tensor, targets: Tensor) -> float:
        """A lower bound on (1/n) Σ H(q_i) for q = y - `surplus`, pivots exactly what the other entries leave.

        q_k ≠ pivot is formed with an error of at most δ = ε(4|surplus_k| + 2 q_k). With -q log q =: η(q), that changes
        a term by at most η(δ), and by at most δ (1 + log 2/q) if δ < q/2. log and log1p are good to 4ε.
        """
        n, c = targets.shape
        q = (targets - surplus).clamp_min(0)
        pivot = q.argmax(dim=1, keepdim=True)
        one_hot = (targets != 0).sum(dim=1, keepdim=True) == 1
        error = UNIT * (4 * surplus.abs() + 2 * q + 2 * c * ~one_hot)  # other targets sum to one but for rounding
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
        value, rounding = total(terms)
        allowance = float(uncertain.sum()) * (1 + n * c * UNIT) + 8 * UNIT * abs(value) + rounding + n * c * TINY
        return max(0.0, (value - allowance * SAFE) / n * (1 - 2 * UNIT))

    def _scales(self, dual_point: Tensor, targets: Tensor, largest: float) -> list[float]:
        """Scalings in [0, largest] to try: the end points and, by bisection on the slope, the best inner one."""
        surplus = len(targets) * dual_point

        def slope(scale: float) -> float:
            q = (targets - scale * surplus).clamp_min(1e-300)
            return float((surplus * (q.log() + 1)).sum())

        low, high = 0.0, largest
        if slope(largest) >= 0:
            return [largest]
        for _ in range(60):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if slope(middle) > 0 else (low, middle)
        return [low, largest]


def _length_of_sum(rows: Tensor) -> float:
    """At least ‖Σ_i rows_i‖, for rows (n, c)."""
    sums = (total(column) for column in rows.T)
    return math.hypot(*(abs(value) + error for value, error in sums)) * SAFE  # whose squares do not underflow


def _row_defects(rows: Tensor) -> Tensor:
    """(n,): at least |Σ_k rows_ik|."""
    return rows.sum(dim=1).abs() + rows.shape[1] * UNIT * rows.abs().sum(dim=1)


def _balanced(rows: Tensor, pivot: Tensor) -> Tensor:
    """The same rows (n, c) with the entry at `pivot` (n, 1) minus the sum of the others: they sum to zero."""
    others = rows.scatter(1, pivot, 0.0)
    return others.scatter(1, pivot, -others.sum(dim=1, keepdim=True))


LOSSES: dict[str, Loss] = {loss.name: loss for loss in (Squared(), CrossEntropy())}


def get_loss(name: str) -> Loss:
    """The loss called `name`."""
    return LOSSES[check_choice("loss", name, LOSSES)]


def encode_targets(
    targets: Tensor | np.ndarray, loss: str, n_classes: int | None = None, *, intercept: bool = True
) -> Tensor:
    """Integer classes (n,) or (n, 1) to one-hot (n, c) float64; real targets (n,) or (n, c) to (n, c) float64.

    c is `n_classes`, and then the classes are 0..c-1; without it the number of distinct ids, which stand for the
    classes in their order, as in scikit-learn. Without an `intercept` rows that all name one class are a problem as any
    other; with one nothing is left to train.

    Raises
    ------
    InputError
        For NaN, classes out of range, a single class, real targets under the cross-entropy that are no probabilities,
        or whole numbers that float64 would round.
    """
    array = as_array("targets", targets)
    if array.ndim not in (1, 2) or array.size == 0:
        raise InputError(f"targets must be (n,) classes or (n, c) real values; got shape {array.shape}")
    if array.dtype.kind != "f" and (array.ndim == 1 or array.shape[1] == 1):
        ids, places = np.unique(array, return_inverse=True)
        _check_two(len(ids), ids[0], n_classes)
        if n_classes is not None:
            if int(ids[0]) < 0:
                raise InputError(f"targets must be classes 0, 1, ...; got {ids[0]}")
            if int(ids[-1]) >= n_classes:
                raise InputError(f"targets must be classes below {n_classes}; got {ids[-1]}")
            places = array
        classes = torch.from_numpy(places.reshape(-1).astype(np.int64))
        return torch.nn.functional.one_hot(classes, n_classes or len(ids)).double()
    if array.dtype.kind in "iu" and max(int(array.max()), -int(array.min())) > LARGEST_WHOLE:
        raise InputError(
            "targets must be whole numbers up to 2^53, which float64 holds, or a column of classes; got "
            f"{max(map(int, (array.max(), array.min())), key=abs)}: subtract a number from all of them"
        )
    real = torch.from_numpy(array.astype(np.float64).reshape(len(array), -1))
    if not bool(real.isfinite().all()):
        raise InputError("targets must be finite; found NaN or infinity")
    if (
        intercept
        and real.shape[1] > 1
        and torch.equal(real[:1].sort().values[0], torch.eye(real.shape[1]).double()[-1])
    ):
        _check_two(1 + int((real != real[0]).any()), int(real[0].argmax()), n_classes)
    if loss == "cross-entropy":
        mass = real.sum(dim=1, keepdim=True)
        if not (bool((real >= 0).all()) and torch.allclose(mass, torch.ones_like(mass))):
            raise InputError("targets must be integer classes or rows of probabilities with loss='cross-entropy'")
        real = real / mass  # with a free intercept, what rounding leaves above 1 would be worth minus infinity
    return real


def _check_two(n_present: int, only: object, n_classes: int | None) -> None:
    """Raise `InputError` if there is a single class and nothing says that there are others."""
    if n_present == 1 and n_classes is None:
        raise InputError(f"targets must have at least two classes; all of them are {only}")
