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
from dataclasses import dataclass, replace
from math import comb

import numpy as np
from torch import Tensor

from convcvx.arrangements.cells import cell_batches, complement, count_bound, unpack_patterns
from convcvx.budget import NEVER, Deadline, OutOfTime
from convcvx.errors import InputError, check_count
from convcvx.oracles._spheres import INSIDE, cell_sweep
from convcvx.oracles._sweeps import DISTINCT, circle_sweep, lines, offer
from convcvx.oracles.base import OracleResult
from convcvx.oracles.charged_rows import ChargedRows
from convcvx.oracles.scope import Scope
from convcvx.problem import Problem
from convcvx.rounding import UNIT

MAX_ARCS = 2 * 10**8
"""Arcs of great circles that rank 3 and above may sweep: a few minutes."""
MAX_CELLS = 10**6
"""Cells that rank 4 and above may list: a few minutes."""


class ExactOracle:
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

    def __call__(
        self,
        problem: Problem,
        dual_point: Tensor,
        *,
        starts: Tensor | None = None,
        n_filters: int = 1,
        seed: int = 0,
        target: float = 0.0,
    ) -> OracleResult:
        """Return up to `n_filters` local maxima, best first; `starts`, `seed` and `target` are not needed."""
        began = time.perf_counter()
        try:
            return self.maximise(ChargedRows.build(problem, dual_point), n_filters, problem.deadline)
        except OutOfTime:
            return OracleResult.unfinished(problem, Scope.GLOBAL, time.perf_counter() - began)

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
        stopped: dict[str, str] = {}
        bound, visited, points = 0.0, 0, np.zeros((0, rank))
        if count and rank:
            _refuse(count, rank)
            search = _Search.of(charged, n_filters, deadline)
            try:
                search.flat(search.whole, 0)
                bound = search.bound + search.unseen
            except OutOfTime:
                bound, stopped = _total(charged), {"stopped": "time_limit"}
            bound, visited = bound + _rounding(charged), search.visited
            points = search.points()
        points, values = _best(charged, points, n_filters)
        stats = {"cells": visited, "rank": rank, "seconds": time.perf_counter() - began} | stopped
        found = charged.result(points, values, bound, stats)
        return replace(found, filters=found.filters / found.filters.norm(dim=1, keepdim=True))


@dataclass(frozen=True)
class _Flat:
    """The rows as a flat sees them: projected on it, unit again, the lost length in the charges.

    `frame` (m, d) is an orthonormal basis of the flat; row `origin[k]` of the whole became row k.
    """

    rows: np.ndarray
    cells: np.ndarray
    charges: np.ndarray
    origin: np.ndarray
    frame: np.ndarray

    def restrict(self, k: int) -> _Flat:
        """The hyperplane of row k; rows that vanish on it (to 4ε, see `_rounding`) go."""
        basis = complement(self.rows[k])
        rows = self.rows @ basis.T
        norms = np.linalg.norm(rows, axis=1)
        keep = norms > 4 * UNIT
        rows, charges = rows[keep] / norms[keep, None], self.charges[keep] * norms[keep, None]
        return _Flat(rows, self.cells[keep], charges, self.origin[keep], basis @ self.frame)


