"""What an optimum tells: its derivative against finite differences, its active directions against planted ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.problems import flat_problem
from hypothesis import given, settings
from hypothesis import strategies as st

import convcvx
from convcvx.certificate import Certificate, certify_parameters
from convcvx.display.words import of_optimum
from convcvx.optimum import derivative
from convcvx.problem import Problem
from convcvx.training.plan import find_beta_max, solve_problem
from convcvx.units import Units


def optimum(problem: Problem, tol: float = 1e-7) -> Certificate:
    """The certificate of the optimal network, by the exact oracle."""
    found = solve_problem(problem, convcvx.budget.Budget(tol=tol), oracle="exact")
    return certify_parameters(problem, found.filters, found.weights, found.intercept, oracle="exact", tol=tol)


@pytest.mark.parametrize(("loss", "ratio"), [("squared", 0.1), ("cross-entropy", 0.5)])
def test_the_slope_is_the_derivative_of_the_optimal_value(loss, ratio):
    problem = flat_problem(loss=loss, seed=3)
    beta = ratio * find_beta_max(problem, "exact")
    below, at, above = (optimum(problem.with_beta(beta * factor)) for factor in (0.98, 1.0, 1.02))
    assert at.optimum is not None
    assert max(below.rel_gap, at.rel_gap, above.rel_gap) < 1e-6
    difference = (above.primal - below.primal) / (0.04 * beta)
    assert at.optimum["slope"] == pytest.approx(difference, rel=2e-2)
    # Of a concave function the difference quotients on both sides enclose the derivative.
    falls = (above.primal - at.dual) / (0.02 * beta), (at.primal - below.dual) / (0.02 * beta)
    assert falls[0] <= falls[1] + 1e-9 * falls[1]
    assert at.optimum["slope_low"] <= at.optimum["slope"] <= at.optimum["slope_high"]
    assert falls[0] - 1e-6 <= at.optimum["slope_high"]
    assert at.optimum["slope_low"] <= falls[1] + 1e-6
    # Under the cross-entropy no dual point is made longer, and the lower bound says little.
    least = at.optimum["slope_low"] if loss == "squared" else at.optimum["slope"]
    assert at.optimum["slope_high"] - least < 0.05 * at.optimum["slope"]


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), rough=st.sampled_from([0.3, 0.03, 0.003]))
def test_the_bounds_hold_for_networks_far_from_the_optimum(seed, rough):
    """The derivative of the optimum lies between bounds that a worse network proves."""
    problem = flat_problem(n=10, seed=seed % 7, beta=0.02)
    best = solve_problem(problem, convcvx.budget.Budget(tol=1e-6), oracle="exact")
    truth = float(best.weights.flatten(1).norm(dim=1).sum())
    random = torch.Generator().manual_seed(seed)
    weights = best.weights * (1 + rough * torch.randn(best.weights.shape, generator=random, dtype=torch.float64))
    found = certify_parameters(problem, best.filters, weights, oracle="exact")
    assert found.optimum is not None
    assert found.optimum["slope_low"] <= truth * (1 + 1e-3)
    assert found.optimum["slope_high"] >= truth * (1 - 1e-3)


def test_negative_control_a_bound_on_g_that_is_too_small_gives_wrong_slopes():
    problem = flat_problem(beta=0.02)
    solution = solve_problem(problem, convcvx.budget.Budget(tol=1e-6), oracle="exact")
    predictions = problem.responses.predict(solution.filters, solution.weights, solution.intercept)
    dual_point, primal = problem.dual_point(predictions), problem.primal(predictions, solution.weights)
    truth = float(solution.weights.flatten(1).norm(dim=1).sum())
    low, high = derivative(problem, dual_point, problem.beta * (1 + 1e-6), primal)
    assert low <= truth <= high
    low, high = derivative(problem, dual_point, problem.beta / 2, primal)
    assert not low <= truth <= high


def test_all_active_directions_are_counted_and_whether_the_network_uses_them():
    problem = flat_problem(beta=0.02)
    whole = optimum(problem, tol=1e-6)
    assert whole.optimum is not None
    assert whole.optimum["active"] == whole.optimum["active_used"] == whole.n_filters
    assert "all of them in this network" in of_optimum(whole.to_dict())

    # A filter twice over: its mirror image does as well where data and targets are symmetric.
    images = torch.cat([problem.responses.images, -problem.responses.images])
    twice = convcvx.training.plan.build_problem(
        images, problem.targets.argmax(1).repeat(2), 0.02, spec=problem.responses.embedding.spec
    )
    solution = solve_problem(twice, convcvx.budget.Budget(tol=1e-6), oracle="exact")
    summed, filters = solution.weights.clone(), solution.filters
    one_sided = certify_parameters(twice, filters[:1], summed[:1], oracle="exact", tol=1e-6)
    assert one_sided.optimum is not None
    assert one_sided.optimum["active"] is None  # far from an optimum
    assert of_optimum(one_sided.to_dict()) is None
    both = certify_parameters(twice, filters, summed, solution.intercept, oracle="exact", tol=1e-6)
    assert both.optimum is not None
    assert both.rel_gap < 1e-5
    assert both.optimum["active"] >= both.optimum["active_used"] > 0


def test_slopes_come_in_the_units_of_the_data():
    found = optimum(flat_problem(beta=0.02), tol=1e-4)
    scaled = Units(images=40, targets=50).certificate(found)
    assert scaled.optimum is not None
    assert found.optimum is not None
    assert scaled.optimum["slope"] == found.optimum["slope"] * 2.0**10
    ratio = scaled.primal / scaled.beta / (found.primal / found.beta)
    assert scaled.optimum["slope_low"] == pytest.approx(found.optimum["slope_low"] * ratio, rel=1e-12)
    assert Certificate.from_dict(scaled.to_dict()) == scaled
    assert of_optimum(replace(found, optimum=None).to_dict()) is None


@pytest.mark.filterwarnings("ignore::convcvx.errors.ConvergenceWarning")
@pytest.mark.parametrize("beta", [0.05, 0.1])
def test_a_bound_at_a_dual_point_of_its_own_bounds_the_slope_of_that_point(beta):
    """The polynomial oracle proves at a dual point that it chooses: with any other its bound would prove nothing."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(12, 3)), random.normal(size=(12, 2))
    exact = convcvx.solve(x, y, beta, tol=1e-6).certificate
    assert exact.scope == "global"
    weak = convcvx.solve(x, y, beta, tol=1e-6, oracle="polynomial", max_rounds=20).certificate
    assert weak.oracle == "polynomial"
    assert weak.dual <= exact.primal
    assert weak.optimum["slope_low"] <= exact.optimum["slope_high"]
    assert weak.optimum["slope_high"] >= exact.optimum["slope_low"]
