"""Losses and the problem: conjugates, derivatives, weak duality for arbitrary points, dual scaling, beta_max."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.problems import flat_problem, problem_of, random_parameters
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar
from torch import Tensor

from convcvx import beta_max
from convcvx.budget import Budget
from convcvx.errors import ConvcvxError, InputError
from convcvx.losses.shares import Shares
from convcvx.losses.table import LOSSES, get_loss
from convcvx.losses.targets import encode_targets
from convcvx.oracles import ExactOracle
from convcvx.problem import Problem
from convcvx.training.plan import find_beta_max, solve_problem

losses = pytest.mark.parametrize("name", LOSSES)


def rows(n: int, c: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def targets_of(name: str, n: int, c: int, seed: int) -> Tensor:
    """Real targets, rows of probabilities, probabilities one by one, or labels."""
    drawn = rows(n, c, seed)
    kinds = {"cross-entropy": drawn.softmax(dim=1), "bce": drawn.sigmoid(), "squared-hinge": (drawn > 0).double()}
    return kinds.get(name, drawn)


# Losses


def supremum(name: str, slope: Tensor, target: Tensor) -> float:
    """sup_f s·f - ℓ(f, y) by numerical ascent."""

    def negative(f: np.ndarray) -> float:
        f = torch.as_tensor(f)
        return float(get_loss(name).value(f[None], target[None])[0] - slope @ f)

    return max(-minimize(negative, start, method="BFGS", tol=1e-9).fun for start in (np.zeros(3), np.ones(3)))


@losses
@pytest.mark.parametrize("seed", range(4))
def test_conjugates_are_suprema(name, seed):
    target = targets_of(name, 1, 3, seed)
    drawn = rows(1, 3, seed + 10)
    slopes = {
        "squared": drawn,
        "huber": drawn.clamp(-0.9, 0.9),
        "squared-hinge": drawn.abs() * (1 - 2 * target),
    }
    slope = slopes.get(name, targets_of(name, 1, 3, seed + 10) - target)
    conjugate = float(get_loss(name).conjugate(slope, target)[0])
    assert supremum(name, slope[0], target[0]) == pytest.approx(conjugate, abs=1e-6)
    assert supremum(name, 0.9 * slope[0], target[0]) != pytest.approx(conjugate, abs=1e-6)  # negative control


def test_the_entropy_is_infinite_outside_the_simplex_and_zero_at_its_corners():
    conjugate = get_loss("cross-entropy").conjugate
    target = torch.tensor([[0.0, 1.0, 0.0]]).double()
    for q in ([0.6, 0.6, -0.2], [0.5, 0.4, 0.0], [1.5, 0.0, -0.5]):
        assert conjugate(torch.tensor([q]).double() - target, target) == torch.inf
    for q in torch.eye(3).double():
        assert conjugate(q - target, target) == 0


@losses
@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 30))
@settings(deadline=None, max_examples=40)
def test_fenchel_young(name, seed, scale):
    """ℓ(f) + ℓ*(s) ≥ s·f for any pair, with equality at s = ∇ℓ(f)."""
    loss, target = get_loss(name), targets_of(name, 4, 3, seed)
    f, other = rows(4, 3, seed + 1, scale), rows(4, 3, seed + 2, scale)
    for slope, equal in ((loss.gradient(f, target), True), (loss.gradient(other, target), False)):
        excess = loss.value(f, target) + loss.conjugate(slope, target) - (slope * f).sum(dim=1)
        assert bool((excess >= -1e-9 * scale**2).all())
        assert not equal or bool((excess <= 1e-9 * (1 + scale**2)).all())


@losses
def test_gradients_and_curvature(name):
    loss, target = get_loss(name), targets_of(name, 5, 3, 0)
    f, direction = rows(5, 3, 1).requires_grad_(), rows(5, 3, 2)
    assert torch.autograd.gradcheck(lambda f: loss.value(f, target), f)
    torch.testing.assert_close(
        torch.autograd.grad(loss.value(f, target).sum(), f)[0], loss.gradient(f, target).detach()
    )
    _, product = torch.autograd.functional.hvp(lambda f: loss.value(f, target).sum(), f.detach(), direction)
    torch.testing.assert_close(loss.hessian(f.detach(), target)(direction), product)
    assert bool(((direction * product).sum(1) <= loss.curvature * direction.square().sum(1) + 1e-12).all())


@losses
@pytest.mark.parametrize("scale", [0, 1, 30, 100])
def test_the_best_intercept_is_stationary_and_best(name, scale):
    loss, f, target = get_loss(name), rows(30, 3, 0, scale), encode_targets(torch.arange(30) % 3, name)
    shift = loss.best_intercept(f, target, Shares.equal(30))
    best = loss.value(f + shift, target).mean()
    assert float(loss.gradient(f + shift, target).mean(dim=0).abs().max()) < 1e-8 * (1 + scale)
    for seed in range(5):
        assert loss.value(f + shift + rows(1, 3, seed, 0.01 + 0.01 * scale), target).mean() >= best


def test_the_squared_loss_is_half_the_square():
    assert get_loss("squared").value(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])) == 12.5


# Targets


def test_targets_are_encoded():
    assert encode_targets(np.array([0, 2, 1]), "squared").tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert encode_targets(torch.tensor([0, 1], dtype=torch.uint8), "cross-entropy", 3).shape == (2, 3)
    assert encode_targets(np.array([False, True]), "squared").tolist() == [[1, 0], [0, 1]]
    assert encode_targets(np.array([0.5, 1.5]), "squared").tolist() == [[0.5], [1.5]]
    assert encode_targets(np.array([1, 1]), "squared", 2).tolist() == [[0, 1], [0, 1]]
    assert encode_targets(np.array([2020, 2019, 2020]), "squared").tolist() == [[0, 1], [1, 0], [0, 1]]
    assert encode_targets(np.array([[-5], [7]], dtype=np.int8), "cross-entropy").tolist() == [[1, 0], [0, 1]]
    assert encode_targets(np.array([2**64 - 1, 0], dtype=np.uint64), "squared").tolist() == [[0, 1], [1, 0]]
    assert encode_targets(np.array([[0.0, 1], [0, 1]]), "squared", 2).tolist() == [[0, 1], [0, 1]]
    assert encode_targets(np.array([[2, 1], [1, 2]]), "squared").tolist() == [[2, 1], [1, 2]]


@pytest.mark.parametrize(
    ("targets", "name", "n_classes", "message"),
    [
        (np.zeros((2, 2, 2)), "squared", None, r"targets must be \(n,\) classes or \(n, c\) real values; got shape"),
        (np.zeros(0), "squared", None, "targets must be"),
        (np.array([0, -1]), "squared", 2, "targets must be classes 0, 1, ...; got -1"),
        (np.array([[1.0, 0], [1, 0]]), "squared", None, "targets must have at least two classes; all of them are 0"),
        (np.array([[3], [3]]), "squared", None, "targets must have at least two classes; all of them are 3"),
        (np.array([1j, 2]), "squared", None, "targets must be whole or real numbers; got complex128"),
        (["a", "b"], "squared", None, "targets must be whole or real numbers; got <U1"),
        ([[1, 2], [3]], "squared", None, "targets must be an array of numbers"),
        (np.array([0, 0]), "squared", None, "targets must have at least two classes; all of them are 0"),
        (np.array([3, 3]), "squared", None, "targets must have at least two classes; all of them are 3"),
        (np.array([0, 5]), "squared", 3, "targets must be classes below 3; got 5"),
        (np.array([0.0, np.nan]), "squared", None, "targets must be finite; found NaN or infinity"),
        (np.array([[0.5, 0.6]]), "cross-entropy", None, "integer classes or rows of probabilities"),
        (np.array([[1.5, -0.5]]), "cross-entropy", None, "integer classes or rows of probabilities"),
        (np.array([0.0, 1.0]), "cross-entropy", None, "integer classes or rows of probabilities"),
    ],
)
def test_bad_targets_are_refused(targets, name, n_classes, message):
    with pytest.raises(InputError, match=message):
        encode_targets(targets, name, n_classes)


def test_probabilities_that_rounding_has_left_sum_to_one():
    rounded = rows(50, 3, 0).softmax(dim=1).float() * (1 + 5e-6)
    sums = encode_targets(rounded, "cross-entropy").sum(dim=1)
    assert float((sums - 1).abs().max()) < 1e-14
    assert float((rounded.double().sum(dim=1) - 1).abs().min()) > 1e-6


def test_bad_problems_are_refused():
    r = flat_problem(4).responses
    targets = torch.tensor([0, 1, 2, 0])
    for beta in (0, -1.0, float("nan"), float("inf"), "much", None):
        with pytest.raises(InputError, match="beta must be a positive float; got"):
            Problem.build(r, targets, beta)
    with pytest.raises(InputError, match=f"loss must be one of {', '.join(LOSSES)}; got 'hinge'"):
        Problem.build(r, targets, 1.0, loss="hinge")
    with pytest.raises(ConvcvxError, match="targets must have one row an image, 4; got 3"):
        Problem.build(r, targets[:3], 1.0)
    with pytest.raises(InputError, match="beta must be a positive float"):
        flat_problem(4).with_beta(0)


# Primal and dual


@losses
def test_the_primal_is_weight_decay_at_balanced_neurons(name):
    problem = flat_problem(loss=name, beta=0.3)
    filters, weights, intercept = random_parameters(problem, 5)
    norms = weights.flatten(1).norm(dim=1)
    predictions = problem.responses.predict(filters, weights, intercept)
    u, v = filters * norms.sqrt()[:, None], weights / norms.sqrt()[:, None, None]
    torch.testing.assert_close(problem.responses.predict(u, v, intercept), predictions)
    decay = 0.15 * float(u.square().sum() + v.square().sum())
    expected = float(problem.loss.value(predictions, problem.targets).mean()) + decay
    assert problem.primal(predictions, weights) == pytest.approx(expected)


CASES = st.fixed_dictionaries(
    {
        "loss": st.sampled_from(sorted(LOSSES)),
        "intercept": st.booleans(),
        "pooling": st.sampled_from([None, "none", "2x1"]),
        "beta": st.sampled_from([0.3, 0.03, 0.003]),
        "seed": st.integers(0, 50),
    }
)


@settings(deadline=None, max_examples=60)
@given(case=CASES, m=st.integers(0, 4), scale=st.sampled_from([0.01, 0.3, 3.0, 100.0]))
def test_weak_duality_for_arbitrary_networks(case, m, scale):
    """The dual value at any network's residual is below the primal value of any other network."""
    problem = flat_problem(8, **case)
    point = problem.dual_point(problem.responses.predict(*random_parameters(problem, m, case["seed"], scale)))
    bound = problem.dual(point, ExactOracle()(problem, point).g_max)
    assert np.isfinite(bound)
    for seed, size in enumerate([0.003, 0.03, 0.1, 0.3, 1.0]):
        filters, weights, intercept = random_parameters(problem, 3, 1000 + seed, size)
        predictions = problem.responses.predict(filters, weights, intercept)
        if problem.intercept:
            predictions = predictions + problem.best_intercept(predictions)
        assert bound <= problem.primal(predictions, weights) * (1 + 1e-12)
    constant = problem.constant_predictions()
    assert bound <= problem.primal(constant, torch.zeros(0, problem.responses.n_cells, 3)) * (1 + 1e-12)


