"""The master against cvxpy with Clarabel, its own claims recomputed, and awkward Gram matrices."""

from __future__ import annotations

import itertools

import cvxpy as cp
import numpy as np
import pytest
import torch
from helpers.problems import digits_problem, flat_problem, random_parameters
from torch import Tensor

from convcvx.losses.table import LOSSES
from convcvx.patches import PatchSpec
from convcvx.problem import Problem
from convcvx.solvers.master import smooth
from convcvx.solvers.master import squared as group_lasso
from convcvx.solvers.master.table import MasterResult, solve_master
from convcvx.training.plan import build_problem


def reference(problem: Problem, filters: Tensor) -> float:
    """The optimal objective by Clarabel."""
    design = problem.responses.matrix(filters).flatten(1).numpy()
    targets, n, cells = problem.targets.numpy(), problem.n, problem.responses.n_cells
    weights = cp.Variable((design.shape[1], problem.n_outputs))
    shift = cp.Variable((1, problem.n_outputs))
    predictions = design @ weights + (np.ones((n, 1)) @ shift if problem.intercept else 0)
    limits: list[cp.Constraint] = []
    if problem.loss.name == "squared":
        data = cp.sum_squares(predictions - targets) / 2
    elif problem.loss.name == "bce":
        data = cp.sum(cp.logistic(predictions)) - cp.sum(cp.multiply(targets, predictions))
    elif problem.loss.name == "squared-hinge":
        short = cp.Variable(targets.shape)  # of the margin: on squares of maxima Clarabel often fails
        limits, data = [short >= 1 - cp.multiply(2 * targets - 1, predictions)], cp.sum_squares(short)
    elif problem.loss.name == "huber":
        data = cp.sum(cp.huber(predictions - targets, 1)) / 2
    else:
        data = cp.sum(cp.log_sum_exp(predictions, axis=1)) - cp.sum(cp.multiply(targets, predictions))
    groups = [cp.norm(cp.vec(weights[j : j + cells], order="F")) for j in range(0, len(filters) * cells, cells)]
    program = cp.Problem(cp.Minimize(data / n + problem.beta * cp.sum(groups)), limits)
    return program.solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)


def recomputed(problem: Problem, filters: Tensor, result: MasterResult) -> tuple[float, float]:
    """Objective and relative gap over these filters, from the weights alone."""
    predictions = problem.responses.predict(filters, result.weights, result.intercept)
    primal = problem.primal(predictions, result.weights)
    point = problem.dual_point(predictions)
    largest = problem.responses.correlate(filters, point).flatten(1).norm(dim=1).max()
    return primal, (primal - problem.dual(point, float(largest))) / primal


def awkward_filters(problem: Problem, m: int, seed: int) -> Tensor:
    """Random filters, one of them twice, and one that no patch excites much."""
    filters, _, _ = random_parameters(problem, m, seed)
    rows = problem.responses.rows(slice(None)).flatten(0, 1)
    return torch.cat([filters, filters[:1], -torch.nn.functional.normalize(rows.mean(dim=0)[None])])


slow = pytest.mark.slow
everywhere = pytest.mark.parametrize("loss", LOSSES)
most = pytest.mark.parametrize(
    "loss", [pytest.param(loss, marks=[slow] * (loss == "squared-hinge")) for loss in LOSSES]
)
"""Quick for all losses but the one whose Newton steps take the longest."""


@everywhere
@pytest.mark.parametrize(
    ("beta", "n_outputs", "intercept"),
    [
        (0.05, 2, False),
        (0.003, 3, True),
        *(pytest.param(*rest, marks=slow) for rest in [(0.05, 2, True), (0.003, 3, False)]),
    ],
)
@pytest.mark.parametrize("pooling", [None, "2x1", "none"])
def test_the_master_agrees_with_clarabel(loss, beta, n_outputs, intercept, pooling):
    problem = flat_problem(18, n_outputs=n_outputs, beta=beta, loss=loss, intercept=intercept, pooling=pooling)
    filters = awkward_filters(problem, 5, seed=n_outputs)
    result = solve_master(problem, filters, tol=1e-8)
    assert result.objective == pytest.approx(reference(problem, filters), rel=1e-6)
    primal, rel_gap = recomputed(problem, filters, result)
    assert result.objective == pytest.approx(primal, rel=1e-9)
    assert result.rel_gap <= 1e-8
    assert rel_gap <= 1e-8 + 1e-12


