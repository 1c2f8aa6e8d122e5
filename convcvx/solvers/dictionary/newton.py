"""The optimal weights under any other loss: Newton's method, with visits to all features.

The norms of the groups are smoothed (`smoothed_norms`), with an ε that goes down as the gap does. The Gram matrix of
the features, scaled to the curvature that the loss shows, preconditions the conjugate gradients of a step; each of
theirs is one visit. It is that of all images: those held out have no part in what is minimised, only in how fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from convcvx.errors import InputError
from convcvx.problem import Problem
from convcvx.solvers.dictionary.features import Features
from convcvx.solvers.dictionary.products import Products, SharedProducts
from convcvx.solvers.dictionary.weights import DictionaryWeights, Point, Standing, conjugate_gradients
from convcvx.solvers.smoothed_norms import SmoothedNorms, idle_groups

REDUCTION = 1e-2
"""Share of its first energy at which conjugate gradients end: Newton steps a tenth off take a third of the visits of
exact ones."""
WORN = 25
"""Steps that show that the factor is worn: the next Newton step gets a fresh one."""
LEAST_CURVATURE = 1e-6
"""What a loss is taken to bend at least, against a squared one: ridges over it are what the Gram matrix is given."""
SMOOTHING = 0.1
"""Share of the gap by which ε raises the penalty: ten times as much leads away from the optimum of the β before, and a
tenth as much makes for short steps."""
SHORTEST = 1e-3
"""Share of a Newton step below which none is taken."""
VISIBLE = 1e-6
"""Share of the objective that the decrease which a step promises must exceed, for it to be shortened below that: where
a loss is linear next to nothing bends, and Newton's step is far too long."""
ENOUGH = 0.1
"""Share of the decrease that Newton's model promises which a step must bring."""


@dataclass(frozen=True)
class _Standing(Standing):
    """With the predictions of all images (n, c)."""

    predictions: Tensor


