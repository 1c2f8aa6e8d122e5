"""Several processes, one solver: the images are shared out, and the passes over them run everywhere.

    torchrun --nproc-per-node 4 -m convcvx.cli train ...

Process 0, the leader, runs solver, oracle and certificate, unchanged; the others, the workers, hold a portion of the
images and wait for passes to make. A pass tells all workers its arguments, every process goes over its own portion,
and the leader puts the results together. There is one solver and one state: nothing can drift apart, and a worker
keeps nothing that a run needs to go on.

Sums over images (Gram matrix, correlations, gradients) are those of `portions`: the same to the last bit however many
processes there are, one included; and so is all that follows from them. Passes that are not `exact` are the exception:
their sums are collectives, right to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from convcvx.budget import NEVER, Deadline
from convcvx.data.images import Images
from convcvx.machine.wire import on_this_machine
from convcvx.patches import Moments, PatchEmbedding, PatchSpec, provisional_mean
from convcvx.pooling import Pooling
from convcvx.responses.passes import Responses
from convcvx.responses.portions import Found, Nodes, add, images_of, portion, segments
from convcvx.responses.processes import Processes
from convcvx.responses.streams import sum_up
from convcvx.responses.table import SLOPES, Pass, Residual

AT_ONCE = 512
"""Images of each process that are brought together at a time."""


class Team(Processes):
    """Processes that share the images, as the leader sees them; one alone by default.

    with Team.of_torchrun() as team:
        team.share_out(images, read, source)
        problem = build_problem(images, ..., embedding=team.fit(images, spec), responses=team.responses)
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        super().__init__(rank, size)
        self._images: Images | None = None
        self._keys = 0
        self._built: WeakValueDictionary[int, Responses] = WeakValueDictionary()
        self._held: WeakValueDictionary[int, Together] = WeakValueDictionary()
        self._made: set[int] = set()

    # -- what a training needs ------------------------------------------------------------------------

    def share_out(self, images: Images, read: Callable[[Any], Images], source: Any) -> None:
        """Give every process its portion of `images`, which a worker gets by `read(source)`; once is enough.

        `read` is a function of a module. Of images on disk a worker touches its portion alone.
        """
        if images is self._images:
            return
        self._portion.keep(images)
        self._run("load", (read, source, len(images)))
        self._images = images

    def transform(self, work: Callable[[Images, Any], Images], source: Any) -> None:
        """Have every process put `work(images, source)`, features of as many images, in the place of its own.

        `work` is a function of a module. Responses that were made before stay those to the images before.
        """
        self.collect("transform", (work, source))

    def gathered(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (images, what the processes have in their place), some of each process at a time."""
        assert self._images is not None
        owned = self._owned(len(self._images))
        for first in range(0, max(own.stop - own.start for own in owned), AT_ONCE):
            for own, part in zip(owned, self.collect("some", (slice(first, first + AT_ONCE),)), strict=True):
                if len(part):
                    yield slice(own.start + first, own.start + first + len(part)), part.cpu()

    def keep(self, images: Images) -> None:
        """Take `images` for what the processes have now."""
        self._portion.keep(images)
        self._images = images

    def fit(self, images: Images, spec: PatchSpec, weights: Tensor | None = None) -> PatchEmbedding:
        """`PatchEmbedding.fit` on the images that were shared out."""
        about, owned = provisional_mean(images, spec), self._owned(len(images))

        def each(rank: int) -> tuple[Any, ...]:
            return (None if weights is None else weights[owned[rank]],)

        (moment,) = _added(self.collect("moment", (spec, about), each))
        count = len(images) if weights is None else weights.sum()
        return PatchEmbedding.of_moments(Moments.about(about, moment / count), images.shape[1], spec)

    def responses(
        self, images: Images, embedding: PatchEmbedding, pooling: Pooling | None = None, **options: Any
    ) -> Responses:
        """The `Responses` on the images that were shared out."""
        if len(segments(len(images))) == 1:
            return Responses(images, embedding, pooling, **options)
        return ShardedResponses(self, images, embedding, pooling, **options)

    # -- passes ---------------------------------------------------------------------------------------

    def build(self, responses: Responses, mirrored: bool = False) -> int:
        """Have every process make these responses on its portion, or on its mirror images.

        Returns the key that passes name them by.
        """
        self._keys += 1
        keys = [*self._built, self._keys]  # those still in use: portions let go of all others
        options = responses.options | {"device": responses.device.type}
        self.collect("build", (keys, responses.embedding, responses.pooling, options, mirrored))
        self._built[self._keys] = responses
        return self._keys

    def hold(
        self,
        make: Callable[..., Any],
        keys: Sequence[int],
        n: int,
        rows: Sequence[Tensor],
        common: Sequence[Any],
        deadline: Deadline = NEVER,
    ) -> Together:
        """What all processes have a part of: each that which `make(wire, responses, *rows, *common)` gives there.

        `make` is a function of a module, and the responses are those of `keys`, which are on `n` images.
        """
        owned = self._owned(n)

        def each(rank: int) -> tuple[Any, ...]:
            return ([row[owned[rank]].cpu() for row in rows],)

        self._keys += 1
        self._made = {*self._held, self._keys}
        given = (list(self._made), make, keys, common, deadline.left)
        self.collect("take_part", given, each, together=True)
        self._held[self._keys] = held = Together(self, self._keys)
        return held

    def ask(self, key: int, name: str, common: Sequence[Any], *, all_answer: bool) -> list[Any]:
        """What the method `name` of each process's part gives; of the leader's alone unless `all_answer`."""
        return self.collect("ask", (key, name, common, all_answer), together=True)

    def part(self, key: int) -> Any:
        """The part of this process."""
        return self._portion.parts[key]

    def _let_go(self) -> None:
        """Have the processes forget the parts of what nobody holds any more: they may fill the memory."""
        if gone := self._made - set(self._held):
            self._made -= gone
            self.collect("let_go", (list(self._made),))

    def owners(self, n: int) -> Tensor:
        """(n,): which process has each of the `n` images."""
        counts = torch.tensor([own.stop - own.start for own in self._owned(n)])
        return torch.arange(self.size).repeat_interleave(counts)

    def apply(self, work: Callable[..., Tensor], items: Sequence[Tensor], common: Sequence[Any]) -> list[Tensor]:
        """`work` on each of `items`; a process has neighbours among them."""

        def each(rank: int) -> tuple[Any, ...]:
            own = portion(len(items), rank, self.size)
            return (items[own.start : own.stop],)

        return [result for found in self.collect("apply", (work, common), each) for result in found]

    def run(
        self,
        keys: Sequence[int],
        n: int,
        wanted: Pass,
        rows: Sequence[Tensor],
        common: Sequence[Any],
        *,
        where: Tensor | None = None,
        deadline: Deadline = NEVER,
    ) -> list[Tensor]:
        """The results of a pass over the responses of `keys`, which are on `n` images; as `Responses.run` does."""
        self._let_go()
        owned = self._owned(n)
        mine: Sequence[slice | Tensor] = owned
        if where is not None:
            mine = [((where >= own.start) & (where < own.stop)).nonzero()[:, 0] for own in owned]

        def each(rank: int) -> tuple[Any, ...]:
            own = None if where is None else where[mine[rank]] - owned[rank].start
            return [row[mine[rank]].cpu() for row in rows], own

        given = [part.cpu() if isinstance(part, Tensor) else part for part in common]
        found: list[Found] = self.collect("run", (keys, wanted, given, deadline.left), each, added=not wanted.exact)
        sums = iter(_added(found) if wanted.exact else _added_in_turn(found))
        others = zip(*(rest for _, parts in found for rest in parts), strict=True)
        order = None if where is None else torch.cat([part for part in mine if isinstance(part, Tensor)]).argsort()
        results: list[Tensor] = []
        for how in wanted.combine:
            if how == "sum":
                results.append(next(sums))
                continue
            parts = next(others)
            whole = torch.cat(parts) if how == "cat" else parts[0]
            results.append(whole[order] if how == "cat" and order is not None else whole)
        return results

    def _owned(self, n: int) -> list[slice]:
        """Which of `n` images each process has."""
        places = segments(n)
        return [images_of(places, portion(len(places), rank, self.size)) for rank in range(self.size)]


class Together:
    """What all processes have a part of, and work on at once; they forget it when this is gone.

    Attributes
    ----------
    own : Any
        The part of this process.
    """

    def __init__(self, team: Team, key: int) -> None:
        self._team, self._key = team, key
        self.own = team.part(key)

    def all(self, name: str, *common: Any) -> list[Any]:
        """What the method `name` of each part gives."""
        return self._team.ask(self._key, name, common, all_answer=True)

    def __call__(self, name: str, *common: Any) -> Any:
        """What it gives in this process."""
        return self._team.ask(self._key, name, common, all_answer=False)[0]


class ShardedResponses(Responses):
    """`Responses` on all images whose passes run in all processes of a team, segment by segment.

    What is not overridden runs in the leader alone and is as right: single rows, samples of images
    (`to(images=...)`), mini-batches among them, and blocks of responses for solvers that want them one by one.
    """

    def __init__(
        self,
        team: Team,
        images: Images,
        embedding: PatchEmbedding,
        pooling: Pooling | None = None,
        *,
        mirrored: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(images, embedding, pooling, **options)
        self._team, self._mirrored = team, mirrored
        self._key = team.build(self, mirrored)

    def to(self, *, images: Images | None = None, **changes: Any) -> Responses:
        """The same map in another arithmetic, sharded; or on other images, in this process."""
        plain = super().to(images=images, **changes)
        if images is not None:
            return plain
        sharded = self._like(plain, self._mirrored)
        sharded.kept = plain.kept
        return sharded.until(self.deadline)

    def mirrored(self) -> Responses:
        """As in `Responses`; of several processes each mirrors its own images."""
        plain = super().mirrored()
        return plain if self.n_processes == 1 else self._like(plain, not self._mirrored).until(self.deadline)

    def _like(self, plain: Responses, mirrored: bool) -> ShardedResponses:
        """The `plain` ones, shared out."""
        how = plain.options | {"mirrored": mirrored}
        return ShardedResponses(self._team, plain.images, plain.embedding, plain.pooling, **how)

    def until(self, deadline: Deadline) -> Responses:
        """As in `Responses`; a pass that has begun is never left, lest the processes fall out of step."""
        other = super().until(deadline)
        other.__dict__["_built"] = self  # while it lives the team keeps the portions
        return other

    @property
    def n_processes(self) -> int:
        return self._team.size

    @property
    def share_here(self) -> float:
        return min(1.0, on_this_machine(self.n_processes) / self.n_processes)

    @property
    def owners(self) -> Tensor:
        return self._team.owners(self.n)

    def run(
        self,
        wanted: Pass,
        rows: Sequence[Tensor],
        *common: Any,
        where: Tensor | None = None,
        beside: Sequence[Responses] = (),
    ) -> list[Tensor]:
        """As in `Responses`."""
        if self.n_processes == 1 and not wanted.exact:
            return super().run(wanted, rows, *common, where=where, beside=beside)
        self.deadline.check()
        keys = [self._key, *(other._key for other in beside if isinstance(other, ShardedResponses))]
        return self._team.run(keys, self.n, wanted, rows, common, where=where, deadline=self.deadline)

    def hold(
        self, make: Callable[..., Any], rows: Sequence[Tensor], *common: Any, beside: Sequence[Responses] = ()
    ) -> Together:
        """`Team.hold` on these responses, and those `beside`; `rows` and `common` as in `run`."""
        self.deadline.check()
        keys = [self._key, *(other._key for other in beside if isinstance(other, ShardedResponses))]
        return self._team.hold(make, keys, self.n, rows, common, self.deadline)

    def apply(self, work: Callable[..., Tensor], items: Sequence[Tensor], *common: Any) -> list[Tensor]:
        """As in `Responses`."""
        return self._team.apply(work, items, common)

    def gradients(
        self, filters: Tensor, weights: Tensor, intercept: Tensor, residual: Residual
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As in `Responses`; `residual` is called once, between a pass forwards and one back."""
        network = filters, weights, intercept
        predictions = self.predict(*network).to(self.device, self.dtype)
        slopes = residual(predictions, torch.arange(self.n, device=self.device))
        kernel, weight, bias = (part.to(self.device) for part in self.run(SLOPES, (slopes,), *network))
        return kernel, weight, bias


def _added(found: Sequence[Found]) -> list[Tensor]:
    """The sums of all segments, pairwise."""
    total: Nodes = {}
    for nodes, _ in found:
        for place, terms in nodes.items():
            add(total, place, terms)
    (root,) = total.values()
    return root


def _added_in_turn(found: Sequence[Found]) -> list[Tensor]:
    """The sums of all processes, one after the other in the place of the first."""
    return sum_up(terms for nodes, _ in found for terms in nodes.values())
