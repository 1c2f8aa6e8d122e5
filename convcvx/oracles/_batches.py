"""The search over cones in batches, on a GPU: in each round, as many as fit are bounded and halved at a time."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from convcvx.oracles._batched_cones import Cones, Entries, Kept, form_bounds, halve
from convcvx.oracles._blocks import Goal, Incumbents, Search
from convcvx.oracles._cone_bounds import FAINT
from convcvx.oracles._cones import CURVATURE, HALVINGS, NARROWEST
from convcvx.oracles._row_tree import RowTree
from convcvx.oracles.charged_rows import ChargedRows
from convcvx.rounding import largest
from convcvx.terms.stop import Stop

ROUND_BYTES = {"cuda": 1 << 31, "cpu": 1 << 26}
"""Bytes that the arrays of a round take, about, by device: a GPU wants millions of entries at a time, a core no more
than its cache holds."""
WAITING_ROUNDS = 16
"""Rounds' worth of entries that may wait; when more do, the narrowest cones come before those with the largest bounds,
which ends cones sooner and keeps memory in bounds."""


class BatchedSearch(Search):
    """The cones still open, all on one device."""

    def __init__(
        self, charged: ChargedRows, tree: RowTree, incumbents: Incumbents, goal: Goal, device: torch.device | str
    ) -> None:
        super().__init__(charged, tree, incumbents, goal)
        self.device = torch.device(device)
        self.rows = Entries(tree, self.device)
        self.odd = torch.as_tensor(self.fold, device=self.device).transpose(0, 1)
        d, width = self.rank, self.rows.width
        self.room = max(1, ROUND_BYTES[self.device.type] // (8 * (3 * d * width + 10 * d)))

    def run(self) -> tuple[float, int, int, Stop]:
        """Search; see `outcome`."""
        cones = self._open(self.orthants())
        while len(cones) and not self.stopped:
            taken = self._choose(cones)
            cones = Cones.concatenate(cones[~taken], self._divide(cones[taken]))
            cones = self._open(cones)
        return self.outcome(largest(float(cones.bounds.max())) if len(cones) else 0.0)

    def orthants(self) -> Cones:
        """Half of them; their antipodes are the others."""
        signs = [(1.0, *signs) for signs in itertools.product((1.0, -1.0), repeat=self.rank - 1)]
        vertices = torch.diag_embed(torch.tensor(signs, dtype=torch.float64, device=self.device))
        n, roots = len(vertices), torch.as_tensor(self.tree.division.roots, device=self.device).long()
        whole = torch.full((n,), torch.inf, dtype=torch.float64, device=self.device)
        none = torch.zeros(n, dtype=torch.long, device=self.device)
        return Cones(
            vertices,
            vertices.new_zeros(n, *self.odd.shape),
            whole,
            vertices.new_ones(n, 2, dtype=torch.bool),
            none,
            none + len(roots),
            roots.repeat(n),
        )

    def _open(self, cones: Cones) -> Cones:
        """Without those that need no division any more; asks whether to stop."""
        low = cones.bounds <= float(self.threshold[0])
        self._record(cones.bounds[low])
        cones = cones[~low]
        self.stopped = self.goal.stopped(self.cones) if len(cones) else None
        return cones

    def _record(self, bounds: Tensor) -> None:
        if bounds.numel():
            self.pruned = largest(self.pruned, float(bounds.max()))

    def _choose(self, cones: Cones) -> Tensor:
        """Which cones (B,) bool come next: the largest bounds first, unless too many wait."""
        order = cones.bounds.argsort(descending=True)
        cost = cones.counts + 2 * self.odd.shape[0]  # a cone has sums for each cell
        if int(cost.sum()) > WAITING_ROUNDS * self.room:
            order = order[cones.halvings[order].argsort(descending=True, stable=True)]
        n = max(1, int((cost[order].cumsum(0) <= self.room).sum()))
        if self.goal.max_cones is not None:
            n = min(n, self.goal.max_cones - self.cones)
        return torch.zeros_like(order, dtype=torch.bool).index_fill_(0, order[:n], True)

    def _divide(self, cones: Cones) -> Cones:
        """Bound g on each cone, and halve those where the bound is too large."""
        d, vertices, linear = self.rank, cones.vertices, cones.linear.clone()
        edges = (vertices[:, :, None] - vertices[:, None]).square().sum(-1)
        longest = edges.amax((1, 2))
        room = 2 * self.room if len(cones) > 1 else self.n_rows
        kept = self.rows.collapse(cones, self.fineness * longest.sqrt(), linear, room)
        if kept is None:
            middle = len(cones) // 2
            return Cones.concatenate(self._divide(cones[:middle]), self._divide(cones[middle:]))
        self.cones += len(cones)
        self.entries += len(kept.entries)
        bounds, values, strain = self.bound(vertices, kept, linear)
        best = int(values.argmax())
        cone, sign, vertex = best // (2 * d), best // d % 2, best % d
        point = vertices[cone, vertex] * (1 - 2 * sign)
        self.raise_threshold(float(values.flatten()[best]), point[None].cpu().numpy())

        threshold = float(self.threshold[0])
        bounds = torch.minimum(bounds, cones.bounds[:, None])
        last = (longest <= NARROWEST) | (cones.halvings >= HALVINGS * d * d)
        done = (bounds <= threshold) | last[:, None]
        self._record(bounds[cones.signs & done])
        signs = cones.signs & ~done
        counts = torch.bincount(kept.owners, minlength=len(cones))
        bounds = torch.where(signs, bounds, 0.0).amax(1)
        halvable = signs.any(1)
        parents = Cones(vertices, linear, bounds, signs, cones.halvings + 1, counts, kept.entries)[halvable]
        return halve(parents, strain[halvable] + (CURVATURE * threshold + 1e-300) * edges[halvable])

    def bound(self, vertices: Tensor, kept: Kept, linear: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`_cone_bounds.cone_bound` on the cones and their antipodes (B, 2), values that g reaches at their vertices
        (B, 2, d), and the strain."""
        linear = linear.clone()
        middle, radius, remainder, strain = self.rows.enclose(kept, linear)
        gram, across = vertices @ vertices.mT, torch.linalg.vector_norm(radius, dim=1) + self.allowance
        rest = torch.linalg.vector_norm(remainder, dim=1, keepdim=True)
        bounds, values = [], []
        for part in (linear, linear - self.odd):  # the antipode: the same enclosure, less the odd part
            flat = vertices[:, None] @ part
            ends = flat + middle  # a_i, then b_i
            direction = ends.sum(2)  # q
            norm = torch.linalg.vector_norm(direction, dim=(1, 2), keepdim=True)
            direction = torch.where(norm > FAINT, direction / norm, 0.0)
            chords, above, below = self.rows.project(kept, direction)
            chords += torch.einsum("bpia,bpa->bi", flat, direction)
            values.append(chords - rest)
            along = torch.maximum(chords + above, below - chords) + rest + self.allowance
            ends -= torch.einsum("bpia,bpa->bi", ends, direction)[:, None, :, None] * direction[:, :, None]
            beside = torch.einsum("bpia,bpja->bij", ends, ends)
            bounds.append(form_bounds(along, beside, across, gram))
        return torch.stack(bounds, 1), torch.stack(values, 1), strain