def test_negative_control_a_wrong_maximum_breaks_weak_duality():
    problem = flat_problem(8, beta=0.003)
    point = problem.dual_point(problem.constant_predictions())
    best = solve_problem(problem, Budget(tol=1e-4)).history[-1]["objective"]
    g_max = ExactOracle()(problem, point).g_max
    assert problem.dual(point, g_max) <= best
    assert problem.dual(point, 0.01 * g_max) > best


def excess(problem: Problem, point: Tensor) -> tuple[float, float, float]:
    """|Σ Z_i|, and by how much y - nZ is negative or does not sum to one."""
    q = problem.targets - problem.n * point
    return float(point.sum(dim=0).abs().max()), float(-q.min()), float((q.sum(dim=1) - 1).abs().max())


@settings(deadline=None, max_examples=60)
@given(scale=st.sampled_from([0.0, 1.0, 30.0, 300.0, 1e4]), seed=st.integers(0, 1000), n=st.sampled_from([5, 40]))
@example(scale=1e4, seed=613, n=5)  # every probability is 0 or 1: the intercept's Newton step once was nan
def test_dual_points_are_feasible_to_rounding(scale, seed, n):
    problem = flat_problem(n, loss="cross-entropy", seed=seed)
    total, negative, mass = excess(problem, problem.dual_point(rows(n, 3, seed, scale)))
    assert total <= 1e-15
    assert negative <= 0
    assert mass <= 1e-13
    squared = flat_problem(n, loss="squared", seed=seed)
    assert excess(squared, squared.dual_point(rows(n, 3, seed, scale)))[0] <= 1e-15 * (1 + scale)


