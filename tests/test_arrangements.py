"""Cells: counted against the formula, listed against linear programs, sampled against both."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linprog

from convcvx.arrangements import cells, count_bound, count_cells, sample_patterns, unpack_patterns
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
    rows = np.random.default_rng(0).standard_normal((300, 8))
    assert len(list(itertools.islice(cells(rows), 3))) == 3


def test_tiny_and_huge_rows_count_alike() -> None:
    rows = np.random.default_rng(3).standard_normal((10, 3))
    assert count_cells(rows * np.logspace(-12, 12, 10)[:, None]) == count_bound(10, 3)


@pytest.mark.parametrize("rows", [np.zeros(3), np.array([[np.nan, 1.0]])])
def test_bad_rows_are_refused(rows: np.ndarray) -> None:
    with pytest.raises(InputError, match="rows must be"):
        list(cells(rows))
