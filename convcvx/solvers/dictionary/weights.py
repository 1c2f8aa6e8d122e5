"""The optimal weights over thousands of features, at one β after the other: what any loss has in common.

The master problems weigh every filter against every other in their Newton steps: too much for thousands of them. Here
the η form, ‖W_j‖ = min_η ½ (‖W_j‖²/η + η), is solved by its plain iteration (Bach et al. 2012, sec. 5.2): W(η) is one
ridge regression, then η_j = ‖W_j‖, warm from one β to the next. A ridge regression is a few conjugate gradient steps,
with the Cholesky factor of an earlier Gram matrix as preconditioner: a path takes two or three factors. Whatever a W
was found by, its objective and the gap to the best dual value are what is reported, in the arithmetic of the features.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convcvx.budget import Deadline
from convcvx.solvers.dictionary.features import Features
from convcvx.solvers.dictionary.products import Products, SharedProducts

FOOTHOLD = 1e-2
"""Where a filter without weight that violates dual feasibility starts, against the mean η."""
CG_STEPS = 40
"""Conjugate gradient steps of a ridge regression at most; with a factor that is not worn a few do."""
LEAST_RESIDUAL = 1e-37
"""Least residual that is divided by, about the least that float32 holds: one that is zero ends in no NaN."""


@dataclass(frozen=True)
class Point:
    """W (D, c) with the best intercept (c,), the η after it, and what W is worth."""

    matrix: Tensor
    intercept: Tensor
    sizes: Tensor
    objective: float
    rel_gap: float


@dataclass(frozen=True)
class Standing:
    """W (D, c) with the best intercept (c,), the mean loss there, and minus its slope in W, the `pull` (D, c).

    The loss is no number where rounding outweighs the penalty, so that W means nothing. `dual` maps a weight decay, and
    the largest norm of the pull on a group, to the dual value.
    """

    matrix: Tensor
    intercept: Tensor
    loss: float
    pull: Tensor
    dual: Callable[[float, float], float]


class DictionaryWeights(ABC):
    """The group lasso over features: a group is what the features of one filter, or of a pair, weigh.

    Attributes
    ----------
    max_iter : int
        Ridge regressions at most at the β that is chosen: they end sooner at the gap that is asked for.
    """

    max_iter: int

    def __init__(self, gram: Products | SharedProducts, features: Features) -> None:
        self.gram, self.features = gram, features
        self._deadline = features.responses[0].deadline
        self._worn = True

    @abstractmethod
    def _standing(self, matrix: Tensor) -> Standing:
        """What W = `matrix` is worth."""

    @abstractmethod
    def _improved(self, here: Standing, ridges: Tensor, alive: Tensor) -> Standing:
        """W(η), nearly, from where `here` is, for `ridges` β/η (D, 1); features that are not `alive` weigh nothing."""

    @abstractmethod
    def held_out(self, point: Point) -> Tensor:
        """(q, c) what `point` predicts for the images held out."""

    @abstractmethod
    def rounding(self, point: Point) -> float:
        """About how far the objective of `point` may be off at most, by rounding in the features' own arithmetic."""

    def _sizes(self, matrix: Tensor) -> tuple[float, float]:
        """What predictions W = `matrix` sum up of the features as they are, in modulus, and as they are multiplied."""
        each = matrix.double().norm(dim=1)
        raw, multiplied = self.gram.scales
        return float(raw @ each), float(multiplied @ each)

    @abstractmethod
    def join(self) -> None:
        """Count the images held out as well."""

    def norms(self, matrix: Tensor) -> Tensor:
        """Frobenius norm of each group (n_groups,)."""
        squares = matrix.double().square().sum(dim=1)
        return squares.new_zeros(self.features.n_groups).index_add_(0, self.features.group, squares).sqrt()

    def nothing(self) -> Standing:
        """What no weights at all are worth, with the best intercept."""
        return self._standing(torch.zeros_like(self.gram.linear))

    def beta_max(self) -> float:
        return float(self.norms(self.nothing().pull).max()) / self.features.copies

    def solve(self, beta: float, start: Point | None, tol: float, max_iter: int) -> Point:
        """Alternate W = W(η), η = ‖W‖ from `start` until the duality gap over the dictionary is `tol`, or time is over.

        The objective is infinite for a β that is lost in rounding.
        """
        penalty = beta * self.features.copies
        here = self.nothing() if start is None else self._standing(start.matrix)
        # The mean η cannot be larger: zero weights would be better.
        sizes = self._even(here.loss / penalty) if start is None else start.sizes
        best, lower = None, -math.inf
        for _ in range(max_iter):
            alive = (sizes > 0)[self.features.group, None]
            ridges = (penalty / sizes.clamp_min(1e-4 * float(sizes.mean())))[self.features.group, None]
            here = self._improved(here, ridges, alive)
            if math.isnan(here.loss):
                self._worn = True
                break
            norms, pulls = self.norms(here.matrix), self.norms(here.pull)
            objective = here.loss + penalty * float(norms.sum())
            lower = max(lower, here.dual(penalty, float(pulls.max())))
            norms = torch.where(norms > 1e-6 * norms.max(), norms, 0)
            sizes = torch.maximum(norms, (pulls > penalty) * FOOTHOLD * norms.mean())
            if best is None or objective < best.objective:
                best = Point(here.matrix, here.intercept, sizes, objective, math.inf)
            best = replace(best, rel_gap=(best.objective - lower) / max(best.objective, 1e-300))
            if best.rel_gap <= tol or self._deadline.passed:
                break
        lost = Point(here.matrix, here.intercept, sizes, math.inf, 1.0) if start is None else start
        return best or replace(lost, objective=math.inf)

    def _even(self, total: float) -> Tensor:
        """The same η for each group, which add up to `total`."""
        groups = self.features.n_groups
        return self.gram.linear.new_full((groups,), total / groups)


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    residual: Tensor,
    reduction: float,
    deadline: Deadline,
    *,
    by_column: bool,
) -> tuple[Tensor, int]:
    """What a linear map takes to `residual` (D, c), nearly, and the steps taken; see Hestenes and Stiefel (1952).

    `reduction` is what the residual's energy comes down to, unless the `deadline` passes before. `by_column` where the
    map leaves columns alone: each then has steps of its own length.
    """

    def inner(left: Tensor, right: Tensor) -> Tensor:
        columns = (left * right).sum(dim=0)
        return columns if by_column else columns.sum(dim=0, keepdim=True)

    solution = torch.zeros_like(residual)
    direction = towards = precondition(residual)
    size = first = inner(residual, towards)
    steps = 0
    while steps < CG_STEPS and bool((size > reduction * first).any()) and not deadline.passed:
        image = product(direction)
        curvature = inner(direction, image)
        # Not positive: rounding of the Gram matrix outweighs the ridge along this direction, and it is left alone.
        length = torch.where(curvature > 0, size / curvature, 0.0)
        solution += length * direction
        residual = residual - length * image
        towards = precondition(residual)
        last, size = size, inner(residual, towards)
        direction = towards + size / last.clamp_min(LEAST_RESIDUAL) * direction
        steps += 1
    return solution, steps
