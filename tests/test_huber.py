"""Huber's loss: against cvxpy, the squared loss where residuals are small, and exact arithmetic for its dual values."""

from __future__ import annotations

from fractions import Fraction
from itertools import chain

import cvxpy as cp
import numpy as np
import pytest
import torch

import convcvx
from convcvx.errors import InputError
from convcvx.estimator import ConvexCNNRegressor
from convcvx.losses.huber import Huber
from convcvx.losses.shares import Shares
from convcvx.losses.table import get_loss


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outliers(n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """|x| with some targets far off."""
    x = np.linspace(-2, 2, n)[:, None]
    y = abs(x[:, 0])
    y[::8] += 30
    return x, y


@pytest.mark.parametrize("delta", [0.3, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_optimum_is_that_of_the_convex_program(delta, weighted):
    """In one dimension two filters are all there are, of which cvxpy finds the weights."""
    x, y = outliers()
    weights = np.linspace(1, 3, len(x)) if weighted else np.ones(len(x))
    loss = f"huber:{delta}"
    found = convcvx.solve(x, y, 0.01, loss=loss, tol=1e-7, sample_weight=weights)
    design = np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)], axis=1)
    free, shift = cp.Variable(2), cp.Variable()
    shares = weights / weights.sum()
    data = cp.sum(cp.multiply(shares, cp.huber(design @ free + shift - y, delta))) / 2
    program = cp.Problem(cp.Minimize(data + 0.01 * cp.norm1(free)))
    program.solve(solver=cp.CLARABEL)
    assert found.certificate.scope == "global"
    assert found.certificate.primal == pytest.approx(program.value, rel=1e-6)
    assert found.certificate.loss == get_loss(loss).name
    # Outliers pull no harder than others: the squared loss is dragged away.
    squared = convcvx.solve(x, y, 0.01, tol=1e-6, sample_weight=weights)
    assert squared.certificate.primal > 2 * found.certificate.primal


def test_with_a_large_delta_it_is_the_squared_loss():
    x, y = draws(20, 2), draws(20, 2, seed=1)
    huber = convcvx.solve(x, y, 0.02, loss="huber:1000", tol=1e-7)
    squared = convcvx.solve(x, y, 0.02, tol=1e-7)
    assert huber.certificate.primal == pytest.approx(squared.certificate.primal, rel=1e-6)
    assert huber.certificate.dual == pytest.approx(squared.certificate.dual, rel=1e-6)


@pytest.mark.parametrize("seed", range(30))
def test_the_dual_value_is_below_the_exact_one_of_a_feasible_point(seed):
    """In fractions: the point that sums to zero, at every scaling that leaves it in the box."""
    n, c, intercept = 5 + seed % 7, 1 + seed % 3, bool(seed % 2)
    shares = Shares.of(None if seed % 5 else torch.rand(n, generator=torch.Generator().manual_seed(seed)) + 0.1, n)
    loss, targets = Huber(0.5), 3 * draws(n, c, seed=seed)
    predictions = draws(n, c, seed=seed + 1)
    if intercept:
        predictions = predictions + loss.best_intercept(predictions, targets, shares)
    point = loss.in_domain(-shares.times(loss.gradient(predictions, targets)), targets, shares, intercept)
    total = sum(map(Fraction, shares.counts.tolist()))
    parts = [Fraction(count) / total for count in shares.counts.tolist()]
    rows = [[Fraction(entry) for entry in row] for row in point.tolist()]
    if intercept:
        sums = [sum(row[k] for row in rows) for k in range(c)]
        exact = [[row[k] - s * sums[k] for k in range(c)] for row, s in zip(rows, parts, strict=True)]
    else:
        exact = rows
    largest = max(abs(entry) / s for row, s in zip(exact, parts, strict=True) for entry in row)
    products = zip(chain.from_iterable(exact), targets.flatten().tolist(), strict=True)
    overlap = sum(entry * Fraction(target) for entry, target in products)
    square = sum(entry**2 / s for row, s in zip(exact, parts, strict=True) for entry in row)
    scale = min(abs(overlap) / square, Fraction(1, 2) / largest)
    best = scale * abs(overlap) - scale**2 * square / 2
    found = Fraction(loss.dual(point, targets, shares, float("inf"), intercept))
    assert found <= best
    assert found >= best * (1 - Fraction(1, 10**9))
    errors = loss.dual_error(point, targets, shares, intercept).tolist()
    for row, given, error in zip(exact, rows, errors, strict=True):
        assert sum((a - b) ** 2 for a, b in zip(row, given, strict=True)) <= Fraction(error) ** 2


@pytest.mark.parametrize("scale", [0.1, 10, 1e6])
def test_the_best_intercept_is_best_from_any_start(scale):
    f, targets, shares, loss = scale * draws(50, 3), scale * draws(50, 3, seed=1), Shares.equal(50), Huber(0.7)
    start = 100 * scale * draws(3, seed=2)
    shift = loss.best_intercept(f, targets, shares, start)
    assert float(shares.mean(loss.gradient(f + shift, targets)).abs().max()) < 1e-8
    assert shares.mean(loss.value(f + shift, targets)) <= shares.mean(loss.value(f + start, targets))


def test_targets_far_from_zero_are_centred():
    x, y = outliers()
    here, there = (convcvx.solve(x, y + offset, 0.01, loss="huber", tol=1e-6) for offset in (0, 1e8))
    assert there.certificate.primal == pytest.approx(here.certificate.primal, rel=1e-5)


def test_a_regressor_takes_it():
    x, y = outliers()
    robust = ConvexCNNRegressor(loss="huber:0.5", tol=1e-4, random_state=0).fit(x, y)
    clean = abs(x[:, 0])
    assert np.abs(robust.predict(x) - clean).max() < 0.5
    assert np.abs(ConvexCNNRegressor(tol=1e-4, random_state=0).fit(x, y).predict(x) - clean).max() > 2


@pytest.mark.parametrize("name", ["huber:", "huber:0", "huber:-1", "huber:nan", "huber:inf", "huber:many"])
def test_a_delta_that_is_none_is_refused(name):
    with pytest.raises(InputError, match="huber"):
        convcvx.solve(draws(5, 2), draws(5, 1), 0.1, loss=name)
