"""Sliding: a joint local descent of filters and weights, started from the convex solution.

    min  (1/n) Σ_i ℓ(f(x_i), y_i) + (β/2) Σ_j (‖u_j‖² + ‖V_j‖²)

over unconstrained (u, V, b). At balanced neurons, ‖u_j‖ = ‖V_j‖, this is the convex objective. Pooled responses
are non-negative and highly correlated, so in (u, V, b) itself gradient steps crawl: the descent runs in
coordinates whitened by the second moments of the patches (for u) and of the centred responses (for V). Small
problems slide by L-BFGS to high precision, large ones by mini-batch Adam with a cosine schedule. Either way the
master then re-optimises the weights exactly, and within a solver the result counts only if the objective fell.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from convcvx.mirror import MirrorPairs
from convcvx.problem import Problem
from convcvx.responses import Responses
from convcvx.shifts import randomly_moved
from convcvx.solution import Solution

DETERMINISTIC_FLOPS = 1e9
"""Cost of a full gradient below which sliding is deterministic."""
SAMPLE = 2000
"""Images from which the whitening is estimated: it sets the speed of the descent, not its target."""


def slide(problem: Problem, solution: Solution, seed: int, *, accuracy: float, epochs: float = 2.0) -> Solution:
    """Descend from `solution`; the objective is not guaranteed to fall.

    A deterministic descent stops when its steps gain less than `accuracy`.
    """
    if solution.n_filters == 0:
        return solution
    responses = problem.responses
    flops = 6.0 * problem.n * responses.n_positions * responses.dim * solution.n_filters
    if flops <= DETERMINISTIC_FLOPS:
        return slide_lbfgs(problem, solution, accuracy)
    return slide_adam(problem, solution, seed, epochs)


def _balanced(solution: Solution) -> tuple[Tensor, Tensor]:
    scale = solution.weights.flatten(1).norm(dim=1).sqrt()
    return solution.filters * scale[:, None], solution.weights / scale[:, None, None]


class _Coordinates:
    """u = u' A⁻¹, V = B⁻ᵀ V', b = b' - meanᵀ V: with AAᵀ and BBᵀ second moments, the descent is well conditioned."""

    def __init__(
        self, problem: Problem, solution: Solution, generator: torch.Generator, pairs: MirrorPairs | None = None
    ) -> None:
        self._pairs = pairs
        filters, weights = _balanced(solution)
        images = torch.randperm(problem.n, generator=generator)[:SAMPLE].sort().values
        sample = problem.sample(images)
        gram, _ = sample.responses.gram(filters, sample.targets)
        moment, self._mean = gram[:-1, :-1], gram[:-1, -1:] * problem.intercept
        if pairs is not None:
            cells = len(filters), problem.responses.n_cells
            fold = partial(_fold_rows, pairs, cells)
            moment, self._mean = fold(fold(moment).T), fold(self._mean)
            filters, weights = filters.chunk(2)[0], weights.chunk(2)[0]
        self._shape = weights.shape
        moment = moment - self._mean @ self._mean.T
        weight_factor = _factor(moment, problem.beta)
        filter_factor = _factor(_patch_moment(sample.responses), 0.0)
        matrix = weights.flatten(0, 1)
        start = [filters @ filter_factor, weight_factor.T @ matrix, solution.intercept + (self._mean.T @ matrix)[0]]
        # The descent needs no more precision than the passes over the images have.
        dtype = problem.responses.dtype
        self._mean = self._mean.to(dtype)
        self._weight_inverse, self._filter_inverse = (
            _inverse(weight_factor).to(dtype),
            _inverse(filter_factor).to(dtype),
        )
        self.start = [part.to(dtype) for part in start]

    def network(self, parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates to filters (m, r), weights (m, P, c), intercept (c,)."""
        matrix = self._weight_inverse.T @ parts[1]
        intercept = parts[2] - (self._mean.T @ matrix)[0]
        filters, weights = parts[0] @ self._filter_inverse, matrix.view(self._shape)
        if self._pairs is not None:
            filters, weights = self._pairs.filters(filters), self._pairs.unfold(weights)
        return filters, weights, intercept

    def pullback(self, filters: Tensor, weights: Tensor, intercept: Tensor) -> list[Tensor]:
        """Gradients in the network to gradients in the coordinates."""
        filters, weights, intercept = (part.to(self._mean) for part in (filters, weights, intercept))
        if self._pairs is not None:
            filters, weights = self._pairs.fold_filters(filters), self._pairs.fold(weights)
        matrix = weights.flatten(0, 1) - self._mean @ intercept[None]
        return [filters @ self._filter_inverse.T, self._weight_inverse @ matrix, intercept]


def _fold_rows(pairs: MirrorPairs, shape: tuple[int, int], matrix: Tensor) -> Tensor:
    """The rows (m·P, ...) of all filters to those of the first halves of the pairs."""
    return pairs.fold(matrix.unflatten(0, shape)).flatten(0, 1)


def _factor(moment: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor of moment + ridge, or of more where rounding has left the moment indefinite."""
    ridge += 1e-6 * float(moment.diagonal().abs().mean()) + 1e-300
    identity = torch.eye(len(moment), dtype=moment.dtype)
    for power in range(6):
        factor, failed = torch.linalg.cholesky_ex(moment + 10**power * ridge * identity)
        if not failed:
            return factor
    return moment.diagonal().clamp_min(ridge).sqrt().diag()


def _inverse(factor: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(factor, torch.eye(len(factor), dtype=factor.dtype), upper=False)


def _patch_moment(responses: Responses) -> Tensor:
    """(r, r) second moment of the embedded patches, scaled to unit mean, damped by a hundredth."""
    basis = responses.embedding.basis
    rows = responses.rows(slice(0, 256)).double().cpu().flatten(0, 1) @ basis.T
    moment = rows.T @ rows
    moment = moment / moment.diagonal().mean().clamp_min(1e-300)
    moment.diagonal().add_(1e-2)
    return moment


def _gradients(problem: Problem, network: tuple[Tensor, Tensor, Tensor]) -> tuple[float, tuple[Tensor, Tensor, Tensor]]:
    """Value and gradients of the balanced objective."""
    filters, weights, intercept = network
    responses = problem.responses
    targets = problem.targets.to(responses.device, responses.dtype)
    losses = torch.zeros(problem.n, dtype=responses.dtype, device=responses.device)

    def residual(predictions: Tensor, where: Tensor) -> Tensor:
        losses[where] = problem.loss.value(predictions, targets[where])
        return problem.loss.gradient(predictions, targets[where]) / problem.n

    slopes = responses.gradients(filters, weights, intercept, residual)
    penalty = 0.5 * problem.beta * float(filters.square().sum() + weights.square().sum())
    return float(losses.double().mean()) + penalty, (
        slopes[0] + problem.beta * filters,
        slopes[1] + problem.beta * weights,
        slopes[2] * problem.intercept,
    )


def slide_lbfgs(problem: Problem, solution: Solution, accuracy: float = 0.0, max_iter: int = 200) -> Solution:
    """Full-batch L-BFGS: kinks of the ReLU can stop it, the oracle then steps over them."""
    coordinates = _Coordinates(problem, solution, torch.Generator().manual_seed(0))
    shapes = [part.shape for part in coordinates.start]
    sizes = [part.numel() for part in coordinates.start]

    def unpack(point: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        pieces = torch.from_numpy(point).to(coordinates.start[0].dtype).split(sizes)
        return coordinates.network([piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)])

    def value_and_gradient(point: np.ndarray) -> tuple[float, np.ndarray]:
        value, slopes = _gradients(problem, unpack(point))
        return value, torch.cat([part.flatten() for part in coordinates.pullback(*slopes)]).double().numpy()

    start = torch.cat([part.flatten() for part in coordinates.start]).double().numpy()
    options = {
        "maxiter": max_iter,
        "maxfun": 2 * max_iter,
        "ftol": max(accuracy, 1e-15),
        "gtol": 1e-13,
        "maxcor": 30,
    }
    result = minimize(value_and_gradient, start, jac=True, method="L-BFGS-B", options=options)
    return solution.with_parameters(*(part.double() for part in unpack(result.x)))


def slide_adam(
    problem: Problem,
    solution: Solution,
    seed: int,
    epochs: float,
    *,
    images: Tensor | None = None,
    pairs: MirrorPairs | None = None,
    crops: int = 0,
    patch_dtype: torch.dtype | None = None,
    batch: int = 128,
    filter_rate: float = 0.1,
    weight_rate: float = 0.03,
    tell: Callable[[str], None] = lambda _: None,
) -> Solution:
    """Mini-batch Adam with a cosine schedule.

    Parameters
    ----------
    problem : Problem
    solution : Solution
        The start; with `pairs` a symmetric network.
    seed : int
        Of the order of the images, and of their moves.
    epochs : float
    images : Tensor, optional
        Indices of the images to train on; all by default.
    pairs : MirrorPairs, optional
        Descend among symmetric networks.
    crops : int
        Each image is moved by up to so many pixels, up or down and left or right, anew whenever it is seen.
    patch_dtype : torch.dtype, optional
        Of the products with patches; by default bfloat16 where float32 problems meet a CPU that multiplies it in
        hardware. The steps are taken in the arithmetic of the problem.
    batch : int
    filter_rate, weight_rate : float
        Relative to the root mean square of each group of coordinates.
    tell : callable
        Is told of every epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    coordinates = _Coordinates(problem, solution, generator, pairs)
    parts = [part.clone() for part in coordinates.start]
    scales = [float(part.square().mean().sqrt()) for part in parts]
    rates = [filter_rate * scales[0], weight_rate * scales[1], weight_rate * scales[2]]
    optimizer = torch.optim.Adam([{"params": [part], "lr": rate} for part, rate in zip(parts, rates, strict=True)])
    images = torch.arange(problem.n) if images is None else images
    batch = min(batch, len(images))
    steps, per_epoch = max(1, math.ceil(epochs * len(images) / batch)), math.ceil(len(images) / batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.randperm(len(images), generator=generator)
    rough = _in(problem, patch_dtype or _fast_dtype(problem.responses))
    total = 0.0
    for step in range(1, steps + 1):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        chosen, order = images[order[:batch]], order[batch:]
        value, slopes = _gradients(_moved(rough.sample(chosen), crops, generator), coordinates.network(parts))
        for part, slope in zip(parts, coordinates.pullback(*slopes), strict=True):
            part.grad = slope
        optimizer.step()
        schedule.step()
        total += value
        if step % per_epoch == 0 or step == steps:
            tell(f"epoch {step / per_epoch:.3g}: objective {total / ((step - 1) % per_epoch + 1):.5g} on its way")
            total = 0.0
    return solution.with_parameters(*(part.double() for part in coordinates.network(parts)))


def _fast_dtype(responses: Responses) -> torch.dtype:
    """bfloat16 where a CPU has matrix units for it and the problem asks for no more than float32."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = responses.device.type == "cpu" and responses.dtype == torch.float32 and capabilities.get("amx_bf16", False)
    return torch.bfloat16 if fast else responses.dtype


def _in(problem: Problem, patch_dtype: torch.dtype) -> Problem:
    return replace(problem, responses=problem.responses.to(patch_dtype=patch_dtype))


def _moved(problem: Problem, pixels: int, generator: torch.Generator) -> Problem:
    """The problem on its images, each moved at random."""
    if not pixels:
        return problem
    images = randomly_moved(problem.responses.images[:], pixels, generator)
    return replace(problem, responses=problem.responses.to(images=images))
