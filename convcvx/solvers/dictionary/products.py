"""One visit to every image for a dictionary: the Gram matrix of the images kept, the responses of those held out.

A pass over the images as `convcvx.responses.table` has them, so that processes share it as they share the images: each
has a Gram matrix of its own images, and these are added. All shift their features alike, by the mean of a few.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from convcvx.machine.watch import watched
from convcvx.problem import Problem
from convcvx.responses.passes import Responses
from convcvx.responses.table import Pass
from convcvx.solvers.dictionary.features import BATCH, Features
from convcvx.solvers.master.gram import Gram


def gather(problem: Problem, features: Features, held: Tensor) -> tuple[Gram, Tensor]:
    """The Gram matrix of the `features` of the images kept, and the features of those `held` out (n,) bool, (q, D).

    Raises
    ------
    OutOfTime
        When the deadline of the problem passes before.
    """
    responses, *beside = features.responses
    shift = None if responses.n_processes == 1 else _mean_of_first(features, held)
    *sums, shift, unseen = responses.run(
        PRODUCTS,
        (problem.targets, problem.shares.counts, held),
        features.filters,
        features.copies > 1,
        problem.intercept,
        shift,
        beside=beside,
    )
    return Gram.of_sums(sums, shift, features.device, centred=problem.intercept), unseen.to(features.device)


def _products(
    streams: Sequence[Responses],
    targets: Tensor,
    counts: Tensor,
    held: Tensor,
    filters: Sequence[Tensor],
    flips: bool,
    centred: bool,
    shift: Tensor | None,
) -> list[Tensor]:
    """The sums and the shift of the Gram matrix, and the features held out."""
    features = Features(streams, filters, flips)
    gram = Gram(features.size, targets.shape[1], features.dtype, features.device, centred=centred, shift=shift)
    alike = bool((counts == 1).all())
    unseen = torch.empty(int(held.sum()), features.size, dtype=features.dtype, device=features.device)
    filled = 0
    batches = watched("features of the images", features.batches(), len(held), size=lambda batch: len(batch[1]))
    for where, block in batches:
        out = held[where]
        gram.add(block[~out], targets[where][~out], None if alike else counts[where][~out])
        unseen[filled : filled + int(out.sum())] = block[out]
        filled += int(out.sum())
    return [*gram.sums, gram.shift, unseen]


def _mean_of_first(features: Features, held: Tensor) -> Tensor:
    """(D,) mean features of the first images kept."""
    first = (~held).nonzero()[:BATCH, 0]
    few = Features([responses.at(first) for responses in features.responses], features.filters, features.copies > 1)
    (block,) = (block for _, block in few.batches())
    return block.mean(dim=0, dtype=torch.float64).cpu()


PRODUCTS = Pass(_products, ("sum",) * 6 + ("same", "cat"), exact=False, several=True)
"""Not exact: a Gram matrix fills the memory, so that none is had of segments of the images."""
