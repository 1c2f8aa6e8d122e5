"""Gated and sampled programs: another solver agrees, cones hold, bounds bound, and none claims more than it proved."""

from __future__ import annotations

import itertools
from dataclasses import replace

import cvxpy as cp
import numpy as np
import pytest
import torch
from helpers.problems import flat_problem, problem_of, random_parameters
from torch import Tensor

from convcvx.arrangements.cells import cells
from convcvx.budget import Budget
from convcvx.certificate import certify_parameters
from convcvx.oracles import ExactOracle, SampledOracle
from convcvx.oracles.base import OracleResult
from convcvx.oracles.pattern_cones import PatternCones
from convcvx.problem import Problem
from convcvx.responses.gated import GatedResponses, embedded_rows, sample_gates
from convcvx.solvers.gated import decompose, gated
from convcvx.solvers.programs import gated as gated_program
from convcvx.solvers.programs.gated import solve_gated
from convcvx.solvers.programs.norms import NORMS
from convcvx.training.plan import solve_problem


def all_gates(problem: Problem) -> Tensor:
    """An interior point of every cell."""
    rows = embedded_rows(problem.responses, slice(0, problem.n)).flatten(0, 1)
    return torch.from_numpy(np.array([cell.interior for cell in cells(rows.numpy())]))


def scalar_problem(n_patches: int = 1, intercept: bool = True, beta: float = 0.01) -> Problem:
    random = np.random.default_rng(1)
    patches = random.standard_normal((16, n_patches, 2))
    targets = np.abs(patches[:, :, 0]).mean(axis=1) + 0.1 * random.standard_normal(16)
    return problem_of(patches, targets, beta, intercept=intercept)


# Gated responses


@pytest.mark.parametrize(("n_patches", "pooling"), [(1, None), (4, None), (4, "2x1"), (3, "none")])
def test_gated_responses_are_linear_adjoint_and_relu_on_their_own_pattern(n_patches, pooling):
    problem = flat_problem(11, n_patches, 3, pooling=pooling)
    filters, weights, _ = random_parameters(problem, 5)
    features = GatedResponses(problem.responses, filters)
    own = torch.einsum("jr,jpc->jrpc", filters, weights)
    relu = problem.responses.predict(filters, weights, torch.zeros(3))
    torch.testing.assert_close(features.apply(own), relu)
    other = GatedResponses(problem.responses, filters.flip(0))
    assert not torch.allclose(other.apply(own), relu)  # negative control
    dual_point = torch.randn(11, 3, dtype=torch.float64)
    pulls = features.adjoint(dual_point)
    assert float((features.apply(own) * dual_point).sum()) == pytest.approx(float((own * pulls).sum()))
    torch.testing.assert_close(features.matrix() @ own.flatten(0, 2), relu)
    gram, moments = features.gram(dual_point)
    torch.testing.assert_close(gram[:-1, :-1], features.matrix().T @ features.matrix() / 11)
    torch.testing.assert_close(moments[:-1], pulls.flatten(0, 2) / 11)


def test_features_recomputed_on_every_pass_are_those_kept(monkeypatch):
    problem = flat_problem(40, 4, 3, pooling="2x1")
    gates = sample_gates(problem.responses, 6)
    weights = torch.randn(len(gates), 3, 2, 3, dtype=torch.float64)
    kept = GatedResponses(problem.responses, gates).apply(weights)
    monkeypatch.setattr("convcvx.responses.gated.CACHE_BYTES", 0)
    monkeypatch.setattr("convcvx.responses.gated.CHUNK_BYTES", {"cpu": 2000})
    torch.testing.assert_close(GatedResponses(problem.responses, gates).apply(weights), kept)


# The gated program


