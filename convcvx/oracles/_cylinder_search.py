"""The search over cylinders, best bound first, in batches: derived in `cylinders.py`."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from convcvx.budget import Deadline
from convcvx.machine.threads import each
from convcvx.oracles._corner_bounds import above, longest
from convcvx.oracles._quadratic_rows import settle
from convcvx.oracles.charged_rows import ChargedRows
from convcvx.rounding import UNIT, largest
from convcvx.terms.stop import Stop

BATCH = 64
"""Cylinders that are looked at between two choices of the largest bounds, at most."""
TOGETHER = 16
"""Of them those that one core looks at: their small matrices are decomposed in one call."""
BATCH_ROWS = 1 << 22
"""Rows that are looked at between two looks at the clock, about: half a second."""
BATCH_ENTRIES = 1 << 23
"""Numbers in the moments and matrices of a batch, at most, about: 64 MiB."""
HALVINGS = 48
"""Halvings after which a cylinder is divided no more: entries of its corners are exact up to 52."""
SHRUNK = 0.5
"""Share of its ancestor's rows up to which a cylinder has a list of rows of its own: memory is not to grow with the
number of cylinders."""
CURVATURE = 0.25
"""Weight of an edge's squared length, times g, in the choice of the edge to halve; the bound is a bound for any."""


@dataclass(frozen=True)
class Held:
    """Rows (·,) that are neither positive nor negative on some cylinder, and Σ s xᵀ (P, c, d) of the positive ones."""

    indices: np.ndarray
    linear: np.ndarray


@dataclass(order=True)
class Cylinder:
    """Its `corners` (r + 1, r + 1), one a row; nobody has looked at it yet, and what bounds its parent bounds it."""

    priority: float
    order: int
    corners: np.ndarray = field(compare=False)
    halvings: int = field(compare=False)
    held: Held = field(compare=False)


@dataclass(frozen=True)
class Settled:
    """What `settle` found of the rows on a cylinder; its text describes the sums."""

    held: Held
    moments: np.ndarray
    tails: np.ndarray
    masses: np.ndarray
    bends: np.ndarray
    modulus: float


