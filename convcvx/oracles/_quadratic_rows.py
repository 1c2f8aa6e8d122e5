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

CHUNK = 256
"""Rows that are looked at together, stage by stage: what they carry stays in the cache."""
SUMS = 64
"""Sums over rows of one source, at least, that are multiplied with their directions in one product."""


@njit(**OPTIONS)
def settle(rows, corners, indices, directions, cells, sums):
    """Sort the rows `indices` on the cylinder with these `corners` (V, V).

    The charge of row k is sizes[k] times directions[sources[k]]: rows of one source are added up before they are
    multiplied with it.

    Parameters
    ----------
    rows : tuple
        x (N, d), sorted by source; ‖x‖ and ‖b‖ or more (N,); sizes and sources (N,).
    directions, cells : (G, c), (G,)
        Of each source.
    sums : tuple
        linear : (P, c, d)
            Rows that are positive all over are added to it.
        moments : (P, c, 1 + d + d(d+1)/2)
            Σ s κ, Σ s α x and Σ s γ x_a x_b, a <= b, of those that are neither positive nor negative.
        tails, masses : (P, c, c), (P,)
            Σ ε size ddᵀ for directions d, and Σ ε size, of these.
        bends : (d(d+1)/2,)
            Σ γ size x_a x_b: how much they bend along an edge.
        kept : (N,) int32
            Receives which rows these are.

    Returns
    -------
    count : int
        Of them.
    modulus : float
        Σ size (|κ| + |α| ‖x‖ + γ ‖x‖²): no entry of `moments` has added up more.
    """
    data, lengths, _, sizes, sources = rows
    linear, moments, tails, masses, bends, kept = sums
    d, c = data.shape[1], directions.shape[1]
    heights, board = np.empty((2 * len(corners), CHUNK)), np.empty((5, CHUNK))
    axes, ends = np.empty((d, CHUNK)), np.empty(CHUNK, np.int64)
    features = np.empty((SUMS + CHUNK, d + moments.shape[2]))
    taken, weighed = np.empty((len(features), c)), np.empty((len(features), c))
    low, high, spread, length, size = board
    count, modulus, filled, begun = 0, 0.0, 0, 0
    while begun < len(indices):
        cell, over = cells[sources[indices[begun]]], min(begun + CHUNK, len(indices))
        while cells[sources[indices[over - 1]]] != cell:
            over -= 1
        waiting = indices[begun:over]
        extremes(rows, corners, waiting, heights, board)
        n, t, before = 0, 0, filled
        while t < len(waiting):
            source, own = sources[waiting[t]], features[filled]
            for j in range(len(own)):
                own[j] = 0.0
            while t < len(waiting) and sources[waiting[t]] == source:
                k = waiting[t]
                if high[t] > 0.0 and low[t] >= 0.0:
                    for j in range(d):
                        own[j] += sizes[k] * data[k, j]
                elif high[t] > 0.0:
                    low[n], high[n], spread[n], length[n], size[n] = low[t], high[t], spread[t], lengths[k], sizes[k]
                    for j in range(d):
                        axes[j, n] = data[k, j]
                    kept[count + n] = k
                    n += 1
                t += 1
            for a in range(c):
                taken[filled, a] = directions[source, a]
            ends[filled - before] = n
            filled += 1
        modulus += quadratics(board, n)
        first = 0
        for place in range(before, filled):
            last = ends[place - before]
            mass = gather(axes, board, first, last, features[place, d:])
            first = last
            masses[cell] += mass
            for a in range(c):
                weighed[place, a] = mass * taken[place, a]
            for j in range(len(bends)):
                bends[j] += features[place, 2 * d + 1 + j]
        count, begun = count + n, over
        if filled > SUMS or begun == len(indices) or cells[sources[indices[begun]]] != cell:
            products = np.dot(taken[:filled].T, features[:filled])
            linear[cell] += products[:, :d]
            moments[cell] += products[:, d:]
            tails[cell] += np.dot(weighed[:filled].T, taken[:filled])
            filled = 0
    return count, modulus