class DictionaryNewton(DictionaryWeights):
    """The group lasso under the loss of a problem, of whose images some are `held` (n,) bool out."""

    max_iter, path_iter = 20, 3

    def __init__(self, gram: Products | SharedProducts, features: Features, problem: Problem, held: Tensor) -> None:
        super().__init__(gram, features)
        if gram.visits is None:
            raise InputError(f"loss {problem.loss.name!r} needs KeptFeatures")
        self._visits, self._problem = gram.visits, problem
        self._count(~held)

    def _count(self, kept: Tensor) -> None:
        """Minimise the loss of the images `kept` (n,) bool."""
        self._kept, self._unseen = kept.nonzero()[:, 0], (~kept).nonzero()[:, 0]
        self._shares, self._targets = self._problem.shares.sample(self._kept), self._problem.targets[self._kept]

    def join(self) -> None:
        self._count(torch.ones(self._problem.n, dtype=torch.bool))

    def held_out(self, point: Point) -> Tensor:
        return self._visits.apply(point.matrix)[self._unseen] + point.intercept

    def rounding(self, point: Point) -> float:
        raw, _ = self._sizes(point.matrix)
        return torch.finfo(self.gram.dtype).eps * raw  # slopes of losses are about one

    def _everywhere(self, rows: Tensor) -> Tensor:
        """`rows` of the images kept, and zeros for those held out."""
        return rows.new_zeros(self._problem.n, *rows.shape[1:]).index_copy_(0, self._kept, rows)

    def _mean_loss(self, predictions: Tensor) -> float:
        return float(self._shares.mean(self._problem.loss.value(predictions[self._kept], self._targets)))

    def _standing(self, matrix: Tensor) -> _Standing:
        return self._at(matrix, torch.zeros(matrix.shape[1], dtype=torch.float64), self._visits.apply(matrix))

    def _at(self, matrix: Tensor, intercept: Tensor, predictions: Tensor) -> _Standing:
        """What W = `matrix` is worth, whose `predictions` have an `intercept` that may not be the best."""
        loss, targets, shares, free = self._problem.loss, self._targets, self._shares, self._problem.intercept
        if free:
            shift = loss.best_intercept(predictions[self._kept], targets, shares)
            intercept, predictions = intercept + shift, predictions + shift
        slopes = loss.gradient(predictions[self._kept], targets)
        dual_point = loss.in_domain(-shares.times(slopes), targets, shares, free)

        def dual(penalty: float, largest: float) -> float:
            limit = penalty / largest if largest > 0 else math.inf
            return loss.dual(dual_point, targets, shares, limit, free)

        pull = self._visits.adjoint(self._everywhere(dual_point)).to(matrix)
        return _Standing(matrix, intercept, self._mean_loss(predictions), pull, dual, predictions)

    def solve(self, beta: float, start: Point | None, tol: float, max_iter: int) -> Point:
        """Newton steps from `start`; see `DictionaryWeights.solve`.

        Once the gap is reached, by the dual point of the weights themselves, groups that count for nothing go, and
        steps of the others go on until that is so again. Where they do not get there, all groups keep their weights.
        """
        penalty, groups = beta * self.features.copies, self.features.groups
        here = best = self._standing(torch.zeros_like(self.gram.linear) if start is None else start.matrix)
        duals = torch.zeros_like(here.matrix) if start is None else start.carried
        free = torch.ones_like(here.matrix[:, :1], dtype=torch.bool)  # features that steps move
        objective, rel_gap, lower, epsilon, dropped = math.inf, math.inf, -math.inf, math.inf, False
        for step in range(max_iter + 1):
            value, dual = self._worth(here, penalty)
            lower, gap = max(lower, dual), (value - dual) / max(value, 1e-300)
            if gap <= tol or (rel_gap > tol and value < objective):
                objective, rel_gap, best = value, gap, here
            if step == max_iter or self._deadline.passed or math.isnan(gap):
                break
            if gap <= tol:
                idle = groups.spread(idle_groups(groups.norms(here.matrix), groups.norms(here.pull), penalty, epsilon))
                sparse = self._standing(torch.where(idle, 0.0, here.matrix))
                # Where weights are rough, groups that count look idle as well.
                if dropped or not bool(idle.any()) or self._worth(sparse, penalty)[0] > value:
                    break
                here, free, dropped = sparse, free & ~idle, True
                continue
            free |= groups.spread(groups.norms(here.pull) > penalty)
            epsilon = min(epsilon, SMOOTHING * (value - dual) / (penalty * groups.n))
            here, duals = self._stepped(here, SmoothedNorms(groups, penalty, epsilon, here.matrix, duals), free)
        gap = (objective - lower) / max(objective, 1e-300)
        return Point(best.matrix, best.intercept, duals, objective, gap)

    def _stepped(self, here: _Standing, penalty: SmoothedNorms, free: Tensor) -> tuple[_Standing, Tensor]:
        """Where a damped Newton step of the `free` features (D, 1) leads, or where it was; the dual variables there."""
        step, shift, promised = self._newton_step(here, penalty, free)
        duals, change = penalty.duals_after(step), self._visits.apply(step) + shift

        def value(matrix: Tensor, predictions: Tensor) -> float:
            return self._mean_loss(predictions) + penalty.value(matrix)

        before, size = value(here.matrix, here.predictions), 1.0
        while size >= SHORTEST or size * promised > VISIBLE * before:
            matrix, predictions = here.matrix + size * step, here.predictions + size * change
            if value(matrix, predictions) <= before - ENOUGH * size * promised:
                return self._at(matrix, here.intercept + size * shift, predictions), duals
            size *= 0.5
        self._worn = True
        return here, duals

    def _newton_step(self, here: _Standing, penalty: SmoothedNorms, free: Tensor) -> tuple[Tensor, Tensor, float]:
        """The steps of W and of b by conjugate gradients, and the decrease that Newton's model promises.

        The last row of what they work on is what is predicted at the mean of the features: beside W that is all but
        on its own, and it is neither penalised nor known to the Gram matrix.
        """
        shares = self._everywhere(self._shares.counts) / self._shares.total
        self._visits.bend(self._problem.loss, here.predictions, shares)
        if self._worn:
            self.gram.factorise(penalty.ridges[:, 0] / self._curvature(here.pull))
        single, mean, c = self.gram.dtype, self.gram.mean, here.matrix.shape[1]
        moved = torch.cat([free, free.new_full((1, 1), self._problem.intercept)])

        def product(direction: Tensor) -> Tensor:
            image = self._visits.curved(direction, mean).to(direction)
            image[:-1] += penalty.curved(direction[:-1].to(penalty.units)).to(direction)
            return image * moved

        def precondition(residual: Tensor) -> Tensor:
            return torch.cat([self.gram.unfactor(residual[:-1]), residual[-1:]]) * moved

        slope = (here.pull - penalty.ridges * here.matrix) * free
        residual = torch.cat([slope, slope.new_zeros(1, c)]).to(single)
        solution, steps = conjugate_gradients(
            product, precondition, residual, REDUCTION, self._deadline, by_column=False
        )
        self._worn = steps >= WORN
        step = solution[:-1].to(slope)
        shift = (solution[-1].to(slope) - mean @ step).cpu() * self._problem.intercept
        return step, shift, 0.5 * float((slope * step).sum())

    def _curvature(self, direction: Tensor) -> float:
        """What the loss bends along `direction` (D, c), against what a squared one of as many images does."""
        padded = torch.cat([direction, direction.new_zeros(1, direction.shape[1])])
        bent = self._visits.curved(padded, self.gram.mean)[:-1].to(direction)
        squared = float((direction * self.gram.times(direction)).sum())
        return max(float((direction * bent).sum()) / max(squared, 1e-300), LEAST_CURVATURE)