@everywhere
def test_negative_control_other_weights_have_a_gap_and_another_objective(loss):
    problem = flat_problem(18, beta=0.003, loss=loss)
    filters = awkward_filters(problem, 5, seed=0)
    result = solve_master(problem, filters, tol=1e-8)
    worse = MasterResult(1.01 * result.weights, result.intercept, 0.0, 0.0, 0)
    primal, rel_gap = recomputed(problem, filters, worse)
    assert rel_gap > 1e-5
    assert primal > result.objective * (1 + 1e-6)
    assert solve_master(problem.with_beta(0.0031), filters).objective != pytest.approx(reference(problem, filters))


def tolerances() -> list:
    """For all losses. The middle one is slow, and all are for the squared hinge, where they take the longest."""
    left = {(1e-4, loss) for loss in LOSSES} | {(tol, "squared-hinge") for tol in (1e-2, 1e-8)}
    pairs = itertools.product((1e-2, 1e-4, 1e-8), LOSSES)
    return [pytest.param(*pair, marks=[slow] * (pair in left)) for pair in pairs]


@pytest.mark.parametrize(("tol", "loss"), tolerances())
def test_the_claimed_gap_is_true(loss, tol):
    problem = flat_problem(30, beta=0.001, loss=loss, pooling="none")
    filters = awkward_filters(problem, 12, seed=1)
    result = solve_master(problem, filters, tol=tol)
    primal, rel_gap = recomputed(problem, filters, result)
    assert result.rel_gap <= tol
    assert primal == pytest.approx(result.objective, rel=1e-9)
    assert rel_gap <= max(tol, result.rel_gap) + 1e-12


@everywhere
def test_a_warm_start_at_the_optimum_is_accepted_at_once(loss):
    problem = flat_problem(30, beta=0.003, loss=loss)
    filters = awkward_filters(problem, 8, seed=2)
    cold = solve_master(problem, filters, tol=1e-8)
    warm = solve_master(problem, filters, cold.weights, cold.intercept, tol=1e-8)
    assert cold.iterations > 0
    assert warm.iterations == 0
    assert warm.objective == pytest.approx(cold.objective, rel=1e-12)


