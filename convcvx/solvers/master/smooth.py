"""The master for any smooth loss: Newton with conjugate gradients on a smoothed group lasso.

    min_{W, b}  Σ_i s_i ℓ(A_i W + b, y_i) + β Σ_j √(‖W_j‖² + ε²),       ε ↓ 0

Path following: a few Newton steps an ε, each a preconditioned conjugate gradient solve with the true Hessian of the
loss. The Hessian of the penalty is linearised with dual variables, as Chan, Golub and Mulet (1999) do for total
variation: plain Newton on a smoothed norm takes tiny steps, the primal-dual form full ones. A loss that is flat
somewhere is smoothed with ε as well (`convcvx.losses.smoothed_hinge`). The preconditioner is the Gram matrix, scaled to
the curvature the loss shows, plus the penalty's Hessian: a ridge, less what is missing of it along each group. The
duality gap of the unsmoothed problem is the stopping rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from convcvx.losses.smoothed_hinge import SmoothedHinge, smoothed
from convcvx.problem import Problem
from convcvx.solvers.master.result import MasterResult

CACHE_BYTES = 1 << 30
"""Pooled responses kept between passes; beyond this they are recomputed on every pass."""
SHRINK = 0.1
"""Factor from one ε to the next."""
START = 0.1
"""Share of the gap at the start by which the first ε raises the penalty: ten times as much costs steps that lead away,
a tenth as much has Newton's method find its way by short ones."""
FROM_ZERO = 0.03
"""The same without any weights, where most of the gap is the dual value's."""
SETTLED = 0.01
"""Share of what ε adds to the penalty that a Newton step may still gain when the next ε begins."""
ROUGH = 1e-2
"""Share of its first energy at which conjugate gradients end on the way: Newton steps a tenth off take a quarter of the
passes of exact ones."""
EXACT = 1e-6
"""The same at the last ε, where Newton's method is to converge, and for losses without `rough_steps`."""
STEPS = 40
"""Steps of conjugate gradients at most: for the Hessian of a loss that bends alike everywhere, about."""
FLAT_STEPS = 300
"""Steps at most for that of a smoothed loss, whose images bend it by factors of a million: the preconditioner knows one
curvature for all."""
SHARP = 1e-6
"""Share of tol times the largest loss of an image that the width squared of a smoothed loss may have in the end: then
the loss itself has nearly the same residual, which the gap is measured at."""
LEAST_GAP = 1e-12
"""Share of the objective that the gap of a start counts as at least: rounding hides less."""
IDLE = 1 - 1e-3
"""Share of β below which the pull on a group is one that it withstands. Smoothed, W_j / √(‖W_j‖² + ε²) is its pull over
β, so that such a group is no longer than 22 ε."""
VISIBLE = 1e-6
"""Share of the objective that the decrease which a step promises must exceed, for the step to be shortened below a
thousandth: where a loss is linear next to nothing bends, and Newton's step is far too long."""
HIDDEN = 1e-15
"""Share of the objective by which a step may raise it: rounding. Where no fall of the objective shows any more, steps
still bring the dual value closer, which is accurate to first order only."""
DAMPINGS = 20
"""Tenfold increases, at most, of a damping that does not make a matrix positive definite."""


def solve_smooth(
    problem: Problem,
    filters: Tensor,
    weights: Tensor,
    intercept: Tensor,
    *,
    tol: float = 1e-6,
    max_iter: int = 100,
) -> MasterResult:
    """The master under any loss of `convcvx.losses`."""
    shape = len(filters), problem.responses.n_cells
    design = _Design(problem, filters)
    state = _State(problem, design, weights.flatten(0, 1), intercept)
    constant = problem.constant_predictions()
    if state.primal_dual()[0] > problem.primal(constant, weights[:0]):
        # Worse than no filters: far out, where the loss is flat, Newton's method would not find back.
        state = _State(problem, design, torch.zeros_like(state.matrix), constant[0])
    slope = problem.beta * len(filters)  # of the penalty in ε, at most
    epsilon = float(state.norms().max()) if len(filters) else 0.0
    if epsilon:
        objective, dual = state.primal_dual()
        epsilon = min(epsilon, START * max(objective - dual, LEAST_GAP * objective) / slope)
    exact = settled = False  # whether this is the last ε, and whether Newton's method has converged there
    result = MasterResult(weights, intercept, np.inf, np.inf, 0)
    for iteration in range(max_iter + 1):
        problem.deadline.check()
        objective, dual = state.primal_dual()
        rel_gap = (objective - dual) / max(objective, 1e-300)
        if rel_gap <= tol or (result.rel_gap > tol and objective <= result.objective):
            result = MasterResult(state.matrix.unflatten(0, shape), state.shift, objective, rel_gap, iteration)
        done = rel_gap <= tol or (settled and exact)
        dropped = done and state.drop_idle(epsilon, objective)
        if iteration == max_iter or (done and not dropped):
            break
        if dropped and rel_gap <= tol:
            continue
        epsilon = epsilon or FROM_ZERO * (objective - dual) / slope
        epsilon *= SHRINK if settled and not exact else 1.0
        exact = 0 < slope * epsilon < 1e-2 * tol * objective and state.sharp(epsilon, tol)
        decrement = state.newton_step(epsilon, exact=exact)
        # The dual value is accurate to first order only: at the last ε Newton's method goes on to rounding.
        settled = decrement <= (1e-16 * objective if exact else SETTLED * slope * epsilon)
    return result


