"""The search of the exact oracle: the faces of the arrangement, each a full cell within its flat.

A flat F = {u : x_k·u = 0, k in K} is searched after the flats below it, the hyperplanes of its rows: in two dimensions
every arc of the circle, in three the cells beside every great circle, in more the cells of `convcvx.arrangements`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from convcvx.arrangements.cells import cell_batches, complement, unpack_patterns
from convcvx.budget import NEVER, Deadline
from convcvx.oracles._spheres import INSIDE, cell_sweep
from convcvx.oracles._sweeps import circle_sweep, lines, offer
from convcvx.oracles.charged_rows import ChargedRows
from convcvx.rounding import UNIT

BATCH = 512
"""Cells that are looked at together in four dimensions and more: their arrays take megabytes."""
ON_BORDER = 1e-9
"""Product of a unit row and a filter up to which the filter lies on the row's hyperplane, in the test for a maximum."""
RISES = 1e-7
"""Share of Σ|pulls| that g may rise by, to first order, from what counts as a maximum: more than rounding makes of 0.
Which maxima are reported depends on it, the bound does not."""
TRIES = 32
"""Random directions in which g has to fall from a maximum, besides the steepest ones."""


@dataclass(frozen=True)
class Flat:
    """The rows as a flat sees them: projected on it, unit again, the lost length in the charges.

    `frame` (m, d) is an orthonormal basis of the flat; row `origin[k]` of the whole became row k.
    """

    rows: np.ndarray
    cells: np.ndarray
    charges: np.ndarray
    origin: np.ndarray
    frame: np.ndarray

    def restrict(self, k: int) -> Flat:
        """The hyperplane of row k; rows that vanish on it (to 4ε, see the notes of `ExactOracle`) go."""
        basis = complement(self.rows[k])
        rows = self.rows @ basis.T
        norms = np.linalg.norm(rows, axis=1)
        keep = norms > 4 * UNIT
        rows, charges = rows[keep] / norms[keep, None], self.charges[keep] * norms[keep, None]
        return Flat(rows, self.cells[keep], charges, self.origin[keep], basis @ self.frame)


class FlatSearch:
    """The running bound, without what rounding adds to it, and the local maxima (g², u) found so far."""

    def __init__(self, whole: Flat, n_cells: int, n_filters: int, deadline: Deadline) -> None:
        self.whole, self.n_cells, self.deadline = whole, n_cells, deadline
        # With one filter wanted, nothing below the bound is looked at.
        self.peaks = np.zeros((1 if n_filters == 1 else 2 * n_filters + 8, 1 + whole.rows.shape[1]))
        self.bound, self.visited = 0.0, 0
        self.unseen = 0.0  # what g can gain on slivers that the enumeration passed over

    @classmethod
    def of(cls, charged: ChargedRows, n_filters: int, deadline: Deadline = NEVER) -> FlatSearch:
        norms = np.linalg.norm(charged.rows, axis=1)
        rows, charges = charged.rows, charged.charges
        if rows.shape[1] > 2:
            rows, charges = rows / norms[:, None], charges * norms[:, None]
        whole = Flat(rows, charged.cells, charges, np.arange(len(rows)), np.eye(rows.shape[1]))
        return cls(whole, charged.n_cells, n_filters, deadline)

    def points(self) -> np.ndarray:
        """The local maxima, best first."""
        peaks = self.peaks[self.peaks[:, 0] > 0]
        points = peaks[np.argsort(-peaks[:, 0], kind="stable"), 1:]
        if points.shape[1] <= 2:
            return points
        # A best of its time was kept unseen.
        return points[[i == 0 or self._is_peak(point) for i, point in enumerate(points)]]

    def flat(self, flat: Flat, first: int) -> None:
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

    def _circle(self, flat: Flat) -> None:
        rows, d = flat.rows, flat.rows.shape[1]
        if d == 1:
            rows = np.concatenate([rows, np.zeros_like(rows)], axis=1)
        peaks = self._places(2)
        charges, order = flat.charges, lines(rows)
        self.bound, arcs = circle_sweep(rows, flat.cells, charges, *order, self.n_cells, self.bound, peaks)
        self.visited += arcs
        self._collect(peaks[:, : 1 + d], flat)

    def _sphere(self, flat: Flat) -> None:
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

    def _collect(self, peaks: np.ndarray, flat: Flat) -> None:
        for square, *u in peaks[peaks[:, 1] < 1.5]:
            self._offer(square, np.array(u) @ flat.frame, on_face=flat is not self.whole)

    def _cones(self, flat: Flat) -> None:
        """Full cells in four dimensions and more: the top eigenvector of each, and whether it is inside."""
        gram = (flat.charges @ flat.charges.T) * (flat.cells[:, None] == flat.cells)
        n, c = flat.charges.shape
        relative = 4.0 * (2 * n + c + 12) * UNIT
        total = float(np.linalg.norm(flat.charges, axis=1).sum())
        noise = (n + 4) * UNIT * total  # in M, and so in its singular values
        for batch in cell_batches(flat.rows, BATCH):
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
        border, active = np.abs(heights) < ON_BORDER, heights >= ON_BORDER
        response = np.zeros((self.n_cells, whole.charges.shape[1]))
        np.add.at(response, whole.cells[active], heights[active, None] * whole.charges[active])
        pulls = (response[whole.cells] * whole.charges).sum(axis=1)
        slope = pulls[active] @ whole.rows[active]
        edges, pull = whole.rows[border], pulls[border]
        tries = [slope[None], slope + pull[:, None] * edges, (slope + pull @ edges)[None], edges, -edges]
        tries.append(np.random.default_rng(0).standard_normal((TRIES, len(u))))
        if len(u) == 3:
            tries += [np.cross(edges, u), np.cross(u, edges)]
        steps = np.concatenate(tries)
        for _ in range(2):  # a slope along u leaves rounding, which is not tangential, the first time
            steps = steps - np.outer(steps @ u, u)
        steps /= np.linalg.norm(steps, axis=1, keepdims=True) + 1e-9 * np.linalg.norm(slope) + 1e-300
        rise = steps @ slope + np.maximum(steps @ edges.T, 0) @ pull
        return bool(rise.max() <= RISES * (np.abs(pulls).sum() + 1e-300))


def _is_first(rows: np.ndarray, k: int) -> bool:
    """Whether no earlier row is the same one or its opposite, so that a hyperplane is searched once."""
    return not ((rows[:k] == rows[k]).all(axis=1) | (rows[:k] == -rows[k]).all(axis=1)).any()
