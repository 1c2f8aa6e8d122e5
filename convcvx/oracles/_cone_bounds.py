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
def take(tree, kept, taken, runs):
    """Put at hand what the `kept` entries carry: charges and, last, lengths, in taken[:, : len(kept)] (width + 1, ·).

    Run r, of entries of one cell that stand together, is runs[r, 0] : runs[r + 1, 0] and its cell is runs[r, 1]: sums
    over a run are loops that use the whole width of the processor. Returns how many runs there are.
    """
    rows, bundles, _, _, cells = tree
    directions, sources, sizes, charges, norms = rows
    n_rows, d, width = len(directions), directions.shape[1], charges.shape[1]
    n_runs, cell = 0, -1
    for t in range(len(kept)):
        k = kept[t]
        if cells[k] != cell:
            cell = cells[k]
            runs[n_runs, 0], runs[n_runs, 1] = t, cell
            n_runs += 1
        if k < n_rows:
            source, size = sources[k], sizes[k]
            for a in range(width):
                taken[a, t] = size * charges[source, a]
            taken[width, t] = size * norms[source]
        else:
            for a in range(width + 1):
                taken[a, t] = bundles[k - n_rows, d + a]
    runs[n_runs, 0] = len(kept)
    return n_runs


@njit(**OPTIONS)
def enclose(tree, kept, scratch, n_runs, linear, middle, radius, remainder, strain):
    """Enclose G at the vertices: `middle` (d, P, width), the centre's curved part, and `radius` (d, P).

    `strain` (d, d), its lower half, says how much the kept entries bend along each edge.

    The parts of the kept bundles that are linear on the cone go into `linear`, the rest of them, R/2, into
    `remainder` (P,), which `radius` includes. The bends r_ki of the entries at the vertices go into `scratch`.
    """
    rows, bundles, moments, _, cells = tree
    heights, taken, bends, line, runs = scratch
    n_rows, n = len(rows.directions), len(kept)
    d, width = len(linear), linear.shape[2]
    middle[:] = 0.0
    radius[:] = 0.0
    remainder[:] = 0.0
    strain[:] = 0.0
    norms = taken[width]
    for t in range(n):
        line[t] = heights[0, t]
    for i in range(1, d):
        for t in range(n):
            line[t] += heights[i, t]
    for i in range(d):
        for t in range(n):  # half of chord less tangent
            bends[i, t] = 0.5 * max(-heights[i, t] if line[t] > 0.0 else heights[i, t], 0.0)
    for i in range(d):
        for t in range(n):
            line[t] = max(heights[i, t], 0.0) - bends[i, t]
        for r in range(n_runs):
            low, high, p = runs[r, 0], runs[r + 1, 0], runs[r, 1]
            total = 0.0
            for t in range(low, high):
                total += bends[i, t] * norms[t]
            radius[i, p] += total
            for a in range(width):
                total = 0.0
                for t in range(low, high):
                    total += line[t] * taken[a, t]
                middle[i, p, a] += total
        for j in range(i):
            total = 0.0
            for t in range(n):  # the smaller modulus where the signs differ
                one, two = heights[i, t], heights[j, t]
                total += max(min(max(one, two), -min(one, two)), 0.0) * norms[t]
            strain[i, j] = total
    for t in range(n):
        if kept[t] >= n_rows:
            b, p = kept[t] - n_rows, cells[kept[t]]
            remainder[p] += 0.5 * bundles[b, d + width + 1]
            for j in range(d):
                for a in range(width):
                    linear[j, p, a] += 0.5 * (moments[b, j, a] - bundles[b, j] * bundles[b, d + a])
    for i in range(d):
        for p in range(len(remainder)):
            radius[i, p] += remainder[p]


@njit(**OPTIONS)
def project(scratch, n_runs, direction, turned, bent):
    """How far the curved part bends along q = `direction` (P, width), beside its centre: adds Σ r_ki <q, s_k> to
    `turned` (d,), and h_i(q) = Σ r_ki |<q, s_k>| to `bent` (d,)."""
    _, taken, bends, line, runs = scratch
    for r in range(n_runs):
        low, high, p = runs[r, 0], runs[r + 1, 0], runs[r, 1]
        for t in range(low, high):
            line[t] = 0.0
        for a in range(direction.shape[1]):
            along = direction[p, a]
            for t in range(low, high):
                line[t] += along * taken[a, t]
    for i in range(len(bent)):
        signed, unsigned = 0.0, 0.0
        for t in range(runs[n_runs, 0]):
            signed += bends[i, t] * line[t]
            unsigned += bends[i, t] * abs(line[t])
        turned[i] += signed
        bent[i] += unsigned


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
    norm = np.sqrt((direction * direction).sum())
    if norm > FAINT:
        direction /= norm
    else:
        direction[:] = 0.0
    project(scratch, n_runs, direction.reshape(n_cells, width), turned, bent)
    rest = np.sqrt((remainder * remainder).sum())
    along, across, beside = np.empty(d), np.empty(d), np.empty((d, d))
    for i in range(d):
        centre = (direction * ends[i]).sum()
        value = centre + turned[i] - rest  # the chords meet g at the vertex
        if value > best[0]:
            best[0] = value
            for j in range(d):
                best[1 + j] = vertices[i, j]
        along[i] = abs(centre) + bent[i] + rest + allowance
        across[i] = np.sqrt((radius[i] * radius[i]).sum()) + allowance
        for k in range(len(direction)):
            ends[i, k] -= centre * direction[k]
        for j in range(i + 1):
            beside[i, j] = (ends[i] * ends[j]).sum()
    return form_bound(along, beside, across, gram)
