"""The master for any smooth loss: Newton with conjugate gradients on a smoothed group lasso.

    min_{W, b}  Σ_i s_i ℓ(A_i W + b, y_i) + β Σ_j √(‖W_j‖² + ε²),       ε ↓ 0

Path following: a few Newton steps an ε, each a preconditioned conjugate gradient solve with the true Hessian of the
loss; of the penalty's see `smoothed_norms`. A loss that is flat somewhere is smoothed with ε as well
(`convcvx.losses.smoothed_hinge`). The preconditioner is the Gram matrix, scaled to the curvature the loss shows, plus
the penalty's Hessian: a ridge, less what is missing of it along each group. The duality gap of the unsmoothed problem
is the stopping rule.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from convcvx.losses.smoothed_hinge import SmoothedHinge, smoothed
from convcvx.problem import Problem
from convcvx.solvers.master.design import Design
from convcvx.solvers.master.preconditioner import Preconditioner
from convcvx.solvers.master.result import MasterResult
from convcvx.solvers.smoothed_norms import Groups, SmoothedNorms, idle_groups

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
VISIBLE = 1e-6
"""Share of the objective that the decrease which a step promises must exceed, for the step to be shortened below a
thousandth: where a loss is linear next to nothing bends, and Newton's step is far too long."""
HIDDEN = 1e-15
"""Share of the objective by which a step may raise it: rounding. Where no fall of the objective shows any more, steps
still bring the dual value closer, which is accurate to first order only."""


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
    design = Design(problem, filters)
    state = _State(problem, design, weights.flatten(0, 1), intercept)
    constant = problem.constant_predictions()
    if state.primal_dual()[0] > problem.primal(constant, weights[:0]):
        # Worse than no filters: far out, where the loss is flat, Newton's method would not find back.
        state = _State(problem, design, torch.zeros_like(state.matrix), constant[0])
    slope = problem.beta * len(filters)  # of the penalty in ε, at most
    epsilon = float(state.groups.norms(state.matrix).max()) if len(filters) else 0.0
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


