"""The training problem: primal, dual and dual scaling. Solvers on a Gram matrix write them in its terms.

    min  Σ_i s_i ℓ(f(x_i), y_i) + β Σ_j ‖V_j‖_F,      f(x) = Σ_j Σ_p φ_p(x; u_j) V_j[p,:] + b,  ‖u_j‖ = 1
    max  -Σ_i s_i ℓ*(-Z_i / s_i, y_i)   over Z with  max_{‖u‖≤1} g(u) ≤ β  (and Σ_i Z_i = 0 with an intercept)

where g(u) = ‖Σ_i φ(x_i; u) Z_iᵀ‖_F: the semi-infinite dual of Sahiner et al., ICLR 2021, with pooling, intercept and
weights of images added. The shares s_i of the images are 1/n each unless weights say otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from convcvx.budget import Deadline
from convcvx.errors import InputError, check_positive
from convcvx.losses.base import Loss
from convcvx.losses.shares import Shares
from convcvx.losses.table import get_loss
from convcvx.losses.targets import encode_targets
from convcvx.responses.passes import Responses
from convcvx.rounding import SAFE, UNIT

SAMPLE_BYTES = 1 << 30
"""Size of a sample's images in float32."""
SINGLE = 100
"""Where there are no units, targets may go up and down to 2^±100, which float32 holds."""
FAR = 8.0
"""Real targets further from zero than so many standard deviations are centred: squares of them would drown the rest."""
ENOUGH_STEPS = 30
"""Halvings of the interval in which `Problem.enough` looks: to a billionth of β."""


