"""The optimal weights over thousands of features, at one β after the other, from their Gram matrix.

The master problem of `master.squared` weighs every filter against every other in its Newton steps: too much for
thousands of them. Here the η form is solved by its plain iteration (Bach et al. 2012, sec. 5.2): W(η) is one ridge
regression, then η_j = ‖W_j‖, warm from one β to the next. A ridge regression is a few conjugate gradient steps on the
Gram matrix, with the Cholesky factor of an earlier one as preconditioner: a path takes two or three factors. Whatever a
W was found by, its objective and its duality gap are what is reported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convcvx.losses.squared import dual_in_gram_form
from convcvx.solvers.dictionary.features import Features
from convcvx.solvers.dictionary.products import Products, SharedProducts

FOOTHOLD = 1e-2
"""Where a filter without weight that violates dual feasibility starts, against the mean η."""
CG_STEPS = 40
"""Conjugate gradient steps of a ridge regression at most; with a factor that is not worn a few do."""
CG_REDUCTION = 1e-2
"""What they reduce its residual to: the next regression has other weights anyway."""
WORN = 25
"""Steps that show that the factor is worn: the next regression gets a fresh one."""
LEAST_RESIDUAL = 1e-37
"""Least residual that is divided by, about the least that float32 holds: one that is zero ends in no NaN."""


@dataclass(frozen=True)
class Point:
    """W, the η after it, and what W is worth."""

    matrix: Tensor
    sizes: Tensor
    objective: float
    rel_gap: float


class DictionaryLasso:
    """The group lasso that a Gram matrix defines; a group is what the features of one filter, or of a pair, weigh."""

    def __init__(self, gram: Products | SharedProducts, features: Features) -> None:
        self.gram, self.features = gram, features
        self._worn = True

    def norms(self, matrix: Tensor) -> Tensor:
        """Frobenius norm of each group (n_groups,)."""
        squares = matrix.double().square().sum(dim=1)
        return squares.new_zeros(self.features.n_groups).index_add_(0, self.features.group, squares).sqrt()

    def beta_max(self) -> float:
        return float(self.norms(self.gram.linear).max()) / self.features.copies

    def solve(self, beta: float, start: Point | None, tol: float, max_iter: int) -> Point:
        """Alternate W = W(η), η = ‖W‖ from `start` until the duality gap over the dictionary is `tol`.

        The objective is infinite for a β that is lost in rounding.
        """
        penalty = beta * self.features.copies
        linear, total = self.gram.linear, self.gram.total
        if start is None:  # the mean η cannot be larger: zero weights would be better
            mean = 0.5 * total / (penalty * self.features.n_groups)
            start = Point(torch.zeros_like(linear), linear.new_full((self.features.n_groups,), mean), 0.0, 1.0)
        matrix, sizes, best = start.matrix, start.sizes, None
        pull = linear - self.gram.times(matrix)
        for _ in range(max_iter):
            matrix = self._ridge(matrix, pull, sizes, penalty)
            pull = linear - self.gram.times(matrix)
            norms, pulls = self.norms(matrix), self.norms(pull)
            loss = 0.5 * (total - float((matrix * (linear + pull)).sum()))
            if not loss >= -1e-12 * total:  # rounding of the Gram matrix outweighs the penalty: W means nothing
                self._worn = True
                break
            objective = loss + penalty * float(norms.sum())
            overlap = total - float((matrix * linear).sum())
            dual = dual_in_gram_form(loss, overlap, penalty, float(pulls.max()))
            norms = torch.where(norms > 1e-6 * norms.max(), norms, 0)
            entering = (pulls > penalty) * FOOTHOLD * norms.mean()
            sizes = torch.maximum(norms, entering)
            if best is None or objective < best.objective:
                best = Point(matrix, sizes, objective, (objective - dual) / max(objective, 1e-300))
            if (objective - dual) <= tol * objective:
                break
        return best or replace(start, objective=math.inf)

    def _ridge(self, matrix: Tensor, pull: Tensor, sizes: Tensor, penalty: float) -> Tensor:
        """W(η), nearly: (H + β/η) W = L by conjugate gradients from W = `matrix`, of which L - H W is the `pull`.

        The weights of a filter with η = 0 are zero.
        """
        alive = (sizes > 0)[self.features.group, None]
        ridges = (penalty / sizes.clamp_min(1e-4 * float(sizes.mean())))[self.features.group]
        if self._worn:
            self.gram.factorise(ridges)
        if not bool(alive.all()):
            matrix = matrix * alive
            pull = self.gram.linear - self.gram.times(matrix)
        ridges = ridges[:, None]
        step, steps = self._conjugate_gradients((pull - ridges * matrix) * alive, ridges, alive)
        self._worn = steps >= WORN
        return matrix + step

    def _conjugate_gradients(self, residual: Tensor, ridges: Tensor, alive: Tensor) -> tuple[Tensor, int]:
        """(H + ridges)⁻¹ `residual`, nearly, column by column, and the steps taken; in the arithmetic of the factor."""
        residual, ridges = residual.to(self.gram.dtype), ridges.to(self.gram.dtype)
        solution = torch.zeros_like(residual)
        direction = towards = self.gram.unfactor(residual) * alive
        size = first = (residual * towards).sum(dim=0)
        steps = 0
        while steps < CG_STEPS and bool((size > CG_REDUCTION**2 * first).any()):
            product = (self.gram.times(direction) + ridges * direction) * alive
            curvature = (direction * product).sum(dim=0)
            # Not positive: rounding of the Gram matrix outweighs the ridge along this direction, and it is left alone.
            length = torch.where(curvature > 0, size / curvature, 0.0)
            solution += length * direction
            residual = residual - length * product
            towards = self.gram.unfactor(residual) * alive
            last, size = size, (residual * towards).sum(dim=0)
            direction = towards + size / last.clamp_min(LEAST_RESIDUAL) * direction
            steps += 1
        return solution, steps
