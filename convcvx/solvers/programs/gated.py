"""The convex program of a gated network: every activation pattern is fixed, only its linear map W_s is trained.

    min_{W, b}  Σ_i s_i ℓ(Σ_s Φ^s(x_i) W_s + b, y_i) + β Σ_s ‖W_s‖,     W_s (r, P·c)
    max_Z  -Σ_i s_i ℓ*(-Z_i / s_i, y_i)   over Z with  max_s ‖Σ_i Φ^s(x_i) ⊗ Z_i‖° <= β

(the convex gated ReLU problem of Mishkin, Sahiner, Pilanci 2022, with pooling, intercept and vector outputs). With
the nuclear norm this is weight decay on the gated network's filters and output weights: W_s = Σ_j u_j vec(V_j)ᵀ at
the cost Σ_j ‖u_j‖‖V_j‖. The column norm, Σ over columns of ‖·‖, lets a neuron feed a single output (the regulariser
of pyscnn); the Frobenius norm is the group lasso. All three coincide for P = c = 1.

The method is accelerated proximal gradient with adaptive restarts (O'Donoghue, Candès 2015) and a step size that
backtracks both ways. Pixels are so unequally scaled that plain steps crawl; the two group norms therefore step in
the metric of the gated features' own second moments, in whose principal axes the proximal point is one scalar
equation a group. A pass over the images down and one up make an iteration, the duality gap comes free with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from convcvx.budget import Deadline, OutOfTime
from convcvx.errors import check_choice
from convcvx.losses.squared import dual_in_gram_form
from convcvx.problem import Problem
from convcvx.responses.gated import GatedResponses
from convcvx.solvers.programs.norms import NORMS, GateNorm

GRAM_SIZE = 2000
"""Features q·r·P up to which the squared loss is solved on their Gram matrix."""
SAMPLE = 2000
"""Images from which the metric is estimated: it sets the speed, not the result."""
COARSE_DIM = 64
"""Entries of a filter from which on a program is first solved in the leading axes; smaller ones are quick anyway."""
ENERGY = 0.95
"""Share of the features' second moment that these axes hold: with it the solution in them is a good start in all."""
SLOW = 0.01
"""Relative fall of the objective in an iteration below which the leading axes have given what they can."""
FLOOR = 1e-4
"""Smallest entry of the metric against the largest."""


@dataclass(frozen=True)
class GatedResult:
    """Solution of a gated program.

    Attributes
    ----------
    weights : Tensor (q, r, P, c) float64
        W_s.
    intercept : Tensor (c,) float64
    primal, dual, rel_gap : float
        Of the gated program; the dual value bounds its optimum from below.
    iterations : int
    history : list of (seconds, primal, dual)
    """

    weights: Tensor
    intercept: Tensor
    primal: float
    dual: float
    rel_gap: float
    iterations: int
    history: list[tuple[float, float, float]]


def solve_gated(
    problem: Problem,
    gates: Tensor,
    *,
    norm: str = "nuclear",
    tol: float = 1e-4,
    max_iter: int = 5000,
    time_limit: float | None = None,
) -> GatedResult:
    """Solve the gated program of `gates` (q, r) to the relative gap `tol`, or until a budget is spent.

    Parameters
    ----------
    norm : {"nuclear", "columns", "frobenius"}
    time_limit : float, optional
        Seconds; the deadline of the problem holds besides.

    Raises
    ------
    OutOfTime
        When there is not even time for a first iterate.
    """
    began = perf_counter()
    problem = problem.until(problem.deadline.sooner(Deadline.after(time_limit)))
    measure = NORMS[check_choice("norm", norm, NORMS)]
    axes, metric = _principal(problem, gates) if measure.proximal is not None else (None, None)
    history: list[tuple[float, float, float]] = []
    weights = torch.zeros(len(gates), 0, problem.responses.n_cells * problem.n_outputs, dtype=torch.float64)
    reached: tuple[int, _Streamed | _Gram, Tensor, Tensor] | None = None
    try:
        for rank in _levels(metric, problem.responses.dim):
            last = rank == problem.responses.dim
            features = GatedResponses(problem.responses, gates, None if axes is None else axes[:rank])
            smooth = _pick(problem, features)
            start = torch.nn.functional.pad(weights, (0, 0, 0, rank - weights.shape[1]))
            descent = _Descent(smooth, measure, problem.beta, start, None if metric is None else metric[:rank])
            while True:
                descent.evaluate()
                history.append((perf_counter() - began, descent.primal, descent.dual if last else 0.0))
                _, primal, dual = history[-1]
                reached = rank, smooth, descent.weights, descent.image
                if len(history) > max_iter or primal - dual <= tol * primal or (not last and _slow(history)):
                    break
                problem.deadline.check()
                descent.step()
            weights = descent.weights
    except OutOfTime:
        if reached is None:
            raise
    assert reached is not None
    rank, smooth, weights, image = reached
    return GatedResult(
        (weights if axes is None else axes[:rank].T @ weights).unflatten(2, (-1, problem.n_outputs)),
        smooth.intercept(weights, image),
        primal,
        dual,
        (primal - dual) / max(primal, 1e-300),
        len(history) - 1,
        history,
    )


