"""Kernel of the exact oracle in the plane: g on every arc of the circle, with rank-one updates.

Rows are crossed in the order of their lines, twice around. `M = Σ_active s_k x_kᵀ`, one (c, 2) block a
pooling cell, is kept as an unevaluated sum `high + low` (Knuth's two-sum), so that millions of updates
leave no drift.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from convcvx.machine.jit import njit
from convcvx.rounding import UNIT

DISTINCT = 1e-7
"""Distance of two points on the unit sphere up to which they are one maximum, found on two arcs or in two cells."""


def lines(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Where the zero lines of (N, 2) rows lie, in the order of their angles.

    Returns
    -------
    order (N,) int64, angles (N,) in [0, π], directions (N, 2) unit vectors at these angles, rising (N,) bool
        `rising`: going counterclockwise over its line, the row becomes active (exact, no rounding).
    """
    rising = (rows[:, 0] < 0) | ((rows[:, 0] == 0) & (rows[:, 1] > 0))
    sign = np.where(rising, 1.0, -1.0)
    directions = np.stack([sign * rows[:, 1], np.abs(rows[:, 0])], axis=1)
    directions /= np.hypot(directions[:, 0], directions[:, 1])[:, None]
    angles = np.arctan2(directions[:, 1], directions[:, 0])
    order = np.argsort(angles, kind="stable")
    return order, angles[order], directions[order], rising[order]


@njit(cache=True, inline="always")
def add_outer(high: Any, low: Any, charge: Any, row: Any, sign: float) -> None:
    """Add sign·charge rowᵀ to one block, (d, c) each; exact up to the rounding of the products."""
    for a in range(len(row)):
        x, top, rest = sign * row[a], high[a], low[a]
        for j in range(len(charge)):
            step = charge[j] * x
            old = top[j]
            new = old + step
            back = new - old
            rest[j] += (old - (new - back)) + (step - back)
            top[j] = new


@njit(cache=True, fastmath={"reassoc", "contract"})
def _moments(high: Any, low: Any) -> tuple[float, float, float]:
    """The 2x2 Gram matrix of one block; any order of summation meets the error bound, so let it vectorise."""
    q00, q01, q11 = 0.0, 0.0, 0.0
    high0, high1, low0, low1 = high[0], high[1], low[0], low[1]
    for j in range(len(high0)):
        m0 = high0[j] + low0[j]
        m1 = high1[j] + low1[j]
        q00 += m0 * m0
        q01 += m0 * m1
        q11 += m1 * m1
    return q00, q01, q11


@njit(cache=True)
def _length(high: Any, low: Any, u0: float, u1: float) -> float:
    """‖M u‖ summed from M itself: relative to ‖M‖_F, where √(uᵀQu) would only be relative to ‖M‖_F²."""
    total = 0.0
    for p in range(high.shape[0]):
        part = 0.0
        for j in range(high.shape[2]):
            value = (high[p, 0, j] + low[p, 0, j]) * u0 + (high[p, 1, j] + low[p, 1, j]) * u1
            part += value * value
        total += part
    return math.sqrt(total)


@njit(cache=True)
def offer(peaks: Any, square: float, u: Any) -> None:
    """Put (g², u) in place of the lowest of `peaks`, or of the same point; row 0 is always the lowest."""
    if square <= peaks[0, 0]:
        return
    spot = 0
    for i in range(len(peaks)):
        apart = 0.0
        for a in range(len(u)):
            apart = max(apart, abs(peaks[i, 1 + a] - u[a]))
        if peaks[i, 0] > 0 and apart < DISTINCT:
            if peaks[i, 0] >= square:
                return
            spot = i
    peaks[spot, 0] = square
    for a in range(len(u)):
        peaks[spot, 1 + a] = u[a]
    lowest = 0
    for i in range(len(peaks)):
        if peaks[i, 0] < peaks[lowest, 0]:
            lowest = i
    for a in range(peaks.shape[1]):
        peaks[0, a], peaks[lowest, a] = peaks[lowest, a], peaks[0, a]


