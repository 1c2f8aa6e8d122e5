"""Losses ℓ(f, y) of a prediction f in R^c: value, gradient, curvature and convex conjugate, row by row."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from convcvx.arrays import as_array
from convcvx.errors import InputError, check_choice


class Loss(Protocol):
    """A convex, differentiable loss. Arrays are (n, c); `value` and `conjugate` give (n,)."""

    name: str
    curvature: float
    """A bound on the largest eigenvalue of the Hessian in f, anywhere."""

    def value(self, predictions: Tensor, targets: Tensor) -> Tensor: ...

    def gradient(self, predictions: Tensor, targets: Tensor) -> Tensor: ...

    def hessian_product(self, predictions: Tensor, direction: Tensor) -> Tensor: ...

    def conjugate(self, slopes: Tensor, targets: Tensor) -> Tensor:
        """ℓ*(s) = sup_f s·f - ℓ(f, y); infinite outside its domain."""
        ...

    def best_intercept(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """The (c,) shift of all predictions that minimises the mean loss."""
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

    def best_intercept(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return (targets - predictions).mean(dim=0)


class CrossEntropy:
    """ℓ(f, y) = log Σ_k exp f_k - y·f for y in the simplex; ℓ*(s) = Σ_k q_k log q_k, q = s + y in the simplex."""

    name = "cross-entropy"
    curvature = 0.5  # Böhning 1992: diag(p) - ppᵀ ⪯ ½(I - 11ᵀ/c)

    def value(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return torch.logsumexp(predictions, dim=1) - (targets * predictions).sum(dim=1)

    def gradient(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return torch.softmax(predictions, dim=1) - targets

    def hessian_product(self, predictions: Tensor, direction: Tensor) -> Tensor:
        probabilities = torch.softmax(predictions, dim=1)
        weighted = probabilities * direction
        return weighted - probabilities * weighted.sum(dim=1, keepdim=True)

    def conjugate(self, slopes: Tensor, targets: Tensor) -> Tensor:
        q = slopes + targets
        inside = (q >= -1e-12).all(dim=1) & ((q.sum(dim=1) - 1).abs() <= 1e-9)
        entropy = torch.special.xlogy(q.clamp_min(0), q.clamp_min(0)).sum(dim=1)
        return torch.where(inside, entropy, torch.inf)

    def best_intercept(self, predictions: Tensor, targets: Tensor) -> Tensor:
        shift = predictions.new_zeros(predictions.shape[1])
        value = self.value(predictions, targets).mean()
        for _ in range(100):
            probabilities = torch.softmax(predictions + shift, dim=1)
            gradient = (probabilities - targets).mean(dim=0)
            hessian = torch.diag(probabilities.mean(dim=0)) - probabilities.T @ probabilities / len(probabilities)
            step = torch.linalg.lstsq(hessian, gradient, driver="gelsd").solution  # singular along 1
            size = 1.0
            # Where all probabilities are 0 or 1 the step is beyond all numbers, and the trial nan: no fall either.
            while not (trial := self.value(predictions + shift - size * step, targets).mean()) <= value and size > 1e-9:
                size *= 0.5
            if not trial <= value:
                break
            shift, previous, value = shift - size * step, value, trial
            if gradient.abs().max() < 1e-14 or previous - value <= 1e-16 * value.abs():
                break
        return shift - shift.mean()


LOSSES: dict[str, Loss] = {loss.name: loss for loss in (Squared(), CrossEntropy())}


def get_loss(name: str) -> Loss:
    """The loss called `name`."""
    return LOSSES[check_choice("loss", name, LOSSES)]


def encode_targets(targets: Tensor | np.ndarray, loss: str, n_classes: int | None = None) -> Tensor:
    """Integer classes (n,) or (n, 1) to one-hot (n, c) float64; real targets (n,) or (n, c) to (n, c) float64.

    c is `n_classes`, and then the classes are 0..c-1; without it the number of distinct ids, which stand for the
    classes in their order, as in scikit-learn.

    Raises
    ------
    InputError
        For NaN, classes out of range, a single class, or real targets under the cross-entropy that are no
        probabilities.
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
    real = torch.from_numpy(array.astype(np.float64).reshape(len(array), -1))
    if not bool(real.isfinite().all()):
        raise InputError("targets must be finite; found NaN or infinity")
    if real.shape[1] > 1 and torch.equal(real[:1].sort().values[0], torch.eye(real.shape[1]).double()[-1]):
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
