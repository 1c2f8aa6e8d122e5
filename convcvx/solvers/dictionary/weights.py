"""The optimal weights over thousands of features, at one β after the other: what any loss has in common.

The master problems weigh every filter against every other in their Newton steps: too much for thousands of them. Here
each step is a ridge regression, or nearly one, warm from one β to the next: a few conjugate gradient steps, with the
Cholesky factor of an earlier Gram matrix as preconditioner. A path takes a few factors. Whatever a W was found by, its
objective and the gap to the best dual value are what is reported, in the arithmetic of the features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from convcvx.budget import Deadline
from convcvx.solvers.dictionary.features import Features
from convcvx.solvers.dictionary.products import Products, SharedProducts

CG_STEPS = 40
"""Conjugate gradient steps of a ridge regression at most; with a factor that is not worn a few do."""
LEAST_RESIDUAL = 1e-37
"""Least residual that is divided by, about the least that float32 holds: one that is zero ends in no NaN."""


@dataclass(frozen=True)
class Point:
    """W (D, c) with the best intercept (c,), what W is worth, and what the next β begins with besides.

    That is `carried`: the η (m,) of the next ridge regression, or the dual variables (D, c) of Newton's method.
    """

    matrix: Tensor
    intercept: Tensor
    carried: Tensor
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
        Steps at most at the β that is chosen: they end sooner at the gap that is asked for.
    path_iter : int
        Steps at a β of a path, each β going on from the one before: enough to tell which is best.
    """

    max_iter: int
    path_iter: int

    def __init__(self, gram: Products | SharedProducts, features: Features) -> None:
        self.gram, self.features = gram, features
        self._deadline = features.responses[0].deadline
        self._worn = True

    @abstractmethod
    def _standing(self, matrix: Tensor) -> Standing:
        """What W = `matrix` is worth."""

    @abstractmethod
    def solve(self, beta: float, start: Point | None, tol: float, max_iter: int) -> Point:
        """The best W of so many steps from `start`, fewer once the gap over the dictionary is `tol`, or time is over.

        The objective is infinite for a β that is lost in rounding.
        """

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

    def nothing(self) -> Standing:
        """What no weights at all are worth, with the best intercept."""
        return self._standing(torch.zeros_like(self.gram.linear))

    def beta_max(self) -> float:
        return float(self.features.groups.norms(self.nothing().pull).max()) / self.features.copies

    def _worth(self, here: Standing, penalty: float) -> tuple[float, float]:
        """Objective, and dual value of the scaled residual, at a weight decay of `penalty` a group."""
        norms = self.features.groups.norms
        objective = here.loss + penalty * float(norms(here.matrix).sum())
        return objective, here.dual(penalty, float(norms(here.pull).max()))


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
