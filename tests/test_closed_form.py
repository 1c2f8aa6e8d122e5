"""The closed form: equal to the trained optimum where its conditions hold, a bound of known side where they do not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.problems import flat_problem, problem_of

from convcvx.budget import Budget
from convcvx.data.datasets import spiral
from convcvx.errors import InputError
from convcvx.oracles import ExactOracle
from convcvx.problem import Problem
from convcvx.solvers.closed_form import analyse, whitened
from convcvx.training.plan import solve_problem


def plain(x: np.ndarray, y: np.ndarray, beta: float = 0.02, intercept: bool = False, **options) -> Problem:
    return problem_of(x, y, beta, intercept=intercept, **options)


def gaussian(n: int, d: int, c: int = 3, seed: int = 0, **options) -> Problem:
    return plain(np.random.default_rng(seed).standard_normal((n, d)), np.arange(n) % c, **options)


def optimum(problem: Problem, **options) -> float:
    return solve_problem(problem, Budget(tol=1e-7), **options).history[-1]["objective"]


@pytest.mark.parametrize(("n", "d", "c"), [(2, 2, 2), (10, 10, 3), (12, 20, 5)])
def test_on_whitened_one_hot_data_it_is_the_optimum(n, d, c):
    problem = whitened(gaussian(n, d, c))
    solution = solve_problem(problem, Budget(tol=1e-8), solver="closed-form")
    record = solution.history[-1]
    assert solution.status == "converged"
    assert record["closed_form"]["linear_is"] == "optimum"
    assert record["closed_form"]["whitened"]
    assert record["objective"] == pytest.approx(record["closed_form"]["linear"], rel=1e-8)
    assert optimum(problem) == pytest.approx(record["objective"], rel=1e-6)
    other = analyse(problem.with_beta(1.001 * problem.beta)).value
    assert other != pytest.approx(record["objective"], rel=1e-6)  # negative control


@pytest.mark.parametrize("intercept", [True, False])
def test_on_positive_numbers_it_is_the_optimum_with_fewer_features_than_samples(intercept):
    random = np.random.default_rng(0)
    x = np.abs(random.standard_normal((20, 1)))
    problem = plain(x, 2 * x[:, 0] + 0.1 * random.standard_normal(20), intercept=intercept)
    form = analyse(problem, ExactOracle())
    assert (form.spike_free, form.signs, form.linear_is) == (True, True, "optimum")
    assert optimum(problem) == pytest.approx(form.value, rel=1e-6)
    mixed = analyse(plain(x - 0.5, 2 * x[:, 0], intercept=intercept), ExactOracle())
    assert mixed.spike_free is False  # negative control
    assert mixed.linear_is != "optimum"


def test_spike_free_data_without_the_signs_give_a_lower_bound():
    problem = whitened(gaussian(6, 8, 3, intercept=True))
    form = analyse(problem)
    assert (form.spike_free, form.signs, form.linear_is) == (True, False, "lower bound")
    assert form.linear < optimum(problem) * (1 - 1e-3)


def test_signs_without_spike_free_data_give_an_upper_bound():
    """Orthogonal columns of equal norm; the targets lie partly outside their span, where ReLU responses reach."""
    x = np.array([[1.0, 1.0], [1.0, -1.0], [1.0, 0.0], [0.0, 1.0]])
    y = x @ [2.0, 1.0] + 0.5 * np.array([1.0, -1.0, 0.0, -2.0])
    problem = plain(x, y)
    form = analyse(problem, ExactOracle())
    assert (form.isotropic, form.spike_free, form.signs) == (True, False, True)
    assert form.linear_is == "upper bound"
    best = optimum(problem)
    assert form.value * (1 + 1e-6) < best < form.linear * (1 - 1e-6)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("beta", [0.3, 0.03, 0.003])
def test_the_value_is_a_lower_bound_on_any_data(intercept, beta):
    x, y = spiral(30)
    problems = [plain(x, y, beta, intercept), flat_problem(14, 3, beta=beta, intercept=intercept)]
    problems.append(flat_problem(14, 3, beta=beta, intercept=intercept, pooling="none"))
    for problem in problems:
        solution = solve_problem(problem, Budget(tol=1e-6), solver="closed-form")
        record = solution.history[-1]
        best = optimum(problem)
        assert record["lower_bound"] <= best * (1 + 1e-7)
        assert record["objective"] >= best * (1 - 1e-7)
        if record["rel_gap"] > 1e-6:
            assert solution.status == "conditions"
            assert record["closed_form"]["linear_is"] != "optimum"


@pytest.mark.parametrize("beta", [1e-9, 1e-11])
def test_outputs_that_say_the_same_leave_the_bound_below_the_optimum(beta):
    """Above all singular values but one, which are 0: rounding of their squares would be worth 1e-8 of the bound."""
    x = np.concatenate([np.eye(6), np.eye(6)])
    y = np.tile(x @ np.abs(np.random.default_rng(0).standard_normal((6, 1))), 4)
    threshold = 12 * beta / 2**0.5
    exact = (2 * threshold * np.linalg.norm(y) - threshold**2) / 24
    for oracle in (None, ExactOracle()):
        assert analyse(plain(x, y, beta), oracle).value == pytest.approx(exact, rel=1e-12, abs=0)


def test_whitening_makes_the_rows_orthogonal():
    problem = whitened(gaussian(7, 9))
    rows = problem.responses.rows(slice(0, 7))[:, 0].double() @ problem.responses.embedding.basis.T
    gram = rows @ rows.T
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(7).double(), rtol=0, atol=1e-9 * float(gram[0, 0]))


def test_what_it_cannot_do_is_refused():
    with pytest.raises(InputError, match="needs loss 'squared'; got 'cross-entropy'"):
        analyse(gaussian(6, 6, loss="cross-entropy"))
    with pytest.raises(InputError, match="linearly independent"):
        whitened(gaussian(6, 4))
    with pytest.raises(InputError, match="one patch a sample; got 3"):
        whitened(flat_problem(6, 3))


@pytest.mark.parametrize("activation", ["linear", "relu"])
def test_directions_that_are_cut_off_as_rounding_are_not_taken_for_none(activation):
    """At a tiny weight decay a network uses a direction 1e-11 as long as the other."""
    signs = torch.tensor([[1.0, -1, 1, -1], [1, 1, -1, -1]], dtype=torch.float64)
    rows, targets = torch.stack([signs[0], 1e-11 * signs[1]], dim=1), signs.sum(dim=0)[:, None]
    problem = problem_of(rows, targets, 1e-14, activation=activation)
    bound = solve_problem(problem, Budget(), solver="closed-form").history[-1]["lower_bound"]
    # Two neurons each direction, as ReLU needs: u = ±e_k, weights 1 / length.
    assert bound <= 2e-14 * 2 * (1 + 1e11)


def test_the_whitened_problem_keeps_its_activation():
    problem = flat_problem(2, n_patches=1, dim=3, activation="abs")
    assert whitened(problem).responses.activation == problem.responses.activation