class _State:
    """W, b, and the predictions there."""

    def __init__(self, problem: Problem, design: Design, matrix: Tensor, shift: Tensor) -> None:
        self.problem, self.design = problem, design
        self.matrix, self.shift = matrix, shift
        self.predictions = design.apply(matrix) + shift
        self.groups = Groups(torch.full((len(matrix) // problem.responses.n_cells,), problem.responses.n_cells))
        self.curvature = problem.loss.curvature  # of the preconditioner, measured as we go
        self.duals = torch.zeros_like(matrix)
        self.free = torch.ones(len(matrix), 1, dtype=torch.bool)  # rows that Newton steps move
        self._dropped = torch.zeros(len(matrix), 1, dtype=torch.bool)
        self._centre(self.problem)

    def _centre(self, problem: Problem) -> None:
        """Move to the optimal intercept of `problem`, which may be smoothed."""
        if problem.intercept:
            change = problem.best_intercept(self.predictions)
            self.shift, self.predictions = self.shift + change, self.predictions + change

    def primal_dual(self) -> tuple[float, float]:
        """Objective without smoothing, and the dual value of the scaled residual over these filters."""
        problem, cells = self.problem, self.problem.responses.n_cells
        dual_point = problem.dual_point(self.predictions)
        pulls = self.groups.norms(self.design.adjoint(dual_point))
        self.free |= self.groups.spread(pulls > problem.beta)
        weights = self.matrix.reshape(-1, cells, self.matrix.shape[1])
        largest = float(pulls.max()) if len(pulls) else 0.0
        return problem.primal(self.predictions, weights), problem.dual(dual_point, largest)

    def drop_idle(self, epsilon: float, objective: float) -> bool:
        """Zero and hold the groups that smoothing by `epsilon` left small and that are dual feasible with room.

        A group goes only once. False if none went; else the point without them has yet to prove its own gap. Where the
        weights are rough, groups that count look idle as well: if the `objective` rises without them, all stay.
        """
        pulls = self.groups.norms(self.design.adjoint(self.problem.dual_point(self.predictions)))
        norms = self.groups.norms(self.matrix)
        idle = idle_groups(norms, pulls, self.problem.beta, epsilon)
        rows = self.groups.spread(idle) & ~self._dropped
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
        excess = problem.beta * epsilon * self.groups.n
        return replace(problem, loss=smoothed(problem.loss, math.sqrt(excess / (2 * c))))

    def sharp(self, epsilon: float, tol: float) -> bool:
        """Whether the loss that is smoothed at `epsilon` is as good as the true one for a gap of `tol`."""
        loss, problem = self._smoothed(epsilon).loss, self.problem
        if not isinstance(loss, SmoothedHinge):
            return True
        return loss.width**2 <= SHARP * tol * float(problem.loss.value(self.predictions, problem.targets).max())

    def newton_step(self, epsilon: float, *, exact: bool) -> float:
        """One damped Newton step at `epsilon`; returns the decrease that Newton's model promised."""
        problem, design = self._smoothed(epsilon), self.design
        flat = isinstance(problem.loss, SmoothedHinge)
        accuracy = ROUGH if problem.loss.rough_steps and not exact else EXACT
        penalty = SmoothedNorms(self.groups, problem.beta, epsilon, self.matrix, self.duals)
        hessian = problem.loss.hessian(self.predictions, problem.targets)

        def product(step: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Hessian times (step, shift): its data part, its penalty part, and its intercept part."""
            curved = problem.shares.times(hessian(design.centred(step) + shift))
            return design.centred_adjoint(curved), penalty.curved(step), curved.sum(dim=0) * problem.intercept

        gram, noise = self.curvature * design.gram, self.curvature * design.noise
        precondition = Preconditioner(gram, noise, penalty)
        dual_point = problem.residual(self.predictions)
        start = design.centred_adjoint(dual_point) - penalty.ridges * self.matrix
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
            data, bent, image_shift = product(direction, direction_shift)
            curvature = float((direction * (data + bent)).sum() + (direction_shift * image_shift).sum())
            if iteration == 0:
                modelled = float((direction * (design.gram @ direction)).sum())
                shown = float((direction * data).sum()) / max(modelled, 1e-300)
                measured = min(max(shown, 1e-4), problem.loss.curvature)
            if not curvature > 0:  # a β so small that nothing bends within rounding
                break
            size = energy / curvature
            step, step_shift = step + size * direction, step_shift + size * direction_shift
            residual, residual_shift = residual - size * (data + bent), residual_shift - size * image_shift
            z, z_shift = precondition(residual) * self.free, residual_shift / self.curvature
            energy, previous = float((residual * z).sum() + (residual_shift * z_shift).sum()), energy
            ratio = energy / previous
            direction, direction_shift = z + ratio * direction, z_shift + ratio * direction_shift
        self.curvature = measured
        decrement = 0.5 * float((start * step).sum() + (start_shift * step_shift).sum())

        self.duals = penalty.duals_after(step)
        change = design.centred(step) + step_shift
        step_shift = step_shift - (design.mean.T @ step)[0]

        def value(predictions: Tensor, matrix: Tensor) -> float:
            return problem.mean_loss(predictions) + penalty.value(matrix)

        before, size = value(self.predictions, self.matrix), 1.0
        while size > 1e-3 or size * decrement > VISIBLE * before:
            predictions, matrix = self.predictions + size * change, self.matrix + size * step
            if value(predictions, matrix) <= before * (1 + HIDDEN) - 0.1 * size * decrement:
                self.matrix, self.shift, self.predictions = (
                    matrix,
                    self.shift + size * step_shift,
                    predictions,
                )
                self._centre(problem)
                return decrement
            size *= 0.5
        return 0.0