@njit(**OPTIONS)
def extremes(rows, corners, waiting, heights, board):
    """The first three lines of `board`: lowest and highest x·u, and how far apart heights are, for rows `waiting`."""
    data, lengths, rests, _, _ = rows
    low, high, spread, length, rest = board
    r, n = len(corners) - 1, len(waiting)
    axes, levels = heights[:r], heights[r + 1 :]
    for t in range(n):
        k = waiting[t]
        length[t], rest[t] = lengths[k], rests[k]
        for j in range(r):
            axes[j, t] = data[k, j]
    for t in range(n):
        low[t], high[t], spread[t] = np.inf, -np.inf, 0.0
    for i in range(r + 1):
        level = levels[i]
        for t in range(n):
            level[t] = 0.0
        for j in range(r):
            share, axis = corners[i, j], axes[j]
            for t in range(n):
                level[t] += share * axis[t]
        for t in range(n):
            reach = rest[t] * corners[i, r]
            left, right = level[t] - reach, level[t] + reach
            low[t] = left if left < low[t] else low[t]
            high[t] = right if right > high[t] else high[t]
        for j in range(i):
            other, further = levels[j], abs(corners[i, r] - corners[j, r])
            for t in range(n):
                apart = abs(level[t] - other[t]) + rest[t] * further
                spread[t] = apart if apart > spread[t] else spread[t]
    shrink = (4.0 * data.shape[1] + 16.0) * UNIT
    for t in range(n):
        low[t] -= shrink * length[t]
        high[t] += shrink * length[t]
        spread[t] += 2.0 * shrink * length[t]


@njit(**OPTIONS)
def quadratics(board, n):
    """Puts κ, α, γ and ε times the size in the place of interval, spread and length; what they add to the modulus.

    On an interval [low, high] with 0 inside, Σ λ_i (κ + α h_i + γ h_i²) is within ε of (Σ λ_i h_i)_+ for all h_i in it
    that are no further than `spread` from one another, and λ_i >= 0 with sum one. C is the least of what is best for a
    point, of 1/`spread`, and of `STEEPEST`/length; B is what is best for C. Without branches, so that many rows are
    looked at together.
    """
    modulus = 0.0
    for t in range(n):
        low, high, spread, length, size = board[0, t], board[1, t], board[2, t], board[3, t], board[4, t]
        longer, shorter = max(-low, high), min(-low, high)
        wide = longer + 2.0 * shorter
        best = 1.0 / longer if longer <= 2.0 * shorter else 8.0 * shorter / (wide * wide)
        best = min(best, STEEPEST / length)
        square = 1.0 / spread if spread * best > 1.0 else best
        rise = np.sqrt(8.0 * square * shorter) - 2.0 * square * shorter
        flat = (2.0 * shorter + square * (longer - shorter) * (longer + shorter)) / (longer + shorter)
        rise = flat if rise > 2.0 * square * longer else rise
        slope = 0.0 if 2.0 * square * shorter >= 1.0 else rise - 1.0
        slope = -slope if high > -low else slope
        # |h| - slope h - square h² at zero, at the ends, and where its derivative vanishes on either side
        right, left = 1.0 - slope, 1.0 + slope
        one, two = high * (right - square * high), -low * (left + square * low)
        three = 0.25 * right * right / square if right < 2.0 * square * high else 0.0
        four = 0.25 * left * left / square if left < -2.0 * square * low else 0.0
        top, bottom = max(max(one, two), max(three, four)), min(min(one, two), 0.0)
        top = max(top, 0.0)
        bend = square * spread * spread / 16.0
        error = 0.25 * (top - bottom) + bend + ROUNDINGS * UNIT * longer
        constant = 0.25 * (top + bottom) - bend
        modulus += size * (abs(constant) + 0.5 * left * length + 0.5 * square * length * length)
        board[0, t], board[1, t] = size * constant, 0.5 * size * (1.0 + slope)
        board[2, t], board[3, t] = 0.5 * size * square, size * error
    return modulus


@njit(**OPTIONS)
def gather(axes, board, first, last, moments):
    """The moments of rows of one source with these coordinates; their Σ ε size."""
    d, n = len(axes), last - first
    constant, slope, square = board[0, first:last], board[1, first:last], board[2, first:last]
    error, bent = board[3, first:last], board[4, first:last]
    mass, total, place = 0.0, 0.0, 1 + d
    for t in range(n):
        mass += error[t]
        total += constant[t]
    moments[0] = total
    for j in range(d):
        one, total = axes[j, first:last], 0.0
        for t in range(n):
            total += slope[t] * one[t]
            bent[t] = square[t] * one[t]
        moments[1 + j] = total
        for m in range(j, d):
            other, total = axes[m, first:last], 0.0
            for t in range(n):
                total += bent[t] * other[t]
            moments[place] = total
            place += 1
    return mass