def _levels(metric: Tensor | None, dim: int) -> list[int]:
    """Numbers of leading axes to solve in, one after another: few carry most of the data and cost little."""
    if metric is None or dim < COARSE_DIM:
        return [dim]
    shares = metric.cumsum(dim=0) / metric.sum()
    rank = int((shares < ENERGY).sum()) + 1
    return [rank, dim] if 3 * rank <= dim else [dim]


def _slow(history: list[tuple[float, float, float]]) -> bool:
    return len(history) > 3 and history[-1][1] > (1 - SLOW) * history[-2][1]


class _Descent:
    """Accelerated proximal gradient in a diagonal metric; `step` after `evaluate`, again and again."""

    def __init__(
        self, smooth: _Streamed | _Gram, norm: GateNorm, beta: float, weights: Tensor, metric: Tensor | None
    ) -> None:
        self.smooth, self.norm, self.beta = smooth, norm, beta
        self.metric = weights.new_ones(weights.shape[1], 1) if metric is None else metric[:, None]
        self.weights, self.image = weights, smooth.image(weights)
        self._ahead, self._ahead_image = self.weights, self.image
        self._momentum, self._scale = 1.0, 0.0
        self.primal, self.dual = np.inf, 0.0  # losses are non-negative

    def evaluate(self) -> None:
        """Gradient at the extrapolated point, whose residual is the dual point; objective at the last one."""
        self._value, self._pull, dual_of = self.smooth.at(self._ahead, self._ahead_image)
        self.dual = max(self.dual, dual_of(float(self.norm.dual(self._pull).max())))
        self.primal = self.smooth.value(self.weights, self.image) + self.beta * self.norm.value(self.weights)

    def step(self) -> None:
        """One proximal step and its extrapolation; the step size backtracks until the model bounds the loss."""
        metric, pull = self.metric, self._pull
        if self._scale == 0.0:  # the curvature along the gradient is a fair first guess
            bend, length = self.smooth.curvature(pull / metric), float((pull.square() / metric).sum())
            self._scale = bend / length if bend > 0 and length > 0 else 1.0
        while True:
            trial = self.norm.step(self._ahead + pull / (self._scale * metric), self._scale * metric, self.beta)
            trial_image = self.smooth.image(trial)
            change = trial - self._ahead
            quadratic = 0.5 * float((metric * change.square()).sum())
            excess = self.smooth.value(trial, trial_image) - self._value + float((pull * change).sum())
            if excess <= self._scale * quadratic + self.smooth.rounding * abs(self._value):
                break
            self._scale = max(1.3 * self._scale, 1.05 * excess / max(quadratic, 1e-300))
        if float((metric * (self._ahead - trial) * (trial - self.weights)).sum()) > 0:
            self._momentum = 1.0
        following = 0.5 * (1 + (1 + 4 * self._momentum**2) ** 0.5)
        share, self._momentum = (self._momentum - 1) / following, following
        self._ahead = trial + share * (trial - self.weights)
        self._ahead_image = trial_image + share * (trial_image - self.image)
        self.weights, self.image = trial, trial_image
        self._scale *= 0.9


# The metric


