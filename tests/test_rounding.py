"""Bounds in floating point: sums, intercepts, dual points and objectives against exact arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from functools import cache

import mpmath
import numpy as np
import pytest
import torch
from helpers.problems import flat_problem, random_parameters
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import convcvx
from convcvx.budget import Budget
from convcvx.certificate import certify_parameters, judged
from convcvx.errors import InputError
from convcvx.losses.cross_entropy import CrossEntropy
from convcvx.losses.intercepts import best_shift
from convcvx.losses.shares import Shares
from convcvx.losses.table import LOSSES, get_loss
from convcvx.oracles.base import OracleResult
from convcvx.problem import Problem, relative_gap
from convcvx.rounding import BLOCK, total
from convcvx.training.plan import find_beta_max, solve_problem

DIGITS = 320
"""Decimal digits of exact values: 1 - q has to be right for q of 1e-130."""


@pytest.fixture(scope="module", autouse=True)
def digits():
    """For this file alone: other files work with other precisions in the same process."""
    with mpmath.workdps(DIGITS):
        yield


def exact(tensor: Tensor) -> list:
    """The numbers of a float64 tensor as fractions."""
    return [Fraction(x) for x in tensor.flatten().tolist()]


def draws(n: int, c: int, seed: int) -> Tensor:
    return torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None)
@given(st.lists(st.floats(-1e200, 1e200), max_size=300), st.integers(0, 3))
def test_the_error_of_a_sum_is_within_its_bound(values, times):
    terms = torch.tensor(values * (1 + times), dtype=torch.float64)
    value, error = total(terms)
    assert abs(Fraction(value) - sum(exact(terms), Fraction(0))) <= Fraction(error)


def test_a_sum_that_cancels_has_a_bound_that_says_so():
    terms = torch.tensor([1e16, 1.0, -1e16], dtype=torch.float64).repeat(50)
    value, error = total(terms)
    assert abs(value - 50) <= error
    assert error > 1  # what is left of it is uncertain


@pytest.mark.parametrize("values", [[1.5e308, 1.5e308, -1.5e308], [math.inf, -math.inf]])
def test_a_sum_that_leaves_float64_on_the_way_is_no_number(values):
    terms = torch.tensor(values, dtype=torch.float64).repeat_interleave(BLOCK)
    assert math.isnan(total(terms)[0])


# The intercept


def shares_of(n: int, weighted: bool, seed: int) -> Shares:
    """1/n each, or by weights over six decades."""
    return Shares.of(10 ** (2 * draws(n, 1, seed + 3)[:, 0]).clamp(-3, 3) if weighted else None, n)


def objective(f: Tensor, y: Tensor, shares: Shares) -> float:
    return float(shares.mean(get_loss("cross-entropy").value(f, y)))


@settings(deadline=None, max_examples=100)
@given(
    n=st.integers(1, 30),
    c=st.integers(2, 5),
    scale=st.sampled_from([0.1, 3.0, 50.0, 1000.0]),
    shift=st.sampled_from([0.0, 10.0, 1000.0]),
    seed=st.integers(0, 10**6),
    weighted=st.booleans(),
)
@example(n=2, c=2, scale=0.0, shift=40.0, seed=0, weighted=False)
@example(n=8, c=4, scale=1000.0, shift=0.0, seed=91, weighted=True)  # a class whose one image has next to no weight
@example(n=10, c=4, scale=1000.0, shift=0.0, seed=708615, weighted=True)
@example(n=12, c=4, scale=1000.0, shift=10.0, seed=542628, weighted=True)
@example(n=17, c=5, scale=1000.0, shift=10.0, seed=530082, weighted=True)
def test_the_best_intercept_is_found_from_any_start(n, c, scale, shift, seed, weighted):
    """No coordinate step, long or short, and no other start lead lower; nor is its own start any better."""
    loss, random = get_loss("cross-entropy"), torch.Generator().manual_seed(seed)
    f, start = scale * draws(n, c, seed), shift * draws(1, c, seed + 1)[0]
    y = nn.functional.one_hot(torch.randint(c, (n,), generator=random), c).double()
    shares = shares_of(n, weighted, seed)
    b = loss.best_intercept(f, y, shares, start)
    best = objective(f + b, y, shares)
    assert best <= objective(f + start, y, shares)
    assert best == pytest.approx(objective(f + loss.best_intercept(f, y, shares), y, shares), rel=1e-7, abs=1e-12)
    for step in (1e-4, 1e-2, 1.0, 100.0):
        for direction in torch.cat([torch.eye(c), -torch.eye(c)]).double():
            assert objective(f + b + step * direction, y, shares) >= best * (1 - 1e-9) - 1e-12


def test_negative_control_newton_from_zero_alone_does_not_find_it():
    """The case that was lost: the sum of two logits has to be shifted by 40, where all probabilities are 0 or 1."""
    f, y = torch.tensor([[0.0, 35.0], [0.0, 45.0]]).double(), torch.eye(2).double()
    shares = Shares.equal(2)
    shift = best_shift(get_loss("cross-entropy"), f, y, shares)
    assert objective(f + shift, y, shares) == pytest.approx(0.0067153, rel=1e-4)
    assert objective(f, y, shares) > 10


@pytest.mark.parametrize("distance", [10.0, 80.0, 300.0, 600.0])
def test_an_intercept_takes_few_losses_however_far_its_start(distance):
    """At a probability of exp(-600) Newton's step is 1e260: to quarter that until a loss falls takes 430 of them."""

    class Counting(CrossEntropy):
        seen = 0

        def value(self, predictions, targets):
            self.seen += 1
            return super().value(predictions, targets)

    loss, y = Counting(), torch.eye(3).double()
    f = torch.tensor([[distance, 0.0, 1.0], [distance, 1.0, 0.0], [distance, 0.0, 0.0]]).double()
    shift = best_shift(loss, f, y, Shares.equal(3))
    assert objective(f + shift, y, Shares.equal(3)) < 1.2
    assert loss.seen < 60


