"""The exact oracle: the maximum of g over every filter, by enumeration of the activation patterns.

Within a cell of the arrangement {u : x_k·u = 0}, g(u) = ‖M u‖ with M = Σ_{active k} s_k x_kᵀ, (P·c, d):
maximising a quadratic form over a cone, cone-constrained PCA. Either the top eigenvector lies in the
cone, or the maximum is on a face, which is a cell of the arrangement that the other rows make in the
face's own linear span, a *flat*.

References
----------
Sahiner, Ergen, Pauly, Pilanci, ICLR 2021; Asteris, Papailiopoulos, Dimakis, ICML 2014 (the
polynomial algorithm for fixed rank); Edelsbrunner, O'Rourke, Seidel, SIAM J. Comput. 15 (1986) 341-363
(arrangements).
"""

from __future__ import annotations

import time
from dataclasses import replace
from math import comb

import numpy as np
from torch import Tensor

from convcvx.arrangements.cells import count_bound
from convcvx.budget import NEVER, Deadline, OutOfTime
from convcvx.errors import InputError, check_count
from convcvx.oracles._flats import FlatSearch
from convcvx.oracles._sweeps import DISTINCT
from convcvx.oracles.base import Oracle, OracleResult, Wanted
from convcvx.oracles.charged_rows import ChargedRows
from convcvx.oracles.support import sweep_plane
from convcvx.problem import Problem
from convcvx.rounding import UNIT
from convcvx.terms.stop import Stop

MAX_ARCS = 2 * 10**8
"""Arcs of great circles that rank 3 and above may sweep: a few minutes."""
MAX_CELLS = 10**6
"""Cells that rank 4 and above may list: a few minutes."""


