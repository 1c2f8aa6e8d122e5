"""The master problem: the optimal output weights of a fixed set of filters, a group lasso.

    min_{W, b}  Σ_i s_i ℓ(A_i W + b, y_i) + β Σ_j ‖W_j‖_F,      A = Φ flattened to (n, m·P), W_j (P, c)

Pooled responses are non-negative and highly correlated, so AᵀA is badly conditioned and first-order methods
stall. For the squared loss the norm is smoothed away instead: ‖W_j‖ = min_η ½ (‖W_j‖²/η + η) (Bach et al.
2012, sec. 5.1), and

    F(η) = min_{W, b}  ½ Σ_i s_i ‖A_i W + b - y_i‖² + ½ Σ_j β (‖W_j‖²/η_j + η_j),     η ≥ 0,

is smooth and convex in as many variables as there are filters. With S = -(∂ loss/∂W) / β its gradient is
½β (1 - ‖S_j‖²): a zero group enters exactly when it violates dual feasibility. Projected Newton on F costs two
(m·P)² Cholesky factors a step and converges quadratically whatever the conditioning. F is the objective of the
copositive program of Sahiner et al. 2021 at rank-one U_D. Other losses: `master.smooth`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from convcvx.losses.squared import dual_in_gram_form
from convcvx.machine.jit import njit
from convcvx.problem import Problem
from convcvx.solvers.master.result import MasterResult

ENTERING = 32
"""Filters that a Newton step may give their first weight, unless more than that have some already."""
NOISE = 0.1
"""Share of β above which the rounding of a Gram matrix shows beside the ridges β/η: it is then computed in float64."""
ROUNDING = 1e-10
"""Relative error that objectives in Gram form may have."""
SHARES = 4
"""Shares in which the groups of a step are solved for: more would skip more zeros, in products that are slower."""
NARROWEST = 64
"""Groups in a share at least."""


def solve_squared(
    problem: Problem, filters: Tensor, weights: Tensor, *, tol: float = 1e-6, max_iter: int = 60
) -> MasterResult:
    """The master under the squared loss. One pass over the images gives the Gram matrix; then n disappears."""
    cells = problem.responses.n_cells
    newton, precise = GramNewton.of(problem, filters), False
    if newton.noise(problem.responses.dtype) > NOISE * problem.beta:
        newton, precise = GramNewton.of(problem.with_dtype(torch.float64), filters), True
    matrix = weights.flatten(0, 1)
    sizes = newton.norms(matrix)
    best, best_matrix, rel_gap, iteration = np.inf, matrix, np.inf, 0
    for iteration in range(max_iter + 1):
        problem.deadline.check()
        objective, dual = newton.primal_dual(matrix)
        if objective <= best * (1 + ROUNDING):
            best, best_matrix = objective, matrix
        rel_gap = (best - dual) / max(best, 1e-300)
        if rel_gap <= tol or iteration == max_iter:
            break
        try:
            matrix, sizes = newton.step(matrix, sizes)
        except torch.linalg.LinAlgError:  # rounding outweighs the smallest ridge β/η
            if precise:
                break
            newton, precise = GramNewton.of(problem.with_dtype(torch.float64), filters), True
    solved, intercept = best_matrix.unflatten(0, (len(filters), cells)), newton.intercept(best_matrix)
    # In Gram form the loss is a difference of large numbers; what is compared with other networks is summed anew.
    objective = problem.primal(problem.responses.predict(filters, solved, intercept), solved)
    return MasterResult(solved, intercept, objective, rel_gap, iteration)


class GramNewton:
    """Projected Newton steps on F(η). Everything is in the Gram matrix (m·P + 1)² of [Φ, 1], or of [Φ - shift, 1].

    Attributes
    ----------
    hessian, linear : Tensor (m·P, m·P), (m·P, c)
        Means of response times response and of response times target, centred where there is an intercept.
    """

    def __init__(self, problem: Problem, gram: Tensor, moments: Tensor, shift: Tensor | float = 0.0) -> None:
        self._shift = shift
        self.beta, self.cells = problem.beta, problem.responses.n_cells
        # Centring is minimising over the intercept.
        self._mean, self._target_mean = gram[:-1, -1:] * problem.intercept, moments[-1:] * problem.intercept
        self.hessian = gram[:-1, :-1] - self._mean @ self._mean.T
        self.linear = moments[:-1] - self._mean @ self._target_mean
        self._last = torch.zeros(0), torch.zeros(0), torch.zeros(0)
        self._pulled = torch.zeros(0), torch.zeros(0)
        self._square = float(problem.mean(problem.targets.square().sum(dim=1)) - self._target_mean.square().sum())

    @classmethod
    def of(cls, problem: Problem, filters: Tensor) -> GramNewton:
        """One pass over the images."""
        responses, shares = problem.responses, problem.shares
        if not problem.intercept:
            return cls(problem, *responses.gram(filters, problem.targets, shares))
        shift = responses.shift(filters)
        return cls(problem, *responses.gram(filters, problem.targets, shares, shift), shift)

    def noise(self, dtype: torch.dtype) -> float:
        """How far below zero an eigenvalue of the Gram matrix may lie when it was computed in `dtype`."""
        return torch.finfo(dtype).eps * float(self.hessian.norm())

    def norms(self, matrix: Tensor) -> Tensor:
        """Frobenius norm of each group (m,)."""
        return torch.linalg.vector_norm(matrix.reshape(-1, self.cells * matrix.shape[1]), dim=1)

    def intercept(self, matrix: Tensor) -> Tensor:
        return (self._target_mean - (self._mean.T + self._shift) @ matrix)[0]

    def _pull(self, matrix: Tensor) -> Tensor:
        """-∂ loss/∂W; kept, as a step and the gap after it ask for that of one matrix again and again."""
        if self._pulled[0] is not matrix:
            product = matrix.T.contiguous() @ self.hessian  # products with a few long rows are the fast ones
            self._pulled = matrix, self.linear - product.T
        return self._pulled[1]

    def _loss(self, matrix: Tensor) -> float:
        return 0.5 * (self._square - float((matrix * (self.linear + self._pull(matrix))).sum()))

    def primal_dual(self, matrix: Tensor) -> tuple[float, float]:
        """Objective, and the dual value of the scaled residual over these filters (`Problem.dual`, in Gram form)."""
        loss = self._loss(matrix)
        overlap = self._square - float((matrix * self.linear).sum())  # <Z, Y>; Σ ‖Z_i‖²/s_i is twice the loss
        largest = float(self.norms(self._pull(matrix)).max()) if len(matrix) else 0.0
        objective = loss + self.beta * float(self.norms(matrix).sum())
        return objective, dual_in_gram_form(loss, overlap, self.beta, largest)

    def step(self, matrix: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """From η = `sizes` and W = W(η) to the next η and its W."""
        slopes = self._pull(matrix) / self.beta
        pulls = self.norms(slopes)
        groups = self._working_set(sizes, pulls)
        # A size that enters gets a foothold, from which the curvature of F is measured.
        entering = (pulls[groups] - 1) * self.beta / self._curvature(groups)
        start = torch.maximum(sizes[groups], 1e-2 * entering.clamp_min(0))
        start = start.clamp_min(1e-9 * float(start.max()))
        target = start.clone()
        gradient, hessian = self._derivatives(slopes, pulls, groups, start)
        _bounded_quadratic(hessian.numpy(), gradient.numpy(), target.numpy())

        value = self._value(matrix, sizes)
        for size in (1.0, 0.5, 0.2):
            trial = torch.zeros_like(sizes)
            trial[groups] = start + size * (target - start)
            solution = self.ridge(trial)
            if self._value(solution, trial) < value:
                return solution, trial
        # Far from the optimum F is no quadratic; η = ‖W(η)‖ always lowers it.
        trial = torch.zeros_like(sizes)
        trial[groups] = start
        trial = self.norms(self.ridge(trial))
        return self.ridge(trial), trial

    def _working_set(self, sizes: Tensor, pulls: Tensor) -> Tensor:
        """Groups to step in: those in use and, of those that violate dual feasibility, as many of the worst.

        A step costs the cube of their number, and of thousands of correlated filters the optimum needs few.
        """
        used = sizes > 0
        idle = torch.where(used, 0.0, pulls)
        worst = idle.topk(min(len(idle), max(ENTERING, int(used.sum())))).indices
        used[worst[idle[worst] > 1]] = True
        return used.nonzero()[:, 0]

    def _curvature(self, groups: Tensor) -> Tensor:
        """Mean diagonal of the Hessian within each group."""
        return self.hessian.diagonal().view(-1, self.cells).sum(dim=1)[groups].clamp_min(1e-300)

    def _value(self, matrix: Tensor, sizes: Tensor) -> float:
        norms, alive = self.norms(matrix), sizes > 0
        penalty = (norms[alive].square() / sizes[alive] + sizes[alive]).sum()
        return self._loss(matrix) + 0.5 * self.beta * float(penalty)

    def _rows(self, groups: Tensor) -> Tensor:
        return (groups[:, None] * self.cells + torch.arange(self.cells)).flatten()

    def _factor(self, where: Tensor, ridges: Tensor) -> Tensor:
        """Cholesky factor of the Hessian over the rows `where` plus `ridges`; the last is kept for the next step."""
        last_where, last_ridges, factor = self._last
        if torch.equal(where, last_where) and torch.equal(ridges, last_ridges):
            return factor
        base = self.hessian[where][:, where]
        base.diagonal().add_(ridges)
        factor, failed = torch.linalg.cholesky_ex(base)
        if failed:  # rounding: a singular Gram matrix and a negligible ridge
            base.diagonal().add_(1e-10 * float(base.diagonal().max()))
            factor = torch.linalg.cholesky(base)
        self._last = where, ridges, factor
        return factor

    def _derivatives(self, slopes: Tensor, pulls: Tensor, groups: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient and Hessian of F over `groups`: H_jl = β <S_j, [D⁻¹ - D⁻¹ (H/β + D⁻¹)⁻¹ D⁻¹]_jl S_l>."""
        where = self._rows(groups)
        factor = self._factor(where, self.beta / sizes.repeat_interleave(self.cells))
        coupling = _coupling(factor, slopes[where].view(len(groups), self.cells, -1) / sizes[:, None, None])
        hessian = torch.diag(self.beta * pulls[groups].square() / sizes) - self.beta**2 * coupling
        return 0.5 * self.beta * (1 - pulls[groups].square()), hessian

    def ridge(self, sizes: Tensor) -> Tensor:
        """W(η) for η = `sizes` (m,)."""
        where = self._rows(sizes.nonzero()[:, 0])
        ridges = self.beta / sizes[sizes > 0].repeat_interleave(self.cells)
        solution = torch.zeros_like(self.linear)
        solution[where] = torch.cholesky_solve(self.linear[where], self._factor(where, ridges))
        return solution