@pytest.mark.parametrize("loss", LOSSES)
@settings(deadline=None, max_examples=25)
@given(scale=st.sampled_from([1.0, 30.0, 1e3]), shift=st.sampled_from([0.0, 1e3]), seed=st.integers(0, 10**6))
def test_judging_never_raises_an_objective(loss, scale, shift, seed):
    problem = flat_problem(12, loss=loss, beta=1e-6, seed=seed % 7)
    filters, weights, intercept = random_parameters(problem, 4, seed, scale)
    own = problem.responses.predict(filters, weights, intercept + shift * draws(1, 3, seed)[0])
    shifted = intercept + shift * draws(1, 3, seed)[0]
    _, balanced, predictions = judged(problem, filters, weights, shifted)
    assert problem.primal(predictions, balanced) <= problem.primal(own, weights) * (1 + 1e-13)


def test_networks_trained_by_adam_are_judged_at_no_more_than_their_own_objective():
    random = np.random.default_rng(0)
    x, y = torch.tensor(random.normal(size=(20, 2, 1, 1))), torch.tensor(random.integers(0, 3, size=20))
    for seed in range(6):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(2, 6, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
        ).double()
        with torch.no_grad():
            network[4].bias.add_(torch.tensor([0.0, 40.0, -300.0]))
        optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x), y).backward()
            optimizer.step()
        with torch.no_grad():
            own = float(nn.functional.cross_entropy(network(x), y))
            decay = float(network[0].weight.square().sum() + network[4].weight.square().sum())
        certificate = convcvx.certify(network, x, y, 1e-6, loss="cross-entropy")
        assert certificate.primal <= (own + 0.5e-6 * decay) * (1 + 1e-12)


# The dual


def exact_shares(shares: Shares) -> list[Fraction]:
    counts = exact(shares.counts)
    return [count / sum(counts) for count in counts]