@njit(cache=True)
def circle_sweep(
    rows: Any,
    cells: Any,
    charges: Any,
    order: Any,
    angles: Any,
    directions: Any,
    rising: Any,
    n_cells: int,
    bound: float,
    peaks: Any,
) -> tuple[float, int]:
    """Sweep the whole circle.

    Parameters
    ----------
    rows (N, 2), cells (N,), charges (N, c), n_cells
        As `ChargedRows` has them, no row zero.
    order, angles, directions, rising
        From `lines`; all but `order` sorted.
    bound : float
        What is known already: arcs that cannot exceed it are passed over.
    peaks : (K, 3)
        Local maxima (g², u), updated in no order; the best point, if new, is among them.

    Returns
    -------
    bound : float
        At least the old one and ‖M_a u‖ for all arcs a and all u on a.
    arcs : int
        Arcs of positive length.
    """
    n, c = charges.shape
    high, low = np.zeros((n_cells, 2, c)), np.zeros((n_cells, 2, c))
    for k in range(n):
        if not rising[k]:
            i = order[k]
            add_outer(high[cells[i]], low[cells[i]], charges[i], rows[i], 1.0)
    moments = np.zeros((n_cells, 3))
    for p in range(n_cells):
        moments[p, 0], moments[p, 1], moments[p, 2] = _moments(high[p], low[p])

    relative = 6.0 * (c + n_cells + 8) * UNIT
    arcs, u = 0, np.empty(2)
    best, best0, best1 = 0.0, 0.0, 0.0
    slope_before, first_slope, first_square = -1.0, 0.0, 0.0
    # The circle is cut at angles[0]; half 0 starts there, half 1 at its antipode.
    for half in range(2):
        turn = 1.0 if half == 0 else -1.0
        k = 0
        while k < n:
            first = k
            while k < n and angles[k] == angles[first]:
                sign = turn if rising[k] else -turn
                i = order[k]
                p = cells[i]
                add_outer(high[p], low[p], charges[i], rows[i], sign)
                moments[p, 0], moments[p, 1], moments[p, 2] = _moments(high[p], low[p])
                k += 1
            a0, a1 = turn * directions[first, 0], turn * directions[first, 1]
            if k < n:
                b0, b1, width = turn * directions[k, 0], turn * directions[k, 1], angles[k] - angles[first]
            else:
                b0, b1, width = (
                    -turn * directions[0, 0],
                    -turn * directions[0, 1],
                    math.pi - angles[first] + angles[0],
                )
            arcs += 1
            q00, q01, q11 = 0.0, 0.0, 0.0
            for p in range(n_cells):
                q00 += moments[p, 0]
                q01 += moments[p, 1]
                q11 += moments[p, 2]
            if not q00 + q11 < math.inf:  # a NaN, which the comparisons below would pass over, proves nothing
                return math.inf, arcs

            slope_a = q01 * (a0 * a0 - a1 * a1) + (q11 - q00) * a0 * a1  # half the derivative of g² in the angle
            slope_b = q01 * (b0 * b0 - b1 * b1) + (q11 - q00) * b0 * b1
            square_a = q00 * a0 * a0 + 2 * q01 * a0 * a1 + q11 * a1 * a1
            square_b = q00 * b0 * b0 + 2 * q01 * b0 * b1 + q11 * b1 * b1
            if arcs == 1:
                first_slope, first_square = slope_a, square_a
            elif slope_before >= 0 and slope_a <= 0:
                u[0], u[1] = a0, a1
                offer(peaks, square_a, u)
            slope_before = slope_b

            # g² = mean + radius cos 2(θ - ψ): its top lies on the arc, or the arc's best point is an end.
            half_difference = 0.5 * (q00 - q11)
            top = 0.5 * (q00 + q11) + math.hypot(half_difference, q01)
            limit = bound * bound
            largest, u0, u1 = (square_a, a0, a1) if square_a > square_b else (square_b, b0, b1)
            inside = False
            if top > peaks[0, 0] or top + relative * (q00 + q11) > limit:
                start = angles[first] + half * math.pi
                ahead = 0.5 * math.atan2(q01, half_difference) - start
                ahead -= math.pi * math.floor(ahead / math.pi)
                inside = ahead <= width
                if inside:
                    largest, u0, u1 = top, math.cos(start + ahead), math.sin(start + ahead)
                    u[0], u[1] = u0, u1
                    offer(peaks, top, u)
            if largest > best:
                best, best0, best1 = largest, u0, u1
            if largest + relative * (q00 + q11) > limit:
                value = max(_length(high, low, a0, a1), _length(high, low, b0, b1))
                if inside:
                    value = max(value, math.sqrt(top))
                bound = max(bound, value + relative * math.sqrt(q00 + q11))
    if slope_before >= 0 and first_slope <= 0:
        offer(peaks, first_square, directions[0])
    u[0], u[1] = best0, best1
    offer(peaks, best * (1 + 1e-12), u)  # rounding may have hidden the slopes that make it a peak
    return bound, arcs
