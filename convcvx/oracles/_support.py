"""Kernels of the exact oracle where cells take the maximum, in the plane: support functions, and g on every arc.

The maximum over a cell, max_k (x_k·u)_+, is the support function of the polygon spanned by 0 and its rows: as u goes
around the circle one vertex after the other attains it, and between two changes the response is linear in u.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from convcvx.machine.jit import njit

QUARTER = 0.5 * math.pi
"""Longest arc, in radians, from whose ends what a row exceeds the vertex by is told for its inside: by √2 at most."""
PAST = 1.5 * math.pi
"""Angle ahead, in radians, from which on a change is one that rounding has put behind us: it is due at once."""
FLAT = 1e-5
"""Share of the trace by which the eigenvalues of a form differ at least where its eigenvector is told to `NEAR`."""
NEAR = 1e-7
"""Angle in radians within which an eigenvector beside an arc counts as on it: the bound then holds all the more."""


@njit(cache=True)
def envelope(points: Any, angles: Any, vertices: Any) -> int:
    """Which of `points` (k, 2), or 0 as number k, is the vertex from which of `angles` in [0, 2π) on; how many changes.

    The first angle is 0. Rounding may pick a vertex that is one but nearly: `excess` tells by how much.
    """
    count = len(points)
    vertex, x, y = count, 0.0, 0.0
    for k in range(count):
        if points[k, 0] > x or (points[k, 0] == x and points[k, 1] > y):
            vertex, x, y = k, points[k, 0], points[k, 1]
    angles[0], vertices[0] = 0.0, vertex
    angle, found = 0.0, 1
    while found < len(angles):
        ahead, farthest, following = 2 * math.pi, 0.0, -1
        for k in range(count + 1):
            dx, dy = (points[k, 0] - x, points[k, 1] - y) if k < count else (-x, -y)
            far = math.hypot(dx, dy)
            if far > 0:
                turn = (math.atan2(-dx, dy) - angle) % (2 * math.pi)
                turn = 0.0 if turn > PAST else turn
                if turn < ahead or (turn == ahead and far > farthest):
                    ahead, farthest, following = turn, far, k
        angle += ahead
        if following < 0 or angle >= 2 * math.pi:
            break
        vertex = following
        x, y = (points[vertex, 0], points[vertex, 1]) if vertex < count else (0.0, 0.0)
        angles[found], vertices[found] = angle, vertex
        found += 1
    return found


@njit(cache=True)
def excess(points: Any, angles: Any, vertices: Any, found: int) -> float:
    """By how much x_k·u, or 0, exceeds the vertex at some end of an arc, of a quarter circle at most."""
    count, most = len(points), 0.0
    for j in range(found):
        stop = angles[j + 1] if j + 1 < found else 2 * math.pi
        k = vertices[j]
        x, y = (points[k, 0], points[k, 1]) if k < count else (0.0, 0.0)
        pieces = max(1, math.ceil((stop - angles[j]) / QUARTER))
        for piece in range(pieces + 1):
            angle = angles[j] + (stop - angles[j]) * piece / pieces
            c, s = math.cos(angle), math.sin(angle)
            reached = x * c + y * s
            most = max(most, -reached)
            for k in range(count):
                most = max(most, points[k, 0] * c + points[k, 1] * s - reached)
    return most


@njit(cache=True)
def changes(rows: Any, starts: Any, positions: Any) -> Any:
    """Where the vertices of all cells change.

    Parameters
    ----------
    rows : (b, K, 2)
    starts : (P + 1,), positions : (E,)
        Those of cell p are positions[starts[p]:starts[p + 1]].

    Returns
    -------
    angles (N,), images (N,), cells (N,), steps (N, 2)
        At which angle which response gets which vector added to its slope; at 0 the slope itself.
    off, sizes, lengths : (b,)
        Over the cells of an image: what `excess` and the longest rows add up to, and the lengths of all steps.
    """
    n, cells = len(rows), len(starts) - 1
    most = n * (2 * len(positions) + 4 * cells)
    angles, images, places = np.empty(most), np.empty(most, np.int64), np.empty(most, np.int64)
    steps = np.empty((most, 2))
    off, sizes, lengths = np.zeros(n), np.zeros(n), np.zeros(n)
    filled = 0
    for i in range(n):
        for p in range(cells):
            points = rows[i][positions[starts[p] : starts[p + 1]]]
            turns, vertices = np.empty(2 * len(points) + 4), np.empty(2 * len(points) + 4, np.int64)
            found = envelope(points, turns, vertices)
            off[i] += excess(points, turns, vertices, found)
            longest = 0.0
            for k in range(len(points)):
                longest = max(longest, math.hypot(points[k, 0], points[k, 1]))
            sizes[i] += longest
            x, y = 0.0, 0.0
            for j in range(found):
                k = vertices[j]
                nx, ny = (points[k, 0], points[k, 1]) if k < len(points) else (0.0, 0.0)
                angles[filled], images[filled], places[filled] = turns[j], i, p
                steps[filled, 0], steps[filled, 1] = nx - x, ny - y
                lengths[i] += math.hypot(nx - x, ny - y)
                x, y = nx, ny
                filled += 1
    return angles[:filled], images[:filled], places[:filled], steps[:filled], off, sizes, lengths


@njit(cache=True)
def arcs(angles: Any, images: Any, cells: Any, steps: Any, charges: Any, n_cells: int) -> Any:
    """The largest ‖M u‖² of each arc, M (P·c, 2) the slope of g's sum there, at which angle, and the trace of MᵀM.

    Changes come in the order of their angles; `charges` are Z (n, c). An arc of no length has none: -1.
    """
    count, c = len(angles), charges.shape[1]
    slope, moments = np.zeros((n_cells, 2, c)), np.zeros((n_cells, 3))
    values, places, traces = np.full(count, -1.0), np.zeros(count), np.zeros(count)
    for t in range(count):
        p, i = cells[t], images[t]
        xx, xy, yy = 0.0, 0.0, 0.0
        for j in range(c):
            slope[p, 0, j] += charges[i, j] * steps[t, 0]
            slope[p, 1, j] += charges[i, j] * steps[t, 1]
            xx += slope[p, 0, j] * slope[p, 0, j]
            xy += slope[p, 0, j] * slope[p, 1, j]
            yy += slope[p, 1, j] * slope[p, 1, j]
        moments[p, 0], moments[p, 1], moments[p, 2] = xx, xy, yy
        start, stop = angles[t], angles[t + 1] if t + 1 < count else 2 * math.pi
        if not stop > start:
            continue
        xx, xy, yy = moments[:, 0].sum(), moments[:, 1].sum(), moments[:, 2].sum()
        mean, half = 0.5 * (xx + yy), 0.5 * (xx - yy)
        radius = math.hypot(half, xy)
        peak = start + (0.5 * math.atan2(xy, half) - start + NEAR) % math.pi - NEAR  # the first not before the arc
        traces[t] = xx + yy
        if peak <= stop + NEAR or not radius > FLAT * mean:
            values[t], places[t] = mean + radius, min(max(peak, start), stop)
            continue
        first = mean + half * math.cos(2 * start) + xy * math.sin(2 * start)
        last = mean + half * math.cos(2 * stop) + xy * math.sin(2 * stop)
        values[t], places[t] = (first, start) if first > last else (last, stop)
    return values, places, traces
