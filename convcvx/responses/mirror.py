"""Mirror images: networks whose filters and weights come in pairs that see in an image what its mirror image shows.

Trained on images and their mirror images alike, a network can be taken symmetric: the objective is convex over all
networks, and mirroring does not change it. The second half of the filters of such a network are the mirror images of
the first, with the mirrored weights. It says the same of an image and of its mirror image, so that the images as they
are carry the whole problem, with half of the parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convcvx.errors import InputError
from convcvx.patches import PatchEmbedding
from convcvx.responses.streams import Stream


def mirror(embedding: PatchEmbedding, filters: Tensor) -> Tensor:
    """(m, r) filters that respond to an image as `filters` do to its mirror image, at the mirrored places.

    The embedding must be fitted with `flips`: then mirroring keeps the norm of a filter.
    """
    weight, bias = embedding.kernels(filters)
    return embedding.filters(embedding.spec.mirrored(weight), bias)


class MirrorPairs:
    """The symmetric networks on some images, as their first halves.

    Parameters
    ----------
    responses : Stream
        Of an embedding fitted with `flips`.

    Raises
    ------
    InputError
        Where patches or pooling cells are not placed symmetrically in the image.
    """

    def __init__(self, responses: Stream) -> None:
        _check_symmetry(responses)
        reflection = mirror(responses.embedding, torch.eye(responses.dim, dtype=torch.float64))
        self._reflection = reflection.to(responses.device)
        grid = responses.pooling.output_size(*responses.map_size)
        self._cells = torch.arange(responses.n_cells).view(grid).flip(1).flatten().to(responses.device)

    def filters(self, half: Tensor) -> Tensor:
        """(m/2, r) to (m, r)."""
        return torch.cat([half, half @ self._reflection.to(half)])

    def fold_filters(self, slopes: Tensor) -> Tensor:
        """The adjoint of `filters`: gradients (m, r) in all filters to those (m/2, r) in the first half."""
        first, second = slopes.chunk(2)
        return first + second @ self._reflection.to(slopes).T

    def unfold(self, half: Tensor, dim: int = 0) -> Tensor:
        """The m/2 entries of a filter each along `dim`, P cells along the next, to all m."""
        return torch.cat([half, half.index_select(dim + 1, self._cells.to(half.device))], dim=dim)

    def fold(self, whole: Tensor, dim: int = 0) -> Tensor:
        """The adjoint of `unfold`: what either filter of a pair contributes, the second at its mirrored cells."""
        first, second = whole.chunk(2, dim=dim)
        return first + second.index_select(dim + 1, self._cells.to(whole.device))


def _check_symmetry(responses: Stream) -> None:
    spec, width, grid = responses.embedding.spec, responses.images.shape[3], responses.map_size
    left = (width + 2 * spec.padding[1] - spec.span[1]) % spec.stride[1]
    pool = responses.pooling.cells(*grid)
    symmetric = pool is None
    if pool is not None:
        mirrored = pool.view(*responses.pooling.output_size(*grid), *grid).flip(1, 3).reshape(pool.shape)
        symmetric = torch.allclose(mirrored, pool)
    if left or not symmetric:
        raise InputError(
            "flips need patches and pooling cells that lie symmetrically in the image; change stride, padding or "
            "pool, or train without flips"
        )
