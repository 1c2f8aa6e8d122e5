"""A dual point chosen for the bound: the best Z of which the polynomial oracle proves that g <= β everywhere.

The bound of `convcvx.oracles.polynomial`, with the best λ, is a norm of Z, since it is the largest ‖Σ_b C_b(Z) Y_b‖_F
over matrices with ‖Y_b‖_F <= 1 and C_b is linear in Z. So {Z : bound(Z) <= β} is convex, and the largest dual value on
it is the optimum of a convex program, which bounds every network from below:

    max_Z  -Σ_i s_i ℓ*(-Z_i/s_i, y_i)   over   E_λ(Z) = Σ_b C_b C_bᵀ/λ_b ⪯ β² I  for some λ > 0, Σ λ_b = 1.

With a multiplier S ⪰ 0 (P·c, P·c) of the constraint, and the loss replaced by its quadratic upper bound about the
predictions f at hand, with curvature L and targets y' = f - ∇ℓ/L (of the squared loss itself L = 1, y' = y), this is

    max_{Z,λ} min_S  Σ_i <Z_i, y'_i> - ‖Z_i‖²/(2 s_i L) - tr(S E_λ(Z))/(2β) + β tr(S)/2,

solved by turns: Z by conjugate gradients; λ_b = ‖C_bᵀ S^½‖_F over their sum, which is best for Z and S; and
S <- (S E S)^½ / β, the step of a nuclear-norm regression as reweighted ridge, of predictions f = K_S(Z)/β + b with K_S
the gradient of ½ tr(S E). Nothing here is believed: of whatever Z comes out the oracle proves a bound anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from convcvx.budget import OutOfTime
from convcvx.losses.squared import Squared
from convcvx.oracles.lifted import lifted, widths
from convcvx.oracles.polynomial import Multipliers, block_bound
from convcvx.problem import Problem

ROUNDS = 60
"""Rounds at most: the dual value of a small problem no longer rises by then."""
CHECKED = 5
"""Rounds between looks at the dual value: a look costs as much as a round."""
ENOUGH = 3e-4
"""Relative rise of the dual value between looks below which it is over."""
PRODUCTS = 40
"""Products with K_S of a round at most: conjugate gradients go on from the Z of the round before."""
ACCURACY = 1e-4
"""Relative residual of the linear equations that will do for a round."""
DENSE = 512
"""Entries n·c of Z, and n·P of a feature, up to which K_S is a matrix and equations are solved by its factor: the calls
of forty products take longer there. Under the squared loss only: elsewhere y' moves from round to round, and exact
solutions follow it to points that prove less than those on the way there."""
FAINTEST = 1e-9
"""Share of the mean of S added to its diagonal: directions given up too early can come back."""


@dataclass(frozen=True)
class Features:
    """All features at once, (n, P, w) of them: far fewer than patches, but more than `lifted` holds."""

    parts: list[Tensor]
    tails: Tensor

    @classmethod
    def of(cls, problem: Problem) -> Features:
        found = list(lifted(problem.responses))
        features = torch.cat([part.features for part in found])
        sizes = widths(problem.responses.dim, 2)
        return cls(list(features.split(sizes, dim=2)), torch.cat([part.tails for part in found]))

    def blocks(self, dual_point: Tensor) -> list[Tensor]:
        """C_b (P, c, w_b) of Z = `dual_point` (n, c)."""
        return [rearrange(dual_point.T @ part.flatten(1), "c (p w) -> p c w", p=part.shape[1]) for part in self.parts]

    def few(self, n_outputs: int) -> bool:
        """Whether all pairs of images fit in a small matrix."""
        n, cells = self.tails.shape
        return n * max(cells, n_outputs) <= DENSE

    def grams(self) -> list[Tensor]:
        """Products of each block with itself, (n·P, n·P)."""
        return [part.flatten(0, 1) @ part.flatten(0, 1).T for part in self.parts]

    def adjoint(self, blocks: list[Tensor]) -> Tensor:
        """(n, c): the gradient in Z of Σ_b <blocks_b, C_b(Z)>."""
        products = (
            part.flatten(1) @ rearrange(block, "p c w -> (p w) c")
            for part, block in zip(self.parts, blocks, strict=True)
        )
        return sum(products, start=torch.zeros((), dtype=torch.float64))


def relaxed_point(problem: Problem, start: Tensor, features: Features | None = None) -> Tensor:
    """A dual point Z (n, c) near the best of those that `PolynomialOracle` proves feasible, from `start` (n, c).

    By the deadline of `problem`: the best one met by then, `start` itself if none was, or where numbers overflow.
    """
    try:
        features = features or Features.of(problem)
        return _improved(problem, start, features)
    except (OutOfTime, torch.linalg.LinAlgError):
        return start


def _improved(problem: Problem, start: Tensor, features: Features) -> Tensor:
    tails, scale = features.tails, float(problem.loss.curvature)
    roots = (problem.shares.times(torch.ones(problem.n, dtype=torch.float64)) * scale).sqrt()[:, None]
    point, best, highest = start, start, _value(problem, features, start)
    blocks = features.blocks(point)
    multipliers = Multipliers.chosen(blocks, tails, point)
    spread = _spread(problem, multipliers, blocks, tails, point)
    predictions, scaled = problem.constant_predictions(), point / roots
    dense = problem.loss.name == Squared.name and features.few(problem.n_outputs)
    grams = features.grams() if dense else None
    before = highest
    for number in range(1, ROUNDS + 1):
        if problem.deadline.passed:
            break
        working = predictions - problem.loss.gradient(predictions, problem.targets) / scale
        if grams is None:
            kernel = _Kernel(features, multipliers, spread / problem.beta)
        else:
            kernel = _DenseKernel(features, multipliers, spread / problem.beta, grams)
        scaled = kernel.solved(roots, working, scaled, problem.intercept)
        point = roots * scaled
        predictions = kernel(point)
        if not bool(predictions.isfinite().all()):
            break
        predictions = predictions + problem.best_intercept(predictions)
        blocks = features.blocks(point)
        multipliers = _balanced(Multipliers.of(spread, blocks, point, tails.shape[1]), tails)
        spread = _geometric(spread, multipliers.matrix(blocks, tails, point)) / problem.beta
        if number % CHECKED == 0:
            candidate = problem.dual_point(predictions)
            value = _value(problem, features, candidate)
            if value > highest:
                best, highest = candidate, value
            if not value > before + ENOUGH * abs(before) and number > 2 * CHECKED:
                break
            before = value
    return best


def _value(problem: Problem, features: Features, point: Tensor) -> float:
    """The dual value at Z = `point`, scaled as the bound on g, nearly, has it."""
    return problem.dual(point, block_bound(features.blocks(point), features.tails, point))


def _spread(problem: Problem, multipliers: Multipliers, blocks: list[Tensor], tails: Tensor, point: Tensor) -> Tensor:
    """A first S: the largest directions of E, as long in all as the weights of a network may be."""
    matrix = multipliers.matrix(blocks, tails, point)
    weight = problem.mean_loss(problem.constant_predictions()) / problem.beta
    return 0.5 * weight * matrix / float(matrix.diagonal().sum().clamp_min(1e-300))


def _balanced(multipliers: Multipliers, tails: Tensor) -> Multipliers:
    """The same λ over their sum."""
    total = max(multipliers.total(tails), 1e-300)
    return Multipliers([value / total for value in multipliers.blocks], multipliers.tails / total)


def _geometric(spread: Tensor, matrix: Tensor) -> Tensor:
    """(S E S)^½."""
    product = spread @ matrix @ spread
    eigenvalues, vectors = torch.linalg.eigh(0.5 * (product + product.T))
    root = (vectors * eigenvalues.clamp_min(0).sqrt()) @ vectors.T
    return root + FAINTEST * root.diagonal().mean() * torch.eye(len(root), dtype=root.dtype)


class _Kernel:
    """Z ↦ K_S(Z) (n, c), the gradient of ½ tr(S E_λ(Z)), and what solves equations in it."""

    def __init__(self, features: Features, multipliers: Multipliers, spread: Tensor) -> None:
        self.features, self.multipliers, self.spread = features, multipliers, spread
        shares = multipliers.tails
        self.weights = torch.where(shares > 0, features.tails / shares, 0.0)  # (n, P)

    def __call__(self, point: Tensor) -> Tensor:
        c = point.shape[1]
        pulled = []
        for block, multiplier in zip(self.features.blocks(point), self.multipliers.blocks, strict=True):
            turned = (self.spread @ block.flatten(0, 1)).view(block.shape)
            pulled.append(turned / max(multiplier, 1e-300))
        total = self.features.adjoint(pulled)
        for p in range(self.weights.shape[1]):
            own = self.spread[p * c : (p + 1) * c, p * c : (p + 1) * c]
            total = total + self.weights[:, [p]] * (point @ own)
        return total

    def solved(self, roots: Tensor, working: Tensor, start: Tensor, intercept: bool) -> Tensor:
        """X (n, c) with X + roots K(roots X) = roots · working, orthogonal to `roots` if asked: conjugate gradients."""
        projected = _projection(roots, intercept)

        def product(rows: Tensor) -> Tensor:
            return projected(rows + roots * self(roots * rows))

        right = projected(roots * working)
        x = projected(start)
        residual = right - product(x)
        search, square = residual, float(residual.square().sum())
        enough = ACCURACY**2 * float(right.square().sum())
        for _ in range(PRODUCTS):
            if not square > enough:
                break
            image = product(search)
            curvature = float((search * image).sum())
            if not curvature > 0:  # but for rounding it is
                break
            step = square / curvature
            x = x + step * search
            residual = residual - step * image
            before, square = square, float(residual.square().sum())
            search = residual + square / before * search
        return x


class _DenseKernel(_Kernel):
    """The same as a matrix (n·c, n·c), from the `grams` (n·P, n·P) of the blocks of features."""

    def __init__(self, features: Features, multipliers: Multipliers, spread: Tensor, grams: list[Tensor]) -> None:
        super().__init__(features, multipliers, spread)
        (n, cells), c = features.tails.shape, len(spread) // features.tails.shape[1]
        pairs = zip(grams, multipliers.blocks, strict=True)
        gram = sum((part / max(share, 1e-300) for part, share in pairs), start=torch.zeros(()))
        by_cell = spread.view(cells, c, cells, c)
        kernel = torch.einsum("pcqd,ipjq->icjd", by_cell, gram.view(n, cells, n, cells))
        image = torch.arange(n)
        kernel[image, :, image] += torch.einsum("ip,pcpd->icd", self.weights, by_cell)
        self.matrix = kernel.reshape(n * c, n * c)

    def __call__(self, point: Tensor) -> Tensor:
        return (self.matrix @ point.flatten()).view(point.shape)

    def solved(self, roots: Tensor, working: Tensor, start: Tensor, intercept: bool) -> Tensor:
        """By a factor; by conjugate gradients where rounding has left none."""
        projected, (n, c) = _projection(roots, intercept), working.shape
        scales = roots.expand(n, c).flatten()
        system = scales[:, None] * self.matrix * scales
        for _ in range(2):  # from either side
            system = projected(system.reshape(n, -1)).reshape(n * c, n * c).T
        system.diagonal().add_(1.0)
        factor, failed = torch.linalg.cholesky_ex(system)
        if failed:
            return super().solved(roots, working, start, intercept)
        right = projected(roots * working)
        return torch.cholesky_solve(right.view(-1, 1), factor).view(n, c)


def _projection(roots: Tensor, intercept: bool) -> Callable[[Tensor], Tensor]:
    """Rows (n, ·) less what lies along `roots` (n, 1), where there is an intercept."""
    direction = roots / roots.norm()
    return lambda rows: rows - direction * (direction.T @ rows) if intercept else rows
