"""The form in which a network takes images: rows, columns and channels. What resizes or takes colour away is here.

Pillow resizes, bilinear, over as many pixels as a smaller image has to be the mean of; rows and columns apart, so that
an image of another shape is stretched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from einops import rearrange
from PIL import Image

from convcvx.errors import InputError, shown

if TYPE_CHECKING:
    from convcvx.data.images import Images

GREY = 1
"""Channels of a grey image."""
COLOUR = 3
"""Channels of an image in colour: red, green, blue."""
BILINEAR = Image.Resampling.BILINEAR
"""How images are resized: as torchvision does by default."""
LUMINANCE = np.array([19595, 38470, 7471], np.uint32)
"""What red, green and blue count for in grey, in 1/65536: ITU-R 601-2, as Pillow rounds it."""


@dataclass(frozen=True)
class ImageForm:
    """What images are made to be.

    Parameters
    ----------
    size : (int, int), optional
        Rows and columns; None: as they are, all alike.
    channels : int, optional
        1 (grey) or 3 (colour); None: as they are, colour if one of them has it.

    Raises
    ------
    InputError
        For other numbers of channels.
    """

    size: tuple[int, int] | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        if self.channels not in (None, GREY, COLOUR):
            raise InputError(f"channels must be {GREY} (grey) or {COLOUR} (colour); got {shown(self.channels)}")
        if self.size is not None and min(self.size) < 1:
            raise InputError(f"resize must be at least 1 pixel; got {self.size[0]}x{self.size[1]}")

    @property
    def keeps_all(self) -> bool:
        """Whether images stay as they are."""
        return self.size is None and self.channels is None

    def image(self, pixels: np.ndarray) -> np.ndarray:
        """One image (H, W, C), uint8 or float, in this form."""
        if self.channels is not None:
            pixels = _with_channels(pixels, self.channels)
        if self.size is None or pixels.shape[:2] == self.size:
            return pixels
        planes = pixels if pixels.dtype == np.uint8 else pixels.astype(np.float32, copy=False)
        rows, columns = self.size
        return np.stack(
            [
                np.asarray(Image.fromarray(np.ascontiguousarray(planes[..., c])).resize((columns, rows), BILINEAR))
                for c in range(planes.shape[2])
            ],
            axis=-1,
        )

    def array(self, pixels: np.ndarray) -> np.ndarray:
        """Images (n, H, W, C), uint8 or float, in this form, one after the other.

        Raises
        ------
        InputError
            For images that stay on disk.
        """
        as_they_are = self.size in (None, pixels.shape[1:3]) and self.channels in (None, pixels.shape[3])
        if as_they_are or len(pixels) == 0:
            return pixels
        if isinstance(pixels, np.memmap):
            raise InputError("images that stay on disk are read as they are: leave resize and channels out")
        first = self.image(pixels[0])
        made = np.empty((len(pixels), *first.shape), first.dtype)
        for row, image in enumerate(pixels):
            made[row] = self.image(image)
        return made

    def images(self, images: Images) -> Images:
        """Images (n, C, H, W), floats, in this form.

        Raises
        ------
        InputError
            For images that stay on disk.
        """
        from convcvx.data.images import StreamedImages, to_floats  # torch: to name sources of data takes none

        if self.keeps_all:
            return images
        if isinstance(images, StreamedImages):
            raise InputError("images that stay on disk are read as they are: leave resize and channels out")
        return to_floats(self.array(channels_last(images)))


def channels_last(images: Images) -> np.ndarray:
    """(n, C, H, W) tensors as float32 (n, H, W, C)."""
    from torch import Tensor

    assert isinstance(images, Tensor)
    return rearrange(images.detach().cpu().float(), "n c h w -> n h w c").numpy()


def _with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """(H, W, C) as grey or colour."""
    found = pixels.shape[2]
    if found == channels:
        return pixels
    if found == GREY:
        return np.repeat(pixels, channels, axis=2)
    if found != COLOUR:
        raise InputError(f"channels {channels} can be had from images with {GREY} or {COLOUR}; these have {found}")
    return grey(pixels)


def grey(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3), uint8 or float, as (H, W, 1)."""
    if pixels.dtype == np.uint8:
        return ((pixels @ LUMINANCE + (1 << 15)) >> 16).astype(np.uint8)[..., None]
    return (pixels @ (LUMINANCE / (1 << 16))).astype(pixels.dtype)[..., None]


def as_pixels(image: Any) -> np.ndarray:
    """An array or a tensor of one image, (H, W) or (H, W, C), with its axis of channels."""
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels
