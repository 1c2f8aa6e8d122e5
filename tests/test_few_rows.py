"""Few patch rows, where maxima lie at kinks: exact climbs, slides along kinks, and that both pay."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.problems import flat_problem, g, random_parameters
from hypothesis import given, settings
from hypothesis import strategies as st

from convcvx.budget import Budget
from convcvx.oracles import ExactOracle, LocalOracle
from convcvx.problem import Problem
from convcvx.responses.few import FewRows
from convcvx.solution import Solution
from convcvx.solvers import sliding_frank_wolfe
from convcvx.solvers.master.table import solve_master
from convcvx.solvers.slide.joint import slide_lbfgs
from convcvx.solvers.slide.kinks import _held
from convcvx.solvers.slide.objective import FewRowsObjective, PassObjective


def problem_and_rows(**options) -> tuple[Problem, FewRows]:
    problem = flat_problem(**options)
    few = FewRows.of(problem.responses)
    assert few is not None
    return problem, few


def network(problem: Problem, m: int, seed: int = 0) -> Solution:
    filters, weights, intercept = random_parameters(problem, m, seed)
    return Solution.empty(problem.responses.dim, problem.responses.n_cells, problem.n_outputs).with_parameters(
        filters, weights, intercept
    )


def searched(problem: Problem, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A dual point, and what a thorough search finds there."""
    dual_point = torch.randn(problem.n, problem.n_outputs, generator=torch.Generator().manual_seed(seed)).double()
    dual_point = problem.in_domain(dual_point / problem.n)
    return dual_point, LocalOracle(thorough=True)(problem, dual_point, n_filters=20, seed=seed)


@pytest.fixture
def by_gradients(monkeypatch):
    """Have everything done as where rows are many."""
    return lambda: monkeypatch.setattr(FewRows, "of", classmethod(lambda cls, responses: None))


