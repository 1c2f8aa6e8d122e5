"""The compiled bound of g on one simplicial cone: what its entries are there, and what follows from that.

Notation of `branch_and_bound.py`, where the bound is derived. Charges are padded with zeros to `width`; sums of
charges have shape (P, width); whatever is given at the d vertices of a cone comes first with length d. `tree` is
`RowTree.arrays`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from convcvx.machine.jit import njit

OPTIONS: dict[str, Any] = {
    "nogil": True,
    "cache": True,
    "fastmath": {"reassoc", "contract", "nsz"},
    "error_model": "numpy",
}
"""How the search is compiled. Sums may be reassociated for speed: the allowance holds for any order."""
FAINT = 1e-140
"""Length of a direction up to which its squares underflow, so that it cannot be made unit. Then no direction is used,
for which the bound holds as well, the whole of G being beside it."""
CANCELLED = 1e-12
"""Share of |b_i||b_j| that is added to an entry b_i.b_j of a form, which may have cancelled down to its rounding."""
ABOVE = 1.0 + 1e-12
"""Factor that raises a bound above the roundings of its last few operations."""


@njit(**OPTIONS)
def copy(source, target):
    """Copy a contiguous array onto another of its shape.

    By a loop, here and where else a slice might be assigned: for that numba compiles what writes the message for shapes
    that do not fit, a quarter of the time that the search took to compile.
    """
    entries, places = source.reshape(-1), target.reshape(-1)
    for t in range(len(entries)):
        places[t] = entries[t]


@njit(**OPTIONS)
def collapse(tree, indices, low, high, vertices, finest, linear, heights):
    """Sort the entries indices[low:high] on the cone of `vertices` (d, d).

    Those that are positive on it are added to `linear` (d, P, width), those that are negative dropped, bundles
    with a remainder above `finest` times their weight divided, and the others kept: in indices[high:], with their
    heights x.w_i in heights[:, :kept]. Returns how many were kept; -1 if there is no room for them.
    """
    rows, bundles, moments, children, cells = tree
    directions, sources, sizes, charges, _ = rows
    n_rows = len(directions)
    d, width = len(vertices), linear.shape[2]
    room = min(len(indices) - high, heights.shape[1])
    pending = np.empty(128, np.int64)
    kept = 0
    for t in range(low, high):
        pending[0] = indices[t]
        waiting = 1
        while waiting > 0:
            waiting -= 1
            k = pending[waiting]
            if kept >= room:
                return -1
            # By indices, not by views of rows and bundles: which of them it is would cost a count of references.
            row, b = k < n_rows, k - n_rows
            radius = 0.0 if row else bundles[b, d + width + 2]
            smallest, largest = np.inf, -np.inf
            for i in range(d):
                height = 0.0
                for j in range(d):
                    height += (directions[k, j] if row else bundles[b, j]) * vertices[i, j]
                heights[i, kept] = height
                smallest, largest = min(smallest, height), max(largest, height)
            if largest <= -radius:
                continue
            if smallest >= radius:
                p = cells[k]
                if row:
                    source = sources[k]
                    for j in range(d):
                        scaled = directions[k, j] * sizes[k]
                        for a in range(width):
                            linear[j, p, a] += scaled * charges[source, a]
                else:
                    for j in range(d):
                        for a in range(width):
                            linear[j, p, a] += moments[b, j, a]
            elif not row and bundles[b, d + width + 1] > finest * bundles[b, d + width + 3]:
                first = children[b, 0]
                for m in range(children[b, 1]):
                    pending[waiting] = first + m
                    waiting += 1
            else:
                indices[high + kept] = k
                kept += 1
    return kept


@njit(**OPTIONS)
def take(tree, kept, taken):
    """The charges of the `kept` entries and, last, their lengths, to taken[: len(kept)] (·, width + 1), at hand."""
    rows, bundles, _, _, _ = tree
    directions, sources, sizes, charges, norms = rows
    n_rows, d, width = len(directions), directions.shape[1], charges.shape[1]
    for t in range(len(kept)):
        k = kept[t]
        if k < n_rows:
            source, size = sources[k], sizes[k]
            for a in range(width):
                taken[t, a] = size * charges[source, a]
            taken[t, width] = size * norms[source]
        else:
            for a in range(width + 1):
                taken[t, a] = bundles[k - n_rows, d + a]


@njit(**OPTIONS)
def enclose(tree, kept, taken, heights, vertices, linear, middle, radius, remainder, strain):
    """Enclose G at the vertices: `middle` (d, P, width), the centre's curved part, and `radius` (d, P).

    `strain` (d, d), its lower half, says how much the kept entries bend along each edge.

    The parts of the kept bundles that are linear on the cone go into `linear`, the rest of them, R/2, into
    `remainder` (P,), which `radius` includes.
    """
    rows, bundles, moments, _, cells = tree
    n_rows = len(rows.directions)
    d, width = len(vertices), linear.shape[2]
    middle[:] = 0.0
    radius[:] = 0.0
    remainder[:] = 0.0
    strain[:] = 0.0
    for t in range(len(kept)):
        k = kept[t]
        p = cells[k]
        norm = taken[t, width]
        total = 0.0
        for i in range(d):
            total += heights[i, t]
        for i in range(d):
            chord = max(heights[i, t], 0.0)
            tangent = heights[i, t] if total > 0.0 else 0.0
            radius[i, p] += 0.5 * (chord - tangent) * norm
            centre = 0.5 * (chord + tangent)
            for a in range(width):
                middle[i, p, a] += centre * taken[t, a]
        for i in range(1, d):
            for j in range(i):
                one, two = heights[i, t], heights[j, t]
                if one * two < 0.0:
                    strain[i, j] += min(abs(one), abs(two)) * norm
        if k >= n_rows:
            b = k - n_rows
            remainder[p] += 0.5 * bundles[b, d + width + 1]
            for j in range(d):
                for a in range(width):
                    linear[j, p, a] += 0.5 * (moments[b, j, a] - bundles[b, j] * bundles[b, d + a])
    for i in range(d):
        for p in range(len(remainder)):
            radius[i, p] += remainder[p]


@njit(**OPTIONS)
def project(tree, kept, taken, heights, direction, chords, above, below):
    """The curved part along `direction` (P, width): its chords at the vertices, and how far the tangents of the
    concave entries lie above them (`above`) and those of the convex ones below (`below`). Adds to each (d,)."""
    cells = tree[-1]
    d, width = len(chords), direction.shape[1]
    for t in range(len(kept)):
        p = cells[kept[t]]
        slope, total = 0.0, 0.0
        for a in range(width):
            slope += direction[p, a] * taken[t, a]
        for i in range(d):
            total += heights[i, t]
        for i in range(d):
            chord = max(heights[i, t], 0.0)
            error = slope * (chord - (heights[i, t] if total > 0.0 else 0.0))
            chords[i] += slope * chord
            above[i] += max(-error, 0.0)
            below[i] += max(error, 0.0)


@njit(**OPTIONS)
def form_bound(along, beside, across, gram):
    """sqrt of max λᵀQλ over λ >= 0 with λᵀ gram λ = 1, bounded entry by entry.

    Q_ij = α_i α_j + b_i.b_j + |b_i| η_j + η_i |b_j| + η_i η_j for α = `along`, b_i.b_j = `beside`, η = `across`.
    """
    d = len(along)
    ratio, peak = 0.0, 0.0
    for i in range(d):
        for j in range(i + 1):
            lengths = np.sqrt(beside[i, i]), np.sqrt(beside[j, j])
            q = along[i] * along[j] + beside[i, j] + across[i] * across[j]
            q += lengths[0] * across[j] + lengths[1] * across[i]
            q += CANCELLED * lengths[0] * lengths[1]  # what many cells add to this is in the allowance
            if not q < np.inf:  # a NaN, which the comparisons below would pass over, proves nothing
                return np.inf
            peak = max(peak, q)
            if not q <= ratio * gram[i, j]:
                ratio = q / gram[i, j] if gram[i, j] > 0.0 else np.inf
    # the vertices lie in one orthant, so λᵀ gram λ >= Σ λ_i² (1 - rounding) >= (Σ λ_i)² / d (1 - rounding)
    return np.sqrt(min(ratio, d * peak)) * ABOVE


@njit(**OPTIONS)
def cone_bound(tree, kept, taken, heights, vertices, gram, linear, middle, radius, remainder, allowance, best):
    """Bound g on the cone of `vertices`; the best vertex value seen is kept in `best` (value, vertex)."""
    d, n_cells, width = linear.shape
    ends = np.zeros((d, n_cells, width))  # a_i, then b_i
    direction = np.zeros((n_cells, width))  # q
    chords, above, below = np.zeros(d), np.zeros(d), np.zeros(d)
    for i in range(d):
        for j in range(d):
            for p in range(n_cells):
                for a in range(width):
                    ends[i, p, a] += vertices[i, j] * linear[j, p, a]
    for i in range(d):
        for p in range(n_cells):
            for a in range(width):
                chords_part = ends[i, p, a]
                ends[i, p, a] = chords_part + middle[i, p, a]
                direction[p, a] += ends[i, p, a]
    norm = np.sqrt((direction * direction).sum())
    if norm > FAINT:
        direction /= norm
    else:
        direction[:] = 0.0
    for i in range(d):
        chords[i] = (direction * (ends[i] - middle[i])).sum()
    project(tree, kept, taken, heights, direction, chords, above, below)
    rest = np.sqrt((remainder * remainder).sum())
    along, across, beside = np.empty(d), np.empty(d), np.empty((d, d))
    for i in range(d):
        if chords[i] - rest > best[0]:
            best[0] = chords[i] - rest
            for j in range(d):
                best[1 + j] = vertices[i, j]
        along[i] = max(chords[i] + above[i], below[i] - chords[i]) + rest + allowance
        across[i] = np.sqrt((radius[i] * radius[i]).sum()) + allowance
        projected = (direction * ends[i]).sum() * direction
        for p in range(n_cells):
            for a in range(width):
                ends[i, p, a] -= projected[p, a]
        for j in range(i + 1):
            beside[i, j] = (ends[i] * ends[j]).sum()
    return form_bound(along, beside, across, gram)
