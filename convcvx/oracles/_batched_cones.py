"""Cones of branch and bound in batches, in torch: what `_cone_bounds.py` does to one cone, for a GPU.

Notation of `branch_and_bound.py`, where the bound is derived, and the same choices as in `_cone_bounds.py`: what is
said of a cone there is done here for a batch of B cones with T entries in all, each entry having an *owner*, its cone.
Everything is float64, which no device multiplies in less: TF32 replaces float32 alone. Sums by owner are added up in
whatever order the device likes, but never taken as differences of running sums, which the allowance does not cover.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from convcvx.oracles._cone_bounds import ABOVE, CANCELLED
from convcvx.oracles._row_tree import RowTree


@dataclass(frozen=True)
class Cones:
    """A batch of cones, still to be looked at; signs and halvings as in `_cones.search`.

    Attributes
    ----------
    vertices : Tensor (B, d, d)
    linear : Tensor (B, P, d, width)
        The rows that are positive on the cone, summed up.
    bounds : Tensor (B,)
        Of g on the cone, and on its antipode, as far as it is known: that of the cone it comes from.
    signs : Tensor (B, 2) bool
        Whether the cone and whether its antipode have to be looked at.
    halvings, counts : Tensor (B,) int64
    entries : Tensor (T,) int64
        `counts` of them for each cone in turn.
    """

    vertices: Tensor
    linear: Tensor
    bounds: Tensor
    signs: Tensor
    halvings: Tensor
    counts: Tensor
    entries: Tensor

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, which: Tensor | slice) -> Cones:
        first = self.counts.cumsum(0) - self.counts
        entries = self.entries[runs(first[which], self.counts[which])]
        each = {field.name: getattr(self, field.name)[which] for field in fields(self) if field.name != "entries"}
        return Cones(**each, entries=entries)

    @classmethod
    def concatenate(cls, *batches: Cones) -> Cones:
        return cls(*(torch.cat([getattr(batch, field.name) for batch in batches]) for field in fields(cls)))


def runs(first: Tensor, count: Tensor) -> Tensor:
    """first[k], first[k] + 1, ..., `count[k]` of them, for each k in turn."""
    total = count.cumsum(0)
    return torch.repeat_interleave(first - total + count, count) + torch.arange(
        int(total[-1]) if len(total) else 0, device=first.device
    )


@dataclass(frozen=True)
class Kept:
    """Entries whose sign is not fixed on their cones, sorted by owner, and their heights x.w_i (T, d)."""

    entries: Tensor
    owners: Tensor
    heights: Tensor


class Entries:
    """The rows and bundles of a `RowTree` on a device."""

    def __init__(self, tree: RowTree, device: torch.device) -> None:
        d, self.width = tree.moments.shape[1:]
        rows = tree.rows
        parts = rows.directions, rows.sources, rows.sizes, rows.charges, rows.norms
        directions, sources, sizes, charges, norms = (torch.as_tensor(part, device=device) for part in parts)
        bundles = torch.as_tensor(tree.bundles, device=device)
        self.n_rows = len(directions)
        self.directions = torch.cat([directions, bundles[:, :d]])
        # a bundle is a source of its own
        self.sources = torch.cat([sources.long(), torch.arange(len(bundles), device=device) + len(charges)])
        self.sizes = torch.cat([sizes, sizes.new_ones(len(bundles))])
        self.source_charges = torch.cat([charges, bundles[:, d : d + self.width]])
        lengths, remainders, radii, weights = bundles[:, d + self.width :].T
        self.norms = torch.cat([sizes * norms[sources.long()], lengths])
        zeros = sizes.new_zeros(self.n_rows)
        self.remainders, self.radii, self.weights = (
            torch.cat(parts) for parts in ((zeros, remainders), (zeros, radii), (self.norms[: self.n_rows], weights))
        )
        self.moments = torch.as_tensor(tree.moments, device=device).flatten(1)
        self.children = torch.as_tensor(tree.division.children, device=device)
        self.cells = torch.as_tensor(tree.cells, device=device).long()

    def charges(self, entries: Tensor) -> Tensor:
        """(T, width)."""
        return self.sizes[entries, None] * self.source_charges[self.sources[entries]]

    def outer(self, entries: Tensor) -> Tensor:
        """(T, d·width): x sᵀ."""
        return (self.directions[entries, :, None] * self.charges(entries)[:, None, :]).flatten(1)

    def heights(self, entries: Tensor, owners: Tensor, vertices: Tensor) -> Tensor:
        """(T, d): x.w_i."""
        total = torch.zeros(len(entries), vertices.shape[1], dtype=vertices.dtype, device=vertices.device)
        for j in range(vertices.shape[2]):
            total += self.directions[entries, j, None] * vertices[owners, :, j]
        return total

    def collapse(self, cones: Cones, finest: Tensor, linear: Tensor, room: int) -> Kept | None:
        """`_cone_bounds.collapse`: adds to `linear`; None if more than `room` entries would be kept in memory."""
        entries, owners = cones.entries, owners_of(cones.counts)
        kept: list[tuple[Tensor, ...]] = []
        while True:
            heights = self.heights(entries, owners, cones.vertices)
            smallest, largest = heights.aminmax(dim=1)
            alive = largest > -self.radii[entries]
            positive = alive & (smallest >= self.radii[entries])
            mixed = alive & ~positive
            coarse = mixed & (self.remainders[entries] > finest[owners] * self.weights[entries])
            mixed &= ~coarse
            self._add_moments(linear, entries[positive], owners[positive])
            kept.append((entries[mixed], owners[mixed], heights[mixed]))
            first, count = self.children[entries[coarse] - self.n_rows].unbind(1)
            entries, owners = runs(first, count), torch.repeat_interleave(owners[coarse], count)
            if len(entries) + sum(len(part[0]) for part in kept) > room:
                return None
            if not len(entries):
                entries, owners, heights = (torch.cat(parts) for parts in zip(*kept, strict=True))
                order = torch.argsort(owners, stable=True)
                return Kept(entries[order], owners[order], heights[order])

    def _add_moments(self, linear: Tensor, entries: Tensor, owners: Tensor) -> None:
        row = entries < self.n_rows
        add(linear, self.slots(entries[row], owners[row], linear), self.outer(entries[row]))
        add(linear, self.slots(entries[~row], owners[~row], linear), self.moments[entries[~row] - self.n_rows])

    def slots(self, entries: Tensor, owners: Tensor, like: Tensor) -> Tensor:
        """Where the cells of the owners stand in a tensor (B, P, ...)."""
        return owners * like.shape[1] + self.cells[entries]

    def enclose(self, kept: Kept, linear: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`_cone_bounds.enclose`: middle (B, P, d, width), radius (B, P, d), remainder (B, P), strain (B, d, d)."""
        entries, owners, heights = kept.entries, kept.owners, kept.heights
        d = heights.shape[1]
        middle, radius, remainder = (
            torch.zeros_like(linear),
            linear.new_zeros(linear.shape[:3]),
            linear[..., 0, 0] * 0.0,
        )
        slots, norms = self.slots(entries, owners, linear), self.norms[entries, None]
        chord, tangent = chords_and_tangents(heights)
        add(radius, slots, 0.5 * (chord - tangent) * norms)
        add(middle, slots, (0.5 * (chord + tangent)[:, :, None] * self.charges(entries)[:, None, :]).flatten(1))
        one, two = pairs(d, linear.device)
        bend = torch.minimum(heights[:, one].abs(), heights[:, two].abs()) * norms
        bend = torch.where(heights[:, one] * heights[:, two] < 0, bend, 0.0)
        strain = linear.new_zeros(len(linear), d, d)
        strain[:, one, two] = linear.new_zeros(len(linear), len(one)).index_add_(0, owners, bend)
        bundle = entries >= self.n_rows
        entries, slots = entries[bundle], slots[bundle]
        add(remainder, slots, 0.5 * self.remainders[entries, None])
        add(linear, slots, 0.5 * (self.moments[entries - self.n_rows] - self.outer(entries)))
        return middle, radius + remainder[..., None], remainder, strain

    def project(self, kept: Kept, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`_cone_bounds.project` along `direction` (B, P, width): chords, above, below, each (B, d)."""
        slots = self.slots(kept.entries, kept.owners, direction)
        slope = (direction.flatten(0, 1)[slots] * self.charges(kept.entries)).sum(1, keepdim=True)
        chord, tangent = chords_and_tangents(kept.heights)
        error = slope * (chord - tangent)
        parts = torch.stack([slope * chord, (-error).clamp(min=0), error.clamp(min=0)], dim=1)
        total = direction.new_zeros(len(direction), *parts.shape[1:])
        chords, above, below = total.index_add_(0, kept.owners, parts).unbind(1)
        return chords, above, below


def owners_of(counts: Tensor) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)


def add(total: Tensor, slots: Tensor, values: Tensor) -> None:
    """Add rows of `values` to `total` (B, P, ...) in its B·P `slots`."""
    total.view(-1, values.shape[1]).index_add_(0, slots, values)


def pairs(d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The edges of a cone with d vertices: i, and j < i."""
    one, two = torch.tril_indices(d, d, -1, device=device)
    return one, two


def chords_and_tangents(heights: Tensor) -> tuple[Tensor, Tensor]:
    return heights.clamp(min=0), torch.where(heights.sum(1, keepdim=True) > 0, heights, 0.0)


def form_bounds(along: Tensor, beside: Tensor, across: Tensor, gram: Tensor) -> Tensor:
    """`_cone_bounds.form_bound` of B forms; that the two agree is tested."""
    d = along.shape[1]
    lengths = beside.diagonal(dim1=1, dim2=2).sqrt()

    def outer(one: Tensor, two: Tensor) -> Tensor:
        return one[:, :, None] * two[:, None, :]

    forms = outer(along, along) + beside + outer(across, across) + outer(lengths, across) + outer(across, lengths)
    forms = (forms + CANCELLED * outer(lengths, lengths)).clamp(min=0)
    ratios = torch.where(gram > 0, forms / gram, torch.where(forms > 0, torch.inf, 0.0))
    bounds = torch.minimum(ratios.amax((1, 2)), d * forms.amax((1, 2))).sqrt() * ABOVE
    return torch.where(bounds.isnan(), torch.inf, bounds)


def halve(cones: Cones, cost: Tensor) -> Cones:
    """The two halves of each cone, across the edge with the largest `cost` (B, d, d)."""
    if not len(cones):
        return cones
    d, each = cost.shape[1], torch.arange(len(cones), device=cost.device)
    edge = cost.flatten(1).argmax(1)
    one, two = edge // d, edge % d
    half = cones.vertices[each, one] + cones.vertices[each, two]
    half /= torch.linalg.vector_norm(half, dim=1, keepdim=True)
    return Cones.concatenate(
        *(replace(cones, vertices=cones.vertices.index_put((each, end), half)) for end in (one, two))
    )
