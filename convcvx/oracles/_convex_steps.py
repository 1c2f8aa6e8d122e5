"""Climbs that stop at kinks: a filter goes to a local maximum of g by convex steps, each of them exact.

With the output weights V of a filter fixed, <V, G(u)> = Σ_ρ a_ρ (x_ρ·u)_+ over all patch rows ρ: a difference of convex
functions, which is not smooth where x_ρ·u = 0. Rows of positive slope a_ρ are replaced by their tangent at the filter
at hand (the concave-convex procedure, Yuille and Rangarajan 2003); what is left is concave, kinks included, and

    max_{‖u‖ <= 1}  q·u - Σ_ρ |a_ρ| (x_ρ·u)_+   =   min_{0 <= λ_ρ <= |a_ρ|}  ‖q - Σ_ρ λ_ρ x_ρ‖,

both sums over rows of negative slope, with q = Σ_ρ a_ρ x_ρ over those of positive slope that are active. Coordinate
descent solves the right side, and what it leaves of q is the next filter, up to its length. Then V becomes G / g. No
step lowers g. At a maximum many rows lie on kinks, r - 1 at most: among few rows that is most of them, and steps along
gradients zigzag there. After its start a filter is a combination of rows, u = Σ_ρ m_ρ x_ρ: a climb knows the rows by
their Gram matrix alone, and a coordinate that stays at its bound costs nothing.
"""

from __future__ import annotations

import numpy as np

from convcvx.machine.jit import njit

MAX_STEPS = 50
"""Convex steps of a climb at most: most take five."""
RISE = 1e-5
"""A climb is over when a step raises g by no more than this share of it."""
MAX_SWEEPS = 100
"""Sweeps of coordinate descent in a step at most: an early stop costs more steps, not the maximum."""
STILL = 1e-8
"""A step is solved when no coordinate of a sweep moves what is left of q by this share of its square."""


@njit(cache=True)
def climb(gram, pool, dual_point, responses, mixtures, values, weights):  # pragma: no cover - compiled
    """Climb from filters with these `responses` x_ρ·u (q, n·K), which are overwritten.

    `gram` (n·K, n·K) has the products of the rows, `pool` (P, K) and `dual_point` (n, c) what else g is made of. Where
    the climbs end `values` (q,) are g, `weights` (q, P, c) are G / g and `mixtures` (q, n·K) are the m_ρ, up to the
    filter's length; those of a climb that did not leave its start are zero.
    """
    n_rows = len(gram)
    slopes, trial = np.empty(n_rows), np.empty(n_rows)
    found = np.empty(weights.shape[1:])
    for j in range(len(responses)):
        mixtures[j] = 0.0
        values[j] = 0.0
        trial[:] = 0.0
        for _ in range(MAX_STEPS):
            g = _correlate(responses[j], pool, dual_point, found)
            if not g > values[j]:
                break
            risen = g > values[j] * (1 + RISE)
            values[j] = g
            for row in range(n_rows):
                mixtures[j, row] = trial[row]
            for p in range(len(pool)):
                for o in range(dual_point.shape[1]):
                    weights[j, p, o] = found[p, o] / g
            if not risen:
                break
            _slopes(pool, dual_point, weights[j], slopes)
            if not _convex_step(gram, slopes, responses[j], trial):
                break


@njit(cache=True)
def _correlate(responses, pool, dual_point, found):  # pragma: no cover - compiled
    """Write G (P, c) to `found`; its norm."""
    found[:] = 0.0
    n_positions = pool.shape[1]
    for row in range(len(responses)):
        if responses[row] > 0:
            i, k = divmod(row, n_positions)
            for p in range(pool.shape[0]):
                if pool[p, k] != 0:
                    for o in range(dual_point.shape[1]):
                        found[p, o] += pool[p, k] * responses[row] * dual_point[i, o]
    square = 0.0
    for p in range(pool.shape[0]):
        for o in range(dual_point.shape[1]):
            square += found[p, o] * found[p, o]
    return np.sqrt(square)


@njit(cache=True)
def _slopes(pool, dual_point, weights, slopes):  # pragma: no cover - compiled
    """a_ρ (n·K,): how <V, G> changes with the response of each row."""
    slopes[:] = 0.0
    n_positions = pool.shape[1]
    for row in range(len(slopes)):
        i, k = divmod(row, n_positions)
        for p in range(pool.shape[0]):
            if pool[p, k] != 0:
                for o in range(dual_point.shape[1]):
                    slopes[row] += pool[p, k] * weights[p, o] * dual_point[i, o]


@njit(cache=True)
def _convex_step(gram, slopes, responses, mixture):  # pragma: no cover - compiled
    """From a filter with these `responses` to the next, in place. False if nothing is left of q.

    `mixture` (n·K,) has the m_ρ up to the filter's length: a_ρ of active rows, -λ_ρ of others, which begin as the last
    step left them.
    """
    n_rows = len(gram)
    for row in range(n_rows):
        if slopes[row] > 0:
            mixture[row] = slopes[row] if responses[row] > 0 else 0.0
        else:
            mixture[row] = max(min(mixture[row], 0.0), slopes[row])
    left = np.zeros(n_rows)  # products of the rows with what is left of q
    for row in range(n_rows):
        if mixture[row] != 0:
            for other in range(n_rows):
                left[other] += mixture[row] * gram[row, other]
    square = 0.0
    for _ in range(MAX_SWEEPS):
        largest = 0.0
        for row in range(n_rows):
            if slopes[row] < 0 and gram[row, row] > 0:
                share = max(min(mixture[row] - left[row] / gram[row, row], 0.0), slopes[row])
                change = share - mixture[row]
                if change != 0:
                    mixture[row] = share
                    for other in range(n_rows):
                        left[other] += change * gram[row, other]
                    largest = max(largest, change * change * gram[row, row])
        square = 0.0
        for row in range(n_rows):
            square += mixture[row] * left[row]
        if largest <= STILL * square:
            break
    if not square > 0:
        return False
    length = np.sqrt(square)
    for row in range(n_rows):
        responses[row] = left[row] / length
    return True
