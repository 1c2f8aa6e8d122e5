"""The optimal weights under the squared loss: all that they take of the images is their Gram matrix.

The η form, ‖W_j‖ = min_η ½ (‖W_j‖²/η + η), is solved by its plain iteration (Bach et al. 2012, sec. 5.2): W(η) is one
ridge regression, then η_j = ‖W_j‖. Two of them a β lead along a path, and a few more to a gap of a per cent.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from convcvx.losses.squared import dual_in_gram_form
from convcvx.solvers.dictionary.weights import DictionaryWeights, Point, Standing, conjugate_gradients

FOOTHOLD = 1e-2
"""Where a filter without weight that violates dual feasibility starts, against the mean η."""
CG_REDUCTION = 1e-2
"""What conjugate gradients reduce the residual of a ridge regression to: the next one has other weights anyway."""
WORN = 25
"""Steps that show that the factor is worn: the next regression gets a fresh one."""
ROUNDING = 1e-12
"""Share of the targets' mean square by which a loss may be below zero: below that it is rounding of the Gram matrix."""


class DictionaryLasso(DictionaryWeights):
    """The group lasso that a Gram matrix defines."""

    max_iter, path_iter = 10, 2

    def _standing(self, matrix: Tensor) -> Standing:
        linear, total = self.gram.linear, self.gram.total
        pull = linear - self.gram.times(matrix)
        loss = 0.5 * (total - float((matrix * (linear + pull)).sum()))
        loss = loss if loss >= -ROUNDING * total else math.nan
        overlap = total - float((matrix * linear).sum())

        def dual(penalty: float, largest: float) -> float:
            return dual_in_gram_form(loss, overlap, penalty, largest)

        return Standing(matrix, self.gram.intercept(matrix), loss, pull, dual)

    def solve(self, beta: float, start: Point | None, tol: float, max_iter: int) -> Point:
        """Alternate W = W(η), η = ‖W‖ from `start`; see `DictionaryWeights.solve`."""
        penalty, groups = beta * self.features.copies, self.features.groups
        here = self.nothing() if start is None else self._standing(start.matrix)
        # The mean η cannot be larger: zero weights would be better.
        sizes = here.pull.new_full((groups.n,), here.loss / penalty / groups.n) if start is None else start.carried
        best, lower = None, -math.inf
        for _ in range(max_iter):
            alive = groups.spread(sizes > 0)
            ridges = groups.spread(penalty / sizes.clamp_min(1e-4 * float(sizes.mean())))
            here = self._regressed(here, ridges, alive)
            if math.isnan(here.loss):
                self._worn = True
                break
            objective, dual = self._worth(here, penalty)
            lower = max(lower, dual)
            norms, pulls = groups.norms(here.matrix), groups.norms(here.pull)
            norms = torch.where(norms > 1e-6 * norms.max(), norms, 0)
            sizes = torch.maximum(norms, (pulls > penalty) * FOOTHOLD * norms.mean())
            if best is None or objective < best.objective:
                best = Point(here.matrix, here.intercept, sizes, objective, math.inf)
            best = replace(best, rel_gap=(best.objective - lower) / max(best.objective, 1e-300))
            if best.rel_gap <= tol or self._deadline.passed:
                break
        lost = Point(here.matrix, here.intercept, sizes, math.inf, 1.0) if start is None else start
        return best or replace(lost, objective=math.inf)

    def _regressed(self, here: Standing, ridges: Tensor, alive: Tensor) -> Standing:
        """(H + β/η) W = L by conjugate gradients from `here`, of which L - H W is the pull, for `ridges` β/η (D, 1).

        Features that are not `alive` weigh nothing.
        """
        if self._worn:
            self.gram.factorise(ridges[:, 0])
        matrix, pull = here.matrix, here.pull
        if not bool(alive.all()):
            matrix = matrix * alive
            pull = self.gram.linear - self.gram.times(matrix)
        rough = ridges.to(self.gram.dtype)
        step, steps = conjugate_gradients(
            lambda direction: (self.gram.times(direction) + rough * direction) * alive,
            lambda residual: self.gram.unfactor(residual) * alive,
            ((pull - ridges * matrix) * alive).to(self.gram.dtype),
            CG_REDUCTION**2,
            self._deadline,
            by_column=True,
        )
        self._worn = steps >= WORN
        return self._standing(matrix + step)

    def held_out(self, point: Point) -> Tensor:
        return self.gram.predict(point.matrix).double() + point.intercept

    def rounding(self, point: Point) -> float:
        """That of features, and of their products: of that no more shows in an objective than the gap leaves open.

        Where it outweighs the penalty, weights are large and no gap closes.
        """
        raw, multiplied = self._sizes(point.matrix)
        return torch.finfo(self.gram.dtype).eps * (raw + point.rel_gap * multiplied**2)

    def join(self) -> None:
        self.gram.join()
