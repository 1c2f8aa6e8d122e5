"""The finite convex program over activation cones, exact or relaxed, through cvxpy: for small problems.

On a cone {u : F_D u ≥ 0} of the arrangement responses are linear, φ_p(x_i; u) = a_ip·u, and the neurons there act as
one matrix T_D = Σ_j u_j vec(V_j)ᵀ in R^{r×P·c}. Over all cones the training problem is the convex program

    min  loss(Σ_D A_D T_D) + β Σ_D ‖T_D‖_D,      ‖T‖_D = min ½(tr U + tr S)
         s.t.  [U T; Tᵀ S] ⪰ 0,  U ∈ conv{uuᵀ : F_D u ≥ 0}

(the finite convex program of Sahiner et al. 2021). Pooling changes nothing else: V_j is penalised by its Frobenius
norm, so a neuron has P·c flat outputs. Under the squared loss, minimising over T and S leaves their copositive
program, with Σ_D Σ_p A_Dp U_D A_Dpᵀ in place of Σ_D A_D U_D A_Dᵀ; intercept and cross-entropy need no closed form.
The *relaxation* asks U ⪰ 0 and F_D U F_Dᵀ ≥ 0 only. With a single flat output, P·c = 1, the norm is min ‖u₊‖ + ‖u₋‖,
T = u₊ - u₋, F_D u± ≥ 0, and nothing needs relaxing (Pilanci and Ergen 2020).

What is solved is the dual, in the scaled dual point W = Z/β and multipliers N_D ≥ 0:

    max  dual(β W)   s.t.   [I - F_DᵀN_D F_D   M_Dᵀ; M_D   I] ⪰ 0,      M_D = Σ_ip W_i ⊗ a_ip  in R^{P·c×r},

that is λ_max(M_DᵀM_D + F_DᵀN_D F_D) ≤ 1: the bound of `convcvx.oracles.copositive`. U, T and S are its multipliers.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from convcvx.budget import Deadline, OutOfTime, clock
from convcvx.errors import InputError, check_choice
from convcvx.oracles.copositive import rounded
from convcvx.problem import Problem
from convcvx.solvers.programs.cones import Cone, Cones

BACKENDS = ("clarabel", "scs")
"""Solvers of cvxpy: an interior point, and ADMM."""
COMPILING = 12
"""Times as long as to pose its constraints cvxpy takes to compile a program, and nothing can interrupt it."""
NEGLIGIBLE = 1e-7
"""Share of the penalty below which a cone's neurons are an interior point's rounding."""


@dataclass(frozen=True)
class ProgramResult:
    """What the backend says: its optimal value and dual point Z (n, c), neither believed, and its network."""

    value: float
    dual_point: Tensor
    filters: Tensor
    weights: Tensor


def solve_program(
    problem: Problem, cones: Cones, *, backend: str = "clarabel", tol: float = 1e-9, time_limit: float | None = None
) -> ProgramResult:
    """Solve the finite program over `cones`: exactly posed for P·c = 1, relaxed otherwise.

    At the deadline of the problem an interior point stops with the iterate that it has.

    Parameters
    ----------
    backend : {"clarabel", "scs"}
        Interior point, or ADMM.
    tol : float
        The backend's own tolerance, absolute and relative.
    time_limit : float, optional
        Seconds; the deadline of the problem holds besides.

    Raises
    ------
    InputError
        When the backend returns nothing.
    OutOfTime
        When there is no time for an iterate.
    """
    check_choice("backend", backend, BACKENDS)
    deadline = problem.deadline.sooner(Deadline.after(time_limit))
    scaled = cp.Variable((problem.n, problem.n_outputs))
    posed = []
    began = clock()
    for cone in cones.cones:
        deadline.check()
        posed.append(_ScalarCone(cone, scaled) if _is_scalar(problem) else _RelaxedCone(cone, scaled))
    if deadline.left < COMPILING * (clock() - began):
        raise OutOfTime
    constraints = [constraint for cone in posed for constraint in cone.constraints]
    if problem.intercept:
        constraints.append(cp.sum(scaled, axis=0) == 0)
    dual = problem.beta * scaled
    targets, counts, total = problem.targets.numpy(), problem.shares.counts.numpy(), problem.shares.total
    if problem.loss.name == "squared":
        objective = cp.sum(cp.multiply(dual, targets)) - 0.5 * total * cp.sum_squares(_over(dual, counts**0.5))
    else:
        probabilities = targets - total * _over(dual, counts)
        objective = cp.sum(_over(cp.entr(probabilities), 1 / counts)) / total
        constraints.append(cp.sum(scaled, axis=1) == 0)
    program = cp.Problem(cp.Maximize(objective), constraints)
    _run(program, backend, tol, deadline)
    if scaled.value is None:
        deadline.check()
        raise InputError(f"backend={backend!r} stopped with {program.status!r}; raise time_limit or try the other one")
    sizes = np.array([cone.size for cone in posed])
    alive = [cone for cone, size in zip(posed, sizes, strict=True) if size > NEGLIGIBLE * sizes.sum()]
    neurons = [cone.neurons(problem.beta) for cone in alive if not problem.deadline.passed]
    filters, weights = _network(problem, cones.frame, neurons)
    return ProgramResult(float(program.value), problem.beta * torch.as_tensor(scaled.value), filters, weights)


def _over(rows: cp.Expression, divisors: np.ndarray) -> cp.Expression:
    """Each of `rows` (n, c) over its divisor; as they are where that is 1 for all."""
    return rows if (divisors == 1).all() else cp.multiply(rows, np.tile(1 / divisors[:, None], rows.shape[1]))


def _run(program: cp.Problem, backend: str, tol: float, deadline: Deadline) -> None:
    """Solve to `tol`; if the backend fails, more loosely, then by the other one: the bound judges the answer."""
    last = max(tol, 1e-8)
    attempts: list[tuple[str, float, dict[str, Any]]] = [
        ("clarabel", tol, {}),
        # Steps that go close to the boundary stall on some machines, whatever the tolerance, and not on others.
        ("clarabel", tol, {"max_step_fraction": 0.9}),
        ("clarabel", 1e3 * tol, {"max_step_fraction": 0.9}),
        ("scs", last, {"max_iters": 20_000}),
    ]
    if backend == "scs":
        many: dict[str, Any] = {"max_iters": 200_000}
        attempts = [("scs", tol, many), ("scs", 1e3 * tol, many), ("clarabel", last, {})]
    for name, reached, settings in attempts:
        deadline.check()
        options: dict = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), reached) | settings
        limit = "time_limit"
        if name == "scs":
            options = {"eps_abs": reached, "eps_rel": reached} | settings
            limit = "time_limit_secs"
        if deadline.left < math.inf:
            options[limit] = deadline.left
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of inaccurate answers
                program.solve(solver=name.upper(), **options)
            return
        except cp.SolverError as error:
            reason = error
    raise InputError(f"no backend solves this program: {reason}; use solver='sliding-fw'")


class _RelaxedCone:
    """[I - FᵀNF, Mᵀ; M, I] ⪰ 0, N ≥ 0: g ≤ β on the cone, by relaxation."""

    def __init__(self, cone: Cone, scaled: cp.Variable) -> None:
        self.normals, m = cone.normals, len(cone.normals)
        self._axes, flat = rounded(cone.normals)  # the constraint holds in any axes; in these it is well scaled
        design = cone.design @ self._axes
        n_cells, c = design.shape[1], scaled.shape[1]
        matrix = cp.vstack([scaled.T @ design[:, p] for p in range(n_cells)])
        multipliers = cp.Variable((m, m), symmetric=True)
        raised = self._axes.T @ self._axes - flat.T @ multipliers @ flat
        self._block = cp.bmat([[raised, matrix.T], [matrix, np.eye(n_cells * c)]]) >> 0
        self.constraints = [self._block, multipliers >= 0]

    @property
    def size(self) -> float:
        """tr U, the cone's share of the penalty."""
        d = self.normals.shape[1]
        return float(np.trace(self._axes @ self._block.dual_value[:d, :d] @ self._axes.T))

    def neurons(self, beta: float) -> tuple[np.ndarray, np.ndarray]:
        """Filters (q, d) and flat weights (q, P·c) from the multiplier [U T; Tᵀ S] of the constraint."""
        d = self.normals.shape[1]
        multiplier = (self._block.dual_value + self._block.dual_value.T) / beta
        filters = factorise(self._axes @ multiplier[:d, :d] @ self._axes.T, self.normals)
        weights = np.linalg.lstsq(filters.T, -self._axes @ multiplier[:d, d:], rcond=1e-6)[0]
        return filters, weights


