"""Frank-Wolfe with cone-constrained PCA, the paper's polynomial algorithm for fixed rank: a baseline, slow by nature.

Sahiner et al. 2021 run Frank-Wolfe on the constrained problem: least loss over networks whose atomic norm
‖f‖ = min Σ_j ‖V_j‖ is at most t. Which t belongs to β is not known beforehand, so t becomes a variable (Harchaoui,
Juditsky and Nemirovski 2015):

    min  Σ_i s_i ℓ(f(x_i), y_i) + β t     over  ‖f‖ ≤ t ≤ T,

whose minimum is that of the penalised problem for every T ≥ ‖f*‖, such as T = objective / β of any network at hand.
The feasible set is the convex hull of (f, t) = (0, 0) and all (T·φ(·; u) V, T) with ‖u‖ = ‖V‖_F = 1. A linear function
with slopes -Z in f and β in t is smallest at (0, 0) if g(u) ≤ β everywhere, else at u = argmax g, V = G(u) / g(u): the
oracle's answer, by enumeration of all cells in the paper. The exact line search is over the triangle of these two
vertices and the current point, hence also over how much the current network shrinks; in it T never binds, because
β t is part of the objective, which does not rise. An intercept is minimised out: it moves with the line search.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from convcvx.problem import Problem
from convcvx.solution import Solution
from convcvx.solvers.loop import Level, Look, Solver
from convcvx.solvers.sparsify import sparsify
from convcvx.terms.status import Status

NEWTON_STEPS = 100
"""Steps of a plane search at most; the squared loss takes one or two, and no step is taken that gains nothing."""
SHORTEST = 1e-8
"""Share of a Newton step at which it is given up: what is gained by less is rounding."""


@dataclass(frozen=True)
class FrankWolfe(Solver):
    """A round adds one neuron at most, so `max_filters` is reached soon; the error falls like 1/round."""

    name: ClassVar[str] = "frank-wolfe"

    same: float = 1e-12
    """Distance below which the oracle's filter is one that the network has: its weights change, none is added."""
    stall: float = 1e-14
    """Share of the objective: a round that lowers it by no more has met rounding."""
    crowded: int = 2
    """Times n·c filters, as many as an optimum needs at most, from which on they are made fewer."""

    def ended(self, level: Level, look: Look) -> Status | None:
        """As for all solvers; or for want of room or progress."""
        if (status := super().ended(level, look)) is not None:
            return status
        if not level.budget.room(look.solution.n_filters, 1):
            return Status.MAX_FILTERS
        history, objective = look.solution.history, look.record["objective"]
        if history and history[-1]["objective"] - objective <= self.stall * objective:
            return Status.STALLED
        return None

    def step(self, level: Level, look: Look, seed: int) -> tuple[Solution, Tensor]:
        """Towards the best filter, and to where the network should shrink."""
        problem, solution, predictions = level.problem, look.solution, look.predictions
        candidate, rounds = look.candidates[:1], solution.rounds + 1
        if len(candidate) == 0:  # no filter responds to anything: the constant is all there is
            return replace(solution, rounds=rounds), predictions
        correlation = problem.responses.correlate(candidate, problem.dual_point(predictions))
        direction = correlation / correlation.norm().clamp_min(1e-300)
        atom = problem.responses.predict(candidate, direction, torch.zeros(problem.n_outputs))
        current = predictions - solution.intercept
        penalty = float(solution.weights.flatten(1).norm(dim=1).sum())
        kept, added, intercept = search_plane(problem, current, penalty, atom, solution.intercept)

        filters, weights = solution.filters, kept * solution.weights
        twins = ((filters - candidate).norm(dim=1) < self.same).nonzero()[:, 0]
        if len(twins):
            weights[twins[0]] += added * direction[0]
        else:
            filters, weights = torch.cat([filters, candidate]), torch.cat([weights, added * direction])
        solution = replace(solution.with_parameters(filters, weights, intercept), rounds=rounds)
        if solution.n_filters > self.crowded * problem.targets.numel():
            solution = sparsify(problem, solution)
        return solution, kept * current + added * atom + intercept


def search_plane(
    problem: Problem, current: Tensor, penalty: float, atom: Tensor, intercept: Tensor
) -> tuple[float, float, Tensor]:
    """Minimise Σ_i s_i ℓ(s·current + θ·atom + b, y) + β (s·penalty + θ) over s, θ ≥ 0 and b: returns (s, θ, b).

    Projected Newton from (1, 0, intercept), with predictions `current`, `atom` (n, c); one step for the squared loss.
    """
    constants = torch.eye(problem.n_outputs, dtype=torch.float64)[:, None].expand(-1, problem.n, -1)
    directions = torch.cat([current[None], atom[None], constants[: problem.n_outputs * problem.intercept]])
    slopes = torch.zeros(len(directions), dtype=torch.float64)
    slopes[0], slopes[1] = problem.beta * penalty, problem.beta
    lowest = torch.full_like(slopes, -torch.inf)
    lowest[:2] = 0

    def value(point: Tensor) -> float:
        predictions = torch.tensordot(point, directions, dims=1)
        return problem.mean_loss(predictions) + float(slopes @ point)

    point = torch.cat([torch.tensor([1.0, 0.0]).double(), intercept[: len(directions) - 2]])
    best = value(point)
    for _ in range(NEWTON_STEPS):
        problem.deadline.check()
        predictions = torch.tensordot(point, directions, dims=1)
        gradient = slopes - (directions * problem.residual(predictions)).sum(dim=(1, 2))
        curvature = problem.loss.hessian(predictions, problem.targets)
        curved = [problem.shares.weighed(curvature(direction)) for direction in directions]
        hessian = torch.stack([(directions * c).sum(dim=(1, 2)) for c in curved]) / problem.shares.total
        free = (point > lowest) | (gradient < 0)
        step = torch.zeros_like(point)
        step[free] = -torch.linalg.pinv(hessian[free][:, free], hermitian=True, rtol=1e-14) @ gradient[free]
        size = 1.0
        while (trial := value(torch.maximum(point + size * step, lowest))) >= best and size > SHORTEST:
            size *= 0.5
        if trial >= best:
            break
        point, best = torch.maximum(point + size * step, lowest), trial
    shift = point[2:] if problem.intercept else intercept
    return float(point[0]), float(point[1]), shift


frank_wolfe = FrankWolfe()
