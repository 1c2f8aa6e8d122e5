"""The exact oracle against grids, climbs, planted maxima and closed forms: the bound holds and is tight."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers.rows import charged
from hypothesis import given, settings
from hypothesis import strategies as st

from convcvx.arrangements._predicates import determinant_sign, minor_sign, parallel_sign
from convcvx.arrangements.cells import cells
from convcvx.errors import InputError
from convcvx.oracles.charged_rows import ChargedRows
from convcvx.oracles.enumerate import ExactOracle
from convcvx.patches import PatchEmbedding, PatchSpec
from convcvx.pooling import Pooling
from convcvx.problem import Problem
from convcvx.responses.passes import Responses

TIGHT = {1: 1e-12, 2: 1e-12, 3: 1e-11, 4: 1e-9, 5: 1e-9}
"""How far the bound may lie above the best filter, by rank."""


def gaussian(n: int, d: int, c: int, n_cells: int, seed: int, spread: float = 1.0) -> ChargedRows:
    """Rows around e_1, the closer the smaller `spread`; charges sum to zero as dual points do."""
    random = np.random.default_rng(seed)
    rows = spread * random.standard_normal((n, d)) + (spread < 1) * np.eye(d)[0]
    charges = random.standard_normal((n, c))
    return charged(rows, charges - charges.mean(axis=0) * (n > 1), random.integers(0, n_cells, n), n_cells)


def sphere(n: int, d: int, seed: int = 0) -> np.ndarray:
    points = np.random.default_rng(seed).standard_normal((n, d))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def climbed(problem: ChargedRows, points: np.ndarray, steps: int = 300) -> np.ndarray:
    """u <- MᵀM u / ‖·‖ for the pattern at u: an ascent within a cell, so an honest lower bound anywhere."""
    best = problem.g(points)
    for _ in range(steps):
        active = points @ problem.rows.T > 0
        pulls = (problem.correlate(points)[:, problem.cells] * problem.charges).sum(axis=2) * active
        moved = pulls @ problem.rows
        norms = np.linalg.norm(moved, axis=1, keepdims=True)
        points = np.where(norms > 0, moved / np.maximum(norms, 1e-300), points)
        best = np.maximum(best, problem.g(points))
    return best


def check(problem: ChargedRows, searched: float, tight: float | None = None):
    """The bound holds, is attained by the first filter, and beats what a search has found."""
    rank = problem.rows.shape[1]
    result = ExactOracle().maximise(problem, 4)
    best, values = result.upper_bound, result.values
    assert result.scope == "global"
    assert searched <= best
    assert best - values[0] <= (TIGHT[rank] if tight is None else tight) * best
    assert values[0] >= searched * (1 - 1e-9)
    assert torch.equal(values, values.sort(descending=True).values)
    assert torch.allclose(result.filters.norm(dim=1), torch.ones(len(values), dtype=torch.float64), atol=1e-14)
    coordinates = (result.filters @ problem.frame.T).numpy()
    np.testing.assert_allclose(problem.g(coordinates), values, rtol=max(1e-12, tight or 0), atol=1e-14 * best)
    single = ExactOracle().maximise(problem, 1)
    assert single.upper_bound == pytest.approx(best, rel=tight or TIGHT[rank])
    assert len(single.values) == 1
    return result


CASES = [(1, 1, 1), (5, 1, 1), (7, 3, 2), (18, 1, 1), (18, 2, 4), (18, 12, 3)]


@pytest.mark.parametrize(("n", "c", "n_cells"), [*CASES, (300, 3, 4)])
@pytest.mark.parametrize("spread", [1.0, 0.01])
def test_plane_against_a_grid(n: int, c: int, n_cells: int, spread: float) -> None:
    problem = gaussian(n, 2, c, n_cells, seed=n + c, spread=spread)
    angles = np.linspace(0, 2 * np.pi, 40001)
    grid = problem.g(np.stack([np.cos(angles), np.sin(angles)], axis=1)).max()
    result = check(problem, climbed(problem, sphere(50, 2)).max(), tight=1e-12 / spread)
    lipschitz = (np.linalg.norm(problem.rows, axis=1) * np.linalg.norm(problem.charges, axis=1)).sum()
    assert grid <= result.upper_bound <= grid + np.pi / 40000 * lipschitz


@pytest.mark.parametrize("d", [3, 4])
@pytest.mark.parametrize(("n", "c", "n_cells"), CASES[1:])
@pytest.mark.parametrize("spread", [1.0, 0.05])
def test_space_against_search(d: int, n: int, c: int, n_cells: int, spread: float) -> None:
    problem = gaussian(n, d, c, n_cells, seed=n + c, spread=spread)
    searched = max(problem.g(sphere(20000, d)).max(), climbed(problem, sphere(60, d)).max())
    check(problem, searched, tight=TIGHT[d] / spread)


def test_five_dimensions() -> None:
    problem = gaussian(8, 5, 2, 2, seed=0)
    check(problem, climbed(problem, sphere(300, 5)).max())


def test_space_against_cells_and_their_vertices() -> None:
    """An independent route in rank 3: the top eigenvector of each listed cell, and grids on all circles."""
    problem = gaussian(9, 3, 2, 1, seed=4)
    rows, best = problem.rows, 0.0
    for cell in cells(rows):
        matrix = (problem.charges * cell.pattern[:, None]).T @ rows
        v = np.linalg.svd(matrix)[2][0]
        for u in (v, -v):
            if np.array_equal(rows @ u > 0, cell.pattern):
                best = max(best, float(problem.g(u[None])[0]))
    for k in range(9):
        frame = np.linalg.svd(rows[k : k + 1])[2][1:]
        angles = np.linspace(0, 2 * np.pi, 20001)
        best = max(best, problem.g(np.stack([np.cos(angles), np.sin(angles)], axis=1) @ frame).max())
    bound = ExactOracle().maximise(problem).upper_bound
    assert best <= bound <= best * (1 + 1e-5)


@pytest.mark.parametrize("d", [2, 3])
def test_planted_maximum_in_a_sliver(d: int) -> None:
    """Three hinges that cancel but within 1e-6 of a plane, where they add 10 to noise of about 1."""
    width, turn = 1e-6, 0.3
    hinges = np.array([turn - width, turn, turn + width])
    rows = np.zeros((3, d))
    rows[:, :2] = np.stack([-np.sin(hinges), np.cos(hinges)], axis=1)
    noise = gaussian(10, d, 1, 1, seed=0)
    charges = 10 / width * np.array([1.0, -2 * np.cos(width), 1.0])[:, None]
    problem = charged(np.concatenate([rows, noise.rows]), np.concatenate([charges, 0.2 * noise.charges]))
    blind = problem.g(sphere(20000, d)).max()
    result = check(problem, blind, tight=1e-7)
    assert blind < 0.5 * result.upper_bound
    assert abs(result.filters[0].numpy() @ rows[1]) < 1e-8
    assert 9 < result.values[0] < 20


@pytest.mark.parametrize("d", [2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_degenerate_rows(d: int, seed: int) -> None:
    """Small whole numbers: many planes through one line, antipodes, repeats, and repeats but for rounding."""
    random = np.random.default_rng(seed)
    rows = random.integers(-1, 2, size=(11, d)).astype(float)
    rows = np.concatenate([rows[(rows != 0).any(axis=1)], np.eye(d)])
    rows = np.concatenate([rows, -rows[:3], rows[:2], rows[2:4] / 3])
    if seed % 2:
        rows = np.concatenate([rows, rows + 1e-15 * random.standard_normal(rows.shape)])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    problem = charged(rows, random.standard_normal((len(rows), 2)), random.integers(0, 2, len(rows)), 2)
    check(problem, climbed(problem, sphere(200, d)).max())


@pytest.mark.parametrize("output", ["ones", "same", "rolled", "first"])
def test_cube_where_forms_have_no_gap(output: str) -> None:
    """The symmetry of the cube makes eigenvalues coincide; the bound must stay attained."""
    rows = np.array(list(itertools.product([-1.0, 1.0], repeat=3)))
    outputs = {
        "ones": np.ones((8, 1)),
        "same": rows,
        "rolled": np.roll(rows, 1, axis=1),
        "first": rows[:, :1],
    }
    problem = charged(rows / 3**0.5, outputs[output])
    result = check(problem, climbed(problem, sphere(100, 3)).max())
    if output == "same":  # g(u) = ‖½ Σ x xᵀ u‖ = 4/√3
        assert result.upper_bound == pytest.approx(4 / 3**0.5, rel=1e-11)


def test_local_maxima_are_distinct_and_stationary() -> None:
    for d in (2, 3):
        problem = gaussian(25, d, 1, 1, seed=5)
        result = ExactOracle().maximise(problem, 6)
        points = (result.filters @ problem.frame.T).numpy()
        assert len(points) >= 2
        assert (np.linalg.norm(points[:, None] - points, axis=2) + np.eye(len(points)) > 1e-6).all()
        for u, value in zip(points, result.values.numpy(), strict=True):
            around = u + 1e-5 * sphere(2000, d)
            around /= np.linalg.norm(around, axis=1, keepdims=True)
            assert problem.g(around).max() <= value * (1 + 1e-11)


def test_rank_one_and_zero() -> None:
    problem = charged([[1.0], [-1.0], [1.0]], [[3.0, 0.0], [1.0, 1.0], [0.0, 4.0]])
    result = check(problem, 5.0)
    assert result.upper_bound == pytest.approx(5.0, rel=1e-13)
    assert result.filters.tolist() == [[1.0], [-1.0]]
    empty = ChargedRows(
        np.zeros((0, 0)),
        np.zeros(0, np.int32),
        np.zeros((0, 2)),
        1,
        torch.zeros(0, 4, dtype=torch.float64),
        0.25,
    )
    result = ExactOracle().maximise(empty, 3)
    assert result.filters.shape == (0, 4)
    assert 0.25 <= result.upper_bound <= 0.25 * (1 + 1e-12)


def test_zero_charges_and_slack() -> None:
    for d in (1, 2, 3, 4):
        result = ExactOracle().maximise(charged(sphere(6, d), np.zeros((6, 2)), slack=1e-3))
        assert result.upper_bound == pytest.approx(1e-3, rel=1e-12)


def test_two_sums_keep_cancelling_charges_exact() -> None:
    """Charges of 1e12 that cancel pairwise over a hundred thousand crossings leave the small ones intact."""
    random = np.random.default_rng(0)
    small, big = gaussian(40, 2, 2, 1, seed=1), sphere(50000, 2)
    large = 1e12 * random.standard_normal((50000, 2))
    rows = np.concatenate([small.rows, big, big])
    problem = charged(rows, np.concatenate([small.charges, large, -large]))
    kept = ExactOracle().maximise(problem)
    scale = np.linalg.norm(large, axis=1).sum()
    alone = ExactOracle().maximise(small).upper_bound
    assert alone <= kept.upper_bound * (1 + 1e-12)
    assert kept.upper_bound - alone <= 1e-14 * scale


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(3, 12), st.integers(1, 3), st.booleans())
def test_no_direction_exceeds_the_bound(seed: int, d: int, n: int, c: int, whole: bool) -> None:
    random = np.random.default_rng(seed)
    rows = np.round(random.standard_normal((n, d)) * 2) if whole else random.standard_normal((n, d))
    rows = np.concatenate([rows[(rows != 0).any(axis=1)], np.eye(d)])
    problem = charged(rows, np.round(random.standard_normal((len(rows), c)) * 3))
    result = ExactOracle().maximise(problem)
    assert climbed(problem, sphere(100, d, seed), 30).max() <= result.upper_bound * (1 + 1e-15) + 1e-300


def test_a_bound_of_one_cell_less_would_be_noticed() -> None:
    """The control: without the charges of one row, the bound no longer holds for the full problem."""
    problem = gaussian(18, 3, 2, 1, seed=3)
    found = climbed(problem, sphere(60, 3)).max()
    heavy = int(np.linalg.norm(problem.charges, axis=1).argmax())
    cut = problem.charges.copy()
    cut[heavy] = 0
    assert ExactOracle().maximise(charged(problem.rows, cut)).upper_bound < found


@pytest.mark.parametrize("d", [1, 2, 3, 4])
def test_scales_neither_over_nor_underflow(d: int) -> None:
    problem = gaussian(9, d, 2, 2, seed=d)
    plain = ExactOracle().maximise(problem, 2)
    scales = 10.0 ** np.random.default_rng(d).integers(-150, 151, 9)[:, None]
    for factor in (1.0, 1e150, 1e-150):
        rows, charges = problem.rows * scales, problem.charges * factor / scales
        scaled = ExactOracle().maximise(charged(rows, charges, problem.cells, 2), 2)
        assert scaled.upper_bound / factor == pytest.approx(plain.upper_bound, rel=1e-12)
        np.testing.assert_allclose(scaled.values / factor, plain.values, rtol=1e-12)
    tiny = charged(problem.rows, problem.charges * 1e-170, problem.cells, 2)
    assert ExactOracle().maximise(tiny).upper_bound == pytest.approx(1e-170 * plain.upper_bound, rel=1e-12)


def exact_g(problem: ChargedRows, u: np.ndarray) -> float:
    """g of a single output and cell at u/‖u‖, without rounding but for the last step."""
    exact = [Fraction(float(v)) for v in u]
    total = Fraction(0)
    for row, (charge,) in zip(problem.rows, problem.charges, strict=True):
        height = sum(Fraction(float(x)) * v for x, v in zip(row, exact, strict=True))
        total += max(height, Fraction(0)) * Fraction(float(charge))
    return float(abs(total)) / float(sum(v * v for v in exact)) ** 0.5


@pytest.mark.parametrize("d", [2, 3, 4])
@pytest.mark.parametrize("width", [1e-8, 1e-10, 1e-12, 1e-14])
def test_slivers_narrower_than_the_tolerance(d: int, width: float) -> None:
    """Three hinges almost parallel, heavy only between them: the bound holds against rational arithmetic."""
    hinges = 0.3 + width * np.array([-1.0, 0.0, 1.0])
    rows = np.zeros((3, d))
    rows[:, :2] = np.stack([-np.sin(hinges), np.cos(hinges)], axis=1)
    noise = gaussian(7, d, 1, 1, seed=1)
    charges = 10 / width * np.array([[1.0], [-2.0], [1.0]])
    problem = charged(np.concatenate([rows, noise.rows]), np.concatenate([charges, 0.2 * noise.charges]))
    bound = ExactOracle().maximise(problem).upper_bound
    angles = 0.3 + width * np.linspace(-1.5, 1.5, 13)
    points = np.zeros((len(angles), d))
    points[:, :2] = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    found = max(exact_g(problem, sign * u) for u in points for sign in (1.0, -1.0))
    assert found > 5
    assert found <= bound
    lost = 1e-9 if d == 4 and width < 1e-9 else 1e-13
    assert bound <= found + 1 + lost * np.abs(problem.charges).sum()


@pytest.mark.parametrize("d", [3, 4])
@pytest.mark.parametrize("miss", [1e-16, 1e-13, 3e-11, 1e-10, 1e-8])
def test_planes_that_all_but_meet(d: int, miss: float) -> None:
    """Six planes that miss a common line by as good as nothing, searched from points where they all but meet."""
    random = np.random.default_rng(d)
    rows = random.integers(-2, 3, size=(6, d)).astype(float) + np.eye(6, d)
    rows[:, -1] = miss * random.standard_normal(6)
    rows = np.concatenate([rows, np.eye(d), random.standard_normal((2, d))])
    problem = charged(rows, random.standard_normal((len(rows), 2)))
    near = np.eye(d)[-1] + 2 * miss * random.standard_normal((200, d))
    near = np.concatenate([near, -near])
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    found = max(climbed(problem, near, 50).max(), climbed(problem, sphere(100, d)).max())
    check(problem, found, tight=1e-8)


def test_single_patch_and_no_charge() -> None:
    """One row alone; and no residual at all."""
    images = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    images[0, 0, 0, 0] = 0.5
    responses = Responses(images, PatchEmbedding.fit(images, PatchSpec((2, 2))), dtype=torch.float64)
    problem = Problem.build(responses, torch.tensor([[1.0, 2.0]], dtype=torch.float64), 1.0, intercept=False)
    dual_point = torch.tensor([[3.0, -4.0]], dtype=torch.float64)
    result = ExactOracle()(problem, dual_point)
    assert result.upper_bound == pytest.approx(2.5, rel=1e-13)
    assert result.upper_bound >= 2.5
    assert ExactOracle()(problem, 0 * dual_point).upper_bound == 0.0


@pytest.mark.parametrize(("loss", "bias"), [("squared", True), ("cross-entropy", False)])
def test_rank_four_with_bias_cells_and_outputs(loss: str, bias: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    images = torch.rand(3, 1, 3, 4, generator=generator, dtype=torch.float64)
    embedding = PatchEmbedding.fit(images, PatchSpec((2, 2), (1 + bias, 1 + bias), hidden_bias=bias))
    responses = Responses(images, embedding, Pooling.of("1" if bias else "2x1"), dtype=torch.float64)
    problem = Problem.build(responses, torch.arange(3), 1e-3, loss)
    dual_point = problem.dual_point(problem.constant_predictions())
    result = ExactOracle()(problem, dual_point, n_filters=3)
    values = responses.correlate(result.filters, dual_point).flatten(1).norm(dim=1)
    torch.testing.assert_close(values, result.values, rtol=1e-12, atol=1e-15)
    others = responses.correlate(torch.as_tensor(sphere(20000, responses.dim)), dual_point).flatten(1).norm(dim=1)
    assert float(others.max()) <= result.upper_bound <= float(result.values[0]) * (1 + 1e-9)


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_on_a_problem_with_overlapping_pooling(loss: str, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    images = torch.rand(6, 1, 5, 5, generator=generator, dtype=torch.float64)
    embedding = PatchEmbedding.fit(images, PatchSpec(rank=rank))
    responses = Responses(images, embedding, Pooling.of("window:2,1"), dtype=torch.float64)
    problem = Problem.build(responses, torch.arange(6) % 3, 1e-3, loss)
    dual_point = problem.dual_point(problem.constant_predictions())
    result = ExactOracle()(problem, dual_point, n_filters=3)
    values = responses.correlate(result.filters, dual_point).flatten(1).norm(dim=1)
    torch.testing.assert_close(values, result.values, rtol=1e-12, atol=1e-15)
    others = responses.correlate(torch.as_tensor(sphere(5000, rank)), dual_point).flatten(1).norm(dim=1)
    assert float(others.max()) <= result.upper_bound
    assert result.upper_bound <= float(result.values[0]) * (1 + 1e-10)
    assert ExactOracle.name == "exact"
    assert result.stats["rank"] == rank


def test_all_images_black() -> None:
    images = torch.zeros(4, 1, 4, 4, dtype=torch.float64)
    responses = Responses(images, PatchEmbedding.fit(images, PatchSpec()), dtype=torch.float64)
    problem = Problem.build(responses, torch.arange(4) % 2, 1.0)
    result = ExactOracle()(problem, problem.dual_point(problem.constant_predictions()))
    assert result.upper_bound == 0.0
    assert result.filters.shape == (0, 9)


def test_hopeless_sizes_are_refused_with_a_remedy() -> None:
    with pytest.raises(InputError, match="branch-and-bound"):
        ExactOracle().maximise(gaussian(60, 9, 1, 1, seed=0))


def test_predicates_are_exact_where_floats_are_not() -> None:
    a = np.array([1.0, 2.0**-30, 0.0]) / 2
    b = np.array([2.0**-30, 2.0**-60, 0.0]) / 2
    tip = np.array([0.0, 0.0, 0.5])
    assert parallel_sign(a, 0.5 * a) == 1
    assert parallel_sign(a, -a) == -1
    assert parallel_sign(a, b) == 1
    assert determinant_sign(a, b, tip) == 0
    b[1] = np.nextafter(b[1], 1)
    assert determinant_sign(a, b, tip) == 1
    assert determinant_sign(b, a, tip) == -1
    assert parallel_sign(a, b) == 0
    assert minor_sign(0.1, 0.3, 0.1, np.nextafter(0.3, 1)) == 1
    random = np.random.default_rng(0)
    for _ in range(200):
        x, y = random.standard_normal((2, 3)) / 4
        z = x * 0.5 + y * 0.25  # nearly dependent: exact arithmetic decides
        f = [[Fraction(float(v)) for v in w] for w in (x, y, z)]
        exact = sum(f[0][i] * (f[1][j] * f[2][k] - f[1][k] * f[2][j]) for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)))
        assert determinant_sign(x, y, z) == (exact > 0) - (exact < 0)