class _Search:
    """The running bound, without what `_rounding` adds, and the local maxima (g², u) found so far."""

    def __init__(self, whole: _Flat, n_cells: int, n_filters: int, deadline: Deadline) -> None:
        self.whole, self.n_cells, self.deadline = whole, n_cells, deadline
        # With one filter wanted, nothing below the bound is looked at.
        self.peaks = np.zeros((1 if n_filters == 1 else 2 * n_filters + 8, 1 + whole.rows.shape[1]))
        self.bound, self.visited = 0.0, 0
        self.unseen = 0.0  # what g can gain on slivers that the enumeration passed over

    @classmethod
    def of(cls, charged: ChargedRows, n_filters: int, deadline: Deadline = NEVER) -> _Search:
        norms = np.linalg.norm(charged.rows, axis=1)
        rows, charges = charged.rows, charged.charges
        if rows.shape[1] > 2:
            rows, charges = rows / norms[:, None], charges * norms[:, None]
        whole = _Flat(rows, charged.cells, charges, np.arange(len(rows)), np.eye(rows.shape[1]))
        return cls(whole, charged.n_cells, n_filters, deadline)

    def points(self) -> np.ndarray:
        """The local maxima, best first."""
        peaks = self.peaks[self.peaks[:, 0] > 0]
        points = peaks[np.argsort(-peaks[:, 0], kind="stable"), 1:]
        if points.shape[1] <= 2:
            return points
        # A best of its time was kept unseen.
        return points[[i == 0 or self._is_peak(point) for i, point in enumerate(points)]]

    def flat(self, flat: _Flat, first: int) -> None:
        """Search a flat and, for the hyperplanes of rows from `first` on, all flats below it."""
        self.deadline.check()
        if len(flat.rows) == 0:
            return
        if flat.rows.shape[1] <= 2:
            self._circle(flat)
            return
        for k in range(len(flat.rows)):
            if flat.origin[k] >= first and _is_first(flat.rows, k):
                self.flat(flat.restrict(k), int(flat.origin[k]) + 1)
        if flat.rows.shape[1] == 3:
            self._sphere(flat)
        else:
            self._cones(flat)

    def _circle(self, flat: _Flat) -> None:
        rows, d = flat.rows, flat.rows.shape[1]
        if d == 1:
            rows = np.concatenate([rows, np.zeros_like(rows)], axis=1)
        peaks = self._places(2)
        charges, order = flat.charges, lines(rows)
        self.bound, arcs = circle_sweep(rows, flat.cells, charges, *order, self.n_cells, self.bound, peaks)
        self.visited += arcs
        self._collect(peaks[:, : 1 + d], flat)

    def _sphere(self, flat: _Flat) -> None:
        peaks = self._places(3)
        for k in range(len(flat.rows)):
            self.deadline.check()
            args = flat.rows, flat.cells, flat.charges, k, self.n_cells
            self.bound, arcs = cell_sweep(*args, self.bound, peaks)
            self.visited += arcs
        self._collect(peaks, flat)

    def _places(self, d: int) -> np.ndarray:
        """Room for the peaks of a flat; what is there, no unit vectors, keeps out all that are not wanted."""
        peaks = np.zeros((len(self.peaks), 1 + d))
        peaks[:, 0], peaks[:, 1] = self.peaks[:, 0].min(), np.arange(len(peaks)) + 2.0
        return peaks

    def _collect(self, peaks: np.ndarray, flat: _Flat) -> None:
        for square, *u in peaks[peaks[:, 1] < 1.5]:
            self._offer(square, np.array(u) @ flat.frame, on_face=flat is not self.whole)

    def _cones(self, flat: _Flat) -> None:
        """Full cells in four dimensions and more: the top eigenvector of each, and whether it is inside."""
        gram = (flat.charges @ flat.charges.T) * (flat.cells[:, None] == flat.cells)
        n, c = flat.charges.shape
        relative = 4.0 * (2 * n + c + 12) * UNIT
        total = float(np.linalg.norm(flat.charges, axis=1).sum())
        noise = (n + 4) * UNIT * total  # in M, and so in its singular values
        for batch in cell_batches(flat.rows, 512):
            self.deadline.check()
            active = unpack_patterns(batch.packed, n)
            self.visited += len(active)
            self.unseen = max(self.unseen, batch.overshoot * total)
            masked = active[:, :, None] * flat.rows
            values, vectors = np.linalg.eigh(masked.transpose(0, 2, 1) @ (gram @ masked))
            if not np.isfinite(values).all():
                self.bound = np.inf
                return
            error = relative * (np.abs(gram) * (active[:, :, None] & active[:, None, :])).sum(axis=(1, 2))
            heights = np.einsum("bk,kd,bd->bk", np.where(active, 1.0, -1.0), flat.rows, vectors[:, :, -1])
            inside = (heights.min(axis=1) >= -INSIDE) | (heights.max(axis=1) <= INSIDE)
            unplaced = values[:, -1] - values[:, -2] <= 2 * error / INSIDE
            limit = min(self.bound**2, self.peaks[:, 0].min())
            for i in np.flatnonzero((values[:, -1] + error > limit) & (inside | unplaced)):
                # Now from M itself: its form loses half the digits where M is far smaller than its terms.
                m = np.zeros((self.n_cells, c, masked.shape[2]))
                np.add.at(m, flat.cells, flat.charges[:, :, None] * masked[i][:, None, :])
                _, sizes, right = np.linalg.svd(m.reshape(-1, masked.shape[2]))
                sizes = np.append(sizes, 0.0)
                height = np.where(active[i], 1.0, -1.0) * (flat.rows @ right[0])
                turns = [t for t in (1.0, -1.0) if (t * height).min() >= -INSIDE]
                for turn in turns:
                    self._offer(sizes[0] ** 2, turn * right[0] @ flat.frame, on_face=flat is not self.whole)
                if turns or sizes[0] - sizes[1] <= 2 * noise / INSIDE:
                    self.bound = max(self.bound, sizes[0] * (1 + (c * self.n_cells + 8) * UNIT) + noise)

    def _offer(self, square: float, u: np.ndarray, on_face: bool) -> None:
        """Keep a maximum over a flat if it is one over the whole sphere too, or the best so far."""
        if square > self.peaks[:, 0].max() or not on_face or self._is_peak(u):
            offer(self.peaks, float(square), u)

    def _is_peak(self, u: np.ndarray) -> bool:
        """Whether g falls from u the steepest ways, across and along the faces, and in random directions."""
        whole = self.whole
        heights = whole.rows @ u
        border, active = np.abs(heights) < 1e-9, heights >= 1e-9
        response = np.zeros((self.n_cells, whole.charges.shape[1]))
        np.add.at(response, whole.cells[active], heights[active, None] * whole.charges[active])
        pulls = (response[whole.cells] * whole.charges).sum(axis=1)
        slope = pulls[active] @ whole.rows[active]
        edges, pull = whole.rows[border], pulls[border]
        tries = [slope[None], slope + pull[:, None] * edges, (slope + pull @ edges)[None], edges, -edges]
        tries.append(np.random.default_rng(0).standard_normal((32, len(u))))
        if len(u) == 3:
            tries += [np.cross(edges, u), np.cross(u, edges)]
        steps = np.concatenate(tries)
        for _ in range(2):  # a slope along u leaves rounding, which is not tangential, the first time
            steps = steps - np.outer(steps @ u, u)
        steps /= np.linalg.norm(steps, axis=1, keepdims=True) + 1e-9 * np.linalg.norm(slope) + 1e-300
        rise = steps @ slope + np.maximum(steps @ edges.T, 0) @ pull
        return bool(rise.max() <= 1e-7 * (np.abs(pulls).sum() + 1e-300))


def _is_first(rows: np.ndarray, k: int) -> bool:
    """Whether no earlier row is the same one or its opposite, so that a hyperplane is searched once."""
    return not ((rows[:k] == rows[k]).all(axis=1) | (rows[:k] == -rows[k]).all(axis=1)).any()


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
    return share * _total(charged)


def _total(charged: ChargedRows) -> float:
    """Σ‖x_k‖‖s_k‖, which g exceeds nowhere, rounded up."""
    return float((np.linalg.norm(charged.rows, axis=1) * np.linalg.norm(charged.charges, axis=1)).sum()) * 1.001


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