class _Design:
    """A = Φ flattened to (n, m·P) as a linear operator, from cached responses when they fit."""

    def __init__(self, problem: Problem, filters: Tensor) -> None:
        responses = problem.responses
        self._responses, self._filters = responses, filters
        size = responses.n * len(filters) * responses.n_cells * responses.dtype.itemsize
        self._cache = list(responses.blocks(filters)) if size <= CACHE_BYTES else None
        shift = responses.shift(filters) if problem.intercept else torch.zeros(len(filters) * responses.n_cells)
        gram, _ = responses.gram(filters, problem.targets, problem.shares, shift)
        mean = gram[:-1, -1:] * problem.intercept
        self.gram = gram[:-1, :-1] - mean @ mean.T
        self.mean = mean + shift[:, None]
        # About how far below zero an eigenvalue may lie, by the rounding of the responses' products.
        self.noise = torch.finfo(responses.dtype).eps * float(self.gram.norm())

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        return iter(self._cache) if self._cache is not None else self._responses.blocks(self._filters)

    def apply(self, matrix: Tensor) -> Tensor:
        """A W (n, c) in float64."""
        out = torch.empty(self._responses.n, matrix.shape[1], dtype=torch.float64)
        for where, block in self._blocks():
            out[where] = (block.flatten(1) @ matrix.to(block)).double().cpu()
        return out

    def adjoint(self, rows: Tensor) -> Tensor:
        """Aᵀ R (m·P, c) in float64."""
        total = torch.zeros(len(self.gram), rows.shape[1], dtype=torch.float64)
        for where, block in self._blocks():
            # Products with a few long rows are the fast ones.
            total += (rows[where].to(block).T @ block.flatten(1)).T.double().cpu()
        return total

    def centred(self, matrix: Tensor) -> Tensor:
        """(A - 1 meanᵀ) W: what W changes when the intercept takes up the mean."""
        return self.apply(matrix) - self.mean.T @ matrix

    def centred_adjoint(self, rows: Tensor) -> Tensor:
        return self.adjoint(rows) - self.mean @ rows.sum(dim=0, keepdim=True)


