"""Cells: counted against the formula, listed against linear programs, sampled against both."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linprog

from convcvx.arrangements.cells import cell_batches, cells, count_bound, count_cells, sample_patterns, unpack_patterns
from convcvx.errors import InputError


def patterns_by_linear_programs(rows: np.ndarray) -> set[bytes]:
    """Every sign vector s for which max t, s_k x_k·u >= t, |u| <= 1, is positive over the non-zero rows."""
    alive = np.abs(rows).sum(axis=1) > 0
    found = set()
    for signs in itertools.product([1.0, -1.0], repeat=int(alive.sum())):
        signed = np.array(signs)[:, None] * rows[alive]
        n, h = signed.shape
        result = linprog(
            np.append(np.zeros(h), -1.0),
            A_ub=np.hstack([-signed, np.ones((n, 1))]),
            b_ub=np.zeros(n),
            bounds=[(-1, 1)] * h + [(None, 1)],
        )
        if -result.fun > 1e-6:
            pattern = np.ones(len(rows), dtype=bool)
            pattern[alive] = np.array(signs) > 0
            found.add(pattern.tobytes())
    return found


def listed(rows: np.ndarray) -> set[bytes]:
    """Patterns of `cells`, after checking that none comes twice and that interior points are interior."""
    found = set()
    for cell in cells(rows):
        heights = rows @ cell.interior
        alive = np.abs(rows).sum(axis=1) > 0
        assert cell.pattern[~alive].all()
        assert np.array_equal(heights[alive] > 0, cell.pattern[alive])
        assert np.abs(heights[alive]).min(initial=1.0) > 1e-9
        assert cell.pattern.tobytes() not in found
        found.add(cell.pattern.tobytes())
    return found


@pytest.mark.parametrize(
    ("n", "h"), [(1, 1), (4, 1), (1, 3), (2, 3), (9, 2), (15, 3), (30, 3), (11, 4), (9, 5), (8, 6)]
)
def test_general_position_attains_the_bound(n: int, h: int) -> None:
    rows = np.random.default_rng(n * 10 + h).standard_normal((n, h))
    assert len(listed(rows)) == count_cells(rows) == count_bound(n, min(n, h))


def test_the_bound_counts_every_sign_vector_when_rows_are_few() -> None:
    assert count_bound(4, 4) == count_bound(4, 9) == 16
    assert count_bound(0, 3) == count_bound(3, 0) == 1


@pytest.mark.parametrize("h", [2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_degenerate_rows_agree_with_linear_programs(h: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    rows = random.integers(-1, 2, size=(6, h)).astype(float)
    rows = np.concatenate([rows, -2 * rows[:1], np.zeros((1, h)), 3 * rows[1:2]])
    expected = patterns_by_linear_programs(rows)
    assert listed(rows) == expected
    assert count_cells(rows) == len(expected)


def test_rank_deficient_rows_cost_their_rank() -> None:
    random = np.random.default_rng(0)
    rows = random.standard_normal((20, 2)) @ random.standard_normal((2, 9))
    assert len(listed(rows)) == count_cells(rows) == 40


def test_braid_arrangement() -> None:
    """x_i - x_j in R^n cut n! cells, far below general position: a count known in closed form."""
    rows = np.array([np.eye(5)[i] - np.eye(5)[j] for i, j in itertools.combinations(range(5), 2)])
    assert len(listed(rows)) == count_cells(rows) == 120


def reflections_of_the_cube(h: int) -> np.ndarray:
    """B_h: its 2^h h! cells are all congruent."""
    unit, pairs = np.eye(h), itertools.combinations(range(h), 2)
    return np.array([unit[i] + s * unit[j] for i, j in pairs for s in (1, -1)] + list(unit))


def test_signed_permutations() -> None:
    rows = reflections_of_the_cube(4)
    assert count_cells(rows) == len(listed(rows)) == 384


@settings(max_examples=60, deadline=None)
@given(arrays(np.float64, st.tuples(st.integers(0, 7), st.integers(1, 4)), elements=st.integers(-3, 3).map(float)))
def test_count_and_list_agree_and_hold_every_sample(rows: np.ndarray) -> None:
    found = listed(rows)
    assert len(found) == count_cells(rows) <= count_bound(len(rows), np.linalg.matrix_rank(rows) if rows.size else 0)
    packed, _ = sample_patterns(rows, 200)
    assert {pattern.tobytes() for pattern in unpack_patterns(packed, len(rows))} <= found


def test_sampling_finds_all_cells_that_are_not_small() -> None:
    rows = reflections_of_the_cube(3)
    packed, directions = sample_patterns(rows, 5000, seed=2)
    assert len(packed) == len(directions) == 48
    assert np.array_equal(unpack_patterns(packed, 9), directions @ rows.T >= 0)
    again, _ = sample_patterns(rows, 5000, seed=2)
    assert np.array_equal(packed, again)


def test_two_thousand_rows_in_space_are_counted_without_being_listed() -> None:
    rows = np.random.default_rng(0).standard_normal((2000, 3))
    assert count_cells(rows) == count_bound(2000, 3) == 3998002


def test_listing_is_lazy() -> None:
    rows = np.random.default_rng(0).standard_normal((300, 6))
    assert len(list(itertools.islice(cells(rows), 3))) == 3


def test_tiny_and_huge_rows_count_alike() -> None:
    rows = np.random.default_rng(3).standard_normal((10, 3))
    assert count_cells(rows * np.logspace(-12, 12, 10)[:, None]) == count_bound(10, 3)


@pytest.mark.parametrize("rows", [np.zeros(3), np.array([[np.nan, 1.0]])])
def test_bad_rows_are_refused(rows: np.ndarray) -> None:
    with pytest.raises(InputError, match="rows must be"):
        list(cells(rows))


def mixed_rows(random: np.random.Generator, rank: int) -> np.ndarray:
    """Rows of a given rank in R^6, with zeros, repeats, antipodes and linear dependences, at all scales."""
    base = random.integers(-2, 3, size=(7 - rank, rank)).astype(float)
    base = np.concatenate([base, np.eye(rank), base[:1] + base[1:2], -base[:2], base[2:3] / 3, np.zeros((1, rank))])
    rows = random.permutation(base) @ np.linalg.qr(random.standard_normal((6, 6)))[0][:rank]
    return rows * np.logspace(-150, 150, len(rows))[:, None]


def neighbours_closure(rows: np.ndarray) -> set[bytes]:
    """Patterns found from one cell by stepping over the planes that bound it, a linear program a plane."""
    alive = np.flatnonzero(np.abs(rows).sum(axis=1) > 0)
    unit = rows[alive] / np.abs(rows[alive]).max(axis=1, keepdims=True)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    parallel = np.abs(unit @ unit.T) > 1 - 1e-12

    def inside(signs: np.ndarray) -> bool:
        signed = signs[:, None] * unit
        h = signed.shape[1]
        program = np.hstack([-signed, np.ones((len(signed), 1))])
        result = linprog(np.append(np.zeros(h), -1.0), program, np.zeros(len(signed)), bounds=[(-1, 1)] * h + [(0, 1)])
        return result.status == 0 and -result.fun > 1e-7

    planes = np.flatnonzero(~np.tril(parallel, -1).any(axis=1))
    start = np.where(unit @ np.random.default_rng(0).standard_normal(unit.shape[1]) > 0, 1.0, -1.0)
    found, stack = {start.tobytes()}, [start]
    while stack:
        signs = stack.pop()
        for k in planes:
            other = np.where(parallel[k], -signs, signs)
            if other.tobytes() not in found and inside(other):
                found.add(other.tobytes())
                stack.append(other)
    patterns = np.ones((len(found), len(rows)), dtype=bool)
    patterns[:, alive] = [np.frombuffer(signs) > 0 for signs in found]
    return {pattern.tobytes() for pattern in patterns}


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_any_rows_agree_with_a_search_from_cell_to_cell(rank: int) -> None:
    rows = mixed_rows(np.random.default_rng(rank), rank)
    expected = neighbours_closure(rows)
    assert listed_at_scale(rows) == expected
    assert count_cells(rows) == len(expected)
    assert listed_at_scale(rows[2:]) != expected  # the comparison can fail


def listed_at_scale(rows: np.ndarray) -> set[bytes]:
    top = np.abs(rows).max(axis=1, keepdims=True)
    return listed(rows / np.where(top > 0, top, 1))


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.float64, st.tuples(st.integers(0, 20), st.integers(1, 4)), elements=st.integers(-2, 2).map(float)),
    st.integers(1, 9),
)
def test_batches_of_any_size_hold_the_same_cells(rows: np.ndarray, size: int) -> None:
    patterns, points = [], []
    for batch in cell_batches(rows, size):
        assert 1 <= len(batch.packed) == len(batch.interiors) <= size
        assert batch.overshoot < 1e-10
        patterns.append(batch.packed)
        points.append(batch.interiors)
    packed, interiors = np.concatenate(patterns), np.concatenate(points)
    assert len(np.unique(packed, axis=0)) == len(packed) == count_cells(rows)
    alive = (rows != 0).any(axis=1)
    unpacked = unpack_patterns(packed, len(rows))
    assert np.array_equal(unpacked[:, alive], interiors @ rows[alive].T > 0)
    assert unpacked[:, ~alive].all()
    assert {pattern.tobytes() for pattern in unpacked} == {cell.pattern.tobytes() for cell in cells(rows)}
    opposite = {(~pattern[alive]).tobytes() for pattern in unpacked}
    assert opposite == {pattern[alive].tobytes() for pattern in unpacked} or not alive.any()


def test_rows_in_a_thin_cone_are_told_apart_as_well() -> None:
    """Enumeration works in coordinates in which the rows spread evenly."""
    rows = np.random.default_rng(0).standard_normal((40, 3))
    thin = rows * np.array([1.0, 1e-7, 1e-7])
    batches = list(cell_batches(thin))
    assert sum(len(batch.packed) for batch in batches) == count_cells(thin) == count_bound(40, 3)
    assert batches[-1].overshoot < 1e-11
    expected = {cell.pattern.tobytes() for cell in cells(rows)}
    assert {cell.pattern.tobytes() for cell in cells(thin)} == expected


def test_what_lies_in_no_listed_cell_is_within_the_overshoot() -> None:
    """Planes that miss a common line by less than the tolerance: their slivers are not listed, but bounded."""
    random = np.random.default_rng(5)
    for miss in (1e-9, 3e-11, 1e-12):
        rows = np.concatenate([np.eye(3), [[1.0, 1.0, 0.0], [1.0, -1.0, 0.0]], random.standard_normal((3, 3))])
        rows[3, 2] = miss
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        batches = list(cell_batches(rows))
        known = unpack_patterns(np.concatenate([batch.packed for batch in batches]), len(rows))
        points = np.concatenate([random.uniform(-2 * miss, 2 * miss, (2000, 2)), np.ones((2000, 1))], axis=1)
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        heights = points @ rows.T
        wrong = (heights[:, None] > 0) != known
        missed = np.where(wrong, np.abs(heights)[:, None], 0).max(axis=2).min(axis=1).max()
        assert missed <= batches[-1].overshoot
        assert (missed == 0) == (miss > 1e-10)


def almost_degenerate(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Planes of R^3 to R^5 that all but meet, and points around places where d - 1 of them do."""
    random = np.random.default_rng(seed)
    d = int(random.integers(3, 6))
    rows = random.integers(-1, 2, size=({3: 12, 4: 10, 5: 8}[d], d)).astype(float)
    rows = rows[(rows != 0).any(axis=1)]
    miss = 10.0 ** random.uniform(-16, -8)
    moved = random.random(rows.shape) < random.choice([0.1, 0.5, 1])
    rows = np.concatenate([rows + miss * random.standard_normal(rows.shape) * moved, np.eye(d)])
    rows = np.concatenate([rows, rows[:2] + miss * random.standard_normal((2, d))])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    corners = [np.linalg.svd(rows[random.choice(len(rows), d - 1, replace=False)])[2][-1] for _ in range(60)]
    steps = 10.0 ** random.uniform(-16, -7, (720, 1)) * random.standard_normal((720, d))
    points = np.repeat(corners, 12, axis=0) + steps
    return rows, points / np.linalg.norm(points, axis=1, keepdims=True)


