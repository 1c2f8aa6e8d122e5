"""Branch and bound in cylinders: each inequality against adversaries, the whole never below the truth."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.bounds import assert_never_below_g, awkward, correlated, sphere
from helpers.problems import flat_problem, random_parameters
from helpers.rows import random_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import convcvx
from convcvx.budget import NEVER, Budget, Deadline
from convcvx.certificate import certify_parameters
from convcvx.data.datasets import load
from convcvx.oracles import CylinderOracle, ExactOracle, LocalOracle, PolynomialOracle, get_oracle
from convcvx.oracles._corner_bounds import above, longest
from convcvx.oracles._cylinder_search import CylinderSearch, corner_maps
from convcvx.oracles._quadratic_rows import quadratics
from convcvx.oracles.beside import best_proof
from convcvx.oracles.charged_rows import ChargedRows
from convcvx.oracles.cylinders import principal
from convcvx.oracles.relaxed import relaxed_point
from convcvx.solvers.sliding_frank_wolfe import sliding_frank_wolfe


def quadratic(low: float, high: float, spread: float) -> list[float]:
    """κ, α, γ and ε of one row of length and size one."""
    board = np.array([low, high, spread, 1.0, 1.0])[:, None]
    modulus = quadratics(board, 1)
    constant, slope, square, error = board[:4, 0].tolist()
    assert modulus == pytest.approx(abs(constant) + abs(slope) + square)
    return [constant, slope, square, error]


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([1e-9, 1.0, 1e3]),
    lopsided=st.sampled_from([0.0, 0.5, 0.9, 1 - 1e-9]),
    share=st.sampled_from([0.0, 0.1, 0.7, 1.0]),
)
def test_a_row_is_within_the_error_of_its_quadratics_wherever_the_heights_lie(seed, size, lopsided, share):
    """Heights h_i anywhere in the interval, ends included, no further than the spread apart, and any weights."""
    random = np.random.default_rng(seed)
    low, high = -size * (1 - lopsided * random.random()), size * (1 - lopsided * random.random())
    spread = share * (high - low)
    constant, slope, square, error = quadratic(low, high, spread)
    start = np.concatenate(
        [[low, high - spread, max(low, -0.5 * spread)], low + (high - low - spread) * random.random(40)]
    )
    heights = start[:, None, None] + spread * random.choice([0.0, 0.5, 1.0, random.random()], (len(start), 30, 4))
    shares = random.dirichlet([0.4] * 4, (len(start), 30))
    mean = (shares * np.clip(heights, low, high)).sum(axis=2)
    heights = np.clip(heights, low, high)
    curves = (shares * (constant + slope * heights + square * heights**2)).sum(axis=2)
    assert float(np.abs(np.maximum(mean, 0) - curves).max()) <= error * (1 + 1e-12)
    assert 0 <= error <= 0.26 * max(-low, high)
    assert 0 <= slope <= 1
    assert square >= 0


@pytest.mark.parametrize("low", [-1.0, -0.7, -0.4, -0.1])
def test_without_spread_no_smaller_error_holds(low):
    """The error is attained four times, with signs that alternate: no quadratic has a smaller one."""
    for left, right in ((low, 1.0), (-1.0, -low)):
        constant, slope, square, error = quadratic(left, right, 0.0)
        grid = np.linspace(left, right, 20_001)
        off = np.maximum(grid, 0) - (constant + slope * grid + square * grid**2)
        signs = np.sign(off[np.abs(off) > 0.995 * error])
        assert 1 + int((np.diff(signs) != 0).sum()) >= 4


def test_with_spread_a_flatter_quadratic_loses_less():
    """Where all heights of an interval are met, chord and tangent are an eighth of it apart from their mean."""
    assert quadratic(-1.0, 1.0, 2.0)[3] == pytest.approx(0.25, rel=1e-9)
    assert quadratic(-1.0, 1.0, 0.0)[3] == pytest.approx(1 / 16, rel=1e-9)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), cells=st.integers(1, 3), c=st.integers(1, 3), m=st.integers(1, 4))
def test_no_direction_and_no_signs_exceed_the_bound_at_a_corner(seed, cells, c, m):
    random = torch.Generator().manual_seed(seed)
    q, n, scale = cells * c, 6, torch.tensor([1.0, 0.3, 1e-3, 0.0], dtype=torch.float64)
    value = (
        torch.randn(4, q, generator=random, dtype=torch.float64) * (scale[torch.randperm(4, generator=random)])[:, None]
    )
    slope, curve = (
        torch.randn(4, q, width, generator=random, dtype=torch.float64) * scale[:, None, None]
        for width in (m, m * (m + 1) // 2)
    )
    charges = torch.randn(4, n, c, generator=random, dtype=torch.float64)
    slots, errors = torch.randint(cells, (4, n), generator=random), torch.rand(4, n, generator=random).double()
    inside = torch.nn.functional.one_hot(slots, cells).double() * errors[..., None]  # (4, n, P)
    sizes = charges.norm(dim=2)
    tails = torch.einsum("bnp,bnc,bne,bn->bpce", inside, charges, charges, 1 / sizes)
    masses = torch.einsum("bnp,bn->bp", inside, sizes)
    bounds = longest(value, slope, curve, tails, masses, torch.full((4,), float(n)).double())
    zeta = sphere(100, m, seed)
    lift = sphere(100, curve.shape[2], seed + 1)  # any unit vector: more than all v(ζ)
    signs = torch.tensor([[1.0 if k >> i & 1 else -1.0 for i in range(n)] for k in range(2**n)]).double()
    tail = torch.einsum("tn,bnp,bnc->btpc", signs, inside, charges).flatten(2)
    centre = value[:, None] + torch.einsum("bqm,zm->bzq", slope, zeta) + torch.einsum("bqw,zw->bzq", curve, lift)
    assert bool(((centre[:, :, None] + tail[:, None]).norm(dim=3).amax(dim=(1, 2)) <= bounds).all())


def test_negative_control_a_tail_that_is_left_out_is_refuted():
    zero = torch.zeros(1, 2, 1).double()
    tail, mass, terms = torch.eye(2)[None, None].double(), torch.ones(1, 1).double(), torch.ones(1).double()
    with_tail = longest(zero[..., 0], zero, zero, tail, mass, terms)
    without = longest(zero[..., 0], zero, zero, 0 * tail, 0 * mass, terms)
    assert float(without) < 1 <= float(with_tail)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 5))
def test_no_combination_of_corners_exceeds_the_plane_above_them(seed, size):
    random = np.random.default_rng(seed)
    corners = random.random((3, size, size)) ** 2 * random.choice([-1.0, 1.0], (3, 1, size)) + 0.0
    values = random.random((3, size)) * random.choice([0.0, 1.0, 5.0], (3, size))
    bounds = above(torch.from_numpy(corners), torch.from_numpy(values)).numpy()
    shares = np.concatenate([np.eye(size), random.dirichlet([0.5] * size, 200)])
    lengths = np.linalg.norm(np.einsum("zi,bij->bzj", shares, corners), axis=2)
    assert (np.einsum("zi,bi->bz", shares, values) <= bounds[:, None] * lengths * (1 + 1e-12)).all()


@pytest.mark.parametrize("place", range(4))
def test_what_is_no_number_proves_nothing(place):
    parts = [torch.ones(1, 2).double(), *(torch.ones(1, 2, 1).double(),) * 2, torch.ones(1, 1, 2, 2).double()]
    parts[place] = parts[place] * math.nan
    assert float(longest(*parts, torch.ones(1, 1).double(), torch.ones(1).double())) == math.inf
    assert float(above(torch.eye(2)[None].double(), torch.tensor([[math.nan, 1.0]]).double())) == math.inf


def inside(corners: np.ndarray, d: int, count: int, seed: int) -> np.ndarray:
    """Unit filters of a cylinder."""
    random = np.random.default_rng(seed)
    places = random.dirichlet([0.5] * len(corners), count) @ corners
    rest = sphere(count, d - corners.shape[1] + 1, seed).numpy()
    filters = np.concatenate([places[:, :-1], places[:, -1:] * rest], axis=1)
    return filters / np.linalg.norm(filters, axis=1, keepdims=True)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_no_filter_of_a_cylinder_or_its_antipode_exceeds_its_bound(seed, d, c, cells, directions):
    """At the beginning and further on, where lists of rows and linear parts are an ancestor's."""
    charged = principal(random_rows(25, d, c, cells, seed))
    search = CylinderSearch(charged, directions, 0.0)
    for _ in range(4):
        if not (batch := search._batch()):
            break
        settled = [search._settled(cylinder) for cylinder in batch]
        for number, (cylinder, found, bound) in enumerate(
            zip(batch, settled, search._bounds(batch, settled), strict=True)
        ):
            filters = inside(cylinder.corners, d, 30, seed + number)
            assert charged.g(np.concatenate([filters, -filters])).max() <= bound
            search._divide(cylinder, found, bound)


