"""Signs of small determinants, without rounding: they decide in which order lines cross.

A floating-point filter answers almost always; what it cannot decide is summed as an expansion
(Shewchuk, Discrete Comput. Geom. 18, 1997), exact unless it under- or overflows.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from convcvx.machine.jit import njit

SPLITTER = 2.0**27 + 1
"""Factor that splits a float64 into two halves of 26 bits, whose products are exact (Veltkamp)."""
SURE_DETERMINANT = 1e-14
"""Size from which on a float64 determinant of three vectors of length at most 1.001 has the right sign; smaller ones
are summed exactly, which takes many times as long."""
SURE_ANGLE = 1e-14
"""Sine of the angle between two rows from which on the rows are not parallel; below, exact minors decide."""


@njit(cache=True, inline="always")
def _product(a: float, b: float) -> tuple[float, float]:
    """a·b as an unevaluated sum (Dekker)."""
    t = SPLITTER * a
    a_high = t - (t - a)
    a_low = a - a_high
    t = SPLITTER * b
    b_high = t - (t - b)
    b_low = b - b_high
    high = a * b
    return high, ((a_high * b_high - high) + a_high * b_low + a_low * b_high) + a_low * b_low


@njit(cache=True)
def _grow(expansion: Any, count: int, value: float) -> int:
    """Add one number to an expansion (components by increasing size); returns the new count."""
    rest, kept = value, 0
    for i in range(count):
        total = rest + expansion[i]
        back = total - rest
        error = (rest - (total - back)) + (expansion[i] - back)
        rest = total
        if error != 0.0:
            expansion[kept] = error
            kept += 1
    if rest != 0.0:
        expansion[kept] = rest
        kept += 1
    return kept


@njit(cache=True)
def _sign(expansion: Any, count: int) -> int:
    return 0 if count == 0 else (1 if expansion[count - 1] > 0 else -1)


@njit(cache=True)
def minor_sign(a0: float, a1: float, b0: float, b1: float) -> int:
    """The sign of a0·b1 - a1·b0."""
    expansion, count = np.zeros(4), 0
    for x, y in ((a0, b1), (-a1, b0)):
        high, low = _product(x, y)
        count = _grow(expansion, count, low)
        count = _grow(expansion, count, high)
    return _sign(expansion, count)


@njit(cache=True)
def parallel_sign(a: Any, b: Any) -> int:
    """0 if a and b (3,) are linearly independent, +1 if they point the same way, -1 if opposite."""
    for i in range(3):
        j = (i + 1) % 3
        if minor_sign(a[i], a[j], b[i], b[j]) != 0:
            return 0
    return 1 if a[0] * b[0] + a[1] * b[1] + a[2] * b[2] > 0 else -1


@njit(cache=True)
def determinant_sign(a: Any, b: Any, c: Any) -> int:
    """The sign of det(a, b, c) for vectors (3,) of length at most 1.001."""
    value = a[0] * (b[1] * c[2] - b[2] * c[1]) + a[1] * (b[2] * c[0] - b[0] * c[2]) + a[2] * (b[0] * c[1] - b[1] * c[0])
    if math.fabs(value) > SURE_DETERMINANT:
        return 1 if value > 0 else -1
    expansion, count = np.zeros(24), 0
    for i in range(3):
        j, k = (i + 1) % 3, (i + 2) % 3
        for x, y in ((b[j], c[k]), (-b[k], c[j])):
            high, low = _product(x, y)
            for part in (low, high):
                upper, lower = _product(part, a[i])
                count = _grow(expansion, count, lower)
                count = _grow(expansion, count, upper)
    return _sign(expansion, count)


@njit(cache=True)
def _along(a: Any, b: Any) -> float:
    """The product of two vectors (3,). By hand, as the sort below: numba takes seconds to compile NumPy's."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@njit(cache=True)
def _sort(keys: Any, places: Any, count: int) -> None:
    """Sort the first `count` keys, and `places` with them: a heap of all, from which the largest goes to the end."""
    for step in range(count + count // 2):
        stop = count if step < count // 2 else count - (step - count // 2)
        top = count // 2 - 1 - step if step < count // 2 else 0
        while 2 * top + 1 < stop:
            below = 2 * top + 1
            if below + 1 < stop and keys[below + 1] > keys[below]:
                below += 1
            if keys[below] <= keys[top]:
                break
            keys[top], keys[below] = keys[below], keys[top]
            places[top], places[below] = places[below], places[top]
            top = below
        if step >= count // 2:
            keys[0], keys[stop - 1] = keys[stop - 1], keys[0]
            places[0], places[stop - 1] = places[stop - 1], places[0]


@njit(cache=True)
def crossings(rows: Any, k: int, parallel: Any, rising: Any) -> tuple[Any, Any]:
    """Rows in the order in which their planes cross the circle of row k, over half a turn.

    Fills `parallel` (±1 for rows that vanish on the circle) and `rising` (the row becomes active).
    Returns the order and, for each place, whether it coincides with the one before.
    """
    n, x = len(rows), rows[k]
    directions = np.empty((n, 3))
    reference, longest = k, 0.0
    for i in range(n):
        y = rows[i]
        directions[i, 0] = x[1] * y[2] - x[2] * y[1]
        directions[i, 1] = x[2] * y[0] - x[0] * y[2]
        directions[i, 2] = x[0] * y[1] - x[1] * y[0]
        length = math.sqrt(_along(directions[i], directions[i]))
        parallel[i] = parallel_sign(x, y) if length < SURE_ANGLE else 0
        if length > longest:
            longest, reference = length, i
    first, second = np.empty(3), np.empty(3)
    axis = 0
    for a in range(3):
        first[a] = directions[reference, a] / max(longest, 1e-300)
        axis = a if math.fabs(first[a]) > math.fabs(first[axis]) else axis
    for a in range(3):
        second[a] = x[(a + 1) % 3] * first[(a + 2) % 3] - x[(a + 2) % 3] * first[(a + 1) % 3]
    j, m = (axis + 1) % 3, (axis + 2) % 3
    keys, places, at_reference = np.empty(n), np.empty(n, np.int64), np.zeros(n, np.bool_)
    count = 0
    for i in range(n):
        if parallel[i] != 0:
            continue
        side = 0 if i == reference else determinant_sign(x, rows[reference], rows[i])
        if side == 0:
            at_reference[i] = True
            rising[i] = minor_sign(x[j], x[m], rows[i, j], rows[i, m]) * first[axis] < 0
            keys[count] = -1.0
        else:
            rising[i] = side < 0
            flip = -1.0 if rising[i] else 1.0
            height, width = flip * _along(directions[i], second), flip * _along(directions[i], first)
            keys[count] = math.atan2(max(height, 0.0), width)
        places[count] = i
        count += 1
    _sort(keys, places, count)
    order = places[:count]
    tied = np.zeros(count, np.bool_)
    for place in range(1, count):  # insertion sort by the exact predicate; hardly ever moves anything
        i, spot = order[place], place
        tie = False
        while spot > 0:
            other = order[spot - 1]
            if at_reference[other]:
                tie = at_reference[i]
                break
            turn = determinant_sign(x, rows[other], rows[i])
            turn = turn if rising[other] == rising[i] else -turn
            if turn >= 0:
                tie = turn == 0
                break
            order[spot] = other
            tied[spot] = tied[spot - 1]
            spot -= 1
        order[spot] = i
        tied[spot] = tie
    return order, tied
