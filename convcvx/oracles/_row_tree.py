"""A tree over charged rows: a cone looks at a bundle of rows as one row as long as the bundle is small beside it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from convcvx.machine.jit import njit
from convcvx.machine.threads import cores
from convcvx.oracles._division import Division
from convcvx.oracles.charged_rows import ChargedRows

SUBTREES = 16
"""Subtrees for each thread, summed up independently: many, as some take longer than others."""


@dataclass(frozen=True)
class RowTree:
    """Rows and bundles of a `Division` with the charges summed up.

    Attributes
    ----------
    table : ndarray (N + nodes, d + width + 4)
        Columns: direction x (d) | charge s, zero-padded (width) | |s| | remainder R | radius | weight.
        A bundle of rows (x_k, s_k) has x = their mean weighted by |s_k|, s = Σ s_k, radius = max |x_k - x|,
        R = Σ |s_k| |x_k - x| or less, and weight Σ |s_k|; a row has R = radius = 0.
    moments : ndarray (nodes, d, width)
        Σ x_k s_kᵀ of a bundle.
    cells : ndarray (N + nodes,) int32
    division : Division
    """

    table: np.ndarray
    moments: np.ndarray
    cells: np.ndarray
    division: Division

    @property
    def weight(self) -> float:
        """Σ |s_k|."""
        return float(self.table[self.division.roots, -1].sum())

    def fold(self, n_cells: int) -> np.ndarray:
        """(d, P, width): Σ x_k s_kᵀ over all rows, by cell; the odd part of G is half of it."""
        n, (d, width) = len(self.table) - len(self.moments), self.moments.shape[1:]
        total = np.zeros((d, n_cells, width))
        for root in self.division.roots:
            row = self.table[root]
            total[:, self.cells[root]] = self.moments[root - n] if root >= n else np.outer(row[:d], row[d : d + width])
        return total

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
    def build(cls, charged: ChargedRows) -> RowTree:
        n, d = charged.rows.shape
        c = charged.charges.shape[1]
        width = -(-c // 4) * 4
        division = charged.division or Division.of(charged.rows, charged.cells)
        nodes, order = len(division.spans), slice(None) if charged.division else division.order
        table = np.zeros((n + nodes, d + width + 4))
        table[:n, :d], table[:n, d : d + c] = charged.rows[order], charged.charges[order]
        table[:n, d + width] = table[:n, d + width + 3] = np.sqrt((charged.charges[order] ** 2).sum(axis=1))
        moments = np.zeros((nodes, d, width))
        cells = charged.cells[order].astype(np.int32)
        sums = partial(_sum_up, table, moments, division.spans, division.children, c)
        threads = cores()
        trees, above = division.forest(SUBTREES * threads)
        with ThreadPoolExecutor(threads) as pool:
            spreads = dict(zip(trees, pool.map(lambda node: sums(node, np.zeros((0, c, c))), trees), strict=True))
        for node in reversed(above):
            first = int(division.children[node, 0]) - n
            spreads[node] = sums(node, np.stack([spreads.pop(first), spreads.pop(first + 1)]))
        return cls(table, moments, np.concatenate([cells, cells[division.spans[:, 0]]]), division)


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _largest_eigenvalue(matrix):
    """An upper bound on the largest eigenvalue of a positive semidefinite matrix: (tr A^8)^(1/8)."""
    n = len(matrix)
    trace = 0.0
    for i in range(n):
        trace += matrix[i, i]
    if trace <= 0.0:
        return 0.0
    power = matrix / trace
    for _ in range(2):
        square = np.zeros((n, n))
        for i in range(n):
            for k in range(n):
                for j in range(n):
                    square[i, j] += power[i, k] * power[k, j]
        power = square
    return trace * (power * power).sum() ** 0.125 * (1.0 + 1e-12)


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _sum_up(table: Any, moments: Any, spans: Any, children: Any, c: int, root: int, below: Any) -> Any:
    """Fill `table` and `moments` for a bundle and all below it, children first; returns its Σ s sᵀ/|s|.

    With `below` (2, c, c), these sums of its children, only for the bundle itself.
    """
    n, (d, width) = len(table) - len(moments), moments.shape[1:]
    path, charges = np.empty(128, np.int64), np.empty((128, c, c))  # one bundle a level, and its Σ s sᵀ/|s|
    done = np.zeros(128, np.int64)  # children dealt with
    path[0], level = root, 0
    charges[0] = 0.0
    if len(below):
        charges[0] = below[0] + below[1]
        done[0] = 2
    while True:
        node = path[level]
        first = children[node, 0]
        if first >= n and done[level] < 2:
            path[level + 1] = first - n + done[level]
            done[level] += 1
            level += 1
            done[level] = 0
            charges[level] = 0.0
            continue
        out = table[n + node]
        for t in range(first, first + children[node, 1]):
            entry = table[t]
            weight = entry[d + width + 3]
            out[d + width + 3] += weight
            for a in range(width):
                out[d + a] += entry[d + a]
            for j in range(d):
                out[j] += weight * entry[j]
                for a in range(width):
                    moments[node, j, a] += moments[t - n, j, a] if t >= n else entry[j] * entry[d + a]
            if t < n and weight > 0.0:
                for a in range(c):
                    scaled = entry[d + a] / weight
                    for b in range(c):
                        charges[level, a, b] += scaled * entry[d + b]
        out[:d] /= max(out[d + width + 3], 1e-300)
        out[d + width] = np.sqrt((out[d : d + width] ** 2).sum())
        _spread(table, spans[node, 0], spans[node, 1], d, width, out, charges[level])
        if level == 0:
            return charges[0].copy()
        level -= 1
        charges[level] += charges[level + 1]


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _spread(table: Any, low: int, high: int, d: int, width: int, out: Any, charge: Any) -> None:
    """Radius and remainder of the bundle `out` of the rows [low, high) of `table`."""
    spread, offset = np.zeros((d, d)), np.empty(d)
    direct, radius = 0.0, 0.0
    for t in range(low, high):
        weight = table[t, d + width]
        square = 0.0
        for j in range(d):
            offset[j] = table[t, j] - out[j]
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
    out[d + width + 1] = min(direct, np.sqrt(_largest_eigenvalue(spread) * _largest_eigenvalue(charge)))