@dataclass(frozen=True)
class Problem:
    """One training problem on fixed images.

    Attributes
    ----------
    responses : Responses
    targets : Tensor (n, c) float64
        One-hot classes or real values, the latter less `offset`.
    shares : Shares
        What each image counts for.
    beta : float
        Weight decay of torch for a mean-reduced loss.
    loss : Loss
    intercept : bool
        Whether the output bias b is trained (it is never penalised).
    offset : Tensor (c,) float64
        What was taken off real targets far from zero, where the intercept makes up for it. Each rounds once by that,
        relative to what is left. Solvers and checkpoints know `targets` alone: whoever hands out a network adds it.
    """

    responses: Responses
    targets: Tensor
    shares: Shares
    beta: float
    loss: Loss
    intercept: bool = True
    offset: Tensor | float = 0.0

    @classmethod
    def build(
        cls,
        responses: Responses,
        targets: Tensor,
        beta: float,
        loss: str = "squared",
        intercept: bool = True,
        n_classes: int | None = None,
        sample_weight: Any = None,
    ) -> Problem:
        """Check the parts and put them together; `targets` and `n_classes` as `encode_targets` reads them.

        `sample_weight` (n,) has what each image counts for, in any unit, and no zeros: see `counted`.
        """
        get_loss(loss)
        encoded = encode_targets(targets, loss, n_classes, intercept=intercept)
        _check_size(encoded, loss)
        if len(encoded) != responses.n:
            raise InputError(f"targets must have one row an image, {responses.n}; got {len(encoded)}")
        shares = Shares.of(sample_weight, responses.n)
        offset = _offset(encoded) if intercept and get_loss(loss).takes_real else 0.0
        return cls(responses, encoded - offset, shares, check_positive("beta", beta), get_loss(loss), intercept, offset)

    @property
    def n(self) -> int:
        return self.responses.n

    @property
    def n_outputs(self) -> int:
        """c."""
        return self.targets.shape[1]

    def with_beta(self, beta: float) -> Problem:
        return replace(self, beta=check_positive("beta", beta))

    @property
    def deadline(self) -> Deadline:
        """When work on it has to be over."""
        return self.responses.deadline

    def until(self, deadline: Deadline) -> Problem:
        """The same problem, to be worked on until `deadline` only; see `convcvx.budget`."""
        return replace(self, responses=self.responses.until(deadline))

    def with_dtype(self, dtype: torch.dtype) -> Problem:
        """The same problem with its passes in another arithmetic."""
        return replace(self, responses=self.responses.to(dtype=dtype))

    @property
    def is_small(self) -> bool:
        """Whether calls are what a pass over the images costs."""
        return self.responses.small

    @property
    def largest_sample(self) -> int:
        """How many images a sample may have: it is held in memory, even of images that stay on disk."""
        return max(1, SAMPLE_BYTES // (4 * self.responses.images.shape[1:].numel()))

    def sample(self, images: Tensor) -> Problem:
        """The same problem on some of its images (indices), whose shares keep their proportion."""
        return self._on(images, self.shares.sample(images))

    def batch(self, images: Tensor) -> Problem:
        """The same on images (indices) drawn alike, whose mean loss and slopes estimate those on all without bias."""
        return self._on(images, self.shares.estimate(images))

    def _on(self, images: Tensor, shares: Shares) -> Problem:
        responses = self.responses.to(images=self.responses.images[images.to(self.responses.device)])
        return replace(self, responses=responses, targets=self.targets[images], shares=shares)

    def mean(self, values: Tensor) -> Tensor:
        """Σ_i s_i values_i, for `values` (n, ...) image by image: every mean over images is this one."""
        return self.shares.mean(values)

    def mean_loss(self, predictions: Tensor) -> float:
        """Σ_i s_i ℓ(f_i, y_i) for f = `predictions` (n, c)."""
        return float(self.mean(self.loss.value(predictions, self.targets)))

    def accuracy(self, predictions: Tensor) -> float | None:
        """Share of the images for which f = `predictions` (n, c) are largest where the targets are; None for c = 1."""
        if self.n_outputs == 1:
            return None
        return float(self.mean((predictions.argmax(dim=1) == self.targets.argmax(dim=1)).double()))

    def best_intercept(self, predictions: Tensor, start: Tensor | None = None) -> Tensor:
        """The (c,) shift of `predictions` with the least mean loss, never above that at `start`; else 0."""
        if not self.intercept:
            return torch.zeros(self.n_outputs, dtype=torch.float64)
        return self.loss.best_intercept(predictions, self.targets, self.shares, start)

    def primal(self, predictions: Tensor, weights: Tensor) -> float:
        """Σ_i s_i ℓ(f_i, y_i) + β Σ_j ‖V_j‖_F for f = `predictions` (n, c) and V = `weights` (m, P, c)."""
        return self.mean_loss(predictions) + self.beta * float(weights.flatten(1).norm(dim=1).sum())

    def primal_error(self, predictions: Tensor, weights: Tensor) -> float:
        """How much `primal` is off at most, for float64 predictions of unit filters with these weights.

        A response φ is off by no more than (h + 2r + K + 4) ε times the `reach` of the patches, twice that of squares,
        and adding up m·P of them rounds as often again.
        """
        decay = float(weights.flatten(1).norm(dim=1).sum())
        responses = self.responses
        dim, size = responses.embedding.basis.shape
        terms = size + 2 * dim + responses.n_positions + weights.shape[0] * weights.shape[1] + 8
        terms *= responses.activation.degree
        reached = terms * UNIT * responses.reach() + responses.contrast_error()
        errors = reached * decay + 2 * UNIT * predictions.norm(dim=1)
        value = float(self.mean(self.loss.value_error(errors, predictions, self.targets)))
        off = value + (self.n + self.shares.roundings) * UNIT * self.mean_loss(predictions)
        return (off + (weights.numel() + 4) * UNIT * self.beta * decay) * SAFE

    def constant_predictions(self) -> Tensor:
        """(n, c): the best predictor without filters."""
        zero = torch.zeros_like(self.targets)
        return zero + self.best_intercept(zero)

    def residual(self, predictions: Tensor) -> Tensor:
        """Z_i = -s_i ∇_f ℓ (n, c)."""
        return -self.shares.times(self.loss.gradient(predictions, self.targets))

    def dual_point(self, predictions: Tensor) -> Tensor:
        """The residual Z at `predictions`, the intercept re-optimised if there is one; as `in_domain` leaves it."""
        if self.intercept:
            predictions = predictions + self.best_intercept(predictions)
        return self.in_domain(self.residual(predictions))

    def in_domain(self, dual_point: Tensor) -> Tensor:
        """A point near Z = `dual_point` (n, c) with a finite dual value and Σ_i Z_i = 0 if there is an intercept.

        Both to rounding: what that leaves is in `dual_error`. Only max g <= β is left to the scaling of `dual`.
        """
        return self.loss.in_domain(dual_point, self.targets, self.shares, self.intercept)

    def dual_error(self, dual_point: Tensor) -> Tensor:
        """(n,): bounds on ‖Ẑ_i - Z_i‖, where Ẑ is the exactly feasible point for which Z = `dual_point` stands.

        A proved bound on max g is one for Ẑ: Σ_i ‖φ(x_i; u)‖ times this is part of it.
        """
        return self.loss.dual_error(dual_point, self.targets, self.shares, self.intercept)

    def dual(self, dual_point: Tensor, g_max: float) -> float:
        """The largest dual value over scalings s·Z with s·g_max <= β, rounded down; no loss is below zero.

        A lower bound on the optimum if `g_max` is at least max g at the exact point that Z = `dual_point` stands for;
        0.0 for a `g_max` that is no number.
        """
        if not g_max >= 0:
            return 0.0
        limit = math.nextafter(self.beta / g_max, 0.0) if g_max > 0 else float("inf")
        value = self.loss.dual(dual_point, self.targets, self.shares, limit, self.intercept)
        return value if value > 0 else 0.0

    def enough(self, dual_point: Tensor, value: float) -> float:
        """A `g_max`, nearly the largest, for which `dual` is `value` or more: what suffices to be proved for a bound.

        0.0 where not even half of β suffices; at most twice β.
        """
        low, high = 0.5 * self.beta, 2.0 * self.beta
        if not self.dual(dual_point, low) >= value:
            return 0.0
        for _ in range(ENOUGH_STEPS):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if self.dual(dual_point, middle) >= value else (low, middle)
        return low


def relative_gap(primal: float, dual: float) -> float:
    """(primal - dual) / primal, from 0 to 1; infinite where it is no number, so that nobody takes it for small."""
    gap = (primal - dual) / primal if primal else 0.0
    return min(max(gap, 0.0), 1.0) if math.isfinite(gap) else math.inf


def _offset(targets: Tensor) -> Tensor:
    """(c,) the mean of real targets where it is far from zero, else 0."""
    mean = targets.mean(dim=0)
    if bool(((targets == 0) | (targets == 1)).all()):  # classes, however rare
        return torch.zeros_like(mean)
    return torch.where(mean.abs() > FAR * (targets - mean).square().mean(dim=0).sqrt(), mean, 0.0)


def _check_size(targets: Tensor, loss: str) -> None:
    """Raise `InputError` for real targets whose squares leave float32 no room."""
    largest = float(targets.abs().max())
    if get_loss(loss).takes_real and abs(math.frexp(largest)[1]) > SINGLE:
        raise InputError(
            f"targets must have a largest entry between 2^-{SINGLE} and 2^{SINGLE}; got {largest:.3g}: divide them"
        )
