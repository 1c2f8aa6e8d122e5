"""The compiled part of the search over cylinders: what the rows are on one of them, linear, nothing or a quadratic.

Notation of `cylinders.py`, where it is derived. A cylinder has V = r + 1 corners (y_i, s_i); rows x = (a, b) have r
entries a and d - r entries b.
"""

from __future__ import annotations

import numpy as np

from convcvx.machine.jit import njit
from convcvx.oracles._cone_bounds import OPTIONS
from convcvx.rounding import UNIT

STEEPEST = 1024.0
"""Largest coefficient of a square, over 1/‖x‖: steeper ones gain nothing, and would magnify what is rounded."""
ROUNDINGS = 64.0
"""Roundings, each of a longer side A at most, by which the error of a quadratic is raised; fewer than 40 were counted
in its coefficients and extremes."""

BLOCK = 256
"""Rows whose moments are added up in one product, small enough for the cache."""


@njit(**OPTIONS)
def quadratic(low, high, spread, steepest):
    """(κ, α, γ, ε): on an interval with 0 inside, Σ λ_i (κ + α h_i + γ h_i²) is within ε of (Σ λ_i h_i)_+.

    For all h_i in [low, high] that are no further than `spread` from one another, and λ_i >= 0 with sum one. C is the
    least of what is best for a point, of 1/`spread`, and of `steepest`; B is what is best for C.
    """
    longer, shorter = max(-low, high), min(-low, high)
    best = 1.0 / longer if longer <= 2.0 * shorter else 8.0 * shorter / (longer + 2.0 * shorter) ** 2
    square = min(best, steepest)
    if spread * square > 1.0:
        square = 1.0 / spread
    if 2.0 * square * shorter >= 1.0:
        slope = 0.0
    else:
        rise = np.sqrt(8.0 * square * shorter) - 2.0 * square * shorter
        if rise > 2.0 * square * longer:
            rise = (2.0 * shorter + square * (longer - shorter) * (longer + shorter)) / (longer + shorter)
        slope = rise - 1.0
    if high > -low:
        slope = -slope
    # |h| - slope h - square h² at zero, at the ends, and where its derivative vanishes on either side
    top, bottom = 0.0, 0.0
    for side in range(2):
        end = high if side == 0 else -low
        steep = 1.0 - slope if side == 0 else 1.0 + slope
        value = end * (steep - square * end)
        top, bottom = max(top, value), min(bottom, value)
        if 0.0 < steep < 2.0 * square * end:
            top = max(top, steep * steep / (4.0 * square))
    bend = square * spread * spread / 16.0
    error = 0.25 * (top - bottom) + bend + ROUNDINGS * UNIT * longer
    return 0.25 * (top + bottom) - bend, 0.5 * (1.0 + slope), 0.5 * square, error


@njit(**OPTIONS)
def settle(rows, lengths, rests, cells, charges, sizes, corners, indices, linear, moments, tails, masses, bends, kept):
    """Sort the rows `indices` on the cylinder with these `corners` (V, V).

    Parameters
    ----------
    rows : (N, d); lengths, rests (N,): ‖x‖ and ‖b‖ or more; cells (N,); charges (N, c); sizes (N,): ‖s‖
    linear : (P, c, d)
        Rows that are positive all over are added to it.
    moments : (P, c, 1 + d + d(d+1)/2)
        Σ s κ, Σ s α x and Σ s γ x_a x_b, a <= b, of those that are neither positive nor negative.
    tails, masses : (P, c, c), (P,)
        Σ ε s sᵀ/‖s‖ and Σ ε ‖s‖ of these.
    bends : (d(d+1)/2,)
        Σ γ ‖s‖ x_a x_b: how much they bend along an edge.
    kept : (N,) int32
        Receives which rows these are.

    Returns
    -------
    count : int
        Of them.
    modulus : float
        Σ ‖s‖ (|κ| + |α| ‖x‖ + γ ‖x‖²): no entry of `moments` has added up more.
    """
    d, c = rows.shape[1], charges.shape[1]
    n_corners = len(corners)
    r = n_corners - 1
    width = moments.shape[2]
    heights = np.empty(n_corners)
    features, taken, weighed = np.empty((BLOCK, width)), np.empty((BLOCK, c)), np.empty((BLOCK, c))
    shrink = (4.0 * d + 16.0) * UNIT
    count, modulus, filled, cell = 0, 0.0, 0, 0
    for t in range(len(indices)):
        k = indices[t]
        low, high = np.inf, -np.inf
        for i in range(n_corners):
            height = 0.0
            for j in range(r):
                height += rows[k, j] * corners[i, j]
            heights[i] = height
            reach = rests[k] * corners[i, r]
            low, high = min(low, height - reach), max(high, height + reach)
        low -= shrink * lengths[k]
        high += shrink * lengths[k]
        if high <= 0.0:
            continue
        p = cells[k]
        if low >= 0.0:
            for a in range(c):
                for j in range(d):
                    linear[p, a, j] += charges[k, a] * rows[k, j]
            continue
        spread = 0.0
        for i in range(n_corners):
            for j in range(i):
                apart = abs(heights[i] - heights[j]) + rests[k] * abs(corners[i, r] - corners[j, r])
                spread = max(spread, apart)
        spread += 2.0 * shrink * lengths[k]
        constant, slope, square, error = quadratic(low, high, spread, STEEPEST / lengths[k])
        if filled == BLOCK or (filled > 0 and p != cell):
            add(features[:filled], taken[:filled], weighed[:filled], moments[cell], tails[cell])
            filled = 0
        cell = p
        share = error / sizes[k] if sizes[k] > 0.0 else 0.0
        for a in range(c):
            taken[filled, a] = charges[k, a]
            weighed[filled, a] = share * charges[k, a]
        features[filled, 0] = constant
        place = 1 + d
        for j in range(d):
            features[filled, 1 + j] = slope * rows[k, j]
            scaled = square * rows[k, j]
            for m in range(j, d):
                features[filled, place + m - j] = scaled * rows[k, m]
            place += d - j
        for j in range(len(bends)):
            bends[j] += sizes[k] * features[filled, 1 + d + j]
        filled += 1
        masses[p] += error * sizes[k]
        modulus += sizes[k] * (abs(constant) + abs(slope) * lengths[k] + square * lengths[k] * lengths[k])
        kept[count] = k
        count += 1
    if filled > 0:
        add(features[:filled], taken[:filled], weighed[:filled], moments[cell], tails[cell])
    return count, modulus


@njit(**OPTIONS)
def add(features, taken, weighed, moments, tails):
    """What some rows of one cell add to its moments and tails."""
    moments += np.dot(taken.T, features)
    tails += np.dot(weighed.T, taken)
