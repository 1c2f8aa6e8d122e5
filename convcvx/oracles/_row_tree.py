"""A tree over charged rows: a cone looks at a bundle of rows as one row as long as the bundle is small beside it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from convcvx.budget import NEVER, Deadline
from convcvx.machine.jit import njit
from convcvx.machine.threads import cores
from convcvx.oracles._division import Division
from convcvx.oracles.charged_rows import ChargedRows

SUBTREES = 16
"""Subtrees for each thread, summed up independently: many, as some take longer than others."""


class RowArrays(NamedTuple):
    """The rows: the charge of row k is sizes[k] charges[sources[k]], and its length sizes[k] norms[sources[k]].

    Attributes
    ----------
    packed : ndarray (N, d + 2)
        Columns: direction (d) | size | source and cell, two int32 in the place of a number. The rows of a cone lie far
        apart in memory: each is fetched at once.
    tags : ndarray (N, 2 d + 4) int32
        The same memory.
    charges : ndarray (m, width)
        Padded with zeros.
    norms : ndarray (m,)
    """

    packed: np.ndarray
    tags: np.ndarray
    charges: np.ndarray
    norms: np.ndarray

    @classmethod
    def of(cls, charged: ChargedRows, division: Division) -> RowArrays:
        """In the order of the division."""
        m, c = charged.charges.shape
        n, d = charged.rows.shape
        charges = np.zeros((m, -(-c // 4) * 4))
        charges[:, :c] = charged.charges
        norms = np.sqrt((charged.charges**2).sum(axis=1))
        packed = np.empty((n, d + 2))
        tags = packed.view(np.int32)
        order: Any = slice(None) if charged.division else division.order
        packed[:, :d] = charged.rows[order]
        packed[:, d] = 1.0 if charged.sizes is None else charged.sizes[order]
        tags[:, -2] = division.order if charged.sources is None else charged.sources[order]
        tags[:, -1] = charged.cells[order]
        return cls(packed, tags, charges, norms)

    @property
    def directions(self) -> np.ndarray:
        """(N, d)"""
        return self.packed[:, :-2]

    @property
    def sizes(self) -> np.ndarray:
        """(N,)"""
        return self.packed[:, -2]

    @property
    def sources(self) -> np.ndarray:
        """(N,) int32"""
        return self.tags[:, -2]


@dataclass(frozen=True)
class RowTree:
    """Rows and bundles of a `Division` with the charges summed up; entry N + b is bundle b.

    Attributes
    ----------
    rows : RowArrays
    bundles : ndarray (nodes, d + width + 4)
        Columns: direction x (d) | charge s (width) | |s| | remainder R | radius | weight.
        A bundle of rows (x_k, s_k) has x = their mean weighted by |s_k|, s = Σ s_k, radius = max |x_k - x|,
        R = Σ |s_k| |x_k - x| or less, and weight Σ |s_k|.
    moments : ndarray (nodes, d, width)
        Σ x_k s_kᵀ of a bundle.
    cells : ndarray (N + nodes,) int32
    division : Division
    """

    rows: RowArrays
    bundles: np.ndarray
    moments: np.ndarray
    cells: np.ndarray
    division: Division

    @property
    def arrays(self) -> tuple[Any, ...]:
        """What the compiled search looks at."""
        return self.rows, self.bundles, self.moments, self.division.children, self.cells

    @property
    def weight(self) -> float:
        """Σ |s_k|."""
        rows, bundles, _ = self._parted(self.division.roots)
        lengths = self.rows.sizes[rows] * self.rows.norms[self.rows.sources[rows]]
        return float(lengths.sum() + self.bundles[bundles, -1].sum())

    def directions(self, entries: np.ndarray) -> np.ndarray:
        """(q, d) of entries (q,)."""
        rows, bundles, place = self._parted(entries)
        return np.concatenate([self.rows.directions[rows], self.bundles[bundles, : self.moments.shape[1]]])[place]

    def moments_of(self, entries: np.ndarray) -> np.ndarray:
        """(q, d, width): Σ x_k s_kᵀ of entries (q,)."""
        rows, bundles, place = self._parted(entries)
        charges = self.rows.sizes[rows, None] * self.rows.charges[self.rows.sources[rows]]
        return np.concatenate([self.rows.directions[rows, :, None] * charges[:, None], self.moments[bundles]])[place]

    def _parted(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows and the bundles among entries, and where each entry is in the one behind the other."""
        n = len(self.rows.packed)
        is_row = entries < n
        place = np.where(is_row, np.cumsum(is_row) - 1, is_row.sum() + np.cumsum(~is_row) - 1)
        return entries[is_row], entries[~is_row] - n, place

    def fold(self, n_cells: int) -> np.ndarray:
        """(d, P, width): Σ x_k s_kᵀ over all rows, by cell; the odd part of G is half of it."""
        total = np.zeros((n_cells, *self.moments.shape[1:]))
        total[self.cells[self.division.roots]] = self.moments_of(self.division.roots)
        return np.ascontiguousarray(total.transpose(1, 0, 2))

    def cut(self, n_entries: int) -> np.ndarray:
        """Entries that hold every row once, about `n_entries`: the largest bundles are divided first."""
        n, spans, children = len(self.division.order), self.division.spans, self.division.children
        entries = self.division.roots.astype(np.int64)
        while len(entries) < n_entries:
            bundles = entries[entries >= n]
            if not len(bundles):
                break
            sizes = spans[bundles - n, 1] - spans[bundles - n, 0]
            divided = bundles[2 * sizes > sizes.max()]
            first, count = children[divided - n].T
            rest = np.setdiff1d(entries, divided, assume_unique=True)
            below = np.repeat(first - np.append(0, count.cumsum()[:-1]), count) + np.arange(count.sum())
            entries = np.concatenate([rest, below])
        return entries

    @classmethod
    def build(cls, charged: ChargedRows, deadline: Deadline = NEVER) -> RowTree:
        """Sum up the charges; `OutOfTime` once the deadline has passed."""
        d, c = charged.rows.shape[1], charged.charges.shape[1]
        division = charged.division or Division.of(charged.rows, charged.cells)
        rows = RowArrays.of(charged, division)
        n, nodes, width = len(rows.packed), len(division.spans), rows.charges.shape[1]
        bundles, moments = np.zeros((nodes, d + width + 4)), np.zeros((nodes, d, width))
        cells = charged.cells if charged.division else charged.cells[division.order]
        threads = cores()
        trees, above = division.forest(SUBTREES * threads)

        def sums(node: int, below: np.ndarray) -> np.ndarray:
            deadline.check()
            return _sum_up(rows, bundles, moments, division.spans, division.children, c, node, below)

        with ThreadPoolExecutor(threads) as pool:
            spreads = dict(zip(trees, pool.map(lambda node: sums(node, np.zeros((0, c, c))), trees), strict=True))
        for node in reversed(above):
            first = int(division.children[node, 0]) - n
            spreads[node] = sums(node, np.stack([spreads.pop(first), spreads.pop(first + 1)]))
        cells = np.concatenate([cells, cells[division.spans[:, 0]]]).astype(np.int32, copy=False)
        return cls(rows, bundles, moments, cells, division)


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _largest_eigenvalue(matrix):
    """An upper bound on the largest eigenvalue of a positive semidefinite matrix: (tr A^8)^(1/8)."""
    n = len(matrix)
    trace = 0.0
    for i in range(n):
        trace += matrix[i, i]
    if trace <= 0.0:
        return 0.0
    power = np.empty((n, n))
    for i in range(n):
        for j in range(n):
            power[i, j] = matrix[i, j] / trace
    for _ in range(2):
        square = np.zeros((n, n))
        for i in range(n):
            for k in range(n):
                for j in range(n):
                    square[i, j] += power[i, k] * power[k, j]
        power = square
    total = 0.0
    for i in range(n):
        for j in range(n):
            total += power[i, j] * power[i, j]
    return trace * total**0.125 * (1.0 + 1e-12)


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _sum_up(rows: Any, bundles: Any, moments: Any, spans: Any, children: Any, c: int, root: int, below: Any) -> Any:
    """Fill `bundles` and `moments` for a bundle and all below it, children first; returns its Σ s sᵀ/|s|.

    With `below` (2, c, c), these sums of its children, only for the bundle itself.
    """
    packed, tags, charges, norms = rows
    n, (d, width) = len(packed), moments.shape[1:]
    path, squares = np.empty(128, np.int64), np.empty((128, c, c))  # one bundle a level, and its Σ s sᵀ/|s|
    done = np.zeros(128, np.int64)  # children dealt with
    path[0], level = root, 0
    squares[0] = 0.0
    if len(below):
        for a in range(c):
            for b in range(c):
                squares[0, a, b] = below[0, a, b] + below[1, a, b]
        done[0] = 2
    while True:
        node = path[level]
        first = children[node, 0]
        if first >= n and done[level] < 2:
            path[level + 1] = first - n + done[level]
            done[level] += 1
            level += 1
            done[level] = 0
            squares[level] = 0.0
            continue
        out = bundles[node]
        for t in range(first, first + children[node, 1]):
            if t >= n:
                entry = bundles[t - n]
                weight = entry[d + width + 3]
                for a in range(width):
                    out[d + a] += entry[d + a]
                for j in range(d):
                    out[j] += weight * entry[j]
                    for a in range(width):
                        moments[node, j, a] += moments[t - n, j, a]
            else:
                source = tags[t, 2 * d + 2]
                direction, charge, size = packed[t], charges[source], packed[t, d]
                weight = size * norms[source]
                for a in range(width):
                    out[d + a] += size * charge[a]
                for j in range(d):
                    out[j] += weight * direction[j]
                    for a in range(width):
                        moments[node, j, a] += direction[j] * size * charge[a]
                if weight > 0.0:
                    for a in range(c):
                        scaled = size * charge[a] / weight
                        for b in range(c):
                            squares[level, a, b] += scaled * (size * charge[b])
            out[d + width + 3] += weight
        weight = max(out[d + width + 3], 1e-300)
        for j in range(d):
            out[j] /= weight
        square = 0.0
        for a in range(width):
            square += out[d + a] * out[d + a]
        out[d + width] = np.sqrt(square)
        _spread(rows, spans[node, 0], spans[node, 1], d, width, out, squares[level])
        if level == 0:
            return squares[0].copy()
        level -= 1
        for a in range(c):
            for b in range(c):
                squares[level, a, b] += squares[level + 1, a, b]


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _spread(rows: Any, low: int, high: int, d: int, width: int, out: Any, squares: Any) -> None:
    """Radius and remainder of the bundle `out` of the rows [low, high)."""
    packed, tags, _, norms = rows
    spread, offset = np.zeros((d, d)), np.empty(d)
    direct, radius = 0.0, 0.0
    for t in range(low, high):
        weight = packed[t, d] * norms[tags[t, 2 * d + 2]]
        square = 0.0
        for j in range(d):
            offset[j] = packed[t, j] - out[j]
            square += offset[j] * offset[j]
        for j in range(d):
            for i in range(j + 1):
                spread[j, i] += weight * offset[j] * offset[i]
        distance = np.sqrt(square)
        direct += weight * distance
        if weight > 0.0:
            radius = max(radius, distance)
    for j in range(d):
        for i in range(j):
            spread[i, j] = spread[j, i]
    out[d + width + 2] = radius
    out[d + width + 1] = min(direct, np.sqrt(_largest_eigenvalue(spread) * _largest_eigenvalue(squares)))
