"""Climbs that stop at kinks: a filter goes to a local maximum of g by convex steps, each of them exact.

With the output weights V of a filter fixed, <V, G(u)> = Σ_ρ a_ρ (x_ρ·u)_+ over all patch rows ρ: a difference of convex
functions, which is not smooth where x_ρ·u = 0. Rows of positive slope a_ρ are replaced by their tangent at the filter
at hand (the concave-convex procedure, Yuille and Rangarajan 2003); what is left is concave, kinks included, and

    max_{‖u‖ <= 1}  q·u - Σ_ρ |a_ρ| (x_ρ·u)_+   =   min_{0 <= λ_ρ <= |a_ρ|}  ‖q - Σ_ρ λ_ρ x_ρ‖,

both sums over rows of negative slope, with q = Σ_ρ a_ρ x_ρ over those of positive slope that are active. Coordinate
descent solves the right side, and what it leaves of q is the next filter, up to its length. Then V becomes G / g. No
step lowers g. At a maximum many rows lie on kinks, r - 1 at most: among few rows that is most of them, and steps along
gradients zigzag there.
"""

from __future__ import annotations

import numpy as np

from convcvx.machine.jit import njit

MAX_STEPS = 50
"""Convex steps of a climb at most: most take five."""
RISE = 1e-7
"""A climb is over when a step raises g by no more than this share of it."""
MAX_SWEEPS = 100
"""Sweeps of coordinate descent in a step at most: an early stop costs more steps, not the maximum."""
STILL = 1e-10
"""A step is solved when no coordinate of a sweep moves what is left of q by this share of its square."""


@njit(cache=True, fastmath={"reassoc", "contract"})
def _dot(left, right):  # pragma: no cover - compiled
    total = 0.0
    for k in range(len(left)):
        total += left[k] * right[k]
    return total


@njit(cache=True)
def _add(total, factor, row):  # pragma: no cover - compiled
    for k in range(len(row)):
        total[k] += factor * row[k]


@njit(cache=True)
def climb(rows, pool, dual_point, filters, values, weights):  # pragma: no cover - compiled
    """Move `filters` (q, r) uphill, in place; `values` (q,) becomes their g, `weights` (q, P, c) G / g.

    `rows` (n, K, r), `pool` (P, K) and `dual_point` (n, c) are what g is made of.
    """
    n, n_positions, size = rows.shape
    squares = np.empty((n, n_positions))
    for i in range(n):
        for k in range(n_positions):
            squares[i, k] = _dot(rows[i, k], rows[i, k])
    slopes, shares = np.empty((n, n_positions)), np.empty((n, n_positions))
    found = np.empty_like(weights[0])
    for j in range(len(filters)):
        filter_ = filters[j].copy()
        shares[:] = 0.0
        values[j] = 0.0
        for _ in range(MAX_STEPS):
            g = _correlate(rows, pool, dual_point, filter_, found)
            if not g > values[j] * (1 + RISE):
                break
            filters[j], values[j], weights[j] = filter_, g, found / g
            _slopes(pool, dual_point, weights[j], slopes)
            if not _convex_step(rows, squares, slopes, shares, filter_):
                break


@njit(cache=True)
def _correlate(rows, pool, dual_point, filter_, found):  # pragma: no cover - compiled
    """Write G (P, c) to `found`; its norm."""
    found[:] = 0.0
    for i in range(rows.shape[0]):
        for k in range(rows.shape[1]):
            response = _dot(rows[i, k], filter_)
            if response > 0:
                for p in range(pool.shape[0]):
                    if pool[p, k] != 0:
                        _add(found[p], pool[p, k] * response, dual_point[i])
    return np.sqrt(np.sum(found * found))


@njit(cache=True)
def _slopes(pool, dual_point, weights, slopes):  # pragma: no cover - compiled
    """a_ρ (n, K): how <V, G> changes with the response of each row."""
    towards = np.ascontiguousarray(pool.T) @ weights
    for i in range(slopes.shape[0]):
        for k in range(slopes.shape[1]):
            slopes[i, k] = _dot(towards[k], dual_point[i])


@njit(cache=True)
def _convex_step(rows, squares, slopes, shares, filter_):  # pragma: no cover - compiled
    """From `filter_` (r,) to the next, in place; `shares` are the λ_ρ of the last step. False if nothing is left."""
    left = np.zeros_like(filter_)
    for i in range(rows.shape[0]):
        for k in range(rows.shape[1]):
            shares[i, k] = min(shares[i, k], max(0.0, -slopes[i, k]))
            if slopes[i, k] > 0 and _dot(rows[i, k], filter_) > 0:
                _add(left, slopes[i, k], rows[i, k])
            elif shares[i, k] > 0:
                _add(left, -shares[i, k], rows[i, k])
    for _ in range(MAX_SWEEPS):
        largest = 0.0
        for i in range(rows.shape[0]):
            for k in range(rows.shape[1]):
                if slopes[i, k] < 0 and squares[i, k] > 0:
                    share = shares[i, k] + _dot(rows[i, k], left) / squares[i, k]
                    share = min(max(share, 0.0), -slopes[i, k])
                    change = share - shares[i, k]
                    if change != 0:
                        shares[i, k] = share
                        _add(left, -change, rows[i, k])
                        largest = max(largest, change * change * squares[i, k])
        if largest <= STILL * _dot(left, left):
            break
    length = np.sqrt(_dot(left, left))
    if not length > 0:
        return False
    filter_[:] = left / length
    return True
