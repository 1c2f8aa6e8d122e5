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
CHUNK = 256
"""Entries that stand together: what they carry stays in the cache while it is summed up, in single precision."""
SINGLE = 2.0**-23
"""Twice the rounding of single precision."""
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


@njit(cache=True, nogil=True)
def dot(one, two):
    """The product of two vectors, added up in their order. By a loop, for the same reason as `copy`."""
    total = 0.0
    for t in range(len(one)):
        total += one[t] * two[t]
    return total


@njit(**OPTIONS)
def next_place(runs, tally, cell):
    """Chunk and place of one more kept entry, of `cell`; `tally` is (entries kept, runs, cell of the last run)."""
    chunk, place = tally[0] // CHUNK, tally[0] % CHUNK
    if cell != tally[2] or place == 0:
        r = tally[1]
        runs[r, 0], runs[r, 1], runs[r, 2] = cell, chunk, place
        tally[1], tally[2] = r + 1, cell
    runs[tally[1] - 1, 3] = place + 1
    tally[0] += 1
    return chunk, place


@njit(**OPTIONS)
def sort_rows(rows, waiting, n_waiting, vertices, linear, kept, scratch, tally, board):
    """Sort the rows waiting[:n_waiting] as `collapse` does. Stage by stage, as rows lie far apart in memory, where
    many are fetched at once if little is done with each."""
    packed, tags, charges, norms = rows
    taken, _, runs = scratch
    d, width = len(vertices), linear.shape[2]
    axes, heights, smallest, largest = board
    for t in range(n_waiting):
        k = waiting[t]
        for j in range(d):
            axes[j, t] = packed[k, j]
    for t in range(n_waiting):
        smallest[t], largest[t] = np.inf, -np.inf
    for i in range(d):
        line = heights[i]
        for t in range(n_waiting):
            line[t] = axes[0, t] * vertices[i, 0]
        for j in range(1, d):
            share, axis = vertices[i, j], axes[j]
            for t in range(n_waiting):
                line[t] += axis[t] * share
        for t in range(n_waiting):
            smallest[t], largest[t] = min(smallest[t], line[t]), max(largest[t], line[t])
    for t in range(n_waiting):
        if largest[t] <= 0.0:
            continue
        k = waiting[t]
        source, p = tags[k, 2 * d + 2], tags[k, 2 * d + 3]
        if smallest[t] >= 0.0:
            for j in range(d):
                scaled = axes[j, t] * packed[k, d]
                for a in range(width):
                    linear[j, p, a] += scaled * charges[source, a]
        else:
            kept[tally[0]] = k
            chunk, place = next_place(runs, tally, p)
            for i in range(d):
                taken[chunk, i, place] = heights[i, t]
            size = packed[k, d]
            for a in range(width):
                taken[chunk, d + a, place] = size * charges[source, a]
            taken[chunk, d + width, place] = size * norms[source]