class ExactOracle(Oracle):
    """Every filter searched: the bound is a proof, the first filter attains it.

    Notes
    -----
    *Why nothing is missed.* Each unit u lies in the relative interior of one face of the arrangement, a
    full cell of the arrangement restricted to the face's flat F = {u : x_k·u = 0, k in K}. There g² is
    one quadratic form, so a maximiser of g is a top eigenvector of the form on F. Hence max g is the
    largest of: top eigenvalues on full cells that hold their eigenvector, and max g over the
    hyperplanes x_k·u = 0, where the same argument applies one dimension lower (flats are taken once, as
    increasing sets K). Rank 1 and 2 end the recursion: on an arc of the circle g² is a sinusoid in
    twice the angle, whose maximum is known. In rank 3 every cell borders an arc of some great circle;
    sweeping all circles, with crossings ordered by exact predicates, meets every cell. In rank 4 and
    above, cells come from `convcvx.arrangements`, complete but for slivers within δ of one of the hyperplanes, where g
    is at most δ·S above its maximum on that hyperplane.

    *Where cells take the maximum* responses are no sums over rows: see `convcvx.oracles.support`, for rank 2.

    *Cost.* Rank 2: O(N (c + P + log N)). Rank 3: O(N² (c + P + log N)). Rank r: O(N^(r-1)) flats and cells.

    *Rounding.* Rows and charges are at scale 1 (`ChargedRows.scaled`), so that no product over- or underflows. With
    ε = 2⁻⁵³ and S = Σ‖x_k‖‖s_k‖ the computed maximum is raised by

    - 16ε·S: angles are accurate to 16ε, so on a computed arc only rows with |x_k·u| <= 16ε‖x_k‖ can have the
      wrong sign; (4m + m√m + 16)ε·S for each projection on a hyperplane of R^m, which moves rows by so much: 2m + 9
      the reflection whose rows are its basis, m√m the products, the rest unit lengths that are not quite and rows
      that are left out;
    - 8ε·S + (3Nε)²·S: products s_k x_kᵀ round once, always alike; two-sums leave second-order errors only;
    - 6(c + P + 8)ε·‖M‖_F on each arc, twice that on a cell: the form and ‖M u‖ are summed anew from M,
      never updated. An interior maximum is at least ‖M‖_F²/2 (/3 in space), so its root does not
      amplify; ends of arcs are evaluated as ‖M u‖;
    - an eigenvector that is numerically on the border counts as inside. Where the gap between
      eigenvalues is too small to place it, their plane is tested instead (in rank 4 and above the cell
      simply counts: still a bound, but perhaps not attained), and a form without any gap counts whole;
    - in rank 4 and above, the cells' `overshoot`·S, for what the enumeration does not tell apart.
    """

    name = "exact"

    def answer(self, problem: Problem, dual_point: Tensor, wanted: Wanted) -> OracleResult:
        """As `Oracle` says, local maxima all of them; of what is wanted `n_filters` alone matters."""
        if problem.responses.pooling.maximum:
            return sweep_plane(problem, dual_point, check_count("n_filters", wanted.n_filters))
        return self.maximise(ChargedRows.build(problem, dual_point), wanted.n_filters, problem.deadline)

    def maximise(self, charged: ChargedRows, n_filters: int = 1, deadline: Deadline = NEVER) -> OracleResult:
        """The same for rows already charged. Of cells not visited by the `deadline` only Σ‖x_k‖‖s_k‖ is known.

        Raises
        ------
        InputError
            If the rank of the patches and their number are too large to enumerate.
        """
        check_count("n_filters", n_filters)
        began = time.perf_counter()
        charged = charged.scaled()
        count, rank = charged.rows.shape
        stopped: dict[str, Stop] = {}
        bound, visited, points = 0.0, 0, np.zeros((0, rank))
        if count and rank:
            _refuse(count, rank)
            search = FlatSearch.of(charged, n_filters, deadline)
            try:
                search.flat(search.whole, 0)
                bound = search.bound + search.unseen
            except OutOfTime:
                bound, stopped = charged.total, {"stopped": Stop.TIME_LIMIT}
            bound, visited = bound + _rounding(charged), search.visited
            points = search.points()
        points, values = _best(charged, points, n_filters)
        stats = {"cells": visited, "rank": rank, "seconds": time.perf_counter() - began} | stopped
        found = charged.result(points, values, bound, stats)
        return replace(found, filters=found.filters / found.filters.norm(dim=1, keepdim=True))


def _refuse(count: int, rank: int) -> None:
    """Raise `InputError` for what would take longer than minutes."""
    n_cells = count_bound(count, rank)
    n_arcs = comb(count, rank - 2) * 2 * count * (rank - 1) if rank > 2 else 0
    if n_arcs > MAX_ARCS or (rank > 3 and n_cells > MAX_CELLS):
        raise InputError(
            f"oracle='exact' would visit {float(n_cells):.0e} cells for {count} patches of rank {rank}; "
            "use oracle='branch-and-bound', a lower rank or fewer images"
        )


def _rounding(charged: ChargedRows) -> float:
    """What angles, products and projections can hide: see the notes of `ExactOracle`."""
    count, rank = charged.rows.shape
    projections = sum(4 * m + m * m**0.5 + 16 for m in range(3, rank + 1))
    share = (24 + projections) * UNIT + (3 * count * UNIT) ** 2
    return share * charged.total


def _best(charged: ChargedRows, points: np.ndarray, n_filters: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `n_filters` different ones of `points` (best first), made unit, and their g."""
    points = points / np.linalg.norm(points, axis=1, keepdims=True)
    kept: list[np.ndarray] = []
    for point in points:
        if len(kept) < n_filters and all(np.linalg.norm(point - other) > DISTINCT for other in kept):
            kept.append(point)
    if not kept:
        return points[:0], np.zeros(0)
    points = np.stack(kept)
    values = charged.g(points)
    order = np.argsort(-values, kind="stable")
    order = order[values[order] > 1e-12 * values.max()]  # the rest is rounding
    return points[order], values[order]
