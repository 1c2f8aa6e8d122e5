"""Coordinates in which filters and weights descend together, and the slopes of their objective.

    min  Σ_i s_i ℓ(f(x_i), y_i) + (β/2) Σ_j (‖u_j‖² + ‖V_j‖²)

over unconstrained (u, V, b). At balanced neurons, ‖u_j‖ = ‖V_j‖, this is the convex objective. Pooled responses
are non-negative and highly correlated, so in (u, V, b) itself gradient steps crawl: a descent runs in coordinates
whitened by the second moments of the patches (for u) and of the centred responses (for V).
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from convcvx.activations import balanced_neurons
from convcvx.data.augment import moved
from convcvx.losses.base import Loss
from convcvx.losses.shares import Shares
from convcvx.problem import Problem
from convcvx.responses.mirror import MirrorPairs
from convcvx.responses.passes import Responses
from convcvx.responses.table import Pass
from convcvx.solution import Solution
from convcvx.solvers.dictionary.features import Features

SAMPLE = 2000
"""Images from which the whitening is estimated: it sets the speed of the descent, not its target."""


def balanced_gradients(
    problem: Problem, network: tuple[Tensor, Tensor, Tensor]
) -> tuple[float, tuple[Tensor, Tensor, Tensor]]:
    """Value and gradients of the balanced objective, on the device of the passes as the network is."""
    found = _loss_gradients(problem.responses, problem.targets, problem.shares, problem.loss, network)
    return _decayed(problem, network, found)


def batch_gradients(
    problem: Problem, network: tuple[Tensor, Tensor, Tensor], images: Tensor, pixels: int, moves: Tensor
) -> tuple[float, tuple[Tensor, Tensor, Tensor]]:
    """The same on some images (indices), each moved by its `moves` of up to so many pixels, as an estimate of that.

    Each image is looked at by the process that has it.
    """
    shares = problem.shares.estimate(images)
    rows = problem.targets[images], shares.counts, moves
    found = problem.responses.run(BATCH, rows, *network, problem.loss, shares.total, pixels, where=images)
    return _decayed(problem, network, [part.to(problem.responses.device) for part in found])


def _decayed(
    problem: Problem, network: tuple[Tensor, Tensor, Tensor], found: list[Tensor]
) -> tuple[float, tuple[Tensor, Tensor, Tensor]]:
    """The mean loss and its gradients with what weight decay adds."""
    filters, weights, _ = network
    value, *slopes = found
    penalty = 0.5 * problem.beta * float(filters.square().sum() + weights.square().sum())
    return float(value) + penalty, (
        slopes[0] + problem.beta * filters,
        slopes[1] + problem.beta * weights,
        slopes[2] * problem.intercept,
    )


def _loss_gradients(
    responses: Responses, targets: Tensor, shares: Shares, loss: Loss, network: tuple[Tensor, Tensor, Tensor]
) -> list[Tensor]:
    """The mean loss of a network, and its gradients in filters, weights and intercept."""
    targets = targets.to(responses.device, responses.dtype)
    counts = None if shares.are_equal else shares.counts.to(targets)[:, None]
    losses = torch.zeros(responses.n, dtype=responses.dtype, device=responses.device)

    def residual(predictions: Tensor, where: Tensor) -> Tensor:
        aimed = targets if len(where) == responses.n else targets[where]
        losses[where] = loss.value(predictions, aimed)
        slopes = loss.gradient(predictions, aimed)
        return (slopes if counts is None else slopes * counts[where]) / shares.total

    slopes = responses.gradients(*network, residual)
    return [shares.mean(losses.double()), *slopes]


def _batch(
    responses: Responses,
    targets: Tensor,
    counts: Tensor,
    moves: Tensor,
    filters: Tensor,
    weights: Tensor,
    intercept: Tensor,
    loss: Loss,
    total: float,
    pixels: int,
) -> list[Tensor]:
    if pixels:
        responses = responses.to(images=moved(responses.images[:], pixels, moves))
    filters, weights, intercept = (part.to(responses.device) for part in (filters, weights, intercept))
    return _loss_gradients(responses, targets, Shares(counts, total), loss, (filters, weights, intercept))


BATCH = Pass(_batch, ("sum",) * 4, exact=False)
"""Not exact: a mini-batch is a few images of each process, and the next step waits for it."""


class Coordinates:
    """u = u' A⁻¹, V = B⁻ᵀ V', b = b' - meanᵀ V: with AAᵀ and BBᵀ second moments, the descent is well conditioned.

    They live on the device of the problem's passes, and so do the networks and the gradients that they are given.

    Attributes
    ----------
    start : list of Tensor
        u' (m, r), V' (m·P, c) and b' (c,) of the solution.
    filter_inverse : Tensor (r, r)
        A⁻¹.
    weight_factor : Tensor (m·P, m·P)
        B, lower triangular.
    mean : Tensor (m·P, 1)
        Of the responses; zero without an intercept.
    """

    def __init__(
        self, problem: Problem, solution: Solution, generator: torch.Generator, pairs: MirrorPairs | None = None
    ) -> None:
        self._pairs = pairs
        device = problem.responses.device
        filters, weights = (part.to(device) for part in balanced_neurons(solution.filters, solution.weights))
        images = torch.randperm(problem.n, generator=generator)[:SAMPLE].sort().values
        sample = problem if len(images) == problem.n else problem.sample(images)
        features = Features([sample.responses], [filters], flips=pairs is not None)
        moment, mean = _moments(features, sample.shares, centred=problem.intercept)
        self.mean = mean[:, None]
        if pairs is not None:
            filters, weights = filters.chunk(2)[0], weights.chunk(2)[0]
        self._shape = weights.shape
        weight_factor = _factor(moment, problem.beta)
        whitened, inverse = (part.to(device) for part in _filter_coordinates(sample.responses))
        self._own = problem.responses.embedding.mask(filters)
        matrix = weights.flatten(0, 1)
        intercept = solution.intercept.to(device) + (self.mean.T @ matrix)[0]
        start = [filters @ whitened, weight_factor.T @ matrix, intercept]
        # The descent needs no more precision than the passes over the images have.
        dtype = problem.responses.dtype
        self.mean = self.mean.to(dtype)
        self.weight_factor, self.filter_inverse = weight_factor.to(dtype), inverse.to(dtype)
        self.start = [part.to(dtype) for part in start]

    @cached_property
    def weight_inverse(self) -> Tensor:
        """B⁻¹ (m·P, m·P)."""
        return _inverse(self.weight_factor.double()).to(self.weight_factor)

    def _whitened(self, matrix: Tensor) -> Tensor:
        """B⁻¹ `matrix`, of a few columns.

        A CPU solves for them in half a product, whose other half would be zeros; on a GPU a solve is one small step
        after another.
        """
        if matrix.is_cuda:
            return self.weight_inverse @ matrix
        return torch.linalg.solve_triangular(self.weight_factor, matrix, upper=False)

    def _unwhitened(self, matrix: Tensor) -> Tensor:
        """B⁻ᵀ `matrix`."""
        if matrix.is_cuda:
            return self.weight_inverse.T @ matrix
        return torch.linalg.solve_triangular(self.weight_factor.T, matrix, upper=True)

    def network(self, parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates to filters (m, r), weights (m, P, c), intercept (c,)."""
        matrix = self._unwhitened(parts[1])
        intercept = parts[2] - (self.mean.T @ matrix)[0]
        filters, weights = parts[0] @ self.filter_inverse, matrix.view(self._shape)
        if self._pairs is not None:
            filters, weights = self._pairs.filters(filters), self._pairs.unfold(weights)
        return filters, weights, intercept

    def pullback(self, filters: Tensor, weights: Tensor, intercept: Tensor) -> list[Tensor]:
        """Gradients in the network to gradients in the coordinates."""
        filters, weights, intercept = (part.to(self.mean) for part in (filters, weights, intercept))
        if self._pairs is not None:
            filters, weights = self._pairs.fold_filters(filters), self._pairs.fold(weights)
        matrix = weights.flatten(0, 1) - self.mean @ intercept[None]
        filters = filters * self._own.to(filters)  # no filter leaves its subspace
        return [filters @ self.filter_inverse.T, self._whitened(matrix), intercept]