@given(
    n=st.integers(3, 6),
    n_patches=st.integers(1, 3),
    n_outputs=st.integers(2, 3),
    pooling=st.sampled_from(["global", "none"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_what_climbs_report_is_their_g_and_filters_have_unit_norm(n, n_patches, n_outputs, pooling, seed):
    problem, _ = problem_and_rows(n=n, n_patches=n_patches, dim=9, n_outputs=n_outputs, pooling=pooling, seed=seed)
    dual_point, found = searched(problem, seed)
    torch.testing.assert_close(found.values, g(problem, found.filters, dual_point), rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(found.filters.norm(dim=1), torch.ones(len(found.filters)).double())


@pytest.mark.parametrize(("n_patches", "n_outputs"), [(1, 2), (2, 3)])
def test_climbs_find_the_maximum_that_enumeration_proves(n_patches, n_outputs):
    for seed in range(5):
        problem, _ = problem_and_rows(n=6 // n_patches, n_patches=n_patches, dim=3, n_outputs=n_outputs, seed=seed)
        dual_point, found = searched(problem, seed)
        exact = ExactOracle()(problem, dual_point)
        assert (1 - 1e-4) * exact.g_max <= found.g_max <= exact.g_max * (1 + 1e-9)


def test_exact_climbs_find_more_than_gradients_do(by_gradients):
    problem, _ = problem_and_rows(n=50, n_patches=1, dim=64, n_outputs=2, beta=1e-3)
    solution = sliding_frank_wolfe(problem, LocalOracle(), Budget(tol=1e-3, max_rounds=3))
    dual_point = problem.dual_point(problem.responses.predict(solution.filters, solution.weights, solution.intercept))
    exact = LocalOracle()(problem, dual_point, starts=solution.filters, target=math.inf)
    by_gradients()
    assert LocalOracle(thorough=True)(problem, dual_point, starts=solution.filters).g_max < exact.g_max


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
@pytest.mark.parametrize(("pooling", "intercept"), [(None, True), ("2x1", True), ("none", False)])
def test_the_objective_from_rows_is_that_of_the_passes(loss, pooling, intercept):
    problem, few = problem_and_rows(
        n=8, n_patches=4, dim=20, n_outputs=3, pooling=pooling, intercept=intercept, loss=loss
    )
    solution = network(problem, 5)
    rows, passes = FewRowsObjective(problem, few, solution), PassObjective(problem, solution)
    rows._kinks.along = lambda filters: filters
    point = passes.start + 0.1 * np.random.default_rng(0).standard_normal(len(passes.start))
    value, slopes = rows(point)
    expected, others = passes(point)
    assert value == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(slopes, others, rtol=1e-9, atol=1e-12)


def test_filters_slide_along_the_kinks_that_they_have_come_to():
    problem, few = problem_and_rows(n=30, n_patches=1, dim=32, n_outputs=2, beta=1e-3)
    solution = sliding_frank_wolfe(problem, LocalOracle(), Budget(tol=1e-3, max_rounds=3))
    objective = FewRowsObjective(problem, few, solution)
    start = objective.network(objective.start)[0]
    held = (start @ torch.from_numpy(few.flat).T).abs() < 1e-9 * start.norm(dim=1, keepdim=True)
    held &= torch.from_numpy(_held(problem, few, solution))  # not where the pull has turned since it came there
    assert int(held.sum()) > len(start)  # they have come to kinks
    slid = slide_lbfgs(problem, solution, 1e-9)
    left = (slid.filters @ torch.from_numpy(few.flat).T)[held].abs()
    assert slid.n_filters == solution.n_filters
    assert float(left.max()) < 1e-9 * float(np.abs(few.flat).max())


def test_a_row_that_pulls_a_filter_across_its_kink_does_not_hold_it():
    problem, few = problem_and_rows(n=10, n_patches=1, dim=12, n_outputs=2, beta=1e-3)
    row = torch.from_numpy(few.flat[0])
    across = torch.linalg.qr(torch.stack([row, torch.ones(12).double()]).T)[0][:, 1]
    weight = problem.dual_point(problem.constant_predictions())[:1] * 1e-3  # a larger response lowers the loss
    for sign, holds in ((1, False), (-1, True)):
        solution = network(problem, 1).with_parameters(across[None], sign * weight[None], torch.zeros(2).double())
        objective = FewRowsObjective(problem, few, solution)
        step = objective._rows[:1]
        assert (np.linalg.norm(objective._kinks.along(step)) < 1e-6 * np.linalg.norm(step)) == holds


def test_a_slide_along_kinks_reaches_as_low_as_one_across(by_gradients):
    """Within what the last bits of a start change, which is a per cent either way; both lower the objective by more."""
    made = [problem_and_rows(n=30, n_patches=1, dim=32, n_outputs=2, beta=1e-3, seed=seed)[0] for seed in range(4)]
    begun = [sliding_frank_wolfe(problem, LocalOracle(), Budget(tol=1e-3, max_rounds=3)) for problem in made]

    def reached(tol: float) -> np.ndarray:
        slid = [slide_lbfgs(problem, solution, tol) for problem, solution in zip(made, begun, strict=True)]
        found = [solve_master(problem, one.filters, tol=1e-6) for problem, one in zip(made, slid, strict=True)]
        return np.array([one.objective for one in found])

    before = [solve_master(problem, one.filters, tol=1e-6).objective for problem, one in zip(made, begun, strict=True)]
    along = reached(1e-9)
    by_gradients()
    assert abs(np.log(along / reached(1e-9)).mean()) < 0.01
    assert np.log(before / along).mean() > 0.02


def test_rows_are_few_or_not_by_their_number_alone():
    assert FewRows.of(flat_problem(n=16, n_patches=1, dim=8).responses) is not None
    assert FewRows.of(flat_problem(n=17, n_patches=1, dim=8).responses) is None
    assert FewRows.of(flat_problem(n=16, n_patches=1, dim=8).with_dtype(torch.float32).responses) is None