@most
def test_a_poor_start_does_no_harm(loss):
    problem = flat_problem(30, beta=0.003, loss=loss)
    filters = awkward_filters(problem, 8, seed=2)
    cold = solve_master(problem, filters, tol=1e-8)
    start = 10 * torch.randn(cold.weights.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    warm = solve_master(problem, filters, start, torch.ones(3).double(), tol=1e-8)
    assert warm.objective == pytest.approx(cold.objective, rel=1e-6)


@most
@pytest.mark.parametrize("n", [4, 9])
def test_singular_gram_matrices(loss, n):
    """More filters than images, every filter three times, some of them dead."""
    problem = flat_problem(n, n_patches=1, beta=1e-3, loss=loss)
    base, _, _ = random_parameters(problem, 10, seed=3)
    filters = torch.cat([base, base, base])
    result = solve_master(problem, filters, tol=1e-6)
    assert result.rel_gap <= 1e-6
    assert recomputed(problem, filters, result)[1] <= 1e-6 + 1e-10
    assert result.objective == pytest.approx(reference(problem, base), rel=2e-6)


@everywhere
def test_only_dead_filters_or_none(loss):
    problem = flat_problem(12, n_patches=1, loss=loss)
    constant = problem.primal(problem.constant_predictions(), torch.zeros(0, 1, 3))
    positive = problem.responses.images.abs()  # a filter (-1, -1) never fires
    problem.responses.images.copy_(positive)
    for filters in (torch.zeros(0, 2).double(), -torch.ones(1, 2).double() / 2**0.5):
        result = solve_master(problem, filters, tol=1e-8)
        assert result.objective == pytest.approx(constant, rel=1e-9)
        assert result.rel_gap <= 1e-8
        assert float(result.weights.abs().sum()) == 0


@everywhere
def test_a_large_beta_empties_the_network(loss):
    problem = flat_problem(18, beta=100.0, loss=loss)
    result = solve_master(problem, awkward_filters(problem, 5, seed=0), tol=1e-8)
    assert float(result.weights.flatten(1).norm(dim=1).max()) < 1e-10
    assert result.rel_gap <= 1e-8


@pytest.mark.parametrize("loss", [pytest.param(name, marks=[slow] * (name == "squared-hinge")) for name in LOSSES])
def test_a_tiny_beta_interpolates(loss):
    problem = flat_problem(9, n_patches=1, beta=1e-7, loss=loss)
    filters, _, _ = random_parameters(problem, 30, seed=0)
    result = solve_master(problem, filters, tol=1e-3)
    assert result.rel_gap <= 1e-3
    assert recomputed(problem, filters, result)[1] <= 2e-3


def test_collinear_responses_do_not_slow_the_newton_steps():
    """Filters a thousandth of a radian apart: first-order methods need thousands of sweeps here."""
    problem = flat_problem(40, beta=1e-3)
    angles = 0.3 + 1e-3 * torch.arange(50).double()
    result = solve_master(problem, torch.stack([angles.cos(), angles.sin()], dim=1), tol=1e-8)
    assert result.rel_gap <= 1e-8
    assert result.iterations <= 40


def test_of_many_correlated_filters_few_enter(monkeypatch):
    """All 300 violate dual feasibility at first; the worst enter, and the optimum is the same as with all at once."""
    problem = flat_problem(60, beta=1e-3)
    angles = torch.linspace(0, 2 * torch.pi, 301, dtype=torch.float64)[:-1]
    filters = torch.stack([angles.cos(), angles.sin()], dim=1)
    widest, derivatives = [], group_lasso.GramNewton._derivatives

    def spy(self, slopes, pulls, groups, sizes):
        widest.append(len(groups))
        return derivatives(self, slopes, pulls, groups, sizes)

    monkeypatch.setattr(group_lasso.GramNewton, "_derivatives", spy)
    few = solve_master(problem, filters, tol=1e-9)
    assert max(widest) <= 100
    monkeypatch.setattr(group_lasso, "ENTERING", 300)
    widest.clear()
    everything = solve_master(problem, filters, tol=1e-9)
    assert max(widest) > 100  # negative control
    assert few.objective == pytest.approx(everything.objective, rel=2e-9)
    assert recomputed(problem, filters, few)[1] <= 2e-9


def test_single_precision_reaches_its_tolerance_at_a_tiny_beta(monkeypatch):
    """A Gram matrix computed in float32 has eigenvalues below zero that outweigh the ridges β/η."""
    problem = digits_problem(150, 1e-7, spec=PatchSpec(3), pooling=2, dtype=torch.float32)
    filters, _, _ = random_parameters(problem, 60, seed=0)
    assert _solved(problem, filters)
    # Negative control: the float32 Gram matrix as it is.
    monkeypatch.setattr(Problem, "with_dtype", lambda self, dtype: self)
    assert not _solved(problem, filters)


def test_the_cross_entropy_bears_the_rounding_of_single_precision():
    """In float32 the Gram matrix of correlated responses is not positive definite, not even with the ridges on it."""
    options = {"spec": PatchSpec(3), "pooling": 2, "loss": "cross-entropy", "dtype": torch.float32}
    problem = digits_problem(150, 1e-5, **options)
    filters, _, _ = random_parameters(problem, 60, seed=0)
    result = solve_master(problem, filters, tol=1e-3)
    exact = solve_master(problem.with_dtype(torch.float64), filters, tol=1e-3)
    assert max(result.rel_gap, exact.rel_gap) <= 1e-3
    assert result.objective == pytest.approx(exact.objective, rel=1e-3)
    assert recomputed(problem.with_dtype(torch.float64), filters, result)[1] <= 2e-3


def _solved(problem: Problem, filters: Tensor) -> bool:
    try:
        result = solve_master(problem, filters, tol=1e-3)
    except torch.linalg.LinAlgError:
        return False
    return recomputed(problem.with_dtype(torch.float64), filters, result)[1] <= 5e-3


def test_groups_that_are_clearly_in_do_not_slow_the_conjugate_gradients():
    """Ten images in ten classes, filters in clusters: where the norms' flat directions are preconditioned as if they
    were curved, a hundred steps end at a gap of 2e-6."""
    problem = flat_problem(10, n_patches=1, dim=4, n_outputs=10, beta=0.03, loss="cross-entropy", pooling="none")
    base, _, _ = random_parameters(problem, 15, seed=0)
    clusters = [base + 1e-3 * random_parameters(problem, 15, seed=k)[0] for k in range(1, 5)]
    result = solve_master(problem, torch.nn.functional.normalize(torch.cat(clusters)), tol=1e-8)
    assert result.rel_gap <= 1e-8
    assert result.iterations <= 60


@most
def test_a_bad_start_does_not_keep_the_optimum_away(loss):
    """Far out the cross-entropy is flat in most directions: a warm start worse than no filters is dropped."""
    problem = flat_problem(12, n_outputs=4, beta=0.01, loss=loss)
    filters, weights, intercept = random_parameters(problem, 12, seed=1, scale=300.0)
    cold = solve_master(problem, filters, tol=1e-9)
    warm = solve_master(problem, filters, weights, intercept, tol=1e-9)
    assert warm.objective == pytest.approx(cold.objective, rel=1e-8)


def test_where_a_loss_is_linear_a_newton_step_is_shortened_until_it_helps():
    """All outputs lie outside Huber's bend at first, so that next to nothing limits a step."""
    for seed in range(20):
        problem = flat_problem(5, dim=3, n_outputs=2, seed=seed, loss="huber:0.3", pooling="2x1")
        filters, _, _ = random_parameters(problem, 40, seed)
        constant = problem.dual_point(problem.constant_predictions())
        largest = float(problem.responses.correlate(filters, constant).flatten(1).norm(dim=1).max())
        problem = problem.with_beta(1e-4 * largest)
        result = solve_master(problem, filters, tol=1e-3)
        assert result.rel_gap <= 1e-3
        assert recomputed(problem, filters, result)[1] <= 1e-3


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "squared"])
def test_at_a_rough_gap_no_group_that_counts_is_dropped(loss, monkeypatch):
    """As in a round of a training. What rough weights pull at says of many that they are idle; without those Newton's
    method would begin anew, and take 40 to 100 steps."""
    problem = digits_problem(100, loss=loss)
    filters, _, _ = random_parameters(problem, 40, seed=1)
    constant = problem.dual_point(problem.constant_predictions())
    largest = float(problem.responses.correlate(filters, constant).flatten(1).norm(dim=1).max())
    problem = problem.with_beta(0.003 * largest)
    seen = []

    def drop_idle(state, *arguments):
        before, _ = state.primal_dual()
        dropped = original(state, *arguments)
        seen.append((before, state.primal_dual()[0]))
        return dropped

    original = smooth._State.drop_idle
    monkeypatch.setattr(smooth._State, "drop_idle", drop_idle)
    first = solve_master(problem, filters[:20], tol=1e-2)
    weights = torch.cat([first.weights, torch.zeros_like(first.weights)])
    second = solve_master(problem, filters, weights, first.intercept, tol=1e-2)
    assert first.iterations + second.iterations <= 30
    assert recomputed(problem, filters, second)[1] <= 1e-2
    assert seen
    assert all(after <= before * (1 + 1e-12) for before, after in seen)