def by_cvxpy(problem: Problem, gates: Tensor, norm: str) -> float:
    features = GatedResponses(problem.responses, gates)
    q, r, cells_ = features.shape
    n, c = problem.targets.shape
    parts = features.matrix().view(n, q, r, cells_).numpy()
    matrices = [cp.Variable((r, cells_ * c)) for _ in range(q)]
    f = sum(parts[:, s, :, p] @ matrices[s][:, p * c : (p + 1) * c] for s in range(q) for p in range(cells_))
    if problem.intercept:
        f = f + np.ones((n, 1)) @ cp.Variable((1, c))
    y = problem.targets.numpy()
    if problem.loss.name == "squared":
        loss = cp.sum_squares(f - y) / (2 * n)
    else:
        loss = (cp.sum(cp.log_sum_exp(f, axis=1)) - cp.sum(cp.multiply(f, y))) / n
    norms = {
        "nuclear": cp.normNuc,
        "columns": lambda w: cp.sum(cp.norm(w, 2, axis=0)),
        "frobenius": lambda w: cp.norm(w, "fro"),
    }
    objective = loss + problem.beta * sum(norms[norm](w) for w in matrices)
    return cp.Problem(cp.Minimize(objective)).solve(solver=cp.CLARABEL)


def programs() -> list:
    """All, of which those with the cross-entropy that take seconds are slow."""
    made = []
    for loss, norm in itertools.product(("squared", "cross-entropy"), NORMS):
        made += [(loss, norm, 1, None, False)]
        for case in [(3, None, True), (3, "none", False)]:
            made += [pytest.param(loss, norm, *case, marks=[pytest.mark.slow] * (loss != "squared"))]
    return made


@pytest.mark.parametrize(("loss", "norm", "n_patches", "pooling", "intercept"), programs())
def test_the_gated_program_agrees_with_cvxpy(loss, norm, n_patches, pooling, intercept):
    problem = flat_problem(14, n_patches, loss=loss, pooling=pooling, intercept=intercept)
    gates = sample_gates(problem.responses, 5)
    reference = by_cvxpy(problem, gates, norm)
    result = solve_gated(problem, gates, norm=norm, tol=1e-6)
    assert result.rel_gap <= 1e-6
    assert result.primal == pytest.approx(reference, rel=2e-6)
    assert result.dual <= reference * (1 + 1e-7)
    predictions = GatedResponses(problem.responses, gates).apply(result.weights) + result.intercept
    judged = float(problem.loss.value(predictions, problem.targets).mean())
    judged += problem.beta * NORMS[norm].value(result.weights.flatten(2))
    assert judged == pytest.approx(result.primal, rel=1e-9)
    other = solve_gated(problem.with_beta(1.01 * problem.beta), gates, norm=norm, tol=1e-6)
    assert other.primal != pytest.approx(reference, rel=2e-6)  # negative control


@pytest.mark.parametrize("norm", list(NORMS))
def test_streamed_equals_gram(norm, monkeypatch):
    problem = flat_problem(30, 3, 3, pooling="none")
    gates = sample_gates(problem.responses, 8)
    gram = solve_gated(problem, gates, norm=norm, tol=1e-6)
    monkeypatch.setattr(gated_program, "GRAM_SIZE", 0)
    streamed = solve_gated(problem, gates, norm=norm, tol=1e-6)
    assert streamed.primal == pytest.approx(gram.primal, rel=2e-6)


def test_leading_axes_first_gives_the_same_optimum(monkeypatch):
    problem = flat_problem(60, 1, 12, intercept=False)
    gates = sample_gates(problem.responses, 6)
    direct = solve_gated(problem, gates, norm="columns", tol=1e-6)
    monkeypatch.setattr(gated_program, "COARSE_DIM", 2)
    monkeypatch.setattr(gated_program, "ENERGY", 0.2)
    coarse = solve_gated(problem, gates, norm="columns", tol=1e-6)
    assert coarse.rel_gap <= 1e-6
    assert coarse.primal == pytest.approx(direct.primal, rel=2e-6)
    assert 0.0 in [dual for *_, dual in coarse.history[1:]]  # no bound is claimed in the leading axes


