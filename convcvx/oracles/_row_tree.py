"""A tree over charged rows: a cone looks at a bundle of rows as one row as long as the bundle is small beside it."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numba
import numpy as np
from numba import njit

from convcvx.oracles.base import ChargedRows

BUCKET = 8
"""Rows below which a bundle is not divided into bundles, but into its rows."""


@dataclass(frozen=True)
class RowTree:
    """Entries 0..N-1 are the rows, entries N.. are bundles of rows of one cell.

    Attributes
    ----------
    table : ndarray (N + nodes, d + width + 4)
        Columns: direction x (d) | charge s, zero-padded (width) | |s| | remainder R | radius | weight.
        A bundle of rows (x_k, s_k) has x = their mean weighted by |s_k|, s = Σ s_k, radius = max |x_k - x|,
        R = Σ |s_k| |x_k - x| and weight Σ |s_k|; a row has R = radius = 0.
    moments : ndarray (nodes, d, width)
        Σ x_k s_kᵀ of a bundle.
    children : ndarray (nodes, 2) int64
        First entry and number of entries a bundle is divided into; they are consecutive.
    cells : ndarray (N + nodes,) int32
    roots : ndarray int32
        The entries that hold everything, one bundle or row a cell.
    """

    table: np.ndarray
    moments: np.ndarray
    children: np.ndarray
    cells: np.ndarray
    roots: np.ndarray

    @property
    def weight(self) -> float:
        """Σ |s_k|."""
        return float(self.table[self.roots, -1].sum())

    def fold(self, n_cells: int) -> np.ndarray:
        """(d, P, width): Σ x_k s_kᵀ over all rows, by cell; the odd part of G is half of it."""
        n, (d, width) = len(self.table) - len(self.moments), self.moments.shape[1:]
        total = np.zeros((d, n_cells, width))
        for root in self.roots:
            row = self.table[root]
            total[:, self.cells[root]] = self.moments[root - n] if root >= n else np.outer(row[:d], row[d : d + width])
        return total

    @classmethod
    def build(cls, charged: ChargedRows) -> RowTree:
        n, d = charged.rows.shape
        c = charged.charges.shape[1]
        width = -(-c // 4) * 4
        order = np.argsort(charged.cells, kind="stable")
        table = np.zeros((n, d + width + 4))
        table[:, :d], table[:, d : d + c] = charged.rows[order], charged.charges[order]
        table[:, d + width] = table[:, d + width + 3] = np.linalg.norm(table[:, d : d + width], axis=1)
        cells = charged.cells[order].astype(np.int32)
        starts = np.flatnonzero(np.diff(cells, prepend=-1))
        permutation, spans, children, roots = _divide(table[:, :d].copy(), starts, np.append(starts[1:], n), BUCKET)
        table = table[permutation]
        nodes, moments = np.zeros((len(spans), table.shape[1])), np.zeros((len(spans), d, width))
        threads = numba.get_num_threads()
        with ThreadPoolExecutor(threads) as pool:
            edges = np.linspace(0, len(spans), 16 * threads + 1).astype(np.int64)
            for low, high in itertools.pairwise(edges):
                pool.submit(_summarise, table, spans, d, c, nodes, moments, low, high)
        return cls(
            np.concatenate([table, nodes]),
            moments,
            children,
            np.concatenate([cells, cells[spans[:, 0]]]),
            roots,
        )


@njit(cache=True)
def _select(values, order, low, high, middle):
    """Quickselect: reorder order[low:high] so that values below position `middle` are not larger than above."""
    high -= 1
    while low < high:
        pivot = values[order[(low + high) // 2]]
        i, j = low, high
        while i <= j:
            while values[order[i]] < pivot:
                i += 1
            while values[order[j]] > pivot:
                j -= 1
            if i <= j:
                order[i], order[j] = order[j], order[i]
                i += 1
                j -= 1
        if middle <= j:
            high = j
        elif middle >= i:
            low = i
        else:
            return


@njit(cache=True)
def _divide(points, starts, stops, bucket):
    """Halve each [start, stop) along its widest coordinate until `bucket` rows are left."""
    n, d = points.shape
    order = np.arange(n)
    limit = 2 * n + 2
    spans = np.empty((limit, 2), np.int64)
    children = np.empty((limit, 2), np.int64)
    roots = np.empty(len(starts), np.int32)
    count = 0
    for r in range(len(starts)):
        if stops[r] - starts[r] == 1:
            roots[r] = starts[r]
        else:
            spans[count] = starts[r], stops[r]
            roots[r] = n + count
            count += 1
    node = 0
    while node < count:
        low, high = spans[node]
        if high - low <= bucket:
            children[node] = low, high - low
            node += 1
            continue
        axis, widest = 0, -1.0
        for j in range(d):
            smallest, largest = np.inf, -np.inf
            for t in range(low, high):
                x = points[order[t], j]
                smallest, largest = min(smallest, x), max(largest, x)
            if largest - smallest > widest:
                axis, widest = j, largest - smallest
        middle = (low + high) // 2
        _select(points[:, axis], order, low, high, middle)
        children[node] = n + count, 2
        spans[count] = low, middle
        spans[count + 1] = middle, high
        count += 2
        node += 1
    return order, spans[:count].copy(), children[:count].copy(), roots


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
def _summarise(table, spans, d, c, nodes, moments, first, last):
    """Fill `nodes` and `moments` of the bundles first..last-1."""
    width = moments.shape[2]
    spread, charge, offset = np.empty((d, d)), np.empty((c, c)), np.empty(d)
    for node in range(first, last):
        low, high = spans[node]
        out = nodes[node]
        for t in range(low, high):
            norm = table[t, d + width]
            out[d + width + 3] += norm
            for j in range(d):
                out[j] += norm * table[t, j]
                for a in range(width):
                    moments[node, j, a] += table[t, j] * table[t, d + a]
            for a in range(width):
                out[d + a] += table[t, d + a]
        out[:d] /= max(out[d + width + 3], 1e-300)
        out[d + width] = np.sqrt((out[d : d + width] ** 2).sum())
        spread[:] = 0.0
        charge[:] = 0.0
        direct = 0.0
        for t in range(low, high):
            norm = table[t, d + width]
            if norm == 0.0:
                continue
            for j in range(d):
                offset[j] = table[t, j] - out[j]
            distance = np.sqrt((offset * offset).sum())
            direct += norm * distance
            out[d + width + 2] = max(out[d + width + 2], distance)
            for j in range(d):
                for i in range(d):
                    spread[j, i] += norm * offset[j] * offset[i]
            for a in range(c):
                scaled = table[t, d + a] / norm
                for b in range(c):
                    charge[a, b] += scaled * table[t, d + b]
        out[d + width + 1] = min(direct, np.sqrt(_largest_eigenvalue(spread) * _largest_eigenvalue(charge)))