class CylinderSearch:
    """The cylinders still open, the largest bound first.

    Parameters
    ----------
    charged : ChargedRows
        In principal directions, sorted by cell.
    directions : int
    enough : float
        The bound up to which cylinders need no further division.
    """

    def __init__(self, charged: ChargedRows, directions: int, enough: float) -> None:
        n, d = charged.rows.shape
        self.charged, self.enough, self.r = charged, enough, max(0, min(directions, d - 1))
        up = 1 + (d + 4) * UNIT
        self.lengths = np.linalg.norm(charged.rows, axis=1) * up
        self.rests = np.linalg.norm(charged.rows[:, self.r :], axis=1) * up
        assert charged.sources is not None
        self.source_cells = np.zeros(len(charged.charges), np.int64)
        self.source_cells[charged.sources] = charged.cells
        self.total = charged.total
        self.fold = np.zeros((charged.n_cells, charged.charges.shape[1], d))
        edges = np.searchsorted(charged.cells, np.arange(charged.n_cells + 1))
        for p, (low, high) in enumerate(itertools.pairwise(edges.tolist())):
            self.fold[p] = charged.charges_of(slice(low, high)).T @ charged.rows[low:high]
        self.open: list[Cylinder] = []
        self.seen, self.made, self.pruned = 0, 0, 0.0
        if n and d:
            whole = Held(np.arange(n, dtype=np.int32), np.zeros_like(self.fold))
            for signs in itertools.product((1.0, -1.0), repeat=max(0, self.r - 1)):
                self._push(np.diag((*(1.0, *signs)[: self.r], 1.0)), 0, whole, self.total)

    @property
    def bound(self) -> float:
        """What is proved by now."""
        return min(self.total, largest(self.pruned, -self.open[0].priority if self.open else 0.0))

    def run(self, deadline: Deadline, most: int | None = None) -> Stop:
        """Search until the bound is low enough, or the deadline, or `most` cylinders; why it stopped."""
        while self.open:
            if deadline.passed:
                return Stop.TIME_LIMIT
            if most is not None and self.seen >= most:
                return Stop.MAX_CYLINDERS
            batch = self._batch()
            self.seen += len(batch)
            parts = [batch[i : i + TOGETHER] for i in range(0, len(batch), TOGETHER)]
            for part, looked in zip(parts, each(self._looked_at, parts), strict=True):
                for cylinder, (found, own) in zip(part, looked, strict=True):
                    self._divide(cylinder, found, min(-cylinder.priority, largest(own)))
        return Stop.BOUND

    def _push(self, corners: np.ndarray, halvings: int, held: Held, bound: float) -> None:
        self.made += 1
        heapq.heappush(self.open, Cylinder(-bound, self.made, corners, halvings, held))

    def _batch(self) -> list[Cylinder]:
        """The cylinders with the largest bounds."""
        n_cells, c, d = self.fold.shape
        entries = n_cells * c * (d * d + 4 * (self.r + 1) * (3 + n_cells) * n_cells * c)
        batch: list[Cylinder] = []
        rows, most = 0, max(1, min(BATCH, BATCH_ENTRIES // entries))
        while self.open and len(batch) < most and rows < BATCH_ROWS:
            batch.append(heapq.heappop(self.open))
            rows += len(batch[-1].held.indices)
        return batch

    def _divide(self, cylinder: Cylinder, found: Settled, bound: float) -> None:
        if bound <= self.enough or cylinder.halvings >= HALVINGS or self.r == 0:
            self.pruned = largest(self.pruned, bound)
            return
        few = len(found.held.indices) <= SHRUNK * len(cylinder.held.indices)
        held, edge = found.held if few else cylinder.held, self._edge(cylinder.corners, found.bends)
        middle = 0.5 * (cylinder.corners[edge[0]] + cylinder.corners[edge[1]])
        for end in edge:
            corners = cylinder.corners.copy()
            corners[end] = middle
            self._push(corners, cylinder.halvings + 1, held, bound)

    def _edge(self, corners: np.ndarray, bends: np.ndarray) -> tuple[int, int]:
        """The edge that costs most: what the rows bend along it, and the curvature of the sphere."""
        d, r = self.fold.shape[2], self.r
        matrix = np.zeros((d, d))
        matrix[np.triu_indices(d)] = bends
        form = CURVATURE * max(self.enough, 0.0) * np.eye(r + 1)
        form[:r, :r] += np.triu(matrix[:r, :r], 1).T + matrix[:r, :r]
        form[r, r] += np.trace(matrix[r:, r:])
        apart = corners[:, None] - corners[None]
        costs = np.einsum("ijk,kl,ijl->ij", apart, form, apart)
        np.fill_diagonal(costs, -1.0)
        one, two = np.unravel_index(np.argmax(costs), costs.shape)
        return int(one), int(two)

    def _looked_at(self, batch: Sequence[Cylinder]) -> list[tuple[Settled, float]]:
        """What is found of the rows on each cylinder, and a bound on it."""
        settled = [self._settled(cylinder) for cylinder in batch]
        return list(zip(settled, self._bounds(batch, settled), strict=True))

    def _settled(self, cylinder: Cylinder) -> Settled:
        charged, held = self.charged, cylinder.held
        n_cells, c, d = self.fold.shape
        linear, moments = held.linear.copy(), np.zeros((n_cells, c, 1 + d + d * (d + 1) // 2))
        tails, masses = np.zeros((n_cells, c, c)), np.zeros(n_cells)
        bends, kept = np.zeros(d * (d + 1) // 2), np.empty(len(held.indices), np.int32)
        rows = charged.rows, self.lengths, self.rests, charged.sizes, charged.sources
        sums = linear, moments, tails, masses, bends, kept
        count, modulus = settle(rows, cylinder.corners, held.indices, charged.charges, self.source_cells, sums)
        return Settled(Held(kept[:count].copy(), linear), moments, tails, masses, bends, modulus)

    def _bounds(self, batch: Sequence[Cylinder], settled: Sequence[Settled]) -> list[float]:
        """A bound on the norm of the sum on each cylinder, and on its antipode."""
        places = _stack([cylinder.corners for cylinder in batch])  # (B, V, r + 1)
        tails, masses = _stack([found.tails for found in settled]), _stack([found.masses for found in settled])
        maps = corner_maps(
            places,
            _stack([found.moments for found in settled]).flatten(1, 2),
            _stack([found.held.linear for found in settled]).flatten(1, 2),
            torch.from_numpy(self.fold).flatten(0, 1),
        )
        counts = torch.tensor([float(len(found.held.indices)) for found in settled], dtype=torch.float64)
        copies = 2 * places.shape[1]
        each_corner = (part.repeat_interleave(copies, dim=0) for part in (0.5 * (tails + tails.mT), masses, counts))
        values = longest(*(part.flatten(0, 2) for part in maps), *each_corner)
        n, d = self.charged.rows.shape
        moduli = torch.tensor([found.modulus for found in settled], dtype=torch.float64)
        allowance = 4 * (n + 2 * d * d + 64) * UNIT * (self.total + moduli)
        values = values.view(len(batch), 2, -1) + allowance[:, None, None]
        bounds = above(places.repeat_interleave(2, dim=0), values.flatten(0, 1))
        return bounds.view(-1, 2).amax(dim=1).tolist()


def corner_maps(places: Tensor, moments: Tensor, linear: Tensor, fold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """G_i(ζ) = g + L ζ + Q v(ζ) at each corner, of cylinders and, second, their antipodes.

    Parameters
    ----------
    places : Tensor (B, V, r + 1)
        Corners (y_i, s_i).
    moments : Tensor (B, q, 1 + d + d(d+1)/2)
    linear : Tensor (B, q, d)
    fold : Tensor (q, d)
        Σ s xᵀ of all rows.

    Returns
    -------
    tuple of Tensor
        g (B, 2, V, q), L (B, 2, V, q, m), Q (B, 2, V, q, m(m+1)/2).
    """
    d, r = linear.shape[2], places.shape[2] - 1
    m, y, s = d - r, places[..., :r], places[..., r]
    constant, first, upper = moments[..., 0], moments[..., 1 : 1 + d], torch.triu_indices(d, d)
    second = moments.new_zeros(*constant.shape, d, d)
    second[..., upper[0], upper[1]] = second[..., upper[1], upper[0]] = moments[..., 1 + d :]
    inner, cross, rest = second[..., :r, :r], second[..., r:, :r], second[..., r:, r:]
    mean = rest.diagonal(dim1=2, dim2=3).sum(dim=2) / m  # (B, q)
    one, two = torch.triu_indices(m, m)
    scale = torch.where(one == two, 1.0, 2.0).double().sqrt() * math.sqrt(1 - 1 / m)
    pure = (rest - mean[..., None, None] * torch.eye(m, dtype=rest.dtype))[..., one, two] * scale
    odd = torch.stack([first + linear, first + linear - fold], dim=1)  # (B, 2, q, d)
    even = constant[:, None] + torch.einsum("bqij,bvi,bvj->bvq", inner, y, y) + s[..., None].square() * mean[:, None]
    value = even[:, None] + torch.einsum("beqi,bvi->bevq", odd[..., :r], y)
    slope = odd[:, :, None, :, r:] + 2 * torch.einsum("bqij,bvj->bvqi", cross, y)[:, None]
    curve = (s.square()[..., None, None] * pure[:, None])[:, None]
    return value, s[:, None, :, None, None] * slope, curve.expand(-1, 2, -1, -1, -1)


def _stack(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))