class _ScalarCone:
    """‖±m + Fᵀλ±‖ ≤ 1, λ± ≥ 0: g ≤ β on the cone, exactly, for a single flat output."""

    def __init__(self, cone: Cone, scaled: cp.Variable) -> None:
        slope = scaled.T @ cone.design[:, 0]
        self._balls, self.constraints = [], []
        for sign in (1.0, -1.0):
            multipliers = cp.Variable(len(cone.normals), nonneg=True)
            ball = cp.SOC(cp.Constant(1.0), sign * slope[0] + cone.normals.T @ multipliers)
            self._balls.append(ball)
            self.constraints.append(ball)

    @property
    def size(self) -> float:
        """‖u₊‖ + ‖u₋‖, the cone's share of the penalty."""
        return sum(float(np.linalg.norm(ball.dual_value[1])) for ball in self._balls)

    def neurons(self, beta: float) -> tuple[np.ndarray, np.ndarray]:
        """u₊ with weight 1 and u₋ with weight -1."""
        filters = np.stack([-np.ravel(ball.dual_value[1]) / beta for ball in self._balls])
        return filters, np.array([[1.0], [-1.0]])


def factorise(moment: np.ndarray, normals: np.ndarray, n_iter: int = 500) -> np.ndarray:
    """Filters H (q, d) with HᵀH = U and F u ≥ 0 for each, U = `moment` (d, d), F = `normals` (m, d).

    A semi-nonnegative factorisation. Any factor B of U gives all others as QB, Q orthogonal; alternating
    projections look for a Q with F (QB)ᵀ ≥ 0 (Groetzner and Dür 2020). Where U is no mixture of such uuᵀ, the
    filters of the best Q found stay outside the cone: HᵀH = U holds always.
    """
    values, vectors = np.linalg.eigh(moment)
    keep = values > 1e-6 * max(values[-1], 1e-300)
    factor = np.sqrt(values[keep])[:, None] * vectors[:, keep].T
    rank, d = factor.shape
    if rank <= 1:
        return factor * np.where((factor @ normals.T).sum(axis=1, keepdims=True) < 0, -1.0, 1.0)
    factor = np.concatenate([factor, np.zeros((d * (d + 1) // 2 - rank, d))])
    heights = factor @ normals.T  # (q, m)
    inverse = np.linalg.pinv(heights)
    within = heights @ inverse
    best, best_turn = np.inf, np.eye(len(factor))
    for seed in range(5):
        turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(factor), len(factor))))[0]
        for _ in range(n_iter):
            turned = turn @ heights
            outside = -float(turned.min())
            if outside < best:
                best, best_turn = outside, turn
            if outside <= 1e-9 * np.abs(heights).max():
                break
            left, _, right = np.linalg.svd(np.maximum(turned, 0) @ inverse + turn @ (np.eye(len(factor)) - within))
            turn = left @ right
        if best <= 1e-9 * np.abs(heights).max():
            break
    return best_turn @ factor


def _is_scalar(problem: Problem) -> bool:
    return problem.responses.n_cells * problem.n_outputs == 1


def _network(problem: Problem, frame: Tensor, neurons: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor]:
    """Unit filters (m, r) and weights (m, P, c) of all cones together, without those that are rounding."""
    shape = problem.responses.n_cells, problem.n_outputs
    filters = np.concatenate([np.zeros((0, len(frame))), *(f for f, _ in neurons)])
    weights = np.concatenate([np.zeros((0, shape[0] * shape[1])), *(w for _, w in neurons)])
    lengths = np.linalg.norm(filters, axis=1)
    sizes = lengths * np.linalg.norm(weights, axis=1)
    keep = sizes > NEGLIGIBLE * sizes.sum()
    units = torch.as_tensor(filters[keep] / lengths[keep, None]) @ frame
    return units, torch.as_tensor(weights[keep] * lengths[keep, None]).unflatten(1, shape)
