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

from dataclasses import replace
from time import perf_counter

import torch
from torch import Tensor

from convcvx.budget import Budget, Deadline, OutOfTime
from convcvx.oracles.base import Oracle
from convcvx.problem import Problem
from convcvx.solution import Callback, Solution
from convcvx.solvers.rounds import begin, consult, predicted
from convcvx.solvers.sparsify import sparsify

SAME = 1e-12
"""Distance below which the oracle's filter is one that the network has."""
STALL = 1e-14
"""A round that lowers the objective by no more than this share of it has met rounding."""


def frank_wolfe(
    problem: Problem,
    oracle: Oracle,
    budget: Budget = Budget(),
    *,
    seed: int = 0,
    start: Solution | None = None,
    callback: Callback | None = None,
) -> Solution:
    """Train as far as `budget` goes, the gap as the oracle sees it; parameters as for the others.

    A round adds one neuron at most, so `max_filters` is reached soon; the error falls like 1/round.
    """
    began = perf_counter()
    solution, earlier = begin(problem, start)
    problem = problem.until(budget.deadline(problem.deadline, earlier))
    predictions = predicted(problem, solution)
    if solution.n_filters == 0:
        predictions = problem.constant_predictions()
        solution = replace(solution, intercept=predictions[0].clone())
    while True:
        found, record, point = consult(problem, oracle, solution, predictions, n_filters=1, tol=budget.tol, seed=seed)
        record["seconds"] = earlier + perf_counter() - began
        status = _status(record, solution, budget, problem.deadline)
        solution = replace(solution, history=[*solution.history, record], status=status, dual_point=point)
        if callback is not None:
            callback(solution)
        if status != "running":
            return solution
        try:
            solution, predictions = _step(problem, solution, predictions, found.filters[:1])
        except OutOfTime:
            return replace(solution, status="time_limit")
        if solution.n_filters > 2 * problem.targets.numel():
            solution = sparsify(problem, solution)


def _status(record: dict, solution: Solution, budget: Budget, deadline: Deadline) -> str:
    """ "running", or why to stop."""
    if status := budget.ends(record, deadline):
        return status
    if not budget.room(solution.n_filters, 1):
        return "max_filters"
    if solution.history and solution.history[-1]["objective"] - record["objective"] <= STALL * record["objective"]:
        return "stalled"
    return "running"


def _step(problem: Problem, solution: Solution, predictions: Tensor, candidate: Tensor) -> tuple[Solution, Tensor]:
    """One step towards the filter `candidate` (1, r); the next solution and its predictions."""
    rounds = solution.rounds + 1
    if len(candidate) == 0:  # no filter responds to anything: the constant is all there is
        return replace(solution, rounds=rounds), predictions
    correlation = problem.responses.correlate(candidate, problem.dual_point(predictions))
    direction = correlation / correlation.norm().clamp_min(1e-300)
    atom = problem.responses.predict(candidate, direction, torch.zeros(problem.n_outputs))
    current = predictions - solution.intercept
    penalty = float(solution.weights.flatten(1).norm(dim=1).sum())
    kept, added, intercept = search_plane(problem, current, penalty, atom, solution.intercept)

    filters, weights = solution.filters, kept * solution.weights
    twins = ((filters - candidate).norm(dim=1) < SAME).nonzero()[:, 0]
    if len(twins):
        weights[twins[0]] += added * direction[0]
    else:
        filters, weights = torch.cat([filters, candidate]), torch.cat([weights, added * direction])
    solution = solution.with_parameters(filters, weights, intercept)
    return replace(solution, rounds=rounds), kept * current + added * atom + intercept


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
    for _ in range(100):
        problem.deadline.check()
        predictions = torch.tensordot(point, directions, dims=1)
        gradient = slopes - (directions * problem.residual(predictions)).sum(dim=(1, 2))
        curved = [problem.loss.hessian_product(predictions, direction) for direction in directions]
        curved = [problem.shares.weighed(rows) for rows in curved]
        hessian = torch.stack([(directions * c).sum(dim=(1, 2)) for c in curved]) / problem.shares.total
        free = (point > lowest) | (gradient < 0)
        step = torch.zeros_like(point)
        step[free] = -torch.linalg.pinv(hessian[free][:, free], hermitian=True, rtol=1e-14) @ gradient[free]
        size = 1.0
        while (trial := value(torch.maximum(point + size * step, lowest))) >= best and size > 1e-8:
            size *= 0.5
        if trial >= best:
            break
        point, best = torch.maximum(point + size * step, lowest), trial
    shift = point[2:] if problem.intercept else intercept
    return float(point[0]), float(point[1]), shift