def _filter_coordinates(responses: Responses) -> tuple[Tensor, Tensor]:
    """F⁻¹ A and its inverse (r, r), in the frame F of `Moments.nearer`, worked out once; each subspace has its own."""
    if "filter_coordinates" not in responses.kept:
        blocks = []
        for part in responses.subspaces:
            patches = part.patch_moments()
            (frame, inverse), factor = patches.nearer(), _factor(patches.damped(), 0.0)
            blocks.append((inverse @ factor, _inverse(factor) @ frame))
        responses.kept["filter_coordinates"] = tuple(torch.block_diag(*parts) for parts in zip(*blocks, strict=True))
    return responses.kept["filter_coordinates"]


def _moments(features: Features, shares: Shares, *, centred: bool) -> tuple[Tensor, Tensor]:
    """Second moment (D, D) of features of images that count for their `shares`, and zero; or about their mean (D,)
    and that; in float64."""
    moment = torch.zeros(features.size, features.size, dtype=torch.float64, device=features.device)
    shift, total = torch.zeros(2, features.size, dtype=torch.float64, device=features.device)
    for where, block in features.batches():
        if centred and where.start == 0:
            shift = block.double().mean(dim=0)
        block = block - shift.to(block)
        weighed = block if shares.are_equal else block * shares.counts[where, None].to(block)
        moment += weighed.T @ block
        total += weighed.sum(dim=0)
    mean = total / shares.total * centred
    return moment.div_(shares.total) - torch.outer(mean, mean), mean + shift


def _factor(moment: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor of moment + ridge, or of more where rounding has left the moment indefinite."""
    ridge += 1e-6 * float(moment.diagonal().abs().mean()) + 1e-300
    identity = torch.eye(len(moment)).to(moment)
    for power in range(6):
        factor, failed = torch.linalg.cholesky_ex(moment + 10**power * ridge * identity)
        if not failed:
            return factor
    return moment.diagonal().clamp_min(ridge).sqrt().diag()


def _inverse(factor: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(factor, torch.eye(len(factor)).to(factor), upper=False)
