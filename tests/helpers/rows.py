"""Charged rows, what the rigorous oracles search: random and awkward ones, and how far a search went wrong."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from convcvx.oracles._blocks import Incumbents
from convcvx.oracles._row_tree import RowTree
from convcvx.oracles.base import OracleResult
from convcvx.oracles.charged_rows import ChargedRows


def charged(rows, charges, cells=None, n_cells: int | None = None, slack: float = 0.0) -> ChargedRows:
    """Rows as they are, in one cell unless `cells` says otherwise."""
    rows, charges = np.asarray(rows, dtype=float), np.asarray(charges, dtype=float)
    cells = np.zeros(len(rows), np.int32) if cells is None else cells.astype(np.int32)  # as `PatchRows` has them
    n_cells = int(cells.max(initial=0)) + 1 if n_cells is None else n_cells
    return ChargedRows(rows, cells, charges, n_cells, torch.eye(rows.shape[1], dtype=torch.float64), slack)


def unit_rows(rows: np.ndarray, charges: np.ndarray, cells: np.ndarray | None = None) -> ChargedRows:
    """The same g by rows of unit length, without those that are zero."""
    norms = np.linalg.norm(rows, axis=1)
    alive = norms > 0
    cells = None if cells is None else cells[alive]
    return charged(rows[alive] / norms[alive, None], charges[alive] * norms[alive, None], cells)


def random_rows(n: int, d: int, c: int = 2, n_cells: int = 1, seed: int = 0) -> ChargedRows:
    random = np.random.default_rng(seed)
    return unit_rows(random.standard_normal((n, d)), random.standard_normal((n, c)), random.integers(0, n_cells, n))


@st.composite
def awkward_rows(draw) -> ChargedRows:
    """Few rows, many of them equal, antipodal, zero or dependent, in several cells."""
    d, c, n = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 12))
    numbers = st.integers(-2, 2).map(float)
    rows = np.array(draw(st.lists(st.lists(numbers, min_size=d, max_size=d), min_size=n, max_size=n)))
    charges = np.array(draw(st.lists(st.lists(numbers, min_size=c, max_size=c), min_size=n, max_size=n)))
    cells = np.array(draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)))
    rows = np.concatenate([rows, -rows[: n // 2]])
    return unit_rows(rows, np.concatenate([charges, charges[: n // 2]]), np.concatenate([cells, cells[: n // 2]]))


@st.composite
def clustered_rows(draw) -> ChargedRows:
    """Small problems of rank d <= 4 whose rows come in d clusters, of any width, with charges that may cancel."""
    d, c, n_cells = draw(st.integers(1, 4)), draw(st.integers(1, 10)), draw(st.integers(1, 4))
    n, width = draw(st.integers(d, 14 if d < 4 else 9)), draw(st.sampled_from([1.0, 0.1, 1e-3, 0.0]))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    centres = random.standard_normal((d, d))[np.arange(n) % d]
    rows, charges = centres + width * random.standard_normal((n, d)), random.standard_normal((n, c))
    charges -= draw(st.sampled_from([0.0, 1.0])) * charges.mean(axis=0)
    return unit_rows(rows, charges, random.integers(0, n_cells, n))


def narrow_cone(seed: int, width: float) -> ChargedRows:
    """g is broad and below 1.6 but for a cone of angle `width` around `peak`, where it reaches 2.

    Rows in a tight bundle nearly orthogonal to `peak`, charged as a second difference, give a spike there.
    """
    peak = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))[0]
    tilt = np.array([-width, 0.0, width])
    rows, charges = [peak[2]], [np.array([0.6])]
    for side in (1, 2):
        rows += [peak[side] - t * peak[0] for t in tilt]
    spike = np.array([1.0, -2.0, 1.0]) / width
    charges += [np.array([s]) for s in spike] * 2
    return unit_rows(np.array(rows), np.array(charges))


def dense_max(rows: ChargedRows, n: int = 20_000) -> float:
    """The largest g over many directions, with the best ones taken uphill: a lower bound on max g."""
    incumbents = Incumbents(rows, RowTree.build(rows), 40)
    incumbents.climb(np.random.default_rng(1).standard_normal((n, rows.rows.shape[1])), 0)
    incumbents.climb(incumbents.points, 40)
    return float(incumbents.values[0])


def largest(result: OracleResult) -> float:
    """The largest g found; 0 for charges that are all zero."""
    return max(result.values.tolist(), default=0.0)


def agrees(upper_bound: float, exact: OracleResult, tol: float, rounding: float) -> bool:
    """Whether it lies between max g, as enumeration proves it, and (1 + tol) times that."""
    return largest(exact) <= upper_bound <= exact.upper_bound * (1 + 1.01 * tol) + rounding