@njit(**OPTIONS)
def collapse(tree, indices, low, high, vertices, finest, linear, scratch):
    """Sort the entries indices[low:high] on the cone of `vertices` (d, d).

    Those that are positive on it are added to `linear` (d, P, width), those that are negative dropped, bundles
    with a remainder above `finest` times their weight divided, and the others kept: in indices[high:], and in `scratch`
    what they carry. Returns how many were kept, -1 if there is no room for them; and how many runs they make.

    `scratch` is (taken, lines, runs), the first two in single precision. Entry t is taken[t // CHUNK, :, t % CHUNK]:
    heights x.w_i (d), charge (width), and its length. Run r is (cell, chunk, low, high): kept entries of one cell that
    stand together in a chunk. `lines` (2, CHUNK) are for sums over a run.
    """
    rows, bundles, moments, children, cells = tree
    taken, _, runs = scratch
    n_rows, (d, _, width) = len(rows.packed), linear.shape
    kept = indices[high:]
    room = min(len(kept), len(taken) * CHUNK)
    pending, waiting, tally = np.empty(128, np.int64), np.empty(CHUNK, np.int64), np.zeros(3, np.int64)
    board = np.empty((d, CHUNK)), np.empty((d, CHUNK)), np.empty(CHUNK), np.empty(CHUNK)
    heights, n_waiting = np.empty(d), np.int64(0)  # not the literal 0, for which `sort_rows` would be compiled again
    tally[2] = -1
    for t in range(low, high):
        pending[0] = indices[t]
        n_pending = 1
        while n_pending > 0:
            n_pending -= 1
            k = pending[n_pending]
            if k < n_rows:
                waiting[n_waiting] = k
                n_waiting += 1
                if n_waiting == CHUNK:
                    if tally[0] + n_waiting > room:
                        return -1, 0
                    sort_rows(rows, waiting, n_waiting, vertices, linear, kept, scratch, tally, board)
                    n_waiting = np.int64(0)
                continue
            b, p = k - n_rows, cells[k]
            radius = bundles[b, d + width + 2]
            smallest, largest = np.inf, -np.inf
            for i in range(d):
                height = 0.0
                for j in range(d):
                    height += bundles[b, j] * vertices[i, j]
                heights[i] = height
                smallest, largest = min(smallest, height), max(largest, height)
            if largest <= -radius:
                continue
            if smallest >= radius:
                for j in range(d):
                    for a in range(width):
                        linear[j, p, a] += moments[b, j, a]
            elif bundles[b, d + width + 1] > finest * bundles[b, d + width + 3]:
                for m in range(children[b, 1]):
                    pending[n_pending] = children[b, 0] + m
                    n_pending += 1
            else:
                if tally[0] + n_waiting + 1 > room:
                    return -1, 0
                if n_waiting > 0:  # before it, so that cells stay together
                    sort_rows(rows, waiting, n_waiting, vertices, linear, kept, scratch, tally, board)
                    n_waiting = np.int64(0)
                kept[tally[0]] = k
                chunk, place = next_place(runs, tally, p)
                for i in range(d):
                    taken[chunk, i, place] = heights[i]
                for a in range(width + 1):
                    taken[chunk, d + a, place] = bundles[b, d + a]
    if tally[0] + n_waiting > room:
        return -1, 0
    sort_rows(rows, waiting, n_waiting, vertices, linear, kept, scratch, tally, board)
    return tally[0], tally[1]


@njit(**OPTIONS)
def product(one, two):
    """Of two vectors of single precision; loops like this one, over arrays of their own, are compiled to wide ones."""
    total = np.float32(0.0)
    for t in range(len(one)):
        total += one[t] * two[t]
    return total


@njit(**OPTIONS)
def reach_of(heights, lengths):
    """Σ |z_k| |s_k|."""
    total = np.float32(0.0)
    for t in range(len(heights)):
        total += abs(heights[t]) * lengths[t]
    return total


@njit(**OPTIONS)
def strain_of(one, two, lengths):
    """How much entries bend between two vertices: the smaller modulus of the heights, where their signs differ."""
    zero = np.float32(0.0)
    total = zero
    for t in range(len(one)):
        larger, smaller = max(one[t], two[t]), min(one[t], two[t])
        total += max(min(larger, -smaller), zero) * lengths[t]
    return total


@njit(**OPTIONS)
def bend(heights, sums, centres):
    """Half of chord less tangent, in place of the heights at a vertex; and the mean of the two."""
    half, zero = np.float32(0.5), np.float32(0.0)
    for t in range(len(heights)):
        height = heights[t]
        heights[t] = half * max(-height if sums[t] > zero else height, zero)
        centres[t] = max(height, zero) - heights[t]


