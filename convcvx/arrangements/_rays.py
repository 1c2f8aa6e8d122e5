"""Cells of a central arrangement by their extreme rays: a depth-first search that halves cells (double description).

A node of the search is a cell of the hyperplanes cut so far, and the list of those that still cut it. The deepest of
these halves the node, and its halves inherit the rest, so that a row is looked at only where it matters: time is
proportional to the number of cells, whatever the rank, and memory to the depth.

References
----------
Fukuda, Prodon, Double description method revisited, 1996; Clarkson, Shor, Discrete Comput. Geom. 4 (1989) 387-421
(lists of conflicts).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from convcvx.machine.jit import njit
from convcvx.rounding import UNIT

TOLERANCE = 1e-10
"""Product of a unit row and a unit ray up to which the ray lies on the row's hyperplane; cells that are thinner are not
told apart. Far above what rounding makes of a ray, so that degenerate rows are seen to be degenerate."""
INDEPENDENT = 1e-13
"""Part of a unit row across the span of others from which on the row is independent of them: what is doubtful counts,
as one ray too many does no harm, and one too few loses a cell."""
FIRST_RAYS = 1024
"""Rays that the stack of a search has room for at first; the stack doubles when it is full."""
FIRST_CUTS = 64
"""Nodes and cuts that the stacks of a search have room for at first: as many cuts as a word of `tight` has bits."""


@dataclass(frozen=True)
class Bits:
    """Where the signs of hyperplanes stand in a packed pattern, most significant bit of a byte first.

    Positions `bit[start[l] : start[l + 1]]` belong to hyperplane l; `flip` says which of them show the opposite sign.
    `blank` (bytes,) uint8 is a pattern with all else set.
    """

    start: np.ndarray
    bit: np.ndarray
    flip: np.ndarray
    blank: np.ndarray


def walk(normals: np.ndarray, bits: Bits, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    """Yield the cells of distinct hyperplanes spanning R^d, one of each antipodal pair, at most `size` at a time.

    Each batch is (packed patterns (q, bytes) uint8, interior unit vectors (q, d), overshoot).

    *Overshoot.* With κ = 1 / min_i c·r_i for the centre c of a node and its unit rays r_i, any unit u = Σ λ_i r_i of it
    has Σ λ_i <= κ. So where rays pass a hyperplane that is not to cut them by at most δ, u does by at most κδ. The
    halves of a node cover it, wherever on their segment the new rays are put: exchange λ_i r_i + λ_j r_j for the new
    ray between them until one side is used up. What rounding moves new rays by is added up along the way.
    """
    n, d = normals.shape
    basis = _independent(normals)
    rest = np.setdiff1d(np.arange(n), basis)
    corner = np.linalg.inv(normals[basis]).T  # ray i lies on every basis hyperplane but i
    corner /= np.linalg.norm(corner, axis=1, keepdims=True)
    stretch = d / np.linalg.norm(normals[basis], -2)  # a κ for the orthants: w = Σ ±b_i has w·r_i >= σ_min, ‖w‖ <= d
    overshoot = np.zeros(1)
    space = _Space.of(n, d)
    for orthant in range(1 << (d - 1)):
        signs = np.array([(orthant >> i) & 1 == 0 for i in range(d)])
        pattern = bits.blank.copy()
        for line, positive in zip(basis, signs, strict=True):
            _set(pattern, bits.start, bits.bit, bits.flip, line, positive)
        space.plant(np.where(signs[:, None], corner, -corner), basis, rest)
        top = 1
        while top:
            packed, centres = np.empty((size, len(pattern)), np.uint8), np.empty((size, d))
            top, count = _fill(
                normals, top, stretch, *space.arrays(), bits.start, bits.bit, bits.flip, pattern, packed, centres,
                overshoot,
            )  # fmt: skip
            if count:
                yield packed[:count], centres[:count], float(overshoot[0])
            if top and count < size:
                space = space.grown()


@dataclass
class _Space:
    """Stacks of the search: rays, what they lie on (a bit a cut), the cuts, lists of undecided rows, nodes to visit."""

    rays: np.ndarray
    tight: np.ndarray
    path: np.ndarray
    lists: np.ndarray
    nodes: np.ndarray
    drifts: np.ndarray

    @classmethod
    def of(cls, n: int, d: int) -> _Space:
        return cls(
            np.empty((FIRST_RAYS, d)),
            np.empty((FIRST_RAYS, 1), np.uint64),
            np.empty(FIRST_CUTS, np.int64),
            np.empty(4 * n, np.int64),
            np.empty((FIRST_CUTS, len(_NODE)), np.int64),
            np.empty(FIRST_CUTS),
        )

    def plant(self, rays: np.ndarray, basis: np.ndarray, undecided: np.ndarray) -> None:
        """The only node: an orthant of the basis."""
        d = len(rays)
        self.path[:d] = basis
        self.rays[:d], self.tight[:d] = rays, 0
        self.tight[:d, 0] = [(1 << d) - 1 - (1 << i) for i in range(d)]
        self.lists[: len(undecided)] = undecided
        self.nodes[0], self.drifts[0] = (0, d, 0, len(undecided), -1, 0, d), 0.0

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return self.rays, self.tight, self.path, self.lists, self.nodes, self.drifts

    def grown(self) -> _Space:
        """Twice the room."""
        double = [np.concatenate([array, np.empty_like(array)]) for array in self.arrays()]
        double[1] = np.concatenate([double[1], np.zeros_like(double[1])], axis=1)
        return _Space(*double)


_NODE = ("first ray", "end", "first undecided row", "end", "row to cut by, or -1", "side", "cuts so far")
"""Columns of a node: half of the cell that the rays and rows at these places of the stacks describe."""


def _independent(normals: np.ndarray) -> np.ndarray:
    """Indices of d rows that span R^d, each as far as can be from the span of those before."""
    rest, chosen = normals.copy(), []
    for _ in range(normals.shape[1]):
        k = int(np.linalg.norm(rest, axis=1).argmax())
        direction = rest[k] / np.linalg.norm(rest[k])
        chosen.append(k)
        rest = rest - np.outer(rest @ direction, direction)
    return np.array(chosen)


@njit(cache=True)
def _set(pattern: Any, start: Any, bit: Any, flip: Any, line: int, positive: bool) -> None:
    """Write the sign of one hyperplane into a packed pattern."""
    for place in range(start[line], start[line + 1]):
        mask = np.uint8(128 >> (bit[place] & 7))
        if positive != flip[place]:
            pattern[bit[place] >> 3] |= mask
        else:
            pattern[bit[place] >> 3] &= ~mask


@njit(cache=True)
def _copy(source: Any, target: Any) -> None:
    """By a loop: where a slice is assigned, numba compiles the message for shapes that do not fit as well."""
    for place in range(len(source)):
        target[place] = source[place]


@njit(cache=True)
def _make_unit(vector: Any) -> None:
    length = np.sqrt(_dot(vector, vector))
    for place in range(len(vector)):
        vector[place] /= length


@njit(cache=True)
def _fill(
    normals: Any,
    top: int,
    stretch: float,
    rays: Any,
    tight: Any,
    path: Any,
    lists: Any,
    nodes: Any,
    drifts: Any,
    start: Any,
    bit: Any,
    flip: Any,
    pattern: Any,
    packed: Any,
    centres: Any,
    overshoot: Any,
) -> tuple[int, int]:
    """Visit nodes from the top of the stack until none is left, `packed` is full or there is no room.

    Returns the nodes left and the cells written.
    """
    d, count = normals.shape[1], 0
    centre = np.empty(d)
    while top and count < len(packed):
        node = nodes[top - 1]
        a, b, first, last, cut, side, cuts = node[0], node[1], node[2], node[3], node[4], node[5], node[6]
        m = b - a
        room = b + m + m * m // 4 <= len(rays) and 2 * last - first <= len(lists) and top < len(nodes)
        if not room or cuts >= len(path):
            break
        top -= 1
        drift = drifts[top]
        if cut >= 0:
            _set(pattern, start, bit, flip, cut, side > 0)
            path[cuts - 1] = cut
            a, b = b, _halve(rays, tight, a, b, normals, path, float(side), cuts - 1)
        stray = _centre(rays, a, b, stretch, centre)
        passed, deepest, depth, end = 2 * d * UNIT, -1, TOLERANCE, last
        for place in range(first, last):
            k = lists[place]
            if k == cut:
                continue
            low, high = _range(rays, a, b, normals[k])
            if min(high, -low) > TOLERANCE:
                lists[end] = k
                end += 1
                if min(high, -low) > depth:
                    depth, deepest = min(high, -low), k
            else:
                _set(pattern, start, bit, flip, k, high > -low)
                passed = max(passed, min(high, -low))
        if deepest >= 0:
            for i in range(a, b):  # such rays stay on both sides
                value = abs(_dot(rays[i], normals[deepest]))
                passed = max(passed, value if value <= TOLERANCE else 0.0)
        overshoot[0] = max(overshoot[0], stray * passed + drift)
        if deepest < 0:
            _copy(pattern, packed[count])
            _copy(centre, centres[count])
            count += 1
            continue
        for turn in (-1, 1):
            node = nodes[top]
            node[0], node[1], node[2], node[3], node[4], node[5], node[6] = a, b, last, end, deepest, turn, cuts + 1
            drifts[top] = drift + 8 * UNIT * stray * stray
            top += 1
    return top, count


@njit(cache=True)
def _dot(x: Any, y: Any) -> float:
    value = 0.0
    for a in range(len(x)):
        value += x[a] * y[a]
    return value


@njit(cache=True)
def _range(rays: Any, a: int, b: int, normal: Any) -> tuple[float, float]:
    """min(0, products of rays a to b with the normal), max(0, ...)."""
    low, high = 0.0, 0.0
    for i in range(a, b):
        value = _dot(rays[i], normal)
        low, high = min(low, value), max(high, value)
    return low, high


@njit(cache=True)
def _centre(rays: Any, a: int, b: int, stretch: float, centre: Any) -> float:
    """The unit sum of the rays a to b, in `centre`; returns κ, what Σ λ_i is at most for a unit Σ λ_i r_i."""
    for j in range(len(centre)):
        centre[j] = 0.0
        for i in range(a, b):
            centre[j] += rays[i, j]
    _make_unit(centre)
    nearest = 1.0
    for i in range(a, b):
        nearest = min(nearest, _dot(rays[i], centre))
    return min(stretch, 1.0 / nearest) if nearest > 0 else stretch


@njit(cache=True)
def _halve(rays: Any, tight: Any, a: int, b: int, normals: Any, path: Any, side: float, index: int) -> int:
    """Append, from b on, the rays of one half of the cell with rays a to b; return their end.

    Rays on both sides meet the hyperplane between them if and only if they span a two-dimensional face.
    """
    d, end = rays.shape[1], b
    word, mask = index // 64, np.uint64(1) << np.uint64(index % 64)
    values = np.empty(b - a)
    for i in range(a, b):
        value = side * _dot(rays[i], normals[path[index]])
        values[i - a] = value
        if value >= -TOLERANCE:
            _copy(rays[i], rays[end])
            _copy(tight[i], tight[end])
            if value <= TOLERANCE:
                tight[end, word] |= mask
            end += 1
    for i in range(a, b):
        for j in range(a, b):
            across = values[i - a] > TOLERANCE and values[j - a] < -TOLERANCE
            if across and (_alone(tight, a, b, i, j) or _rank(tight, i, j, normals, path) >= d - 2):
                for k in range(d):
                    rays[end, k] = values[i - a] * rays[j, k] - values[j - a] * rays[i, k]
                _make_unit(rays[end])
                for w in range(tight.shape[1]):
                    tight[end, w] = tight[i, w] & tight[j, w]
                tight[end, word] |= mask
                end += 1
    return end


@njit(cache=True)
def _alone(tight: Any, a: int, b: int, i: int, j: int) -> bool:
    """Whether no third of the rays a to b lies on all the hyperplanes that rays i and j share: they span a face.

    The converse holds for extreme rays. Where hyperplanes almost meet there are others, and `_rank` decides.
    """
    for other in range(a, b):
        if other != i and other != j:
            contains = True
            for w in range(tight.shape[1]):
                if tight[i, w] & tight[j, w] & ~tight[other, w]:
                    contains = False
                    break
            if contains:
                return False
    return True


@njit(cache=True)
def _rank(tight: Any, i: int, j: int, normals: Any, path: Any) -> int:
    """The rank of the hyperplanes that rays i and j share; what is doubtful counts as independent."""
    d, count, rank = normals.shape[1], 0, 0
    for w in range(tight.shape[1]):
        shared = tight[i, w] & tight[j, w]
        while shared:
            shared &= shared - np.uint64(1)
            count += 1
    if count < d - 2:
        return count
    basis, rest = np.empty((d, d)), np.empty(d)
    for index in range(64 * tight.shape[1]):
        if (tight[i, index // 64] & tight[j, index // 64]) >> np.uint64(index % 64) & np.uint64(1):
            _copy(normals[path[index]], rest)
            for _ in range(2):
                for k in range(rank):
                    share = _dot(rest, basis[k])
                    for j in range(d):
                        rest[j] -= share * basis[k, j]
            if np.sqrt(_dot(rest, rest)) > INDEPENDENT and rank < d:
                _make_unit(rest)
                _copy(rest, basis[rank])
                rank += 1
    return rank