def test_negative_control_a_raw_residual_is_not_feasible():
    problem = flat_problem(loss="cross-entropy")
    assert excess(problem, problem.residual(rows(14, 3, 0)))[0] > 1e-3
    assert excess(problem, 3 * problem.residual(rows(14, 3, 0)))[1] > 1e-3


def test_a_class_without_targets_does_not_spoil_the_dual():
    """Its intercept runs off to minus infinity; the mixture with class frequencies once swallowed the point."""
    problem = flat_problem(20, n_outputs=2, loss="cross-entropy", beta=0.01)
    wide = replace(problem, targets=torch.nn.functional.pad(problem.targets, (1, 0)))
    gaps = [solve_problem(p, Budget(tol=1e-4, max_rounds=20)).history[-1]["rel_gap"] for p in (problem, wide)]
    assert max(gaps) <= 1e-4
    logits = torch.zeros(20, 3).double()
    logits[:7, 0] = 1e4  # no mass at all outside the absent class
    assert np.isfinite(wide.dual(wide.dual_point(logits), 1.0))


@settings(deadline=None, max_examples=60)
@given(
    case=CASES,
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    g_max=st.sampled_from([0.0, 1e-3, 0.02, 0.1, 10.0]),
)
@example({"loss": "cross-entropy", "intercept": True, "pooling": None, "beta": 0.3, "seed": 1}, 5.0, 0.0)
def test_the_dual_scaling_is_the_best_one(case, scale, g_max):
    problem = flat_problem(8, **case)
    point = problem.dual_point(rows(8, 3, case["seed"], scale))
    room = {"squared": 50.0, "squared-hinge": 50.0, "huber": 1 / (8 * float(point.abs().max()))}
    limit = min(problem.beta / g_max if g_max else np.inf, room.get(case["loss"], 1.0))

    def negative(s: float) -> float:
        return float(problem.loss.conjugate(-8 * s * point, problem.targets).mean())

    lowest = -limit if problem.loss.takes_real else 0.0  # g(-Z) = g(Z), but no simplex is left that way
    inner = minimize_scalar(negative, bounds=(lowest, limit), method="bounded", options={"xatol": 1e-10 * limit})
    best = max(-inner.fun, -negative(lowest), -negative(limit))
    assert problem.dual(point, g_max) == pytest.approx(best, rel=1e-8, abs=1e-10)