class _State:
    """W, b, and the predictions there."""

    def __init__(self, problem: Problem, design: _Design, matrix: Tensor, shift: Tensor) -> None:
        self.problem, self.design = problem, design
        self.matrix, self.shift = matrix, shift
        self.predictions = design.apply(matrix) + shift
        self.curvature = problem.loss.curvature  # of the preconditioner, measured as we go
        self.duals = torch.zeros_like(matrix)
        self.free = torch.ones(len(matrix), 1, dtype=torch.bool)  # rows that Newton steps move
        self._dropped = torch.zeros(len(matrix), 1, dtype=torch.bool)
        self._centre(self.problem)

    def norms(self, matrix: Tensor | None = None) -> Tensor:
        """Frobenius norm of each group (m,)."""
        matrix = self.matrix if matrix is None else matrix
        return matrix.reshape(-1, self.problem.responses.n_cells * matrix.shape[1]).norm(dim=1)

    def _centre(self, problem: Problem) -> None:
        """Move to the optimal intercept of `problem`, which may be smoothed."""
        if problem.intercept:
            change = problem.best_intercept(self.predictions)
            self.shift, self.predictions = self.shift + change, self.predictions + change

    def primal_dual(self) -> tuple[float, float]:
        """Objective without smoothing, and the dual value of the scaled residual over these filters."""
        problem, cells = self.problem, self.problem.responses.n_cells
        dual_point = problem.dual_point(self.predictions)
        pulls = self.norms(self.design.adjoint(dual_point))
        self.free |= (pulls > problem.beta).repeat_interleave(cells)[:, None]
        weights = self.matrix.reshape(-1, cells, self.matrix.shape[1])
        largest = float(pulls.max()) if len(pulls) else 0.0
        return problem.primal(self.predictions, weights), problem.dual(dual_point, largest)

    def drop_idle(self, epsilon: float, objective: float) -> bool:
        """Zero and hold the groups that smoothing by `epsilon` left small and that are dual feasible with room.

        A group goes only once. False if none went; else the point without them has yet to prove its own gap. Where the
        weights are rough, groups that count look idle as well: if the `objective` rises without them, all stay.
        """
        pulls = self.norms(self.design.adjoint(self.problem.dual_point(self.predictions)))
        norms = self.norms()
        idle = (pulls < IDLE * self.problem.beta) & (norms > 0) & (norms <= IDLE / math.sqrt(1 - IDLE**2) * epsilon)
        rows = idle.repeat_interleave(self.problem.responses.n_cells)[:, None] & ~self._dropped
        if not bool(rows.any()):
            return False
        before = self.matrix, self.shift, self.predictions
        self.matrix = torch.where(rows, 0.0, self.matrix)
        self.predictions = self.design.apply(self.matrix) + self.shift
        self._centre(self.problem)
        weights = self.matrix.reshape(len(norms), -1, self.matrix.shape[1])
        rounding = torch.finfo(self.problem.responses.dtype).eps
        if not self.problem.primal(self.predictions, weights) <= objective * (1 + rounding):
            self.matrix, self.shift, self.predictions = before
            return False
        self._dropped, self.free = self._dropped | rows, self.free & ~rows
        return True

    def _smoothed(self, epsilon: float) -> Problem:
        """The problem with its loss smoothed by no more than `epsilon` adds to the penalty; itself if that bends."""
        problem, c = self.problem, self.matrix.shape[1]
        excess = problem.beta * epsilon * len(self.norms())
        return replace(problem, loss=smoothed(problem.loss, math.sqrt(excess / (2 * c))))

    def sharp(self, epsilon: float, tol: float) -> bool:
        """Whether the loss that is smoothed at `epsilon` is as good as the true one for a gap of `tol`."""
        loss, problem = self._smoothed(epsilon).loss, self.problem
        if not isinstance(loss, SmoothedHinge):
            return True
        return loss.width**2 <= SHARP * tol * float(problem.loss.value(self.predictions, problem.targets).max())

    def _value(self, problem: Problem, predictions: Tensor, matrix: Tensor, epsilon: float) -> float:
        """The objective of the smoothed `problem` with the penalty smoothed by `epsilon`."""
        penalty = (self.norms(matrix).square() + epsilon**2).sqrt().sum()
        return problem.mean_loss(predictions) + problem.beta * float(penalty)

    def newton_step(self, epsilon: float, *, exact: bool) -> float:
        """One damped Newton step at `epsilon`; returns the decrease that Newton's model promised."""
        problem, design = self._smoothed(epsilon), self.design
        flat = isinstance(problem.loss, SmoothedHinge)
        accuracy = ROUGH if problem.loss.rough_steps and not exact else EXACT
        cells = problem.responses.n_cells
        hessian = problem.loss.hessian(self.predictions, problem.targets)
        radii = (self.norms().square() + epsilon**2).sqrt().repeat_interleave(cells)[:, None]
        ridges, units = problem.beta / radii, self.matrix / radii

        def inner(left: Tensor, right: Tensor) -> Tensor:
            """Inner products group by group, spread over the groups' rows (m·P, 1)."""
            return (left * right).reshape(-1, cells * right.shape[1]).sum(dim=1).repeat_interleave(cells)[:, None]

        def product(step: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Hessian times (step, shift): its data part, its penalty part, and its intercept part."""
            curved = problem.shares.times(hessian(design.centred(step) + shift))
            bent = self.duals * inner(units, step) + units * inner(self.duals, step)
            return (
                design.centred_adjoint(curved),
                ridges * (step - 0.5 * bent),
                curved.sum(dim=0) * problem.intercept,
            )

        gram, noise = self.curvature * design.gram, self.curvature * design.noise
        precondition = _Preconditioner(gram, noise, ridges, self.duals, units, cells)
        dual_point = problem.residual(self.predictions)
        start = design.centred_adjoint(dual_point) - ridges * self.matrix
        start = start * self.free
        step, step_shift = torch.zeros_like(self.matrix), torch.zeros_like(self.shift)
        residual, residual_shift = start, dual_point.sum(dim=0) * problem.intercept
        start_shift = residual_shift
        direction = z = precondition(residual) * self.free
        direction_shift = z_shift = residual_shift / self.curvature
        energy = first = float((residual * z).sum() + (residual_shift * z_shift).sum())
        measured = self.curvature
        for iteration in range(FLAT_STEPS if flat else STEPS):
            problem.deadline.check()
            if energy <= accuracy * first or energy <= 0:
                break
            data, penalty, image_shift = product(direction, direction_shift)
            curvature = float((direction * (data + penalty)).sum() + (direction_shift * image_shift).sum())
            if iteration == 0:
                modelled = float((direction * (design.gram @ direction)).sum())
                shown = float((direction * data).sum()) / max(modelled, 1e-300)
                measured = min(max(shown, 1e-4), problem.loss.curvature)
            if not curvature > 0:  # a β so small that nothing bends within rounding
                break
            size = energy / curvature
            step, step_shift = step + size * direction, step_shift + size * direction_shift
            residual, residual_shift = residual - size * (data + penalty), residual_shift - size * image_shift
            z, z_shift = precondition(residual) * self.free, residual_shift / self.curvature
            energy, previous = float((residual * z).sum() + (residual_shift * z_shift).sum()), energy
            ratio = energy / previous
            direction, direction_shift = z + ratio * direction, z_shift + ratio * direction_shift
        self.curvature = measured
        decrement = 0.5 * float((start * step).sum() + (start_shift * step_shift).sum())

        duals = units + (step - self.duals * inner(units, step)) / radii
        self.duals = duals / self.norms(duals).clamp_min(1.0).repeat_interleave(cells)[:, None]
        change = design.centred(step) + step_shift
        step_shift = step_shift - (design.mean.T @ step)[0]
        value, size = self._value(problem, self.predictions, self.matrix, epsilon), 1.0
        while size > 1e-3 or size * decrement > VISIBLE * value:
            predictions, matrix = self.predictions + size * change, self.matrix + size * step
            if self._value(problem, predictions, matrix, epsilon) <= value * (1 + HIDDEN) - 0.1 * size * decrement:
                self.matrix, self.shift, self.predictions = (
                    matrix,
                    self.shift + size * step_shift,
                    predictions,
                )
                self._centre(problem)
                return decrement
            size *= 0.5
        return 0.0


class _Preconditioner:
    """Solves with G + diag(ridges) - Σ_j q_j q_jᵀ, the last of rank one in each group of `cells` rows.

    A norm does not bend along its own direction: with dual variables d and u = W / r the penalty's Hessian there is a
    ridge times 1 - <d, u>, next to nothing for a group that is clearly in or clearly out. q_j = √(ridge <d, u>) u/‖u‖
    takes the rest away. Without it conjugate gradients need hundreds of passes once ε is small.

    Both matrices factored here are positive definite but for rounding, the second because no q_j takes away more than
    its group's ridge. In float32 the Gram matrix of correlated responses has eigenvalues at about minus `noise`: where
    the ridges are smaller, damping makes up for it. Conjugate gradients find the same step, if later.
    """

    def __init__(self, gram: Tensor, noise: float, ridges: Tensor, duals: Tensor, units: Tensor, cells: int) -> None:
        self._groups = len(gram) // cells, cells
        damping = max(1e-7 * float(gram.diagonal().max()), noise) if len(gram) else 0.0
        factor = _damped_factor(gram + torch.diag(ridges[:, 0]), damping)
        self._inverse = torch.cholesky_inverse(factor)
        shares = self._sum(duals * units).clamp_min(0)
        lengths = self._sum(units.square()).sqrt().clamp_min(1e-300)
        self._missing = (ridges * self._spread(shares)).sqrt() * units / self._spread(lengths)
        m = self._groups[0]
        coupling = (self._inverse * (self._missing @ self._missing.T)).view(m, cells, m, cells).sum(dim=(1, 3))
        self._small = _damped_factor(torch.eye(m, dtype=gram.dtype) - coupling, 1e-12)

    def _sum(self, rows: Tensor) -> Tensor:
        """(m·P, c) to sums over each group (m, 1)."""
        return rows.reshape(self._groups[0], -1).sum(dim=1, keepdim=True)

    def _spread(self, sums: Tensor) -> Tensor:
        return sums.repeat_interleave(self._groups[1], dim=0)

    def __call__(self, rows: Tensor) -> Tensor:
        sums = torch.cholesky_solve(self._sum(self._missing * self._plain(rows)), self._small)
        return self._plain(rows + self._missing * self._spread(sums))

    def _plain(self, rows: Tensor) -> Tensor:
        """Of the matrix without what is of rank one."""
        return (rows.T @ self._inverse).T  # half the time of two triangular solves


def _damped_factor(matrix: Tensor, damping: float) -> Tensor:
    """Cholesky factor of `matrix` with `damping`, or as much more as it takes, added to its diagonal in place."""
    for _ in range(DAMPINGS):
        matrix.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            return factor
        damping *= 10
    return torch.linalg.cholesky(matrix)
