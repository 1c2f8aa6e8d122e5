"""The columns of the regression over dictionaries of filters: pooled responses, streamed over the images.

With flips each image stands for itself and its mirror image, and the dictionary for symmetric networks (`MirrorPairs`):
the sums of each filter's responses and its mirror's are twice the images for half the features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from convcvx.responses.mirror import MirrorPairs
from convcvx.responses.passes import Responses
from convcvx.solvers.smoothed_norms import Groups

BATCH = 1024
"""Images whose features are multiplied at once."""


class Features:
    """The features of one or several dictionaries side by side; a group is what one filter, or a pair, contributes.

    Parameters
    ----------
    responses : sequence of Responses
        To the same images, or to features of them.
    filters : sequence of Tensor (m, r)
    flips : bool
        Add each filter's responses to those of its mirror image, which comes half the filters later.

    Attributes
    ----------
    size, copies : int
        D features in all, in groups each of which is for so many filters.
    groups : Groups
        Of the features.
    responses : list of Responses
    filters : list of Tensor (m, r)
    dtype : torch.dtype
        The least precise of the responses'.
    device : torch.device
        Of the responses, and of everything here.

    Raises
    ------
    InputError
        For flips of images whose patches or pooling cells are not placed symmetrically.
    """

    def __init__(self, responses: Sequence[Responses], filters: Sequence[Tensor], flips: bool) -> None:
        self.copies, self.responses, self.filters = 2 if flips else 1, list(responses), list(filters)
        self._parts = list(zip(responses, filters, strict=True))
        self._pairs = [MirrorPairs(part) if flips else None for part in responses]
        counts = [len(part) // self.copies for part in filters]
        cells = torch.tensor([r.n_cells for r, count in zip(responses, counts, strict=True) for _ in range(count)])
        self.device = responses[0].device
        self.groups, self.size = Groups(cells.to(self.device)), int(cells.sum())
        self.dtype = min((r.dtype for r in responses), key=lambda dtype: dtype.itemsize)

    def batches(self, batch: int = BATCH) -> Iterator[tuple[slice, Tensor]]:
        """Yield (images, features (b, D)) until all images are through, `batch` at a time."""
        streams = [
            responses.blocks(filters, batch * len(filters) * responses.n_cells * responses.dtype.itemsize)
            for responses, filters in self._parts
        ]
        for blocks in zip(*streams, strict=True):
            folded = [
                (block if pairs is None else pairs.fold(block, dim=1)).flatten(1).to(self.dtype)
                for (_, block), pairs in zip(blocks, self._pairs, strict=True)
            ]
            yield blocks[0][0], torch.cat(folded, dim=1) if len(folded) > 1 else folded[0]

    def weights(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """W (D, c) to the weights (m, P, c) of each dictionary's filters, on the CPU as filters are."""
        out, first = [], 0
        for (responses, filters), pairs in zip(self._parts, self._pairs, strict=True):
            size = len(filters) // self.copies * responses.n_cells
            weights = matrix[first : first + size].unflatten(0, (-1, responses.n_cells))
            out.append((weights if pairs is None else pairs.unfold(weights)).cpu())
            first += size
        return tuple(out)
