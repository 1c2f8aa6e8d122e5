"""The squared hinge: against scikit-learn, cvxpy, one output for two, exact fractions; and in all that trains."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import cvxpy as cp
import numpy as np
import pytest
import torch
from helpers.commands import invoke
from helpers.problems import NO_TIME
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score
from sklearn.svm import LinearSVC

import convcvx
from convcvx.errors import InputError
from convcvx.losses.shares import Shares
from convcvx.losses.table import get_loss

HINGE = get_loss("squared-hinge")
LAYER = {"kernel_size": 3, "rank": 2, "pool": 2, "beta": 0.02, "tol": 1e-3, "loss": "squared-hinge"}


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*shape: int, seed: int = 1) -> torch.Tensor:
    """0 and 1, both in each column."""
    drawn = (draws(*shape, seed=seed) > 0).double()
    drawn[0] = 1 - drawn[1]
    return drawn


def test_it_is_the_loss_of_a_linear_support_vector_machine():
    """Of whose objective, ½‖w‖² + C Σ_i (1 - t_i f_i)²₊, this loss is the second part, C = 1 / (n β)."""
    x, t = draws(40, 3).numpy(), np.sign(draws(40, seed=1).numpy())
    beta = 0.05
    machine = LinearSVC(C=1 / (40 * beta), loss="squared_hinge", fit_intercept=False, tol=1e-8, max_iter=100_000)
    w = machine.fit(x, t).coef_[0]
    targets = torch.as_tensor((t[:, None] + 1) / 2)

    def objective(w: np.ndarray) -> float:
        predictions = torch.as_tensor(x @ w)[:, None]
        return float(HINGE.value(predictions, targets).mean()) + 0.5 * beta * float(w @ w)

    slope = torch.as_tensor(x).T @ HINGE.gradient(torch.as_tensor(x @ w)[:, None], targets) / 40
    np.testing.assert_allclose(slope[:, 0], -beta * w, atol=1e-6)
    assert all(objective(w + 0.01 * draws(3, seed=seed).numpy()) > objective(w) for seed in range(5))


@pytest.mark.parametrize("weighted", [False, True])
def test_the_optimum_is_that_of_the_convex_program(weighted):
    """In one dimension two filters are all there are, of which cvxpy finds the weights."""
    x, y = np.linspace(-2, 2, 30)[:, None], (np.arange(30) % 7 < 3).astype(float)[:, None]
    weights = np.linspace(1, 3, len(x)) if weighted else np.ones(len(x))
    found = convcvx.solve(x, y, 0.01, loss="squared-hinge", tol=1e-7, sample_weight=weights)
    design = np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)], axis=1)
    free, shift = cp.Variable((2, 1)), cp.Variable()
    margins = cp.multiply(2 * y - 1, design @ free + shift)
    data = cp.sum(cp.multiply(weights[:, None] / weights.sum(), cp.square(cp.pos(1 - margins))))
    program = cp.Problem(cp.Minimize(data + 0.01 * cp.sum(cp.abs(free))))
    program.solve(solver=cp.CLARABEL)
    assert found.certificate.scope == "global"
    assert found.certificate.primal == pytest.approx(program.value, rel=1e-6)
    assert found.certificate.loss == "squared-hinge"


@pytest.mark.parametrize("intercept", [pytest.param(True, marks=pytest.mark.slow), False])
def test_two_classes_are_one_label_twice_at_another_beta(intercept):
    """Two outputs of opposite sign lose twice as much, and have √2 of the length."""
    x, y = draws(20, 2), labels(20).long()
    options = {"intercept": intercept, "tol": 1e-6, "loss": "squared-hinge"}
    one = convcvx.solve(x, y[:, None].double(), 0.02, **options)
    two = convcvx.solve(x, y, 0.02 * math.sqrt(2), **options)
    assert one.weights.shape[2] == 1
    assert two.certificate.scope == "global"
    assert two.certificate.primal == pytest.approx(2 * one.certificate.primal, rel=2e-6)
    assert two.certificate.dual == pytest.approx(2 * one.certificate.dual, rel=2e-6)


@pytest.mark.parametrize("seed", range(20))
def test_the_dual_value_is_below_the_exact_one_of_a_feasible_point(seed):
    """In fractions: the larger side of each output is scaled to the other, and the whole by the best factor."""
    n, c, intercept = 5 + seed % 7, 1 + seed % 3, bool(seed % 2)
    shares = Shares.of(None if seed % 5 else torch.rand(n, generator=torch.Generator().manual_seed(seed)) + 0.1, n)
    targets = labels(n, c, seed=seed)
    predictions = draws(n, c, seed=seed + 1)
    if intercept and seed % 4 > 1:
        predictions = predictions + HINGE.best_intercept(predictions, targets, shares)
    point = HINGE.in_domain(-shares.times(HINGE.gradient(predictions, targets)), targets, shares, intercept)
    weights = [Fraction(count) for count in shares.counts.tolist()]
    signs = [[int(2 * y - 1) for y in row] for row in targets.tolist()]
    rows = [[Fraction(entry) for entry in row] for row in point.tolist()]
    assert all(t * z >= 0 for row, own in zip(rows, signs, strict=True) for z, t in zip(row, own, strict=True))
    exact = [list(row) for row in rows]
    for k in range(c if intercept else 0):
        sides = {t: sum(abs(row[k]) for row, own in zip(rows, signs, strict=True) if own[k] == t) for t in (1, -1)}
        for row, own in zip(exact, signs, strict=True):
            row[k] *= min(sides.values()) / sides[own[k]] if sides[own[k]] else 0
        assert sum(row[k] for row in exact) == 0
    overlap = sum(z * t for row, own in zip(exact, signs, strict=True) for z, t in zip(row, own, strict=True))
    square = sum(sum(z**2 for z in row) * sum(weights) / w for row, w in zip(exact, weights, strict=True))
    best = overlap**2 / square
    found = Fraction(HINGE.dual(point, targets, shares, float("inf"), intercept))
    assert best * (1 - Fraction(1, 10**9)) <= found <= best
    short = HINGE.dual(point, targets, shares, float(overlap / square), intercept)  # half of the best factor
    assert Fraction(short) <= best * Fraction(3, 4) * (1 + Fraction(1, 10**15))
    errors = HINGE.dual_error(point, targets, shares, intercept).tolist()
    for row, given, error in zip(exact, rows, errors, strict=True):
        assert sum((a - b) ** 2 for a, b in zip(row, given, strict=True)) <= Fraction(error) ** 2


def test_a_point_of_the_wrong_sign_or_none_proves_nothing():
    targets, shares = labels(6, 2), Shares.equal(6)
    right = HINGE.in_domain(2 * targets - 1, targets, shares, False)
    assert HINGE.dual(right, targets, shares, 1.0, False) > 0
    for wrong in (-right, right * float("nan")):
        assert HINGE.dual(wrong, targets, shares, 1.0, False) == 0
        assert HINGE.dual(HINGE.in_domain(wrong, targets, shares, True), targets, shares, 1.0, True) == 0


def test_a_label_that_all_images_have_or_none_costs_nothing():
    targets = torch.stack([torch.arange(8) % 2, torch.zeros(8), torch.ones(8)], dim=1).double()
    predictions = draws(8, 3)
    shifted = predictions + HINGE.best_intercept(predictions, targets, Shares.equal(8))
    assert bool((HINGE.value(shifted[:, 1:], targets[:, 1:]) == 0).all())
    assert float(HINGE.value(shifted, targets).mean()) > 0.1


@pytest.mark.parametrize("scale", [0.1, 10, 1e6])
def test_the_best_intercept_is_best_from_any_start(scale):
    f, targets, shares = scale * draws(50, 3), labels(50, 3), Shares.equal(50)
    start = 100 * scale * draws(3, seed=2)
    shift = HINGE.best_intercept(f, targets, shares, start)
    assert float(shares.mean(HINGE.gradient(f + shift, targets)).abs().max()) < 1e-8 * (1 + scale)
    assert shares.mean(HINGE.value(f + shift, targets)) <= shares.mean(HINGE.value(f + start, targets))


@pytest.mark.slow
def test_classes_are_trained_certified_and_scored_by_every_door(tmp_path):
    digits = load_digits()
    images, classes = (digits.images[:120] / 16).astype(np.float32), digits.target[:120] % 3
    arrays = {"x_train": images, "y_train": classes, "x_test": images[:40], "y_test": classes[:40]}
    np.savez(tmp_path / "set.npz", **arrays)
    flags = ["--kernel-size", "3", "--rank", "2", "--pool", "2", "--beta", "0.02", "--tol", "1e-3"]
    done = invoke(
        "train", "--data", tmp_path / "set.npz", *flags, "--loss", "squared-hinge", "--out", tmp_path / "run", "--json"
    )
    metrics = json.loads(done.stdout)
    fit = convcvx.fit(images, classes, **LAYER)
    assert metrics["scope"] == fit.certificate.scope == "global"
    assert metrics["primal"] == fit.certificate.primal
    outputs = fit.network(torch.as_tensor(images)[:, None])
    assert metrics["train_accuracy"] == pytest.approx(accuracy_score(classes, outputs.argmax(dim=1).numpy()))
    assert metrics["train_accuracy"] > 0.5
    options = {"loss": "squared-hinge", "embedding": fit.solution.embedding, **NO_TIME}
    by_hand = convcvx.certify(fit.network, torch.as_tensor(images)[:, None], classes, 0.02, **options)
    assert by_hand.primal == pytest.approx(metrics["primal"], rel=1e-6)


def test_a_classifier_takes_classes_and_labels():
    x = np.random.default_rng(0).normal(size=(40, 2))
    several = (x > 0).astype(int)
    model = convcvx.ConvexCNNClassifier(loss="squared-hinge", beta=0.02, tol=0.05, random_state=0)
    found = model.fit(x, several).predict(x)
    assert model.score(x, several) == accuracy_score(several, found) > 0.8
    np.testing.assert_array_equal(found, model.decision_function(x) > 0)
    assert not hasattr(model, "predict_proba")
    named = model.fit(x, np.where(x[:, 0] > 0, "right", "left"))
    assert named.score(x, np.where(x[:, 0] > 0, "right", "left")) > 0.9
    assert not hasattr(model, "predict_proba")


@pytest.mark.parametrize("targets", [-1.0 + 2 * labels(10, 2), 0.5 * labels(10, 2)])
def test_labels_beside_0_and_1_are_refused(targets):
    with pytest.raises(InputError, match=r"labels of 0 and 1, with loss='squared-hinge'"):
        convcvx.solve(draws(10, 2), targets, 0.1, loss="squared-hinge")
