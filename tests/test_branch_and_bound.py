"""The bound of branch and bound is true, tight to `rel_tol`, and finds what local search misses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.batches import Batched
from helpers.problems import digits_problem
from helpers.rows import agrees, awkward_rows, clustered_rows, dense_max, largest, narrow_cone, random_rows, unit_rows
from helpers.rows import charged as rows_as_they_are
from hypothesis import given, settings

from convcvx.budget import Budget, OutOfTime
from convcvx.certificate import certify_parameters
from convcvx.errors import InputError
from convcvx.oracles._blocks import Incumbents, Workspace
from convcvx.oracles._division import Division
from convcvx.oracles._row_tree import RowTree
from convcvx.oracles.branch_and_bound import BranchAndBoundOracle
from convcvx.oracles.charged_rows import ChargedRows
from convcvx.oracles.enumerate import ExactOracle
from convcvx.oracles.local import LocalOracle
from convcvx.oracles.searched import target_of
from convcvx.patches import PatchEmbedding, PatchSpec
from convcvx.pooling import Pooling
from convcvx.problem import Problem, relative_gap
from convcvx.responses.passes import Responses
from convcvx.solvers.rounds import predicted
from convcvx.training.plan import find_beta_max, solve_problem

both = pytest.mark.parametrize("oracle", [BranchAndBoundOracle, Batched], ids=["compiled", "in batches"])
"""The two searches prove the same."""


def check(charged: ChargedRows, rel_tol: float) -> float:
    result = BranchAndBoundOracle(rel_tol).maximise(charged, n_filters=3)
    top, reference = float(result.values[0]), dense_max(charged)
    assert result.stats["stopped"] == "bound"
    assert result.upper_bound >= max(top, reference)
    assert result.upper_bound <= top * (1 + rel_tol) * (1 + 1e-9)
    # the values are g of the filters, and the filters are unit
    points = (result.filters @ charged.frame.T).numpy()
    np.testing.assert_allclose(charged.g(points), result.values, rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1.0, rtol=1e-12)
    return result.upper_bound


@pytest.mark.parametrize("d", [1, 2, 3, 4])
@pytest.mark.parametrize(("n", "c", "n_cells"), [(1, 1, 1), (7, 3, 1), (60, 2, 3), (300, 4, 1)])
def test_bound_against_dense_search(d, n, c, n_cells):
    check(random_rows(n, d, c, n_cells, seed=d), 1e-2)


@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize("n_cells", [1, 3])
def test_equals_enumeration(d, n_cells):
    for seed in range(4):
        charged = random_rows(25, d, 3, n_cells, seed)
        exact = ExactOracle().maximise(charged)
        result = BranchAndBoundOracle(1e-5).maximise(charged)
        assert result.upper_bound >= float(exact.values[0])
        assert result.upper_bound <= exact.upper_bound * (1 + 1.1e-5)


@both
@settings(max_examples=50, deadline=None)
@given(charged=awkward_rows())
def test_bound_on_awkward_rows(oracle, charged):
    result = oracle(1e-2).maximise(charged)
    if len(charged.rows) == 0:
        assert result.upper_bound == 0
        return
    reference = dense_max(charged, 2000)
    assert result.upper_bound >= reference
    assert result.upper_bound <= float(result.values.max()) * 1.01 * (1 + 1e-9) + 1e-10


@both
@settings(max_examples=30, deadline=None)
@given(charged=clustered_rows())
def test_agrees_with_enumeration(oracle, charged):
    """Both prove max g, in every rank, number of outputs and of cells; a bound that is wrong by 1 % is told."""
    exact, result = ExactOracle().maximise(charged), oracle(1e-3).maximise(charged)
    rounding = 1e-10 * np.linalg.norm(charged.charges, axis=1).sum()
    assert result.stats["stopped"] == "bound"
    assert agrees(result.upper_bound, exact, 1e-3, rounding)
    if largest(exact) > 1e-3:
        assert not agrees(0.98 * result.upper_bound, exact, 1e-3, rounding)  # the control
        assert not agrees(1.01 * result.upper_bound, exact, 1e-3, rounding)


@both
@pytest.mark.parametrize("max_cones", [1, 100])
@settings(max_examples=15, deadline=None)
@given(charged=clustered_rows())
def test_stopped_early_it_is_still_a_bound(oracle, charged, max_cones):
    result = oracle(1e-6, max_cones=max_cones).maximise(charged)
    assert result.upper_bound >= largest(ExactOracle().maximise(charged))


def test_far_from_the_target_it_stops_early():
    charged = random_rows(300, 3)
    full = BranchAndBoundOracle(1e-4).maximise(charged)
    best = float(full.values[0])
    early = BranchAndBoundOracle(1e-4, far_tol=0.1).maximise(charged, target=best / 1.3)
    assert best <= early.upper_bound <= best * 1.1001
    assert early.stats["cones"] < full.stats["cones"]
    near = BranchAndBoundOracle(1e-4, far_tol=0.1).maximise(charged, target=best / 1.0005)
    assert near.upper_bound <= best * 1.00026


@both
@pytest.mark.parametrize("width", [2e-2, 1e-4])
@pytest.mark.parametrize("seed", range(3))
def test_narrow_cone_that_local_search_misses(oracle, seed, width):
    charged = narrow_cone(seed, width)
    incumbents = Incumbents(charged, RowTree.build(charged), 1)
    incumbents.climb(np.random.default_rng(seed + 10).standard_normal((30, 3)), 50)
    missed = float(incumbents.values[0])
    exact = float(ExactOracle().maximise(charged).values[0])
    assert missed < 0.8 * exact  # the control: without the spike there is nothing to find
    result = oracle(1e-3).maximise(charged)
    assert exact <= result.upper_bound <= exact * 1.0021
    assert float(result.values[0]) >= exact / 1.0021


@both
def test_stopping_early_gives_a_valid_larger_bound(oracle):
    charged = random_rows(400, 4, 3)
    full = oracle(1e-2).maximise(charged)
    bounds = []
    for budget in ({"time_limit": 0.0}, {"max_cones": 30}, {"max_cones": full.stats["cones"] // 2}):
        result = oracle(1e-2, **budget).maximise(charged)
        assert result.stats["stopped"] in budget
        assert result.scope == "global"
        assert np.isfinite(result.upper_bound)
        bounds.append(result.upper_bound)
    assert bounds[0] >= bounds[1] >= bounds[2] >= float(full.values[0])
    assert bounds[2] > full.upper_bound


def test_bound_is_monotone_in_rel_tol():
    charged = random_rows(200, 3)
    bounds = [BranchAndBoundOracle(tol).maximise(charged).upper_bound for tol in (1.0, 0.1, 1e-2, 1e-4)]
    assert bounds == sorted(bounds, reverse=True)


def test_stops_at_the_target():
    charged = random_rows(300, 3)
    full = BranchAndBoundOracle(1e-4).maximise(charged)
    target = 1.5 * full.upper_bound
    early = BranchAndBoundOracle(1e-4).maximise(charged, target=target)
    assert full.upper_bound <= early.upper_bound * (1 + 1e-4)
    assert early.upper_bound <= target
    assert early.stats["cones"] < full.stats["cones"]


def test_several_filters_are_distinct_and_sorted():
    result = BranchAndBoundOracle(1e-2).maximise(random_rows(100, 3), n_filters=4)
    values = result.values.tolist()
    assert 1 < len(values) <= 4
    assert values == sorted(values, reverse=True)
    assert float((result.filters @ result.filters.T - 2 * torch.eye(len(values))).max()) < 0.9999


@both
def test_zero_charges(oracle):
    charged = unit_rows(np.random.default_rng(0).standard_normal((5, 3)), np.zeros((5, 2)))
    assert oracle().maximise(charged).upper_bound == 0


def test_nan_charges_are_refused():
    charged = unit_rows(np.eye(3), np.full((3, 1), np.nan))
    with pytest.raises(InputError, match="dual_point must be finite"):
        BranchAndBoundOracle().maximise(charged)


def test_a_hopeless_rank_is_refused_before_memory_runs_out():
    with pytest.raises(InputError, match="needs patches of a rank of 16 at most") as caught:
        BranchAndBoundOracle().maximise(random_rows(30, 17))
    assert "got patches of rank 17; pass a smaller rank, or oracle='local'" in str(caught.value)


@pytest.mark.parametrize("arguments", [{"rel_tol": 0.0}, {"rel_tol": -1.0}, {"time_limit": -1.0}, {"max_cones": -1}])
def test_bad_parameters(arguments):
    with pytest.raises(InputError, match=next(iter(arguments))):
        BranchAndBoundOracle(**arguments)


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_a_search_that_runs_out_of_room_proves_the_same(rank, monkeypatch):
    """A stack and a buffer of entries that are far too small: what the search had begun is bounded again, with room."""
    charged = random_rows(120 if rank < 4 else 14, rank)
    expected, exact = BranchAndBoundOracle(1e-3).maximise(charged), ExactOracle().maximise(charged)
    rounding = 1e-10 * np.linalg.norm(charged.charges, axis=1).sum()
    grown, grow = [], Workspace.grow
    monkeypatch.setattr(Workspace, "grow", lambda space: grown.append(len(space.indices)) or grow(space))
    monkeypatch.setattr(Workspace.__init__, "__defaults__", (3, 8))
    result = BranchAndBoundOracle(1e-3).maximise(charged)
    assert grown
    assert result.stats["stopped"] == "bound"
    assert agrees(result.upper_bound, exact, 1e-3, rounding)
    assert result.upper_bound == pytest.approx(expected.upper_bound, rel=1e-3)
    for wrong in (0.98, 1.01):  # the control
        assert not agrees(wrong * result.upper_bound, exact, 1e-3, rounding)


@both
@pytest.mark.parametrize("max_cones", [None, 0])
@pytest.mark.parametrize("spread", [-25.0, 9.0, 25.0])
def test_rows_of_any_length_are_bounded(oracle, max_cones, spread):
    """Rows made by hand need not be unit: what the search starts from and its rounding count their lengths as well."""
    for seed in range(3):
        random = np.random.default_rng(seed)
        rows = random.standard_normal((12, 3)) * 2.0 ** (spread * random.random(12))[:, None]
        charges = random.standard_normal((12, 2))
        exact = ExactOracle().maximise(unit_rows(rows, charges))
        result = oracle(1e-3, max_cones=max_cones).maximise(rows_as_they_are(rows, charges))
        assert result.upper_bound >= largest(exact)
        if max_cones is None:
            rounding = 1e-10 * (np.linalg.norm(rows, axis=1) * np.linalg.norm(charges, axis=1)).sum()
            assert agrees(result.upper_bound, exact, 1e-3, rounding)


def test_bundles_enclose_their_rows():
    """R/2 bounds what a bundle leaves out, at random unit vectors."""
    charged = random_rows(200, 3, 2)
    tree = RowTree.build(charged)
    n, d, width = 200, 3, tree.moments.shape[2]
    order = [int(np.flatnonzero((charged.rows == row).all(axis=1))[0]) for row in tree.rows.directions]
    charges = np.zeros((n, width))
    charges[:, :2] = charged.charges[order]
    np.testing.assert_array_equal(charges, tree.rows.charges[tree.rows.sources])

    def rows_of(entry: int) -> np.ndarray:
        if entry < n:
            return np.array([entry])
        first, count = tree.division.children[entry - n]
        return np.concatenate([rows_of(first + k) for k in range(count)])

    points = np.random.default_rng(0).standard_normal((50, d))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    seen = 0
    for k, moment in enumerate(tree.moments):
        rows, entry = rows_of(n + k), tree.bundles[k]
        mean, charge_sum = entry[:d], entry[d : d + width]
        true = np.maximum(points @ tree.rows.directions[rows].T, 0) @ charges[rows]
        linear = points @ (moment - np.outer(mean, charge_sum))
        stated = np.maximum(points @ mean, 0)[:, None] * charge_sum + 0.5 * linear
        left = np.linalg.norm(true - stated, axis=1)
        assert (left <= 0.5 * entry[d + width + 1] * (1 + 1e-12) + 1e-13).all()
        seen += left.max() > 0.1 * entry[d + width + 1]  # the control: the bound is not idle
    assert seen > 0


@both
@settings(max_examples=15, deadline=None)
@given(charged=clustered_rows())
def test_rows_without_charges_of_their_own_are_the_same_rows(oracle, charged):
    """Charge k is sizes[k] charges[sources[k]]: the same g, and a bound that is true and as tight."""
    random = np.random.default_rng(len(charged.rows))
    sources, sizes = random.permutation(len(charged.rows)), 2.0 ** random.integers(-40, 40, len(charged.rows))
    division = Division.of(charged.rows, charged.cells)
    order = division.order
    apart = np.empty_like(charged.charges)
    apart[sources] = charged.charges[order] / sizes[:, None]
    shared = replace(
        charged,
        rows=charged.rows[order],
        cells=charged.cells[order],
        charges=apart,
        division=division.sorted(),
        sources=sources.astype(np.int32),
        sizes=sizes,
    )
    points = random.standard_normal((5, charged.rows.shape[1]))
    scale = np.linalg.norm(charged.charges, axis=1).sum()
    np.testing.assert_allclose(shared.g(points), charged.g(points), atol=1e-12 * scale)
    assert shared.total >= scale * (1 - 1e-9)
    result, exact = oracle(1e-3).maximise(shared), ExactOracle().maximise(charged)
    assert agrees(result.upper_bound, exact, 1e-3, 1e-10 * scale)
    wrong = oracle(1e-3).maximise(replace(shared, sizes=1.01 * sizes))
    assert largest(exact) < 1e-3 or not agrees(wrong.upper_bound, exact, 1e-3, 1e-10 * scale)  # the control


@pytest.mark.parametrize("hidden_bias", [False, True])
@pytest.mark.parametrize(
    ("rank", "pool"),
    [(1, "global"), (2, "2"), (3, "2"), (3, "none"), (4, "global"), pytest.param(5, "2", marks=pytest.mark.slow)],
)
def test_single_rows_prove_what_merged_ones_do(rank, pool, hidden_bias, monkeypatch):
    """Images that share patches, blank ones among them: equal rows of a cell, zero rows, cells without rows."""
    random = np.random.default_rng(rank)
    images = torch.tensor(
        random.integers(0, 3, (7, 1, 5, 5)) * (random.random((7, 1, 5, 5)) < 0.5), dtype=torch.float64
    )
    images = torch.cat([images, images[:2], torch.zeros(1, 1, 5, 5)])
    images[:, :, :3, :3] = 0.0
    embedding = PatchEmbedding.fit(images, PatchSpec(3, rank=rank, hidden_bias=hidden_bias))
    responses = Responses(images, embedding, Pooling.of(pool), dtype=torch.float64)
    problem = Problem.build(responses, torch.tensor(random.integers(0, 3, len(images))), 0.01)
    dual_point = problem.dual_point(problem.constant_predictions())
    merged = ChargedRows.build(problem, dual_point, shared=True)
    monkeypatch.setattr("convcvx.oracles.charged_rows.OWN_BYTES", 0)
    single = ChargedRows.build(problem, dual_point, shared=True)
    assert merged.sources is None
    assert single.sources is not None
    assert len(single.rows) > len(merged.rows)  # the control: there were equal ones
    points = random.standard_normal((20, len(single.frame)))
    merged_g, single_g = (np.ldexp(rows.g(points), rows.exponent) for rows in (merged, single))
    np.testing.assert_allclose(single_g, merged_g, rtol=1e-12)
    one, other = (BranchAndBoundOracle(1e-2).maximise(rows) for rows in (merged, single))
    assert single_g.max() / np.linalg.norm(points[single_g.argmax()]) <= other.upper_bound
    assert one.upper_bound / 1.0101 <= other.upper_bound <= 1.0101 * one.upper_bound


def test_a_search_without_time_for_its_tree_has_a_finite_bound(monkeypatch):
    charged = random_rows(50, 3)
    reached = dense_max(charged)
    monkeypatch.setattr("convcvx.oracles.branch_and_bound.RowTree.build", _late)
    late = BranchAndBoundOracle().maximise(charged)
    assert late.cut_short
    assert reached <= late.upper_bound <= 1.002 * np.linalg.norm(charged.charges, axis=1).sum()


def _late(charged, deadline):
    raise OutOfTime


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_as_an_oracle(loss):
    """Through the protocol: pooled images, a filter space of lower rank than the patches, an image-based g."""
    rng = np.random.default_rng(0)
    images = torch.tensor(rng.random((12, 1, 6, 6)), dtype=torch.float32)
    embedding = PatchEmbedding.fit(images, PatchSpec(3, rank=3))
    responses = Responses(images, embedding, Pooling.of("2"), dtype=torch.float64)
    problem = Problem.build(responses, torch.tensor(rng.integers(0, 3, 12)), 0.01, loss)
    dual_point = problem.dual_point(problem.constant_predictions())
    starts = torch.tensor(rng.standard_normal((5, 3)))
    result = BranchAndBoundOracle(1e-3)(problem, dual_point, starts=starts, n_filters=2)
    assert result.scope == "global"
    assert result.g_max == result.upper_bound
    direct = responses.correlate(result.filters, dual_point).flatten(1).norm(dim=1)
    torch.testing.assert_close(direct, result.values, rtol=1e-9, atol=0)
    random = torch.nn.functional.normalize(torch.tensor(rng.standard_normal((3000, 3))), dim=1)
    assert float(responses.correlate(random, dual_point).flatten(1).norm(dim=1).max()) <= result.upper_bound
    assert result.upper_bound <= float(result.values[0]) * 1.0011


def test_a_proof_takes_the_room_that_the_gap_leaves():
    tol, found = 0.05, []
    problem = digits_problem(60, spec=PatchSpec((3, 3), rank=3), pooling="2")
    problem = problem.with_beta(0.05 * find_beta_max(problem, "local"))
    solution = solve_problem(problem, Budget(tol=tol), oracle="branch-and-bound")
    predictions = predicted(problem, solution)
    dual_point, objective = problem.dual_point(predictions), problem.primal(predictions, solution.weights)
    room = target_of(BranchAndBoundOracle(), problem, dual_point, objective, tol)
    assert room > problem.beta * (1 + tol)  # more than the old rule, half of tol, had
    for target in (problem.beta * (1 + tol / 2), room):
        found.append(BranchAndBoundOracle(tol / 4)(problem, dual_point, starts=solution.filters, target=target))
        assert relative_gap(objective, problem.dual(dual_point, found[-1].upper_bound)) <= tol
    assert found[1].stats["entries"] < found[0].stats["entries"]
    assert target_of(LocalOracle(), problem, dual_point, objective, tol) == problem.beta * (1 + tol / 2)
    certificate = certify_parameters(problem, solution.filters, solution.weights, oracle="branch-and-bound", tol=tol)
    assert certificate.rel_gap <= tol
    closer = certify_parameters(problem, solution.filters, solution.weights, oracle="branch-and-bound", tol=0.01)
    assert certificate.dual <= closer.dual <= closer.primal


def test_charges_that_images_make_tiny_are_not_lost_in_single_precision():
    """A row of size 1 whose image has next to no charge, beside rows whose sizes make up for theirs."""
    rows = random_rows(200, 3, seed=1)
    division = Division.of(rows.rows, rows.cells)
    sizes, charges = np.full(200, 1e-46), rows.charges.copy()
    sizes[7], charges[7] = 1.0, 1e-80
    shared = replace(
        rows,
        rows=rows.rows[division.order],
        charges=charges,
        division=division.sorted(),
        sources=np.arange(200, dtype=np.int32),
        sizes=sizes,
    )
    scaled = shared.scaled()
    products = scaled.sizes * np.abs(scaled.charges).max(axis=1)
    assert 2.0**-32 <= products.max() <= 2.0**32
    bound, most = BranchAndBoundOracle(1e-3).maximise(shared).upper_bound, largest(ExactOracle().maximise(scaled))
    assert most * (1 - 1e-9) <= bound <= most * (1 + 2e-3)
