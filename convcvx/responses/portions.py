"""One process's portion of the images: the passes over it, and sums that do not depend on how many processes there are.

The images are cut into segments that depend on their number alone, and a process has whole segments. Sums over images
are summed pairwise over segments, up a binary tree, so that they are the same to the last bit for one process and for
many.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from convcvx.budget import Deadline, clock
from convcvx.data.images import Images
from convcvx.errors import InputError
from convcvx.machine.wire import Wire
from convcvx.patches import PatchEmbedding, PatchSpec, shifted_moment
from convcvx.pooling import Pooling
from convcvx.responses.passes import Responses
from convcvx.responses.table import Pass

SEGMENT = 1024
"""Images that are worth a segment of their own: what a process more gains on fewer, messages cost."""
MAX_SEGMENTS = 256
"""Segments at most, and so processes that have some: partial sums of more would cost more than the passes do."""

Nodes = dict[tuple[int, int], list[Tensor]]
"""Partial sums by (level, index) in the binary tree over the segments: a level up covers twice as many."""
Found = tuple[Nodes, list[list[Tensor]]]
"""What a pass finds in a portion: sums by their place, and of each part the results that are not summed."""


def segments(n: int) -> list[slice]:
    """The segments of `n` images: a power of two of them, as equal as can be."""
    count = 1
    while 2 * count * SEGMENT <= n and count < MAX_SEGMENTS:
        count *= 2
    return [slice(i * n // count, (i + 1) * n // count) for i in range(count)]


def portion(count: int, rank: int, size: int) -> range:
    """Which of `count` segments process `rank` of `size` has."""
    return range(rank * count // size, (rank + 1) * count // size)


def images_of(places: list[slice], own: range) -> slice:
    """The images of the segments `own`, which are neighbours."""
    return slice(places[own[0]].start, places[own[-1]].stop) if own else slice(0, 0)


def add(nodes: Nodes, place: tuple[int, int], terms: list[Tensor]) -> None:
    """Add the partial sum at `place` to `nodes`: whenever two neighbours are there, their sum replaces them."""
    level, index = place
    while (level, index ^ 1) in nodes:
        terms = [ours + theirs for ours, theirs in zip(terms, nodes.pop((level, index ^ 1)), strict=True)]
        level, index = level + 1, index // 2
    nodes[level, index] = terms


class Portion:
    """One process's portion of the images, and the passes over it. What is per image is given for the portion."""

    def __init__(self, rank: int, size: int, wire: Wire | None = None) -> None:
        self.rank, self.size = rank, size
        self._wire = wire or Wire(rank, size)
        self._images: Images = torch.zeros(0, 1, 1, 1)
        self._places: dict[int, slice] = {}
        self._responses: dict[int, dict[int, Responses]] = {}
        self._wholes: dict[int, Responses | None] = {}
        self.parts: dict[int, Any] = {}

    def load(self, read: Callable[[Any], Images], source: Any, n: int) -> None:
        """Have the portion of the `n` images that `read(source)` finds, and let go of the rest."""
        images = read(source)
        if len(images) != n:
            raise InputError(f"it found {len(images)} images, process 0 {n}: give all machines the same data")
        self.keep(images)
        if isinstance(self._images, Tensor):
            self._images = self._images.clone()

    def keep(self, images: Images) -> None:
        """Have the portion of these images, which are all."""
        places = segments(len(images))
        own = portion(len(places), self.rank, self.size)
        whole = images_of(places, own)
        self._images = images.narrow(0, whole.start, whole.stop - whole.start)
        self._places = {i: slice(places[i].start - whole.start, places[i].stop - whole.start) for i in own}

    def transform(self, work: Callable[[Images, Any], Images], source: Any) -> None:
        """Have `work(images, source)` in the place of the images; responses that were made stay those to the old."""
        if len(self._images):
            self._images = work(self._images, source)

    def some(self, where: slice) -> Tensor:
        """Some of the images, as far as there are that many."""
        return self._images[where]

    def build(
        self,
        keys: Collection[int],
        embedding: PatchEmbedding,
        pooling: Pooling | None,
        options: dict[str, Any],
        mirrored: bool = False,
    ) -> None:
        """Make these responses under the last of `keys`, the only ones that are still in use.

        With `mirrored` they are those to the mirror images, which take as much memory again.
        """
        *kept, key = keys
        images = self._images = self._images.to(options["device"])
        if mirrored:
            images = embedding.spec.mirrored(images[:])
        self._responses = {old: self._responses[old] for old in kept}
        self._wholes = {old: self._wholes[old] for old in kept}
        made: dict[int, Responses] = {}
        for i, part in self._parts(images).items():
            # One map for all segments, each in its turn: with maps of its own each would have its own scratch memory.
            first = next(iter(made.values()), None)
            made[i] = first.to(images=part) if first is not None else Responses(part, embedding, pooling, **options)
        self._responses[key] = made
        self._wholes[key] = next((responses.to(images=images) for responses in made.values()), None)

    def _parts(self, images: Images) -> dict[int, Images]:
        """The images of each segment."""
        return {i: images.narrow(0, where.start, where.stop - where.start) for i, where in self._places.items()}

    def moment(self, spec: PatchSpec, about: Tensor, weights: Tensor | None = None) -> Found:
        """The sum over the images of the second moment of their patches, `about` a point, times their `weights`."""
        nodes: Nodes = {}
        for i, part in self._parts(self._images).items():
            own = None if weights is None else weights[self._places[i]]
            count = len(part) if own is None else own.sum()
            add(nodes, (0, i), [shifted_moment(part, spec, about, weights=own) * count])
        return nodes, []

    def run(
        self,
        keys: Sequence[int],
        wanted: Pass,
        common: Sequence[Any],
        seconds: float,
        rows: Sequence[Tensor],
        where: Tensor | None = None,
    ) -> Found:
        """A pass over the responses of `keys`, for so many seconds at most; of the images `where` alone if it is given.

        Segment by segment, or at one go where sums need not be exact.

        Raises
        ------
        OutOfTime
            When the seconds are over before.
        """
        deadline = Deadline(clock() + seconds)
        nodes: Nodes = {}
        others: list[list[Tensor]] = []
        for place, streams, own in self._streams(keys, wanted, where):
            timely = [stream.until(deadline) for stream in streams]
            results = wanted.of(timely, *(row[own] for row in rows), *common)
            if wanted.exact:  # what is summed where it lies stays there
                results = [result.cpu() for result in results]
            add(nodes, (0, place), wanted.select(results, summed=True))
            others.append([part.cpu() for part in wanted.select(results, summed=False)])
        return nodes, others

    def _streams(
        self, keys: Sequence[int], wanted: Pass, where: Tensor | None
    ) -> Iterator[tuple[int, list[Responses], slice]]:
        """What a pass runs over one after the other: place, responses, and which of the rows belong to them."""
        if wanted.exact:
            for i, own in self._places.items():
                yield i, [self._responses[key][i] for key in keys], own
            return
        wholes = [whole for key in keys if (whole := self._wholes[key]) is not None]
        if wholes and (where is None or len(where)):
            yield self.rank, [whole.at(where) for whole in wholes], slice(None)

    def take_part(
        self,
        keys: Collection[int],
        make: Callable[..., Any],
        streams: Sequence[int],
        common: Sequence[Any],
        seconds: float,
        rows: Sequence[Tensor],
    ) -> None:
        """Have `make(wire, streams, *rows, *common)` under the last of `keys`, the only ones that are still in use.

        That is this process's part of something of which all have a part. There are no streams where it has no images.
        """
        self.let_go(keys)
        deadline = Deadline(clock() + seconds)
        wholes = [whole.until(deadline) for key in streams if (whole := self._wholes[key]) is not None]
        *_, key = keys
        self.parts[key] = make(self._wire, wholes, *rows, *common)

    def let_go(self, keys: Collection[int]) -> None:
        """Of all `parts` keep those under `keys`."""
        self.parts = {key: part for key, part in self.parts.items() if key in keys}

    def ask(self, key: int, name: str, common: Sequence[Any], all_answer: bool) -> Any:
        """What the method `name` of a part gives; all processes call it, and may talk to each other in it.

        Unless `all_answer` the others do not send what they have: the first one's is the result.
        """
        found = getattr(self.parts[key], name)(*common)
        return found if all_answer or self.rank == 0 else None

    def apply(self, work: Callable[..., Tensor], common: Sequence[Any], items: Sequence[Tensor]) -> list[Tensor]:
        """`work` on each of some items, which have nothing to do with the images."""
        return [work(item, *common) for item in items]