def test_the_maps_at_corners_are_the_quadratics_of_the_filters_there():
    random = torch.Generator().manual_seed(0)
    batch, corners, q, d, r = 2, 3, 4, 5, 2
    places = torch.rand(batch, corners, r + 1, generator=random, dtype=torch.float64)
    moments = torch.randn(batch, q, 1 + d + d * (d + 1) // 2, generator=random, dtype=torch.float64)
    linear, fold = (torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((batch, q, d), (q, d)))
    value, slope, curve = corner_maps(places, moments, linear, fold)
    zeta, upper = sphere(1, d - r)[0], torch.triu_indices(d, d)
    filters = torch.cat([places[..., :r], places[..., r:] * zeta], dim=2)  # (B, V, d)
    squares = (filters[..., :, None] * filters[..., None, :])[..., upper[0], upper[1]]
    squares = squares * (2 - (upper[0] == upper[1]).double())
    features = torch.cat([torch.ones(batch, corners, 1).double(), filters, squares], dim=2)
    m = d - r
    a, b = torch.triu_indices(m, m)
    lift = (zeta[a] * zeta[b] - (a == b).double() / m) * (2 - (a == b).double()).sqrt() / (1 - 1 / m) ** 0.5
    assert float(lift.norm()) == pytest.approx(1)
    for sign in range(2):
        truth = torch.einsum("bqw,bvw->bvq", moments, features)
        truth = truth + torch.einsum("bqd,bvd->bvq", linear - sign * fold, filters)
        torch.testing.assert_close(value[:, sign] + slope[:, sign] @ zeta + curve[:, sign] @ lift, truth)


@settings(deadline=None, max_examples=20)
@given(awkward(), st.integers(1, 3))
def test_the_bound_is_never_below_g_anywhere(case, directions):
    problem, point = case
    result = CylinderOracle(directions, max_cylinders=30)(problem, point)
    assert_never_below_g(problem, point, result)


def random_point(problem, seed: int) -> Tensor:
    return torch.randn(problem.n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_the_bound_is_above_the_exact_maximum_and_near_it(d):
    for seed in range(2):
        problem = flat_problem(4 + seed, 2, d, 2, seed=seed, intercept=False)
        point = random_point(problem, seed)
        exact = float(ExactOracle()(problem, point).values.max())
        bound = CylinderOracle(2, max_cylinders=300)(problem, point).upper_bound
        assert exact <= bound <= 1.3 * exact


def test_turning_the_rows_changes_no_value_but_by_the_slack():
    charged = random_rows(40, 4, 3, 2)
    turned = principal(charged)
    filters = sphere(50, 4).numpy()
    same = turned.g(filters @ turned.frame.T.numpy())
    np.testing.assert_allclose(charged.g(filters), same, atol=turned.slack - charged.slack)
    assert (np.diff(turned.cells) >= 0).all()


def test_rows_of_an_image_have_one_direction_between_them():
    problem, point = correlated()
    charged = ChargedRows.build(problem, point)
    turned = principal(charged)
    assert len(turned.charges) < 0.5 * len(charged.rows)
    assert (np.diff(turned.sources) >= 0).all()
    filters = sphere(20, charged.rows.shape[1]).numpy()
    same = turned.g((charged.lift(filters) @ turned.frame.T).numpy())
    np.testing.assert_allclose(charged.g(filters), same, rtol=1e-9)


def test_the_number_of_threads_changes_no_bit_of_the_bound():
    charged, threads, bounds = principal(ChargedRows.build(*correlated())), torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        search = CylinderSearch(charged, 2, 0.0)
        search.run(NEVER, 200)
        bounds.append(search.bound)
    torch.set_num_threads(threads)
    assert bounds[0] == bounds[1]


@pytest.mark.parametrize("most", [30, 150])
def test_a_proof_goes_to_the_dual_point_where_cylinders_prove_about_the_most(most):
    problem, residual = correlated()
    oracle = CylinderOracle(2, max_cylinders=most)
    proof = best_proof(problem, [residual], oracle)
    chosen = relaxed_point(problem, residual)
    between = [problem.in_domain((1 - share) * residual + share * chosen) for share in (0, 0.25, 0.5, 0.75, 1)]
    values = [problem.dual(point, oracle(problem, point).g_max) for point in between]
    assert proof.value >= 0.98 * max(values)
    assert proof.value >= best_proof(problem, [residual], PolynomialOracle()).value


def test_on_correlated_patches_cylinders_prove_more_than_polynomials_and_the_more_the_longer():
    problem, point = correlated()
    whole = PolynomialOracle()(problem, point).upper_bound
    few, more = (CylinderOracle(2, max_cylinders=most)(problem, point) for most in (40, 400))
    assert float(more.values.max()) <= more.upper_bound < few.upper_bound <= whole
    assert more.stats["stopped"] == "max_cylinders" or more.upper_bound <= 1.02 * float(more.values.max())


def test_a_search_stops_at_its_target_or_its_deadline_with_a_bound_that_holds():
    problem, point = correlated()
    easy = CylinderOracle(2)(problem, point, target=2 * LocalOracle()(problem, point).g_max)
    assert easy.stats["stopped"] == "bound"
    own = CylinderOracle(2, time_limit=1e-9)(problem, point)
    assert own.stats["stopped"] == "seconds"
    assert not own.cut_short
    late = CylinderOracle(2)(problem.until(Deadline.after(0.0)), point)
    assert late.cut_short
    assert easy.values.max() <= late.upper_bound < math.inf
    search = CylinderSearch(principal(ChargedRows.build(problem, point)), 2, 0.0)
    assert search.run(Deadline.after(0.0)) == "time_limit"
    assert search.bound == search.total
    assert search.run(NEVER, 1) == "max_cylinders"
    assert search.bound < search.total


def test_a_certificate_by_cylinders_is_a_proof_and_names_what_proved_it():
    problem, _ = correlated()
    filters, weights, _ = random_parameters(problem, 2, scale=0.01)
    certificate = certify_parameters(problem, filters, weights, oracle=CylinderOracle(2, max_cylinders=200))
    assert certificate.scope == "global"
    assert certificate.oracle == "cylinders"
    assert certificate.proved_by == "cylinders, at a dual point chosen for it"
    assert 0 < certificate.dual <= certificate.primal
    none = certify_parameters(problem, filters, weights, oracle=CylinderOracle(2, max_cylinders=0))
    assert none.oracle == "polynomial"  # whose bound is all there is
    assert none.proved_by.startswith("polynomials of degree 2")
    assert none.search["stopped"] == "max_cylinders"
    assert get_oracle("cylinders", problem, thorough=True).name == "cylinders"
    assert get_oracle("cylinders", problem).name == "polynomial"


@pytest.mark.slow
def test_on_a_thousand_small_problems_no_rigorous_bound_is_below_the_exact_maximum(monkeypatch, counted):
    """Of all rigorous oracles; ranks 1 to 4, one to three cells, both losses."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    proofs = importlib.import_module("proofs")
    counts = dict.fromkeys(proofs.CHECKED, 0)
    for seed in range(1000):
        for name, ratio in proofs.looseness(*proofs.small_problem(seed)).items():
            assert ratio >= proofs.EQUAL, (name, seed)
            counts[name] += 1
    assert min(counts.values()) > 900
    counted("bounds of oracles judged", sum(counts.values()))


def test_a_certificate_with_a_time_limit_of_its_own_proves_more_in_the_time_that_is_left():
    problem, _ = correlated()
    solution = sliding_frank_wolfe(problem, LocalOracle(), Budget(tol=1e-3, max_rounds=10))
    network = solution.filters, solution.weights, solution.intercept
    brief = certify_parameters(problem, *network)
    for oracle in ("auto", "local"):
        long = certify_parameters(problem.until(Deadline.after(60.0)), *network, oracle=oracle, tol=0.05)
        assert long.scope == "heuristic"
        assert brief.proved < long.proved <= long.dual <= long.primal
        assert long.proved_by.startswith(("remainder", "cylinders"))
    training = certify_parameters(problem.until(Deadline.after(60.0)), *network, training=[])
    assert training.proved_by.startswith("polynomials")  # whose time is the training's


@pytest.mark.parametrize("rank", [2, 3])
def test_a_search_that_comes_down_to_the_maximum_is_made_at_the_residual(rank):
    """Polynomials are loose there: what they promise elsewhere is nothing beside it."""
    train, _ = load("digits", limit=150)
    fit = convcvx.fit(train.images, train.targets, rank=rank, beta_ratio=0.05, tol=0.02, loss="squared")
    assert fit.certificate.scope == "global"
    known = {"beta": fit.certificate.beta, "embedding": fit.solution.embedding, "loss": "squared"}
    again = convcvx.certify(fit.network, train.images, train.targets, oracle="remainder", **known)
    assert again.rel_gap < 0.04
