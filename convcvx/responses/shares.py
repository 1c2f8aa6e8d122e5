"""One process's share of the images: the passes over it, and sums that do not depend on how many processes there are.

The images are cut into segments that depend on their number alone, and a process has whole segments. Sums over images
are summed pairwise over segments, up a binary tree, so that they are the same to the last bit for one process and for
many.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from convcvx.data.images import Images
from convcvx.errors import InputError
from convcvx.losses.shares import Shares
from convcvx.patches import PatchEmbedding, PatchSpec, shifted_moment
from convcvx.pooling import Pooling
from convcvx.responses.passes import Responses

SEGMENT, MAX_SEGMENTS = 1024, 256
"""Images that are worth a segment of their own, and how many segments there are at most."""

Nodes = dict[tuple[int, int], list[Tensor]]
"""Partial sums by (level, index) in the binary tree over the segments: a level up covers twice as many."""


def segments(n: int) -> list[slice]:
    """The segments of `n` images: a power of two of them, as equal as can be."""
    count = 1
    while 2 * count * SEGMENT <= n and count < MAX_SEGMENTS:
        count *= 2
    return [slice(i * n // count, (i + 1) * n // count) for i in range(count)]


def share(count: int, rank: int, size: int) -> range:
    """Which of `count` segments process `rank` of `size` has."""
    return range(rank * count // size, (rank + 1) * count // size)


def add(nodes: Nodes, place: tuple[int, int], terms: list[Tensor]) -> None:
    """Add the partial sum at `place` to `nodes`: whenever two neighbours are there, their sum replaces them."""
    level, index = place
    while (level, index ^ 1) in nodes:
        terms = [ours + theirs for ours, theirs in zip(terms, nodes.pop((level, index ^ 1)), strict=True)]
        level, index = level + 1, index // 2
    nodes[level, index] = terms


class Share:
    """One process's share of the images, and the passes over it. What is per image is given for the share."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._parts: dict[int, Images] = {}
        self._places: dict[int, slice] = {}
        self._responses: dict[int, dict[int, Responses]] = {}

    def load(self, read: Callable[[Any], Images], source: Any, n: int) -> None:
        images = read(source)
        if len(images) != n:
            raise InputError(f"it found {len(images)} images, process 0 {n}: give all machines the same data")
        self.keep(images)
        for segment, part in self._parts.items():
            if isinstance(part, Tensor):
                self._parts[segment] = part.clone()  # and lets go of the rest

    def keep(self, images: Images) -> None:
        places = segments(len(images))
        own = share(len(places), self.rank, self.size)
        first = images_of(places, own).start
        self._parts = {i: images.narrow(0, places[i].start, places[i].stop - places[i].start) for i in own}
        self._places = {i: slice(places[i].start - first, places[i].stop - first) for i in own}

    def build(
        self, keys: Collection[int], embedding: PatchEmbedding, pooling: Pooling | None, options: dict[str, Any]
    ) -> None:
        """Make these responses under the last of `keys`, the only ones that are still in use."""
        *kept, key = keys
        self._parts = {i: part.to(options["device"]) for i, part in self._parts.items()}
        self._responses = {old: self._responses[old] for old in kept}
        made: dict[int, Responses] = {}
        for i, part in self._parts.items():
            # One map for all segments, each in its turn: with maps of its own each would have its own scratch memory.
            first = next(iter(made.values()), None)
            made[i] = first.to(images=part) if first is not None else Responses(part, embedding, pooling, **options)
        self._responses[key] = made

    def predict(self, key: int, filters: Tensor, weights: Tensor, intercept: Tensor) -> Tensor:
        outputs = [responses.predict(filters, weights, intercept) for responses in self._responses[key].values()]
        return torch.cat([torch.zeros(0, len(intercept), dtype=torch.float64), *outputs])

    def moment(self, spec: PatchSpec, about: Tensor) -> Nodes:
        return self._sum(lambda i: [shifted_moment(self._parts[i], spec, about) * len(self._parts[i])])

    def gram(self, key: int, targets: Tensor, counts: Tensor, filters: Tensor, shift: Tensor | None) -> Nodes:
        def product(i: int) -> list[Tensor]:
            responses, place = self._responses[key][i], self._places[i]
            shares = Shares(counts[place], float(responses.n))
            return [part.mul_(responses.n) for part in responses.gram(filters, targets[place], shares, shift)]

        return self._sum(product)

    def correlate(self, key: int, dual: Tensor, filters: Tensor) -> Nodes:
        return self._sum(lambda i: [self._responses[key][i].correlate(filters, dual[self._places[i]])])

    def ascent(self, key: int, dual: Tensor, filters: Tensor, directions: Tensor) -> Nodes:
        return self._sum(lambda i: [*self._responses[key][i].ascent(filters, dual[self._places[i]], directions)])

    def gradients(self, key: int, slopes: Tensor, *network: Tensor) -> Nodes:
        """Gradients of <slopes, predictions>."""
        filters, weights, intercept = network

        def gradients(i: int) -> list[Tensor]:
            responses = self._responses[key][i]
            part = slopes[self._places[i]].to(responses.device)
            found = responses.gradients(filters, weights, intercept, lambda _, images: part[images])
            return [gradient.cpu() for gradient in found]

        return self._sum(gradients)

    def _sum(self, term: Callable[[int], list[Tensor]]) -> Nodes:
        nodes: Nodes = {}
        for segment in self._parts:
            add(nodes, (0, segment), term(segment))
        return nodes


def images_of(places: list[slice], own: range) -> slice:
    """The images of the segments `own`, which are neighbours."""
    return slice(places[own[0]].start, places[own[-1]].stop) if own else slice(0, 0)