def exact_dual_value(point: Tensor, targets: Tensor, shares: Shares, s: Fraction, intercept: bool) -> Fraction:
    """The squared loss's dual value at s times the exactly centred point."""
    share = exact_shares(shares)
    z = [[Fraction(v) for v in row] for row in point.tolist()]
    if intercept:
        sums = [sum(column) for column in zip(*z, strict=True)]
        z = [[v - share[i] * sums[k] for k, v in enumerate(row)] for i, row in enumerate(z)]
    y = [[Fraction(v) for v in row] for row in targets.tolist()]
    overlap = sum(a * b for p, q in zip(z, y, strict=True) for a, b in zip(p, q, strict=True))
    square = sum(a * a / share[i] for i, row in enumerate(z) for a in row)
    return s * overlap - s * s * square / 2


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 20),
    scale=st.sampled_from([1e-8, 1.0, 1e8]),
    fit=st.floats(0, 1),
    weighted=st.booleans(),
)
def test_the_squared_dual_value_is_below_the_exact_one(seed, n, scale, fit, weighted):
    """At the best exact scaling; near a fit of all targets, overlap and square cancel."""
    loss, shares = get_loss("squared"), shares_of(n, weighted, seed)
    targets = draws(n, 2, seed)
    residual = shares.times(targets - fit * (targets + 1e-9 * draws(n, 2, seed + 1))) * n * scale
    point = loss.in_domain(residual, targets, shares, True)
    got = loss.dual(point, targets, shares, math.inf, True)
    z = [exact_dual_value(point, targets, shares, Fraction(s), True) for s in (1, 2)]
    # value(s) = a s - b s²/2: from values at 1 and 2.
    b = z[0] * 2 - z[1]
    a = z[0] + b / 2
    best = a * a / (2 * b) if b > 0 else Fraction(0)
    assert Fraction(got) <= best
    assert Fraction(got) >= best * (1 - Fraction(1, 10**9)) - Fraction(1, 10**12) * Fraction(scale)


def exact_entropies(point: Tensor, targets: Tensor, shares: Shares, s: float) -> mpmath.mpf:
    """Σ_i s_i H(y_i - s Z_i / s_i) with each row's largest entry what the others leave."""
    value = mpmath.mpf(0)
    for z, y, exact_share in zip(point.tolist(), targets.tolist(), exact_shares(shares), strict=True):
        share = mpmath.mpf(exact_share.numerator) / exact_share.denominator
        q = [mpmath.mpf(b) - mpmath.mpf(s) / share * mpmath.mpf(a) for a, b in zip(z, y, strict=True)]
        p = max(range(len(q)), key=lambda k: q[k])
        q[p] = 1 - sum(v for k, v in enumerate(q) if k != p)
        value -= share * sum(v * mpmath.log(v) for v in q if v > 0)
    return value


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 8),
    c=st.integers(2, 5),
    scale=st.sampled_from([0.3, 3.0, 20.0, 60.0, 300.0]),
    intercept=st.booleans(),
    weighted=st.booleans(),
)
def test_the_entropy_of_a_dual_point_is_below_the_exact_one(seed, n, c, scale, intercept, weighted):
    """Also of confident networks, whose entropy is a millionth of rounding of 1 away from zero."""
    loss, random = get_loss("cross-entropy"), torch.Generator().manual_seed(seed)
    y = nn.functional.one_hot(torch.randint(c, (n,), generator=random), c).double()
    f, shares = draws(n, c, seed) + scale * y, shares_of(n, weighted, seed)
    point = loss.in_domain(-shares.times(loss.gradient(f, y)), y, shares, intercept)
    got = loss.dual(point, y, shares, 0.9, intercept)
    exact_value = max(exact_entropies(point, y, shares, s) for s in (0.0, *loss._scales(point, y, shares, 0.9)))
    assert mpmath.mpf(got) <= exact_value
    assert got >= float(exact_value) * (1 - 1e-9)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(2, 12),
    scale=st.sampled_from([1.0, 30.0]),
    soft=st.booleans(),
    weighted=st.booleans(),
)
def test_an_exactly_feasible_point_lies_within_the_error_of_a_dual_point(seed, n, scale, soft, weighted):
    """Built in fractions: rows in the simplex, columns with the mean of the targets, by the mixture that is claimed."""
    loss, random = get_loss("cross-entropy"), torch.Generator().manual_seed(seed)
    y = nn.functional.one_hot(torch.arange(n) % 3, 3).double()
    if soft:
        y = convcvx.losses.encode_targets((y + torch.rand(n, 3, generator=random)).softmax(dim=1), "cross-entropy")
    f, shares = scale * draws(n, 3, seed), shares_of(n, weighted, seed)
    w = exact_shares(shares)
    point = loss.in_domain(-shares.times(loss.gradient(f + loss.best_intercept(f, y, shares), y)), y, shares, True)
    allowed = [Fraction(e) for e in loss.dual_error(point, y, shares, True).tolist()]
    exact_y = [[Fraction(v) for v in row] for row in y.tolist()]
    for row in exact_y:
        top = max(range(3), key=lambda k: row[k])
        row[top] = 1 - sum(v for k, v in enumerate(row) if k != top)
    z = [[Fraction(v) for v in row] for row in point.tolist()]
    s = 1 - Fraction(1, 2**50)
    q = [[b - s / w[i] * a for a, b in zip(z[i], exact_y[i], strict=True)] for i in range(n)]
    for row in q:
        top = max(range(3), key=lambda k: row[k])
        row[top] = 1 - sum(v for k, v in enumerate(row) if k != top)
        assert min(row) >= 0
    mean_y = [sum(w[i] * row[k] for i, row in enumerate(exact_y)) for k in range(3)]
    excess = [sum(w[i] * row[k] for i, row in enumerate(q)) - mean_y[k] for k in range(3)]
    share = Fraction(loss._mixture(point, y, shares))
    if share == 0:
        assert not any(excess)
        return
    t = [mean_y[k] - excess[k] * (1 - share) / share for k in range(3)]
    assert min(t) >= 0
    assert sum(t) == 1
    for i, row in enumerate(q):
        mixed = [(1 - share) * a + share * b for a, b in zip(row, t, strict=True)]
        moved = sum(((y_k - m) * w[i] - s * a) ** 2 for y_k, m, a in zip(exact_y[i], mixed, z[i], strict=True))
        assert moved <= (allowed[i] * (1 + Fraction(1, 10**6))) ** 2 + Fraction(1, 2**106) * soft


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_dual_point_that_is_no_number_is_all_mixture(value):
    loss, y = get_loss("cross-entropy"), torch.eye(3).double()
    point = torch.zeros(3, 3).double()
    point[1, 2] = value
    assert loss._mixture(point, y, Shares.equal(3)) == 1.0
    assert loss.dual(point, y, Shares.equal(3), 1.0, True) == 0.0