@njit(**OPTIONS)
def enclose(tree, kept, scratch, n_runs, linear, middle, radius, remainder, strain):
    """Enclose G at the vertices: `middle` (d, P, width), the centre's curved part, and `radius` (d, P).

    `strain` (d, d), its lower half, says how much the kept entries bend along each edge.

    The parts of the kept bundles that are linear on the cone go into `linear`, the rest of them, R/2, into
    `remainder` (P,), which `radius` includes. In `scratch` the bends r_ki of the entries take the place of their
    heights. Returns what single precision may hide at a vertex.
    """
    rows, bundles, moments, _, cells = tree
    taken, lines, runs = scratch
    n_rows, (d, n_cells, width) = len(rows.packed), linear.shape
    middle[:] = 0.0
    radius[:] = 0.0
    remainder[:] = 0.0
    strain[:] = 0.0
    single = 0.0
    for r in range(n_runs):
        p, chunk, low, high = runs[r, 0], runs[r, 1], runs[r, 2], runs[r, 3]
        lengths = taken[chunk, d + width, low:high]
        sums, centres = lines[0, low:high], lines[1, low:high]
        sums[:] = np.float32(0.0)
        for i in range(d):
            heights = taken[chunk, i, low:high]
            for t in range(len(sums)):
                sums[t] += heights[t]
            single += (len(sums) + width + 16) * reach_of(heights, lengths)
            for j in range(i):
                strain[i, j] += strain_of(heights, taken[chunk, j, low:high], lengths)
        for i in range(d):
            bends = taken[chunk, i, low:high]
            bend(bends, sums, centres)
            radius[i, p] += product(bends, lengths)
            for a in range(width):
                middle[i, p, a] += product(centres, taken[chunk, d + a, low:high])
    for t in range(len(kept)):
        if kept[t] >= n_rows:
            b, p = kept[t] - n_rows, cells[kept[t]]
            remainder[p] += 0.5 * bundles[b, d + width + 1]
            for j in range(d):
                for a in range(width):
                    linear[j, p, a] += 0.5 * (moments[b, j, a] - bundles[b, j] * bundles[b, d + a])
    for i in range(d):
        for p in range(n_cells):
            radius[i, p] += remainder[p]
    return SINGLE * single


@njit(**OPTIONS)
def project(scratch, n_runs, direction, turned, bent):
    """How far the curved part bends along q = `direction` (P, width), beside its centre: adds Σ r_ki <q, s_k> to
    `turned` (d,), and h_i(q) = Σ r_ki |<q, s_k>| to `bent` (d,)."""
    taken, lines, runs = scratch
    d = len(bent)
    for r in range(n_runs):
        p, chunk, low, high = runs[r, 0], runs[r, 1], runs[r, 2], runs[r, 3]
        line = lines[0, low:high]
        line[:] = np.float32(0.0)
        for a in range(direction.shape[1]):
            along, charges = np.float32(direction[p, a]), taken[chunk, d + a, low:high]
            for t in range(len(line)):
                line[t] += along * charges[t]
        for i in range(d):
            bends = taken[chunk, i, low:high]
            turned[i] += product(bends, line)
            bent[i] += reach_of(line, bends)


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
def cone_bound(scratch, n_runs, vertices, gram, linear, middle, radius, remainder, allowance, best):
    """Bound g on the cone of `vertices`; the best vertex value seen is kept in `best` (value, vertex)."""
    d, n_cells, width = linear.shape
    ends = np.zeros((d, n_cells * width))  # a_i, then b_i
    direction = np.zeros(n_cells * width)  # q
    turned, bent = np.zeros(d), np.zeros(d)
    parts, centres = linear.reshape(d, -1), middle.reshape(d, -1)
    for i in range(d):
        copy(centres[i], ends[i])
        for j in range(d):
            share = vertices[i, j]
            for k in range(len(direction)):
                ends[i, k] += share * parts[j, k]
        for k in range(len(direction)):
            direction[k] += ends[i, k]
    norm = np.sqrt(dot(direction, direction))
    for k in range(len(direction)):
        direction[k] = direction[k] / norm if norm > FAINT else 0.0
    project(scratch, n_runs, direction.reshape(n_cells, width), turned, bent)
    rest = np.sqrt(dot(remainder, remainder))
    along, across, beside = np.empty(d), np.empty(d), np.empty((d, d))
    for i in range(d):
        centre = dot(direction, ends[i])
        value = centre + turned[i] - rest - allowance  # the chords meet g at the vertex
        if value > best[0]:
            best[0] = value
            for j in range(d):
                best[1 + j] = vertices[i, j]
        along[i] = abs(centre) + bent[i] + rest + allowance
        across[i] = np.sqrt(dot(radius[i], radius[i])) + allowance
        for k in range(len(direction)):
            ends[i, k] -= centre * direction[k]
        for j in range(i + 1):
            beside[i, j] = dot(ends[i], ends[j])
    return form_bound(along, beside, across, gram)