def _coupling(factor: Tensor, blocks: Tensor) -> Tensor:
    """(m, m): <B_j, [(L Lᵀ)⁻¹]_jl B_l> for L = `factor` (m·P, m·P) and B = `blocks` (m, P, c).

    Each column b of a block stands alone in its rows, so L⁻¹b is zero above them: the groups are taken in turn, and of
    L only what lies below their first row. The inverse itself would cost several times as much, unless a group has few
    rows and many columns.
    """
    m, cells, columns = blocks.shape
    if columns > 2 * cells:
        flat = blocks.flatten(0, 1)
        return (torch.cholesky_inverse(factor) * (flat @ flat.T)).view(m, cells, m, cells).sum(dim=(1, 3))
    solved = blocks.new_zeros(m * cells, columns, m)
    width = max(NARROWEST, -(-m // SHARES))
    for first in range(0, m, width):
        part, top = torch.arange(first, min(first + width, m)), first * cells
        right = blocks.new_zeros(m - first, cells, columns, len(part))
        right[part - first, :, :, part - first] = blocks[part]
        below = torch.linalg.solve_triangular(factor[top:, top:], right.view(len(factor) - top, -1), upper=False)
        solved[top:, :, part] = below.view(-1, columns, len(part))
    flat = solved.view(-1, m)
    return flat.T @ flat


@njit(cache=True)
def _bounded_quadratic(hessian, gradient, point):  # pragma: no cover - compiled
    """Minimise the quadratic model at `point` over non-negative points, in place, by coordinate descent."""
    slope = gradient.copy()
    for _ in range(2000):
        largest, farthest = 0.0, 0.0
        for j in range(len(point)):
            if hessian[j, j] <= 0.0:
                continue
            change = max(0.0, point[j] - slope[j] / hessian[j, j]) - point[j]
            if change != 0.0:
                point[j] += change
                largest = max(largest, abs(change))
                for k in range(len(slope)):
                    slope[k] += hessian[j, k] * change
        for j in range(len(point)):
            farthest = max(farthest, point[j])
        if largest <= 1e-13 * farthest:
            break