def test_a_bound_that_is_no_number_proves_nothing():
    problem = flat_problem(8)
    point = problem.dual_point(problem.constant_predictions())
    assert problem.dual(point, math.nan) == 0.0
    assert problem.dual(point, math.inf) == 0.0
    assert problem.dual(point, -1.0) == 0.0
    assert problem.dual(point, 1e-9) > 0
    assert relative_gap(1.0, math.nan) == math.inf
    assert relative_gap(math.nan, 1.0) == math.inf
    assert relative_gap(math.inf, 1.0) == math.inf
    assert relative_gap(0.0, 0.0) == 0.0
    assert relative_gap(1.0, 1.0 + 1e-15) == 0.0


@pytest.mark.parametrize("bound", [math.nan, math.inf])
def test_an_oracle_that_returns_no_number_leaves_the_trivial_bound(bound):
    class Broken:
        name = "exact"

        def __call__(self, problem, dual_point, **_):
            return OracleResult(torch.zeros(0, 2).double(), torch.zeros(0).double(), bound, "global")

    problem = flat_problem(8)
    certificate = certify_parameters(problem, *random_parameters(problem, 3)[:2], oracle=Broken())
    assert certificate.dual == 0.0
    assert certificate.rel_gap == 1.0


def test_an_error_of_the_primal_that_is_no_number_leaves_the_trivial_bound(monkeypatch):
    problem = flat_problem(8)
    monkeypatch.setattr(Problem, "primal_error", lambda *_: math.nan)
    assert certify_parameters(problem, *random_parameters(problem, 3)[:2]).dual == 0.0


# Whole certificates against known optima


@cache
def centred(seed):
    """Images, targets near zero, and their certificate."""
    random = np.random.default_rng(seed)
    x, spread = random.normal(size=(10, 2)), random.integers(0, 8, size=(10, 1)).astype(float)
    return x, spread, convcvx.solve(x, spread, 0.05).certificate


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6, 1e8, 1e10, 1e12])
def test_far_targets_have_the_certificate_of_centred_ones(offset):
    """Above beta_max the optimum is half the variance, here exactly; a bound above it is a false proof."""
    for seed in range(5):
        x, spread, near = centred(seed)
        y = offset + spread  # exact: integers below 2^53
        values = [Fraction(v) for v in y[:, 0]]
        mean = sum(values) / 10
        optimum = sum((v - mean) ** 2 for v in values) / 20
        certificate = convcvx.solve(x, y, 2 * convcvx.beta_max(x, spread)).certificate
        assert certificate.scope == "global"
        assert Fraction(certificate.dual) <= optimum
        assert 0 <= certificate.rel_gap <= 1e-9
        far = convcvx.solve(x, y, 0.05).certificate
        assert far.primal == pytest.approx(near.primal, rel=1e-4)  # to the gap that was asked for
        assert far.dual == pytest.approx(near.dual, rel=1e-4)


