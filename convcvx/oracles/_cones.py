"""The compiled part of branch and bound: the search over simplicial cones, depth first.

Notation as in `_cone_bounds.py`.
"""

from __future__ import annotations

import numpy as np

from convcvx.machine.jit import njit
from convcvx.oracles._cone_bounds import OPTIONS, collapse, cone_bound, copy, dot, enclose

NARROWEST = 1e-14
"""Square of a cone's longest edge up to which the cone is not halved: rounding outweighs what a half would gain. The
bound on such a cone is recorded as it is."""
HALVINGS = 12
"""Times the square of the rank: halvings after which a cone is not halved either, in case its edges do not shrink."""
CURVATURE = 0.25
"""Weight of an edge's squared length, times g, in the choice of the edge to halve: the fastest of those tried; the
bound is a bound for any."""
DONE = 0
"""Status of `search`: no cone is left."""
OUT_OF_BUDGET = 1
"""Status of `search`: as many entries as allowed have been looked at; cones are left on the stack."""
OUT_OF_ROOM = 2
"""Status of `search`: the stack of entries has to grow first."""


@njit(**OPTIONS)
def subtract(source, target):
    """Subtract a contiguous array from another of its shape."""
    entries, places = source.reshape(-1), target.reshape(-1)
    for t in range(len(entries)):
        places[t] -= entries[t]


@njit(**OPTIONS)
def search(tree, fold, fineness, allowance, threshold, budget, indices, scratch, stack, depth, pruned, best, counts):
    """Depth first from the top of the stack, until it is empty or full, or `budget` entries were looked at.

    It stops early for a vertex with g > threshold[0], which the caller should raise: the cones around that vertex
    could not be dropped. Cones with a bound <= threshold[0] are dropped, the largest such bound being kept in
    pruned[0]. The two children of a cone share the list of entries that it kept, in `indices` after its own.
    `scratch`, as in `collapse`, has room for as many entries as `indices` has.
    Signs: bit 0 stands for the cone, bit 1 for its antipode, where G(-u) = G(u) - fold(u). Returns (status, new depth).
    """
    vertices_of, linear_of, span_of, signs_of, bound_of = stack
    d, n_cells, width = linear_of.shape[1:]
    linear, middle = np.empty((d, n_cells, width)), np.empty((d, n_cells, width))
    radius, remainder = np.empty((d, n_cells)), np.empty(n_cells)
    vertices, gram, edges, strain = np.empty((d, d)), np.empty((d, d)), np.empty((d, d)), np.empty((d, d))
    edge, half = np.empty(d), np.empty(d)
    while depth > 0:
        if budget <= 0 or depth == len(bound_of) or max(best[0, 0], best[1, 0]) > threshold[0]:
            return OUT_OF_BUDGET, depth
        top = depth - 1
        low, high, halvings = span_of[top]
        if bound_of[top] <= threshold[0]:
            pruned[0] = max(pruned[0], bound_of[top])
            depth = top
            continue
        copy(vertices_of[top], vertices)
        copy(linear_of[top], linear)
        longest, one, two = 0.0, 0, 0
        for i in range(d):
            for j in range(i + 1):
                gram[i, j] = dot(vertices[i], vertices[j])
                for a in range(d):
                    edge[a] = vertices[i, a] - vertices[j, a]
                edges[i, j] = dot(edge, edge)
                if edges[i, j] > longest:
                    longest, one, two = edges[i, j], i, j
        last = longest <= NARROWEST or halvings >= HALVINGS * d * d
        n, n_runs = collapse(tree, indices, low, high, vertices, fineness * np.sqrt(longest), linear, scratch)
        if n < 0:
            return OUT_OF_ROOM, depth
        depth = top
        kept = indices[high : high + n]
        budget -= high - low + n + 16
        counts[0] += 1
        counts[1] += n
        copy(linear, linear_of[top])
        rounding = allowance + enclose(tree, kept, scratch, n_runs, linear, middle, radius, remainder, strain)
        signs, bound = 0, 0.0
        for bit in range(2):
            if not signs_of[top] & (1 << bit):
                continue
            if bit == 1:  # the antipode: the same enclosure, less the odd part
                subtract(fold, linear)
            own = cone_bound(scratch, n_runs, vertices, gram, linear, middle, radius, remainder, rounding, best[bit])
            own = min(own, bound_of[top])
            if own <= threshold[0] or last:
                pruned[0] = max(pruned[0], own)
            else:
                signs |= 1 << bit
                bound = max(bound, own)
        if signs == 0:
            continue
        # halve the edge that costs most: what the entries bend along it, and the curvature of the sphere
        most = 0.0
        for i in range(d):
            for j in range(i):
                cost = strain[i, j] + CURVATURE * threshold[0] * edges[i, j]
                if cost > most:
                    one, two, most = i, j, cost
        for a in range(d):
            half[a] = vertices[one, a] + vertices[two, a]
        length = np.sqrt(dot(half, half))
        for a in range(d):
            half[a] /= length
        for child in range(2):
            copy(vertices, vertices_of[depth])
            copy(half, vertices_of[depth, one if child == 0 else two])
            copy(linear_of[top], linear_of[depth])
            span_of[depth, 0], span_of[depth, 1], span_of[depth, 2] = high, high + n, halvings + 1
            signs_of[depth], bound_of[depth] = signs, bound
            depth += 1
    return DONE, 0
