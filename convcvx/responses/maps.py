"""Patches in the coordinates of the filters: where these are few, passes over the patches cost a fraction.

A kernel is a filter times the basis of the embedding, so a response is a product of h entries. Of patches that are
multiplied with the basis, once, it is one of r: those of an image are a map of r channels, whose 1x1 patches they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from convcvx.data.images import Images
from convcvx.patches import PatchEmbedding, PatchSpec

POINTS = PatchSpec((1, 1))
"""The patches of a map."""
FEWER = 2
"""Times as many entries as a filter has coordinates a patch must have at least: else products cost as much."""
LARGEST = 1
"""Numbers of a map for each pixel of its image at most. The passes of a training hold the maps once, and its
mini-batches once more."""
Pixels = Callable[[Tensor], Tensor]
"""Image indices (b,), on the CPU, to pixels (b, C, H, W)."""


class Maps:
    """The maps (n, r, rows, columns) of some images, each made when a pass first comes to it.

    Parameters
    ----------
    embedding : PatchEmbedding
    n : int
    size : (int, int)
        Rows and columns of patch positions.
    dtype : torch.dtype
    device : torch.device
    chunk_bytes : int
        Patches that are unrolled at a time.
    """

    def __init__(
        self,
        embedding: PatchEmbedding,
        n: int,
        size: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        chunk_bytes: int,
    ) -> None:
        self._embedding = embedding
        self._at_once = max(1, chunk_bytes // (embedding.basis.shape[1] * size[0] * size[1] * dtype.itemsize))
        self._maps = torch.empty(n, embedding.dim, *size, dtype=dtype, device=device)
        self._made = torch.zeros(n, dtype=torch.bool)

    @staticmethod
    def suit(embedding: PatchEmbedding, images: Images, size: tuple[int, int], dtype: torch.dtype) -> bool:
        """Whether passes in this arithmetic should go over maps of the images.

        Not in float64, of which proofs know the rounding patch by patch; nor of images that are not held in memory.
        """
        few = FEWER * embedding.dim <= embedding.basis.shape[1]
        small = embedding.dim * size[0] * size[1] <= LARGEST * images.shape[1:].numel()
        return few and small and dtype == torch.float32 and isinstance(images, Tensor)

    def of(self, part: slice, pixels: Pixels) -> Tensor:
        """The maps of a part of the images, of which `pixels` gives those not made yet.

        Threads may ask at once, each for another part.
        """
        self._make(torch.arange(part.start, part.stop), pixels)
        return self._maps[part]

    def at(self, where: Tensor, pixels: Pixels) -> Maps:
        """Those of some of the images (indices), which are made if they are not yet."""
        self._make(where.cpu(), pixels)
        other = self.__class__.__new__(self.__class__)
        other.__dict__ |= self.__dict__ | {"_made": self._made[where.cpu()]}
        other._maps = self._maps[where.to(self._maps.device)]
        return other

    def _make(self, where: Tensor, pixels: Pixels) -> None:
        missing = where[~self._made[where]]
        for chosen in missing.split(self._at_once) if len(missing) else ():
            columns = self._embedding.spec.columns(pixels(chosen))  # (h, b·K)
            products = self._embedding.basis.to(columns) @ columns
            maps = products.view(len(products), len(chosen), *self._maps.shape[2:]).transpose(0, 1)
            self._maps[chosen.to(maps.device)] = maps
            self._made[chosen] = True