@pytest.mark.parametrize("kind", [np.int64, np.uint64])
def test_whole_targets_that_float64_would_round_are_refused(kind):
    x = np.random.default_rng(0).normal(size=(6, 2))
    y = np.arange(12).reshape(6, 2).astype(kind)
    assert convcvx.solve(x, y + kind(2**53 - 11), 1.0).certificate.scope == "global"
    with pytest.raises(InputError, match="whole numbers up to 2"):
        convcvx.solve(x, y + kind(2**53), 1.0)


def test_the_intercept_takes_any_offset_of_real_targets():
    random = np.random.default_rng(0)
    x = random.normal(size=(300, 3))
    y = abs(x[:, 0]) - x[:, 1]
    scores, filters = [], []
    for offset in (0.0, -1e8):
        model = convcvx.ConvexCNNRegressor(oracle="local", random_state=0).fit(x, y + offset)
        scores.append(model.score(x, y + offset))
        filters.append(len(model.filters_))
        assert model.certificate_.rel_gap <= 0.01
        assert float(model.intercept_[0]) == pytest.approx(offset, abs=3)
    assert min(scores) > 0.99
    start = convcvx.solve(x, y + 1e8, 0.01, oracle="local", tol=0.01)
    again = convcvx.solve(x, y + 1e8, 0.01, oracle="local", start=replace(start, history=[]), tol=0.05)
    assert again.history[0]["objective"] == pytest.approx(start.certificate.primal, rel=1e-6)


@pytest.mark.parametrize("c", [2, 5])
def test_one_sample_of_the_cross_entropy_against_its_exact_optimum(c):
    """min over q of the entropy: one filter, whose weights point from the other classes to the target's."""
    phi = 1.7658057464286234
    for exponent in range(2, 13):
        beta = 10.0**-exponent
        s = mpmath.sqrt(mpmath.mpf(c) / (c - 1))
        q = mpmath.mpf(beta) * s * (c - 1) / (mpmath.mpf(phi) * c)
        z = -mpmath.log(q / ((1 - q) * (c - 1)))
        optimum = mpmath.log1p((c - 1) * mpmath.e**-z) + mpmath.mpf(beta) * s * z * (c - 1) / c / mpmath.mpf(phi)
        one = np.eye(c)[[0]]
        solution = convcvx.solve(np.array([[phi]]), one, beta, loss="cross-entropy", intercept=False, tol=1e-7)
        certificate = solution.certificate
        assert certificate.scope == "global"
        assert mpmath.mpf(certificate.dual) <= optimum
        assert mpmath.mpf(certificate.primal) >= optimum * (1 - mpmath.mpf(10) ** -13)
        assert 0 <= certificate.rel_gap <= 1e-6


@pytest.mark.parametrize(
    "loss",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("squared", "cross-entropy"))) for name in LOSSES],
)
def test_no_relative_gap_is_negative_down_to_tiny_betas(loss):
    problem = flat_problem(4, loss=loss)
    top = find_beta_max(problem)
    for exponent in (0, 4, 8, 12):
        at = problem.with_beta(top * 10.0**-exponent)
        solution = solve_problem(at, Budget(tol=1e-3, max_rounds=4))
        certificate = certify_parameters(at, solution.filters, solution.weights, solution.intercept)
        assert certificate.scope == "global"
        assert 0 <= certificate.dual <= certificate.primal
        assert certificate.rel_gap >= 0
        assert all(record["rel_gap"] >= 0 for record in solution.history)


def test_what_dual_points_are_off_by_is_taken_off_the_bound():
    """A dual point with rows that do not sum to zero: without its error the bound on g would be false."""
    problem = flat_problem(6, loss="squared")
    point = problem.dual_point(problem.constant_predictions())
    tilted = point + 0.01
    assert float(problem.dual_error(tilted).min()) >= 0.01
    assert float(problem.dual_error(point).max()) <= 1e-15
    smooth = replace(problem, loss=get_loss("cross-entropy"))
    inside = smooth.in_domain(point)
    assert float(smooth.dual_error(inside).max()) <= 1e-14
    assert float(smooth.dual_error(inside + 0.01).min()) >= 0.01