def test_zero_residuals_have_dual_value_zero():
    problem = flat_problem()
    assert problem.dual(torch.zeros(14, 3).double(), 0.0) == 0
    assert problem.dual(torch.zeros(14, 3).double(), 1.0) == 0


# beta_max


@losses
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("pooling", [None, "none"])
def test_at_beta_max_the_network_is_empty_and_below_it_is_not(name, intercept, pooling):
    problem = flat_problem(loss=name, intercept=intercept, pooling=pooling)
    top = find_beta_max(problem)
    for ratio in (1.0, 1.001, 10.0):
        empty = solve_problem(problem.with_beta(ratio * top), Budget(tol=1e-9))
        assert empty.n_filters == 0
        assert empty.status == "converged"
    solution = solve_problem(problem.with_beta(0.99 * top), Budget(tol=1e-6))
    assert solution.n_filters > 0
    assert solution.history[-1]["objective"] < solution.history[0]["objective"]


def test_beta_max_of_patches():
    random = np.random.default_rng(0)
    patches, targets = random.standard_normal((14, 3, 2)), random.standard_normal((14, 2))
    top = beta_max(patches, targets, intercept=False)
    # By brute force: g at many angles, Z = Y / n.
    angles = np.linspace(0, 2 * np.pi, 20001)
    active = np.maximum(patches @ np.stack([np.cos(angles), np.sin(angles)]), 0).mean(axis=1)
    g = np.linalg.norm(active.T @ targets / 14, axis=1)
    assert top == pytest.approx(g.max(), rel=1e-6)
    assert top >= g.max()


@pytest.mark.parametrize("loss", ["squared", "cross-entropy", "bce", "huber:0.5"])
def test_what_is_enough_for_a_dual_value_gives_that_value_and_more_does_not(loss):
    targets = rows(14, 3, seed=1).softmax(dim=1) if loss != "bce" else rows(14, 3, seed=1).sigmoid()
    problem = problem_of(rows(14, 6, seed=0).reshape(14, 3, 2), targets, 0.02, loss=loss)
    dual_point = problem.dual_point(problem.constant_predictions())
    highest, least = (problem.dual(dual_point, share * problem.beta) for share in (0.5, 2.0))
    for share in (0.01, 0.3, 0.99):
        value = share * highest + (1 - share) * least
        enough = problem.enough(dual_point, value)
        assert problem.dual(dual_point, enough) >= value > problem.dual(dual_point, enough * (1 + 1e-6))
    assert problem.enough(dual_point, 0.0) == pytest.approx(2 * problem.beta)
    for value in (highest * (1 + 1e-6), float("nan"), float("inf")):  # nothing that is looked at suffices
        assert problem.enough(dual_point, value) == 0.0