@pytest.mark.parametrize("seeds", [range(20), range(20, 40)], ids=str)
def test_nothing_is_lost_where_planes_all_but_meet(seeds: range) -> None:
    unlisted = 0
    for rows, points in map(almost_degenerate, seeds):
        batches = list(cell_batches(rows))
        known = unpack_patterns(np.concatenate([batch.packed for batch in batches]), len(rows))
        assert len(np.unique(known, axis=0)) == len(known)
        patterns = {pattern.tobytes() for pattern in known}
        for height in points @ rows.T:
            if (height > 0).tobytes() not in patterns:
                unlisted += 1
                missed = np.where((height > 0) != known, np.abs(height), 0).max(axis=1).min()
                assert missed <= batches[-1].overshoot
    assert unlisted > 100


def test_memory_does_not_grow_with_the_number_of_cells() -> None:
    def peak(n: int) -> float:
        rows = np.random.default_rng(0).standard_normal((n, 3))
        tracemalloc.start()
        count = sum(len(batch.packed) for batch in cell_batches(rows, 1000))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == count_bound(n, 3)
        return size

    peak(5)
    assert peak(320) < 4 * peak(80)  # 16 times the cells, 4 times the bits a cell


@pytest.mark.slow
def test_two_thousand_rows_in_space_are_listed() -> None:
    rows = np.random.default_rng(0).standard_normal((2000, 3))
    weights = np.random.default_rng(1).integers(0, 1 << 63, 250, dtype=np.uint64)
    hashes = []
    for batch in cell_batches(rows):
        hashes.append((batch.packed.astype(np.uint64) * weights).sum(axis=1))
        sample = slice(None, None, 97)
        assert np.array_equal(unpack_patterns(batch.packed[sample], 2000), batch.interiors[sample] @ rows.T > 0)
    assert len(np.unique(np.concatenate(hashes))) == sum(map(len, hashes)) == count_bound(2000, 3) == 3998002