@pytest.mark.parametrize("norm", list(NORMS))
def test_dual_norm_and_proximal_point(norm):
    random = torch.Generator().manual_seed(0)
    point, other = (torch.randn(4, 5, 3, generator=random, dtype=torch.float64) for _ in range(2))
    measure = NORMS[norm]
    bound = float((measure.dual(other) * torch.tensor([measure.value(w[None]) for w in point])).sum())
    assert float((point * other).sum()) <= bound * (1 + 1e-12)
    metric = torch.ones(5, 1).double() if norm == "nuclear" else torch.rand(5, 1, generator=random).double() + 0.1
    nearest = measure.step(point, metric, 0.7)
    slack = metric * (point - nearest)  # a subgradient of 0.7 ‖·‖ at `nearest`
    assert float(measure.dual(slack).max()) <= 0.7 * (1 + 1e-9)
    assert float((slack * nearest).sum()) == pytest.approx(0.7 * measure.value(nearest))
    assert float(measure.dual(metric * (point - 0.9 * nearest)).max()) > 0.7 * (1 + 1e-9)  # negative control


# Cones


def lowest(cones: PatternCones, points: Tensor) -> float:
    return min(float(cones._heights(*chunk, points, None).min()) for chunk in cones._chunks(points[:, :, 0].numel()))


def test_projections_and_splits_lie_in_their_cones():
    problem = flat_problem(12, 2, 3)
    gates = sample_gates(problem.responses, 20)
    cones = PatternCones(problem.responses, gates)
    points = torch.randn(len(gates), 2, 3, dtype=torch.float64)
    nearest, bounds = cones.project(points)
    assert lowest(cones, nearest) >= 0
    assert lowest(cones, points) < 0  # negative control
    torch.testing.assert_close(nearest.norm(dim=2), bounds, rtol=1e-6, atol=1e-9)
    residual = points - nearest  # Moreau: orthogonal to the projection, and in the polar cone
    torch.testing.assert_close((residual * nearest).sum(dim=2), torch.zeros(len(gates), 2).double(), atol=1e-6, rtol=0)
    assert float((residual * gates[:, None]).sum(dim=2).max()) <= 1e-6
    plus, minus = cones.split(points)
    torch.testing.assert_close(plus - minus, points)
    assert min(lowest(cones, plus), lowest(cones, minus)) >= 0


@pytest.mark.parametrize("pooling", [None, "none"])
def test_the_decomposition_predicts_what_the_gated_network_does(pooling):
    problem = flat_problem(12, 2, pooling=pooling)
    gates = sample_gates(problem.responses, 6)
    result = solve_gated(problem, gates, tol=1e-6)
    solution = decompose(problem, gates, result, 10**6)
    relu = problem.responses.predict(solution.filters, solution.weights, solution.intercept)
    expected = GatedResponses(problem.responses, gates).apply(result.weights) + result.intercept
    torch.testing.assert_close(relu, expected, rtol=0, atol=1e-4)
    assert problem.primal(relu, solution.weights) >= result.primal - 1e-9


@pytest.mark.parametrize("max_filters", [1, 2, 3])
def test_no_more_filters_than_the_budget_has(max_filters):
    """A component of the gated network decomposes into two."""
    problem = flat_problem(14)
    gates = sample_gates(problem.responses, 6)
    largest = decompose(problem, gates, solve_gated(problem, gates), max_filters)
    assert largest.n_filters == max_filters
    solution = gated(problem, SampledOracle(gates=gates), Budget(max_filters=max_filters))
    assert 0 < solution.n_filters <= max_filters
    assert max(record["n_filters"] for record in solution.history) <= max_filters


# The sampled oracle and the ReLU program


