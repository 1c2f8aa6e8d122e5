"""From any image to what a network takes: the transforms that come with its weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from convcvx.data.form import COLOUR, GREY, ImageForm
from convcvx.data.image_files import decoded
from convcvx.data.images import to_floats
from convcvx.errors import InputError, shown


class ImageTransform:
    """Resizes images, as a data set loaded with `resize` and `channels` has them, and makes floats in [0, 1] of them.

    Parameters
    ----------
    image_shape : (int, int, int)
        Channels, rows and columns of the images that the network takes.

    Examples
    --------
    >>> ImageTransform((1, 8, 8))(Image.new("RGB", (40, 30), "white")).shape
    torch.Size([1, 8, 8])
    >>> ImageTransform((1, 8, 8))
    ImageTransform: float32 (n, 1, 8, 8) in [0, 1]: grey, resized to 8x8 (bilinear, stretched)
    """

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        self.image_shape = image_shape
        channels, *size = image_shape
        self._form = ImageForm((size[0], size[1]), channels if channels in (GREY, COLOUR) else None)

    def __call__(self, images: Any) -> Tensor:
        """One image (C, H, W) or a batch (n, C, H, W), float32.

        Parameters
        ----------
        images : PIL image; Tensor (C, H, W) or (n, C, H, W)
            uint8, or float in [0, 1].

        Raises
        ------
        InputError
            For anything else, and channels that cannot be had from these.
        """
        if isinstance(images, Image.Image):
            return self._made(decoded(images, self._form.channels)[None])[0]
        if not isinstance(images, Tensor) or images.ndim not in (3, 4) or 0 in images.shape:
            kind = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise InputError(f"images must be (n, C, H, W), (C, H, W) or one of Pillow's; got {shown(kind)}")
        if tuple(images.shape[-3:]) == self.image_shape:
            return images.float() / 255 if images.dtype == torch.uint8 else images.float()
        batch = images.detach().cpu() if images.ndim == 4 else images.detach().cpu()[None]
        batch = batch if batch.dtype == torch.uint8 else batch.float()
        made = self._made(rearrange(batch, "n c h w -> n h w c").numpy()).to(images.device)
        return made if images.ndim == 4 else made[0]

    def _made(self, pixels: np.ndarray) -> Tensor:
        """Of images (n, H, W, C)."""
        made = to_floats(np.require(self._form.array(pixels), requirements="W"))  # torch warns of others
        if tuple(made.shape[1:]) != self.image_shape:
            raise InputError(f"images must be {self.image_shape}, or of other sizes; got {pixels.shape[3]} channels")
        return made

    @property
    def description(self) -> str:
        """What it makes of images, in words."""
        channels, height, width = self.image_shape
        colour = {GREY: "grey, ", COLOUR: "RGB, "}.get(channels, "")
        how = f"{colour}resized to {height}x{width} (bilinear, stretched)"
        return f"float32 (n, {channels}, {height}, {width}) in [0, 1]: {how}"

    def __repr__(self) -> str:
        return f"ImageTransform: {self.description}"
