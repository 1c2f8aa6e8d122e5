"""Patches in the coordinates of the filters: where these are few, passes over the patches cost a fraction.

A kernel is a filter times the basis of the embedding, so a response is a product of h entries. Of patches that are
multiplied with the basis, once, it is one of r: those of an image are a map of r channels, whose 1x1 patches they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from convcvx.data.images import Images
from convcvx.patches import PatchEmbedding, PatchSpec

POINTS = PatchSpec((1, 1))
"""The patches of a map."""
FEWER = 2
"""Times as many entries as a filter has coordinates a patch must have at least: else products cost as much."""
LARGEST = 3
"""Times as much memory as the images the maps may take at most."""


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
    """

    def __init__(
        self, embedding: PatchEmbedding, n: int, size: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._embedding = embedding
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

    def of(self, part: slice, pixels: Any) -> Tensor:
        """The maps of a part of the images, of which `pixels` gives the pixels (b, C, H, W) if they are not made yet.

        Threads may ask at once, each for another part.
        """
        if not bool(self._made[part].all()):
            columns = self._embedding.spec.columns(pixels())  # (h, b·K)
            maps = self._maps[part]
            products = self._embedding.basis.to(columns) @ columns
            maps.copy_(products.view(maps.shape[1], len(maps), *maps.shape[2:]).transpose(0, 1))
            self._made[part] = True
        return self._maps[part]

    def at(self, where: Tensor) -> Maps:
        """Those of some of the images (indices)."""
        other = self.__class__.__new__(self.__class__)
        other._embedding, other._made = self._embedding, self._made[where.cpu()]
        other._maps = self._maps[where.to(self._maps.device)]
        return other
