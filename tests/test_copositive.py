"""The copositive relaxation: its bound holds whatever the backend says, its network is real, its size is minded."""

from __future__ import annotations

import types

import cvxpy as cp
import numpy as np
import pytest
import torch
from helpers.problems import flat_problem

import convcvx
from convcvx.arrangements.cells import cells, facets
from convcvx.budget import NEVER, Budget, Deadline
from convcvx.certificate import certify_parameters
from convcvx.errors import ConvergenceWarning, InputError
from convcvx.oracles import CopositiveOracle, ExactOracle
from convcvx.oracles import copositive as relaxation
from convcvx.problem import Problem
from convcvx.solvers.copositive import copositive
from convcvx.solvers.programs.cones import Cones, check_size
from convcvx.solvers.programs.convex import _run, factorise, solve_program
from convcvx.solvers.sliding_frank_wolfe import sliding_frank_wolfe
from convcvx.training.plan import solve_problem

# The oracle


def random_dual_point(problem, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    point = torch.randn(problem.n, problem.n_outputs, generator=random, dtype=torch.float64)
    return point - point.mean(dim=0)


@pytest.mark.parametrize("dim", [1, 2, 3, 4])
@pytest.mark.parametrize("pooling", [None, "none"])
def test_the_relaxed_bound_meets_the_exact_one(dim, pooling):
    problem = flat_problem(6, n_patches=2, dim=dim, pooling=pooling, seed=dim)
    dual_point = random_dual_point(problem, dim)
    exact, found = ExactOracle()(problem, dual_point, n_filters=2), CopositiveOracle()(problem, dual_point, n_filters=2)
    assert found.scope == "global"
    assert float(exact.values[0]) <= found.upper_bound <= exact.upper_bound * (1 + 1e-8)
    assert float(found.values[0]) == pytest.approx(float(exact.values[0]), rel=1e-8)
    assert found.stats["looseness"] < 1e-8
    shorter = CopositiveOracle()(problem, 0.9 * dual_point)
    assert found.upper_bound > 1.01 * float(shorter.upper_bound)  # negative control


def test_the_bound_holds_whatever_the_backend_answers(monkeypatch):
    problem = flat_problem(6, n_patches=2, dim=3)
    dual_point = random_dual_point(problem)
    exact = float(ExactOracle()(problem, dual_point).values[0])
    random = np.random.default_rng(0)

    class Liar:
        def __init__(self, p, q, a, b, cones, settings):
            self.sizes = len(q), len(b)

        def solve(self):
            answers = random.standard_normal(self.sizes[0]) * 10.0 ** random.integers(-8, 2)
            return types.SimpleNamespace(x=np.where(answers > 1, np.nan, answers), z=np.full(self.sizes[1], np.nan))

    monkeypatch.setattr("clarabel.DefaultSolver", Liar)
    found = CopositiveOracle()(problem, dual_point)
    assert found.upper_bound >= exact
    assert found.upper_bound > exact * (1 + 1e-3)  # negative control: the lies did arrive


def test_too_many_cells_are_refused():
    problem = flat_problem(200, n_patches=3, dim=4)
    with pytest.raises(InputError, match=r"oracle='copositive' would list .* use oracle='branch-and-bound'"):
        CopositiveOracle()(problem, random_dual_point(problem))


def test_certificates_can_rest_on_the_relaxation():
    problem = flat_problem(10, dim=2)
    solution = sliding_frank_wolfe(problem, ExactOracle(), Budget(tol=1e-6))
    certificate = certify_parameters(problem, solution.filters, solution.weights, oracle="copositive", tol=1e-6)
    assert (certificate.oracle, certificate.scope) == ("copositive", "global")
    assert -1e-9 <= certificate.rel_gap <= 2e-6


# Cones


@pytest.mark.parametrize("dim", [1, 2, 3, 4])
def test_facets_describe_the_cell(dim):
    rows = np.random.default_rng(dim).standard_normal((9, dim))
    points = np.random.default_rng(0).standard_normal((3000, dim))
    for cell in cells(rows):
        normals = facets(rows, cell)
        inside = (points @ normals.T > 0).all(axis=1)
        assert (((points @ rows.T > 0) == cell.pattern).all(axis=1) == inside).all()
        fewer = (points @ normals[1:].T > 0).all(axis=1)  # negative control: each facet cuts something off
        assert dim > 2 or fewer.sum() > inside.sum()


def test_thin_cones_are_bounded_as_well_as_wide_ones():
    """In the coordinates of the data an opening of 1e-3 cost half the digits."""
    axis = np.array([0.6, 0.8])
    for opening in (1.0, 1e-2, 1e-3):
        turn = np.array([[np.cos(opening), -np.sin(opening)], [np.sin(opening), np.cos(opening)]])
        rays = np.stack([axis, axis @ turn.T])
        normals = np.linalg.inv(rays).T
        matrix = np.array([[2.0, -3.0], [0.3, 0.4]])
        angles = np.arctan2(*axis[::-1]) + np.linspace(0, opening, 10001)
        truth = np.linalg.norm(matrix @ np.stack([np.cos(angles), np.sin(angles)]), axis=0).max()
        bound, _ = relaxation.relax(matrix, normals)
        assert truth * (1 - 1e-9) <= bound <= truth * (1 + 1e-6)


@pytest.mark.parametrize(("dim", "m", "count"), [(1, 1, 1), (2, 2, 3), (3, 3, 4), (3, 5, 3), (4, 6, 4)])
def test_factorisations_stay_in_the_cone(dim, m, count):
    random = np.random.default_rng(dim)
    normals = random.standard_normal((m, dim))
    normals *= np.where(normals[:, :1] < 0, -1, 1)
    points = np.abs(random.standard_normal((4000, dim))) * np.where(np.arange(dim) > 0, random.choice([-1, 1], dim), 1)
    points = np.concatenate([points, random.standard_normal((20000, dim))])
    inside = points[(points @ normals.T > 0.05).all(axis=1)][:count]
    assert len(inside) == count
    filters = factorise(inside.T @ inside, normals)
    np.testing.assert_allclose(filters.T @ filters, inside.T @ inside, atol=1e-4)
    assert (filters @ normals.T).min() >= -1e-6


def test_negative_control_what_is_no_mixture_does_not_factorise():
    moment = np.array([[1.0, -0.5], [-0.5, 1.0]])  # F U Fᵀ has negative entries
    filters = factorise(moment, np.eye(2))
    np.testing.assert_allclose(filters.T @ filters, moment, atol=1e-12)
    assert filters.min() < -0.1


# The solver

CASES = [
    {"loss": "squared"},
    {"loss": "squared", "pooling": "none", "intercept": False},
    {"loss": "cross-entropy"},
    pytest.param({"loss": "squared", "dim": 3, "n": 7, "n_patches": 1}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", CASES)
def test_the_solver_reaches_the_optimum_with_its_own_proof(case):
    problem = flat_problem(**{"n": 8, "n_patches": 2, "beta": 0.02, **case})
    seen = []
    solution = solve_problem(problem, Budget(tol=1e-6), solver="copositive", callback=seen.append)
    record = solution.history[-1]
    assert (solution.status, record["scope"], seen) == ("converged", "global", [seen[0]])
    reference = sliding_frank_wolfe(problem, ExactOracle(), Budget(tol=1e-6)).history[-1]
    assert record["objective"] == pytest.approx(reference["objective"], rel=2e-6)
    assert record["lower_bound"] <= reference["objective"]
    assert record["relaxation"] == pytest.approx(reference["objective"], rel=1e-5)
    predictions = problem.responses.predict(solution.filters, solution.weights, solution.intercept)
    assert problem.primal(predictions, solution.weights) == record["objective"]
    assert solution.n_filters <= problem.targets.numel()


@pytest.mark.parametrize("n_outputs", [1, 2])
def test_both_backends_agree(n_outputs):
    problem = flat_problem(8, n_patches=1, beta=0.02, n_outputs=max(2, n_outputs), intercept=False)
    if n_outputs == 1:
        problem = Problem.build(problem.responses, torch.randn(8).double(), 0.02, intercept=False)
    cones = Cones.all(problem)
    values = [solve_program(problem, cones, backend=backend, tol=1e-7).value for backend in ("clarabel", "scs")]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert values[0] != pytest.approx(solve_program(problem.with_beta(0.021), cones).value, rel=1e-5)


def test_a_gap_above_tol_is_not_called_converged():
    """A backend stopped at a loose tolerance leaves a gap: the status says so, and the bound still holds."""
    problem = flat_problem(8, n_patches=2, beta=0.02)
    optimum = sliding_frank_wolfe(problem, ExactOracle(), Budget(tol=1e-6)).history[-1]["objective"]
    solution = copositive(problem, ExactOracle(), Budget(tol=1e-14))
    record = solution.history[-1]
    assert solution.status == "relaxation_gap"
    assert record["rel_gap"] > 1e-14
    assert record["lower_bound"] <= optimum


def test_sampled_cones_bound_from_above():
    problem = flat_problem(8, n_patches=2, beta=0.02)
    exact = solve_program(problem, Cones.all(problem)).value
    few = solve_program(problem, Cones.sample(problem, 4)).value
    many = solve_program(problem, Cones.sample(problem, 2000)).value
    assert exact * (1 + 1e-4) < few
    assert many == pytest.approx(exact, rel=1e-6)


def test_size_is_warned_of_then_refused():
    problem = flat_problem(10)
    check_size(problem, 100, 2)
    with pytest.warns(UserWarning, match=r"100,000 activation cones times 10 images: 6.0e\+06 coefficients"):
        check_size(problem, 100_000, 2)
    with pytest.raises(InputError, match=r"6.0e\+07 coefficients, above 5e\+07; use solver='sliding-fw'"):
        check_size(problem, 1_000_000, 2)


def test_a_filter_budget_cuts_and_says_so():
    random = np.random.default_rng(0)
    x = random.standard_normal((12, 2))
    with pytest.warns(ConvergenceWarning, match="stopped by max_filters: raise max_filters"):
        solution = convcvx.solve(x, np.arange(12) % 3, 0.005, solver="copositive", max_filters=2, tol=1e-6)
    assert solution.n_filters <= 2


def test_images_that_are_all_zero_leave_the_constant():
    problem = flat_problem(8)
    problem.responses.images.zero_()
    solution = copositive(problem, ExactOracle())
    assert (solution.n_filters, solution.status) == (0, "converged")


class Stubborn:
    """A program that every solver fails at, but for one whose options satisfy `yields`."""

    def __init__(self, yields):
        self.yields, self.asked = yields, []

    def solve(self, **options):
        self.asked.append(options)
        if not self.yields(options):
            raise cp.SolverError("stalled")


def test_a_stalled_backend_is_asked_again_by_shorter_steps_then_the_other_one():
    program = Stubborn(lambda options: "max_step_fraction" in options)
    _run(program, "clarabel", 1e-9, Deadline.after(5.0))
    assert [options["tol_gap_abs"] for options in program.asked] == [1e-9, 1e-9]
    assert all(0 < options["time_limit"] <= 5.0 for options in program.asked)
    for backend, last in (("clarabel", "SCS"), ("scs", "CLARABEL")):
        program = Stubborn(lambda options, last=last: options["solver"] == last)
        _run(program, backend, 1e-9, NEVER)
        assert {options["solver"] for options in program.asked[:-1]} == {backend.upper()}
        with pytest.raises(InputError, match="no backend solves this program: stalled"):
            _run(Stubborn(lambda options: False), backend, 1e-9, NEVER)
