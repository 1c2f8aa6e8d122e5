"""Kernel of the exact oracle in space: the top eigenvector of every cell that borders one great circle.

The circle of row k is crossed by the others in an order that `_predicates` makes exact, so each arc
comes with the true activation pattern of the two cells beside it. Every cell of a sphere has an arc on
some circle: all are seen.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from convcvx.arrangements._predicates import crossings
from convcvx.machine.jit import njit
from convcvx.oracles._sweeps import add_outer, offer
from convcvx.rounding import UNIT

FAINT = 1e-100
"""Distance of a matrix from the multiples of the identity up to which the matrix has no axes to speak of: cubes of
entries that small underflow."""
INSIDE = 1e-7
"""Distance of an eigenvector from a cell up to which the eigenvector counts as inside, as rounding may have moved it;
that raises the bound by at most the square of the distance."""
TOP_ERROR = 1e-6
"""Share of the trace by which the top eigenvalue in closed form may be too small, where eigenvalues are close."""
CLEAR_GAP = 1e-3
"""Share of the trace between the two largest eigenvalues from which on the eigenvector in closed form can be relied on
to `DIRECTION_ERROR`; see also `NOISY_GAP`."""
NOISY_GAP = 1e7
"""Errors by rounding of the form that the gap has to exceed besides."""
DIRECTION_ERROR = 1e-6
"""Distance from a cell up to which an eigenvector in closed form may lie in the cell: farther away, the cell is passed
over; nearer, the eigenvector is computed to full precision."""


@njit(cache=True)
def _along(row: Any, v: Any) -> float:
    """Their product. By hand, as arrays are filled entry by entry here: for what NumPy does to so few numbers numba
    compiles checks and their messages, which took most of the time."""
    return row[0] * v[0] + row[1] * v[1] + row[2] * v[2]


@njit(cache=True)
def _inside(v: Any, rows: Any, active: Any, parallel: Any, k: int, side: float, near: Any, slack: float) -> bool:
    """Whether v lies in the cell beside circle k, within `slack`; the likeliest refusals come first."""
    if side * _along(rows[k], v) < -slack:
        return False
    for i in near:
        value = _along(rows[i], v)
        if (value if active[i] else -value) < -slack:
            return False
    for i in range(len(rows)):
        value = _along(rows[i], v)
        sign = side * parallel[i] if parallel[i] != 0 else (1.0 if active[i] else -1.0)
        if sign * value < -slack:
            return False
    return True


@njit(cache=True)
def _plane_meets(
    v: Any, w: Any, rows: Any, active: Any, parallel: Any, k: int, side: float, near: Any, slack: float
) -> bool:
    """Whether the plane of v and w meets the cell, within `slack`: then also on the plane of some row."""
    meeting = np.empty(3)
    for i in range(len(rows)):
        a, b = _along(rows[i], v), _along(rows[i], w)
        length = math.hypot(a, b)
        if length > 0:
            for turn in (1.0, -1.0):
                for j in range(3):
                    meeting[j] = turn * (a * w[j] - b * v[j]) / length
                if _inside(meeting, rows, active, parallel, k, side, near, slack):
                    return True
    return _inside(v, rows, active, parallel, k, side, near, slack)


@njit(cache=True)
def _turn(v: Any) -> None:
    """To its antipode."""
    for a in range(3):
        v[a] = -v[a]


@njit(cache=True)
def _top(q: Any, vector: Any) -> tuple[float, float]:
    """λ1, λ1 - λ2 and in `vector` a unit top eigenvector of a symmetric 3x3 matrix, in closed form (for screening)."""
    mean = (q[0, 0] + q[1, 1] + q[2, 2]) / 3
    a, b, c = q[0, 0] - mean, q[1, 1] - mean, q[2, 2] - mean
    p = math.sqrt((a * a + b * b + c * c + 2 * (q[0, 1] ** 2 + q[0, 2] ** 2 + q[1, 2] ** 2)) / 6)
    vector[0], vector[1], vector[2] = 1.0, 0.0, 0.0
    if p < FAINT:
        return mean + 2 * p, 0.0
    half = (
        a * (b * c - q[1, 2] ** 2)
        - q[0, 1] * (q[0, 1] * c - q[1, 2] * q[0, 2])
        + q[0, 2] * (q[0, 1] * q[1, 2] - b * q[0, 2])
    ) / (2 * p * p * p)
    angle = math.acos(min(1.0, max(-1.0, half))) / 3
    top = mean + 2 * p * math.cos(angle)
    middle = mean + 2 * p * math.cos(angle - 2 * math.pi / 3)
    best = 0.0
    for i in range(3):
        j = (i + 1) % 3
        r0 = q[i, 0] - top * (i == 0), q[i, 1] - top * (i == 1), q[i, 2] - top * (i == 2)
        r1 = q[j, 0] - top * (j == 0), q[j, 1] - top * (j == 1), q[j, 2] - top * (j == 2)
        n0, n1, n2 = (
            r0[1] * r1[2] - r0[2] * r1[1],
            r0[2] * r1[0] - r0[0] * r1[2],
            r0[0] * r1[1] - r0[1] * r1[0],
        )
        norm = n0 * n0 + n1 * n1 + n2 * n2
        if norm > best:
            best = norm
            vector[0], vector[1], vector[2] = n0, n1, n2
    if best > 0:
        length = math.sqrt(max(best, 1e-300))
        for a in range(3):
            vector[a] /= length
    return top, top - middle


@njit(cache=True)
def _maximum(
    q: Any, rows: Any, active: Any, parallel: Any, k: int, side: float, near: Any, noise: float, peaks: Any
) -> float:
    """λ1 of q if its eigenvector may lie in the cell, else -1; a point that does is offered to `peaks`."""
    values, vectors = np.linalg.eigh(q)
    v, w = np.empty(3), np.empty(3)
    for a in range(3):
        v[a], w[a] = vectors[a, 2], vectors[a, 1]
    held = False
    for _ in range(2):
        if _inside(v, rows, active, parallel, k, side, near, INSIDE):
            held = True
            offer(peaks, values[2], v)
        _turn(v)
    smallest = 2 * noise / INSIDE  # a smaller gap cannot place the eigenvector within INSIDE
    if not held and values[2] - values[1] <= smallest:
        held = values[2] - values[0] <= smallest
        held = held or _plane_meets(v, w, rows, active, parallel, k, side, near, INSIDE)
    return max(values[2], 0.0) if held else -1.0


@njit(cache=True)
def _cross(high: Any, low: Any, charge: Any, row: Any, sign: float) -> None:
    """`add_outer`, compiled once for all its calls."""
    add_outer(high, low, charge, row, sign)


@njit(cache=True)
def _explicit(high: Any, low: Any, beside: Any, x: Any, q: Any) -> None:
    """The form of M + beside xᵀ, added up before it is squared: `beside` may cancel most of M."""
    q[:] = 0.0
    for p in range(high.shape[0]):
        for j in range(high.shape[2]):
            m0 = (high[p, 0, j] + beside[p, j] * x[0]) + low[p, 0, j]
            m1 = (high[p, 1, j] + beside[p, j] * x[1]) + low[p, 1, j]
            m2 = (high[p, 2, j] + beside[p, j] * x[2]) + low[p, 2, j]
            q[0, 0] += m0 * m0
            q[0, 1] += m0 * m1
            q[0, 2] += m0 * m2
            q[1, 1] += m1 * m1
            q[1, 2] += m1 * m2
            q[2, 2] += m2 * m2
    q[1, 0], q[2, 0], q[2, 1] = q[0, 1], q[0, 2], q[1, 2]


@njit(cache=True)
def cell_sweep(
    rows: Any, cells: Any, charges: Any, k: int, n_cells: int, bound: float, peaks: Any
) -> tuple[float, int]:
    """Judge the cells on both sides of every arc of the circle of row k.

    Parameters
    ----------
    rows (N, 3) unit, cells (N,), charges (N, c), n_cells
    bound : float
        What is already known: cells that cannot exceed it are passed over.
    peaks (K, 4)
        Local maxima (g², u), updated.

    Returns
    -------
    bound : float
        At least the old one and each ‖M u‖ that is maximal in the interior of one of these cells.
    arcs : int
        0 if an earlier row has the same circle.
    """
    n, c = charges.shape
    x = rows[k]
    parallel, rising = np.zeros(n, np.int64), np.zeros(n, np.bool_)
    order, tied = crossings(rows, k, parallel, rising)
    for i in range(k):
        if parallel[i] != 0:
            return bound, 0
    high, low = np.zeros((n_cells, 3, c)), np.zeros((n_cells, 3, c))
    beside = np.zeros((2, n_cells, c))  # what the rows on the circle itself add: beside xᵀ
    active = np.zeros(n, np.bool_)
    for i in range(n):
        if parallel[i] != 0:
            for j in range(c):
                beside[0 if parallel[i] > 0 else 1, cells[i], j] += parallel[i] * charges[i, j]
        elif not rising[i]:
            active[i] = True
            _cross(high[cells[i]], low[cells[i]], charges[i], rows[i], 1.0)
    squares = np.zeros(2)
    for s in range(2):
        for p in range(n_cells):
            for j in range(c):
                squares[s] += beside[s, p, j] * beside[s, p, j]
    moments = np.zeros((n_cells, 12))
    for p in range(n_cells):
        _products(high[p], low[p], beside[0, p], beside[1, p], moments[p])
    relative = 12.0 * (c + n_cells + 12) * UNIT
    q, total, v = np.empty((3, 3)), np.empty(12), np.empty(3)
    near = np.empty(2, np.int64)
    arcs, count = 0, len(order)
    for half in range(2):
        place = 0
        while place < count:
            near[0] = order[place]
            while True:
                i = order[place]
                active[i] = rising[i] if half == 0 else not rising[i]
                p = cells[i]
                _cross(high[p], low[p], charges[i], rows[i], 1.0 if active[i] else -1.0)
                _products(high[p], low[p], beside[0, p], beside[1, p], moments[p])
                place += 1
                if place == count or not tied[place]:
                    break
            near[1] = order[place] if place < count else order[0]
            arcs += 1
            total[:] = 0.0
            for p in range(n_cells):
                for a in range(12):
                    total[a] += moments[p, a]
            for s in range(2):
                t0 = 6 + 3 * s
                for a in range(3):
                    for b in range(a, 3):
                        flat = b if a == 0 else a + b + 1
                        mixed = total[t0 + a] * x[b] + x[a] * total[t0 + b]
                        q[a, b] = total[flat] + mixed + squares[s] * x[a] * x[b]
                        q[b, a] = q[a, b]
                # Screen with the cheap form; its error is relative to what went into it, not what came out.
                trace = q[0, 0] + q[1, 1] + q[2, 2]
                if not trace < math.inf:  # a NaN, which the comparisons below would pass over, proves nothing
                    return math.inf, arcs
                noise = relative * (total[0] + total[3] + total[5] + squares[s])
                limit = min(bound * bound, peaks[0, 0])
                if trace + noise <= limit:
                    continue
                top, gap = _top(q, v)
                if top + TOP_ERROR * trace + noise <= limit:
                    continue
                side = 1.0 - 2.0 * s
                if gap > CLEAR_GAP * trace + NOISY_GAP * noise:
                    inside = _inside(v, rows, active, parallel, k, side, near, DIRECTION_ERROR)
                    if not inside:
                        _turn(v)
                        inside = _inside(v, rows, active, parallel, k, side, near, DIRECTION_ERROR)
                    if not inside:
                        continue
                _explicit(high, low, beside[s], x, q)
                trace = q[0, 0] + q[1, 1] + q[2, 2]
                top = _maximum(q, rows, active, parallel, k, side, near, relative * trace, peaks)
                if top >= 0:
                    bound = max(bound, math.sqrt(top) + relative * math.sqrt(trace))
    return bound, arcs


@njit(cache=True, fastmath={"reassoc", "contract"})
def _products(high: Any, low: Any, plus: Any, minus: Any, out: Any) -> None:
    """MᵀM (00, 01, 02, 11, 12, 22), Mᵀplus and Mᵀminus of one block."""
    for a in range(3):
        for b in range(a, 3):
            value = 0.0
            for j in range(high.shape[1]):
                value += (high[a, j] + low[a, j]) * (high[b, j] + low[b, j])
            out[b if a == 0 else a + b + 1] = value
        first, second = 0.0, 0.0
        for j in range(high.shape[1]):
            first += (high[a, j] + low[a, j]) * plus[j]
            second += (high[a, j] + low[a, j]) * minus[j]
        out[6 + a], out[9 + a] = first, second
