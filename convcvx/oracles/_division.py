"""How rows are divided into bundles of neighbours: geometry alone, whatever their charges."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from convcvx.machine.jit import njit

BUCKET = 16
"""Rows up to which a bundle is divided into its rows: looking at smaller bundles would cost what they save."""


@dataclass(frozen=True)
class Division:
    """How rows are divided into bundles: geometry alone, whatever their charges.

    Entries 0..N-1 are the rows, in the order `order` puts them; entries N.. are bundles of rows of one cell.

    Attributes
    ----------
    order : ndarray (N,) integer
    spans : ndarray (nodes, 2) int64
        The rows [low, high) of a bundle.
    children : ndarray (nodes, 2) int64
        First entry and number of entries a bundle is divided into; they are consecutive.
    roots : ndarray int32
        The entries that hold everything, one bundle or row a cell.
    """

    order: np.ndarray
    spans: np.ndarray
    children: np.ndarray
    roots: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, cells: np.ndarray) -> Division:
        """Halve the rows (N, d) of each cell again and again."""
        order = np.argsort(cells, kind="stable")
        starts = np.flatnonzero(np.diff(cells[order], prepend=-1))
        division = cls.in_place(rows[order], starts, BUCKET)
        return replace(division, order=order[division.order])

    @classmethod
    def in_place(cls, rows: np.ndarray, starts: np.ndarray, bucket: int) -> Division:
        """The same for rows in the order of their cells, each of which begins at one of `starts`; they are put in
        order where they are, and bundles of up to `bucket` of them are divided into rows."""
        return cls(*_divide(rows, starts, np.append(starts[1:], len(rows)), bucket))

    def sorted(self) -> Division:
        """The same for rows that have been put in order."""
        return Division(np.arange(len(self.order)), self.spans, self.children, self.roots)

    def forest(self, n_trees: int) -> tuple[list[int], list[int]]:
        """Disjoint bundles that hold all others, about `n_trees`, but for those in a second list, parents first."""
        n = len(self.order)
        trees, above = [int(root) - n for root in self.roots if root >= n], []
        while trees and len(trees) < n_trees:
            largest = max(trees, key=lambda node: self.spans[node, 1] - self.spans[node, 0])
            first = int(self.children[largest, 0])
            if first < n:
                break
            trees.remove(largest)
            trees += [first - n, first + 1 - n]
            above.append(largest)
        return trees, above


@njit(cache=True)
def _select(points, axis, order, low, high, middle):
    """Quickselect: reorder low:high so that points before position `middle` have no more of `axis` than those after."""
    high -= 1
    while low < high:
        pivot = points[(low + high) // 2, axis]
        i, j = low, high
        while i <= j:
            while points[i, axis] < pivot:
                i += 1
            while points[j, axis] > pivot:
                j -= 1
            if i <= j:
                order[i], order[j] = order[j], order[i]
                for k in range(points.shape[1]):
                    points[i, k], points[j, k] = points[j, k], points[i, k]
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
    """Halve each [start, stop) along its widest coordinate until `bucket` rows are left, moving `points` to do so."""
    n, d = points.shape
    order = np.arange(n).astype(np.int32)
    limit = 2 * (len(starts) + n // max(1, (bucket + 1) // 2)) + 2
    spans = np.empty((limit, 2), np.int64)
    children = np.empty((limit, 2), np.int64)
    roots = np.empty(len(starts), np.int32)
    count = 0
    for r in range(len(starts)):
        if stops[r] - starts[r] == 1:
            roots[r] = starts[r]
        else:
            spans[count, 0], spans[count, 1] = starts[r], stops[r]
            roots[r] = n + count
            count += 1
    node = 0
    while node < count:
        low, high = spans[node]
        if high - low <= bucket:
            children[node, 0], children[node, 1] = low, high - low
            node += 1
            continue
        axis, widest = 0, -1.0
        for j in range(d):
            smallest, largest = np.inf, -np.inf
            for t in range(low, high):
                x = points[t, j]
                smallest, largest = min(smallest, x), max(largest, x)
            if largest - smallest > widest:
                axis, widest = j, largest - smallest
        middle = (low + high) // 2
        _select(points, axis, order, low, high, middle)
        children[node, 0], children[node, 1] = n + count, 2
        spans[count, 0], spans[count, 1] = low, middle
        spans[count + 1, 0], spans[count + 1, 1] = middle, high
        count += 2
        node += 1
    return order, spans[:count].copy(), children[:count].copy(), roots
