"""The columns of the regression over dictionaries of filters: pooled responses, streamed over the images.

With flips each image stands for itself and its mirror image. The dictionary is closed under mirroring: then the
optimum can be taken symmetric, a mirrored filter having the mirrored weights, because the objective is convex and
mirroring does not change it. Such a network says the same of an image and of its mirror image, so that the sums of
each filter's responses and its mirror's over the images as they are carry the whole problem: twice the images for
half the features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from convcvx.errors import InputError
from convcvx.responses import Responses

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
    size, n_groups, copies : int
        D features in all, in so many groups, each for so many filters.
    group : Tensor (D,) int64
        The group of each feature.
    dtype : torch.dtype
        The least precise of the responses'.

    Raises
    ------
    InputError
        For flips of images whose patches or pooling cells are not placed symmetrically.
    """

    def __init__(self, responses: Sequence[Responses], filters: Sequence[Tensor], flips: bool) -> None:
        self.copies = 2 if flips else 1
        self._parts = list(zip(responses, filters, strict=True))
        if flips:
            for part in responses:
                _check_symmetry(part)
        counts = [len(part) // self.copies for part in filters]
        cells = torch.tensor([r.n_cells for r, count in zip(responses, counts, strict=True) for _ in range(count)])
        self.n_groups = len(cells)
        self.group = torch.arange(self.n_groups).repeat_interleave(cells)
        self.size = len(self.group)
        self.dtype = min((r.dtype for r in responses), key=lambda dtype: dtype.itemsize)

    def batches(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (images, features (b, D)) until all images are through, `BATCH` at a time."""
        streams = [
            responses.blocks(filters, BATCH * len(filters) * responses.n_cells * responses.dtype.itemsize)
            for responses, filters in self._parts
        ]
        for blocks in zip(*streams, strict=True):
            folded = [
                self._fold(block, r).to(self.dtype) for (_, block), (r, _) in zip(blocks, self._parts, strict=True)
            ]
            yield blocks[0][0], torch.cat(folded, dim=1).cpu() if len(folded) > 1 else folded[0].cpu()

    def _fold(self, block: Tensor, responses: Responses) -> Tensor:
        if self.copies == 1:
            return block.flatten(1)
        first, second = block.split(block.shape[1] // 2, dim=1)
        return (first + _mirror(second, 2, responses)).flatten(1)

    def weights(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """W (D, c) to the weights (m, P, c) of each dictionary's filters."""
        out, first = [], 0
        for responses, filters in self._parts:
            size = len(filters) // self.copies * responses.n_cells
            weights = matrix[first : first + size].unflatten(0, (-1, responses.n_cells))
            out.append(torch.cat([weights, _mirror(weights, 1, responses)]) if self.copies == 2 else weights)
            first += size
        return tuple(out)


def _mirror(pooled: Tensor, cells: int, responses: Responses) -> Tensor:
    """Flip the axis `cells` of P pooling cells left to right."""
    grid = responses.pooling.output_size(*responses.map_size)
    return pooled.unflatten(cells, grid).flip(cells + 1).flatten(cells, cells + 1)


def _check_symmetry(responses: Responses) -> None:
    spec, width, grid = responses.embedding.spec, responses.images.shape[3], responses.map_size
    left = (width + 2 * spec.padding[1] - spec.kernel_size[1]) % spec.stride[1]
    pool = responses.pooling.matrix(*grid)
    symmetric = pool is None
    if pool is not None:
        mirrored = pool.view(*responses.pooling.output_size(*grid), *grid).flip(1, 3).reshape(pool.shape)
        symmetric = torch.allclose(mirrored, pool)
    if left or not symmetric:
        raise InputError(
            "flips need patches and pooling cells that lie symmetrically in the image; change stride, padding or "
            "pool, or train without flips"
        )