def test_a_gram_matrix_that_rounding_made_indefinite_is_computed_in_double_precision(monkeypatch):
    """Filters that all but coincide, at a weight decay that single precision cannot see beside them."""
    monkeypatch.setattr(group_lasso, "NOISE", 1e9)  # the estimate of the noise, which is no bound, says all is well
    problem = digits_problem(200, 1e-8, spec=PatchSpec((3, 3)), pooling=2, dtype=torch.float32)
    random = torch.Generator().manual_seed(0)
    filters = torch.nn.functional.normalize(torch.randn(12, 9, generator=random, dtype=torch.float64))
    filters = torch.nn.functional.normalize(torch.cat([filters, filters + 1e-6 * filters.roll(1, 0)]))
    solved = solve_master(problem, filters, tol=1e-4)
    exact = solve_master(problem.with_dtype(torch.float64), filters, tol=1e-4)
    assert solved.objective == pytest.approx(exact.objective, rel=0.05)


@pytest.mark.parametrize(
    ("loss", "share", "tol"),
    [("huber:0.3", 1e-4, 1e-6), pytest.param("squared-hinge", 1e-5, 1e-4, marks=pytest.mark.slow)],
)
def test_losses_of_quadratic_pieces_are_solved_at_small_beta(loss, share, tol):
    """Where Newton steps that are a tenth off end short of the tolerance."""
    random = torch.Generator().manual_seed(1)
    images, classes = torch.rand(40, 1, 5, 5, generator=random), torch.randint(0, 3, (40,), generator=random)
    problem = build_problem(images, classes, loss=loss, spec=PatchSpec((3, 3), stride=2, rank=4), pooling=2)
    filters = torch.randn(8, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    filters /= filters.norm(dim=1, keepdim=True)
    constant = problem.dual_point(problem.constant_predictions())
    largest = float(problem.responses.correlate(filters, constant).flatten(1).norm(dim=1).max())
    assert solve_master(problem.with_beta(share * largest), filters, tol=tol).rel_gap <= tol