def _principal(problem: Problem, gates: Tensor) -> tuple[Tensor, Tensor]:
    """Principal axes (r, r) of the gated features, and their second moments (r,), kept away from zero.

    From a sample of images and gates; centred if there is an intercept.
    """
    images = torch.arange(0, problem.n, -(-problem.n // SAMPLE))
    sample = problem.sample(images)
    features = GatedResponses(sample.responses, gates[:: max(1, len(gates) // 4)][:4])
    matrix = features.matrix().view(len(images), *features.shape)
    matrix = matrix - sample.mean(matrix) * problem.intercept
    matrix = matrix * sample.shares.roots.to(matrix)[:, None, None, None]
    rows = rearrange(matrix, "n q a p -> (n q p) a")
    moments, axes = torch.linalg.eigh((rows.T @ rows).double() / len(rows))
    moments = moments.flip(0).clamp_min(FLOOR * float(moments[-1])).clamp_min(1e-300)
    return axes.T.flip(0).contiguous(), moments


# The smooth part: min over b of the mean loss, as a function of W


class _Streamed:
    """Any loss, two passes an iteration; the image of W is its predictions."""

    def __init__(self, problem: Problem, features: GatedResponses) -> None:
        self.problem, self.features = problem, features
        self.rounding = 1e-6 if problem.responses.dtype == torch.float32 else 1e-13

    def image(self, weights: Tensor) -> Tensor:
        return self.features.apply(weights.unflatten(2, (-1, self.problem.n_outputs)))

    def _predictions(self, image: Tensor) -> Tensor:
        return image + self.problem.best_intercept(image)

    def value(self, weights: Tensor, image: Tensor) -> float:
        return self.problem.mean_loss(self._predictions(image))

    def at(self, weights: Tensor, image: Tensor) -> tuple[float, Tensor, Callable[[float], float]]:
        """Value, -gradient (q, r, P·c), and the dual value as a function of max_s ‖G_s‖°."""
        dual_point = self.problem.dual_point(image)
        pull = self.features.adjoint(dual_point).flatten(2)
        return self.value(weights, image), pull, lambda g_max: self.problem.dual(dual_point, g_max)

    def curvature(self, direction: Tensor) -> float:
        """A bound on the second derivative along `direction`."""
        image = self.image(direction)
        image = image - self.problem.mean(image) * self.problem.intercept
        shares = self.problem.shares
        return self.problem.loss.curvature * float((image.square() * shares.counts[:, None]).sum()) / shares.total

    def intercept(self, weights: Tensor, image: Tensor) -> Tensor:
        return self.problem.best_intercept(image)


class _Gram:
    """The squared loss in the Gram matrix H of the features: the image of W is H W, and n is gone."""

    rounding = 1e-13

    def __init__(self, problem: Problem, features: GatedResponses) -> None:
        gram, moments = features.gram(problem.targets, problem.shares)
        self.beta, self.outputs = problem.beta, problem.n_outputs
        self.mean, self.target_mean = gram[:-1, -1:] * problem.intercept, moments[-1:] * problem.intercept
        self.hessian = gram[:-1, :-1] - self.mean @ self.mean.T
        self.linear = moments[:-1] - self.mean @ self.target_mean
        self.square = float(problem.mean(problem.targets.square().sum(dim=1)) - self.target_mean.square().sum())

    def _flat(self, weights: Tensor) -> Tensor:
        """(q, r, P·c) to (q·r·P, c)."""
        return weights.reshape(-1, self.outputs)

    def image(self, weights: Tensor) -> Tensor:
        return self.hessian @ self._flat(weights)

    def value(self, weights: Tensor, image: Tensor) -> float:
        return 0.5 * (self.square - float((self._flat(weights) * (2 * self.linear - image)).sum()))

    def at(self, weights: Tensor, image: Tensor) -> tuple[float, Tensor, Callable[[float], float]]:
        value = self.value(weights, image)
        overlap = self.square - float((self._flat(weights) * self.linear).sum())  # <Z, Y>; Σ ‖Z_i‖²/s_i is 2 value
        dual = partial(dual_in_gram_form, value, overlap, self.beta)
        return value, (self.linear - image).view_as(weights), dual

    def curvature(self, direction: Tensor) -> float:
        return float((self._flat(direction) * self.image(direction)).sum())

    def intercept(self, weights: Tensor, image: Tensor) -> Tensor:
        return (self.target_mean - self.mean.T @ self._flat(weights))[0]


def _pick(problem: Problem, features: GatedResponses) -> _Streamed | _Gram:
    squared = problem.loss.name == "squared"
    return (
        _Gram(problem, features) if squared and np.prod(features.shape) <= GRAM_SIZE else _Streamed(problem, features)
    )
