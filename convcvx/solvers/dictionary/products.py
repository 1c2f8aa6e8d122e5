"""One visit to every image for a dictionary: the Gram matrix of the images kept, the responses of those held out.

One process has all of both. Of several each has some rows of the Gram matrix (`GramBlocks`), and the responses of those
of its own images that are held out. With an intercept all shift their features alike, by the mean of a few.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from convcvx.losses.base import Loss
from convcvx.machine.watch import watched
from convcvx.machine.wire import Wire
from convcvx.problem import Problem
from convcvx.responses.passes import Responses
from convcvx.responses.team import ShardedResponses
from convcvx.solvers.dictionary.features import BATCH, Features
from convcvx.solvers.dictionary.kept import KeptFeatures, SharedVisits, Visits
from convcvx.solvers.master.blocks import GramBlocks
from convcvx.solvers.master.gram import Gram

SHIFT_SAMPLE = 64
"""Images by which the mean of the features is told well enough to be taken off before they are multiplied."""
Kept = tuple[Tensor, Tensor, Tensor | None]
"""Features (b, D) of some images, their targets (b, c), and what each counts for if not for one."""
Form = tuple[int, int, torch.dtype, str]
"""Of a Gram matrix: D features, c targets, and the dtype and the kind of device of the products."""
Dictionaries = tuple[type[Features], list[Tensor], bool]
"""The kind of features, the filters of each dictionary, and whether to add each one's responses to those of its mirror
image."""


def gather(problem: Problem, features: Features, held: Tensor) -> Products | SharedProducts:
    """The Gram matrix of the `features` of the images kept, and the features of those `held` out (n,) bool.

    Of `KeptFeatures` every process keeps those of its own images, for more visits: see `visits`.

    Raises
    ------
    OutOfTime
        When the deadline of the problem passes before.
    """
    return (Products if problem.responses.n_processes == 1 else SharedProducts)(problem, features, held)


class Products(Gram):
    """Those of one process.

    Attributes
    ----------
    visits : Visits, optional
        More visits to `KeptFeatures`.
    """

    def __init__(self, problem: Problem, features: Features, held: Tensor) -> None:
        form = features.size, problem.n_outputs, features.dtype, features.device
        super().__init__(*form, centred=problem.intercept)
        self._held_out = _HeldOut(features, problem.targets, problem.shares.counts, held)
        for kept in self._held_out.others(BATCH):
            self.add(*kept)
        self.visits = _visits(features, problem.targets, torch.arange(problem.n))

    def predict(self, matrix: Tensor) -> Tensor:
        """(q, c) what weights `matrix` (D, c) without intercept predict for the images held out."""
        return self._held_out.predict(matrix)

    def join(self) -> None:
        """Add the images held out to the Gram matrix, and let go of their features."""
        for part in self._held_out.taken(len(self._held_out)):
            self.add(*part)


class SharedProducts:
    """Those of several processes, as the leader sees them: the methods are those of `Products`."""

    def __init__(self, problem: Problem, features: Features, held: Tensor) -> None:
        responses, *beside = features.responses
        assert isinstance(responses, ShardedResponses)
        self._blocks = responses.hold(
            _part,
            (problem.targets, problem.shares.counts, held, torch.arange(problem.n)),
            (features.size, problem.n_outputs, features.dtype, features.device.type),
            (type(features), features.filters, features.copies > 1),
            problem.intercept,
            _mean_of_first(features, held) if problem.intercept else torch.zeros(features.size, dtype=torch.float64),
            beside=beside,
        )
        self.visits = SharedVisits(self._blocks) if isinstance(features, KeptFeatures) else None

    @property
    def dtype(self) -> torch.dtype:
        return self._blocks.own.dtype

    @property
    def linear(self) -> Tensor:
        return self._blocks.own.linear

    @property
    def total(self) -> float:
        return self._blocks.own.total

    @property
    def mean(self) -> Tensor:
        return self._blocks.own.mean

    @property
    def scales(self) -> tuple[Tensor, Tensor]:
        return self._blocks.own.scales

    def intercept(self, matrix: Tensor) -> Tensor:
        return self._blocks.own.intercept(matrix)

    def times(self, matrix: Tensor) -> Tensor:
        return self._blocks("times", matrix.cpu())

    def factorise(self, ridges: Tensor) -> None:
        self._blocks("factorise", ridges.cpu())

    def unfactor(self, matrix: Tensor) -> Tensor:
        return self._blocks("unfactor", matrix.cpu())

    def predict(self, matrix: Tensor) -> Tensor:
        return torch.cat(self._blocks.all("predict", matrix.cpu())).to(matrix.device)

    def join(self) -> None:
        self._blocks("join")


class _HeldOut:
    """The features of the images held out, set aside while those of the others are gone through."""

    def __init__(self, features: Features, targets: Tensor, counts: Tensor, held: Tensor) -> None:
        self._features, self._targets, self._held = features, targets, held
        self._counts = None if bool((counts == 1).all()) else counts
        self._unseen = torch.empty(int(held.sum()), features.size, dtype=features.dtype, device=features.device)

    def others(self, batch: int) -> Iterator[Kept]:
        """The images kept, those of `batch` images at a time."""
        held, filled, n = self._held, 0, len(self._held)
        batches = self._features.batches(batch)
        for where, block in watched("features of the images", batches, n, size=lambda part: len(part[1])):
            out = held[where]
            aside = block[out]
            self._unseen[filled : filled + len(aside)] = aside
            filled += len(aside)
            counts = None if self._counts is None else self._counts[where][~out]
            yield block[~out], self._targets[where][~out], counts

    def __len__(self) -> int:
        return len(self._unseen)

    def predict(self, matrix: Tensor) -> Tensor:
        return self._unseen @ matrix.to(self._unseen)

    def taken(self, batch: int) -> Iterator[Kept]:
        """The images held out, `batch` at a time, of which the features are then forgotten."""
        unseen, self._unseen = self._unseen, self._unseen[:0].clone()
        targets, counts = self._targets[self._held], None if self._counts is None else self._counts[self._held]
        for first in range(0, len(unseen), max(1, batch)):
            part = slice(first, first + batch)
            yield unseen[part], targets[part], None if counts is None else counts[part]


class _Part(GramBlocks):
    """One process's part of `SharedProducts`, and of `SharedVisits`; `held_out` is None in one without images."""

    def __init__(
        self, wire: Wire, form: Form, held_out: _HeldOut | None, centred: bool, shift: Tensor, visits: Visits | None
    ) -> None:
        super().__init__(wire, *form, centred=centred, shift=shift)
        self._held_out, self._batch, self._visits = held_out, -(-BATCH // wire.size), visits
        self.add_all(held_out.others(self._batch) if held_out is not None else (), self._batch)

    def predict(self, matrix: Tensor) -> Tensor:
        return self._held_out.predict(matrix).cpu() if self._held_out is not None else matrix[:0]

    def join(self) -> None:
        self.add_all(self._held_out.taken(self._batch) if self._held_out is not None else (), self._batch)

    def apply(self, matrix: Tensor) -> Tensor:
        return self._visits.apply(matrix) if self._visits is not None else matrix.new_zeros(0, matrix.shape[1])

    def bend(self, loss: Loss, predictions: Tensor, shares: Tensor) -> None:
        if self._visits is not None:
            self._visits.bend(loss, predictions, shares)

    def adjoint(self, rows: Tensor) -> Tensor:
        return self._added(None if self._visits is None else self._visits.adjoint(rows), self.size, rows.shape[1])

    def curved(self, direction: Tensor, mean: Tensor) -> Tensor:
        found = None if self._visits is None else self._visits.curved(direction, mean)
        return self._added(found, *direction.shape)

    def _added(self, own: Tensor | None, *shape: int) -> Tensor:
        """The sum over the processes, of which one without images has none of its `own`."""
        nothing = torch.zeros(shape, dtype=torch.float64, device=self._device)
        return self._wire.add_up(nothing if own is None else own)


def _part(
    wire: Wire,
    streams: Sequence[Responses],
    targets: Tensor,
    counts: Tensor,
    held: Tensor,
    images: Tensor,
    form: Form,
    dictionaries: Dictionaries,
    centred: bool,
    shift: Tensor,
) -> _Part:
    if not streams:
        return _Part(wire, form, None, centred, shift, None)
    kind, filters, flips = dictionaries
    features = kind(streams, filters, flips)
    held_out, visits = _HeldOut(features, targets, counts, held), _visits(features, targets, images)
    return _Part(wire, form, held_out, centred, shift, visits)


def _visits(features: Features, targets: Tensor, images: Tensor) -> Visits | None:
    return Visits(features, targets, images) if isinstance(features, KeptFeatures) else None


def _mean_of_first(features: Features, held: Tensor) -> Tensor:
    """(D,) mean features of the first images kept."""
    first = (~held).nonzero()[:SHIFT_SAMPLE, 0]
    few = Features([responses.at(first) for responses in features.responses], features.filters, features.copies > 1)
    (block,) = (block for _, block in few.batches(BATCH))
    return block.mean(dim=0, dtype=torch.float64).cpu()