@pytest.mark.parametrize(
    ("n_patches", "intercept"), [(1, True), (3, True), pytest.param(1, False, marks=pytest.mark.slow)]
)
def test_over_all_patterns_the_relu_program_is_the_global_optimum(n_patches, intercept):
    problem = scalar_problem(n_patches, intercept)
    gates = all_gates(problem)
    solution = gated(problem, SampledOracle(gates=gates), Budget(tol=1e-6))
    optimum = solve_problem(problem, Budget(tol=1e-7), oracle="exact").history[-1]["objective"]
    assert solution.status == "converged"
    assert solution.history[-1]["objective"] == pytest.approx(optimum, rel=2e-6)
    assert solution.history[0]["gated_dual"] <= optimum
    few = gated(problem, SampledOracle(gates=gates[:4]), Budget(tol=1e-6))
    assert few.history[-1]["objective"] > optimum * (1 + 1e-4)  # negative control


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_over_all_patterns_the_sampled_bound_is_a_global_one(loss):
    problem = flat_problem(12, 2, loss=loss)
    z = problem.dual_point(problem.constant_predictions())
    exact = ExactOracle()(problem, z).upper_bound
    oracle = SampledOracle(gates=all_gates(problem))
    assert oracle(problem, z).upper_bound >= exact * (1 - 1e-9)
    one = SampledOracle(gates=all_gates(problem)[:1])(problem, z)
    assert one.scope == "sampled"


def test_with_one_output_the_bound_is_the_maximum_over_the_cones():
    problem = scalar_problem(3)
    z = problem.dual_point(problem.constant_predictions())
    found = SampledOracle(gates=all_gates(problem))(problem, z)
    exact = ExactOracle()(problem, z)
    assert found.upper_bound == pytest.approx(exact.upper_bound, rel=1e-7)
    assert float(found.values[0]) == pytest.approx(found.upper_bound, rel=1e-7)
    g = problem.responses.correlate(found.filters, z).flatten(1).norm(dim=1)
    torch.testing.assert_close(g, found.values)
    assert found.stats["bound_without_cones"] > found.upper_bound * (1 + 1e-6)


@pytest.mark.parametrize(
    ("loss", "pooling"),
    [
        ("squared", None),
        ("squared", "none"),
        *(pytest.param("cross-entropy", pooling, marks=pytest.mark.slow) for pooling in (None, "none")),
    ],
)
def test_a_sampled_certificate_never_claims_more(loss, pooling):
    """The network is a point of the program that judges it, however few patterns are sampled."""
    problem = flat_problem(14, pooling=pooling, loss=loss)
    best = solve_problem(problem, Budget(tol=1e-6), oracle="exact")
    certificate = certify_parameters(problem, best.filters, best.weights, oracle=SampledOracle(2))
    assert certificate.scope == "sampled"
    assert "only" in certificate.meaning
    assert certificate.dual <= certificate.primal
    assert "lower bound (sampled)" in str(certificate)
    again = certify_parameters(problem, best.filters, best.weights, oracle=SampledOracle(2), seed=7)
    assert again.dual == certificate.dual  # the program depends on its own seed alone


def test_a_sampled_bound_never_passes_to_another_network():
    problem = flat_problem(14)
    best = solve_problem(problem, Budget(tol=1e-6), oracle="exact")
    proof = certify_parameters(problem, best.filters, best.weights, oracle="exact")
    sampled = replace(proof, scope="sampled", dual=2 * proof.dual)
    estimate = replace(proof, scope="heuristic", dual=3 * proof.dual)
    assert proof.with_bound_of(sampled) is proof
    assert estimate.with_bound_of(sampled) is estimate
    assert sampled.with_bound_of(estimate) is sampled
    assert sampled.with_bound_of(proof).scope == "global"


def test_only_what_was_proved_scales_the_dual():
    found = OracleResult(torch.zeros(1, 2), torch.tensor([1.0]), 2.0, "sampled")
    assert found.g_max == 2.0
    assert replace(found, scope="heuristic").g_max == 1.0


def test_another_oracle_judges_the_network_not_the_program():
    problem = scalar_problem()
    solution = gated(problem, ExactOracle(), Budget(tol=1e-6), n_gates=3)
    assert solution.history[-1]["scope"] == "global"
    assert solution.history[-2]["scope"] == "sampled"
    assert solution.status == "sampled"
    assert solution.history[-1]["rel_gap"] > 1e-6


def test_gates_depend_on_the_seed_alone():
    problem = flat_problem(14)
    assert torch.equal(sample_gates(problem.responses, 9, 3), sample_gates(problem.responses, 9, 3))
    assert not torch.equal(sample_gates(problem.responses, 9, 3)[:1], sample_gates(problem.responses, 9, 4)[:1])
