"""The exact oracle where cells take the maximum: every filter of the plane, one arc after the other.

φ_p(x_i; u) = max_k (x_ik·u)_+ is the support function of the polygon that 0 and the rows of the cell span. On an arc of
the circle on which no cell changes its vertex, all responses are linear in u, Σ_i φ(x_i; u) Z_iᵀ = M u, and the largest
‖M u‖ is at an eigenvector of MᵀM or at an end of the arc.

**Rounding.** Angles and vertices are taken as they come. At the ends of arcs, a quarter of the circle at most, it is
measured how far another row of the cell, or 0, exceeds the vertex: x·u - v·u is linear in u, a combination of its
values at the ends with weights that add up to √2 at most, so that φ_ip is off by no more than √2 times that. Measuring
it rounds: an angle by 8ε, its sine and cosine by ε, products and sums by 4ε, of rows that differ by twice the longest
one, which √2 times 26ε of that allow for: 64ε. Sums of N steps add (N + 2)ε Σ_i ‖Z_i‖ Σ‖step‖ to M u, and the circle
does not end at the float 2π but within 3ε of it. The forms MᵀM are off
by 4 (P·c + 32)ε of their trace. What rows do not say in coordinates of the plane, and what Z may be off, is added.
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from convcvx.budget import NEVER, OutOfTime
from convcvx.oracles._patch_rows import ROUND_UP, embedding_errors, lengths
from convcvx.oracles._support import arcs, changes
from convcvx.oracles.base import OracleResult
from convcvx.oracles.charged_rows import at_scale_one, raised
from convcvx.oracles.needs import AVERAGES_OR_PLANE, require
from convcvx.patches import Moments
from convcvx.problem import Problem
from convcvx.rounding import SAFE, TINY, UNIT, largest
from convcvx.terms.scope import Scope

CHUNK = 256
"""Images whose patches are gathered at once."""
DISTINCT = 1e-4
"""Distance below which two filters are the same maximum, found on neighbouring arcs."""
CONSIDERED = 64
"""Arcs looked at for every filter that is wanted: neighbours of a maximum come first."""


def sweep_plane(problem: Problem, dual_point: Tensor, n_filters: int) -> OracleResult:
    """The maximum of g over all filters for cells that take the maximum, patches being of rank 2 at most: a proof.

    Raises
    ------
    InputError
        For patches of a higher rank, or numbers that are not finite.
    """
    began = time.perf_counter()
    try:
        points, bound, count = _swept(problem.with_dtype(torch.float64), dual_point, CONSIDERED * n_filters)
    except OutOfTime:
        return OracleResult.unfinished(problem, Scope.GLOBAL, time.perf_counter() - began)
    filters = _distinct(points, n_filters)
    measured = problem.until(NEVER).with_dtype(torch.float64).responses.correlate(filters, dual_point)
    values = measured.flatten(1).norm(dim=1)
    stats = {"cells": count, "rank": 2, "seconds": time.perf_counter() - began}
    order = values.argsort(descending=True)
    return OracleResult(filters[order], values[order], bound, Scope.GLOBAL, stats)


def _swept(problem: Problem, dual_point: Tensor, most: int) -> tuple[Tensor, float, int]:
    """Up to `most` filters (q, r), the best of their arcs, best first; a bound on max g; how many arcs there are."""
    responses = problem.responses
    spec, basis, (_, size) = responses.embedding.spec, responses.embedding.basis, responses.embedding.basis.shape
    frame = Moments.of(responses.images, spec).embedded(basis, spec).span
    d = len(frame)
    if d > 2:
        raise AVERAGES_OR_PLANE.refusal("oracle exact", f"pool {responses.pooling} of rank {d}")
    require("oracle exact", (AVERAGES_OR_PLANE,), problem)
    # As for `PatchRows`: how much longer coordinates are than filters, and what computing them rounds.
    skew = float((frame @ frame.T - torch.eye(d, dtype=torch.float64)).norm()) + (size + 2) * d * UNIT
    skew += ((d + 1) * d**0.5 + 8) * UNIT
    cells = responses.pooling.cells(*responses.map_size)
    assert cells is not None
    positions = cells.nonzero()[:, 1].numpy()
    starts = np.concatenate([[0], (cells > 0).sum(dim=1).cumsum(dim=0).numpy()])
    reach = responses.pooling.reach(*responses.map_size)
    charges, exponent = at_scale_one(dual_point.numpy())
    wrong = np.ldexp(problem.dual_error(dual_point).numpy(), -exponent)
    weights = np.linalg.norm(charges, axis=1)
    found: list[tuple[np.ndarray, ...]] = []
    slack, mass = 0.0, 0.0
    for start in range(0, responses.n, CHUNK):
        where = slice(start, min(start + CHUNK, responses.n))
        raw = responses.rows(where).cpu()
        rows = raw @ basis.T
        coordinates = rows @ frame.T
        outside = lengths(rows - coordinates @ frame) + embedding_errors(responses, where, raw)
        unsaid = ((outside + skew * lengths(coordinates)) @ reach).numpy()
        angles, images, places, steps, off, sizes, moved = changes(
            pad(coordinates, (0, 2 - d)).contiguous().numpy(), starts, positions
        )
        unsaid = ROUND_UP * (unsaid + math.sqrt(2) * off + 64 * UNIT * sizes)
        slack = largest(slack + float(unsaid @ weights[where]) + float((sizes + unsaid) @ wrong[where]))
        mass += float(moved @ weights[where])
        found.append((angles, images + start, places, steps))
    angles, images, places, steps = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(angles, kind="stable")
    values, attained, traces = arcs(
        angles[order], images[order], places[order], steps[order], charges, responses.n_cells
    )
    share = 4 * (responses.n_cells * charges.shape[1] + 32) * UNIT
    top = float(np.max(values + share * traces, initial=0.0))
    bound = largest(math.sqrt(top) if top >= 0 else math.inf, 0.0) if math.isfinite(top) else math.inf
    slack += (len(angles) + 8) * UNIT * mass + len(angles) * TINY
    best = np.argsort(-values, kind="stable")[:most]
    plane = torch.from_numpy(np.stack([np.cos(attained[best]), np.sin(attained[best])], axis=1))
    points = normalize(plane[:, :d] @ frame) if d else plane[:0] @ frame.new_zeros(2, len(basis))
    return points, raised(largest(bound * SAFE + slack * ROUND_UP) * SAFE, exponent), len(angles)


def _distinct(points: Tensor, count: int) -> Tensor:
    """Up to `count` different filters of `points` (q, r), best first."""
    kept: list[Tensor] = []
    for point in points[points.norm(dim=1) > 0.5]:  # of a line, where there is no plane, the angles beside it have none
        if len(kept) < count and all(float((point - other).norm()) > DISTINCT for other in kept):
            kept.append(point)
    return torch.stack(kept) if kept else points[:0]
