"""Images that stay in their file: read and converted a chunk at a time, for data larger than memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from convcvx.data.arrays import aligned, as_tensor
from convcvx.errors import DataError, InputError


class StreamedImages:
    """Pixels on a memory map, used as the (n, C, H, W) float32 tensor in [0, 1] that they stand for.

    It offers what convcvx asks of such a tensor: `images[where]` reads these images and gives a tensor; `len`,
    `shape`, `split`, `narrow`, `to`, `clamp` and `aminmax` are those of torch. Nothing else touches the file.

    Parameters
    ----------
    pixels : ndarray (n, H, W, C)
        uint8, or float in [0, 1]; usually of `numpy.load(file, mmap_mode="r")`.
    device : str or torch.device
        Where the tensors go. Pixels travel as they are stored.
    bounds : (float, float), optional
        Pixels below or above are set to these as they are read.
    """

    dtype = torch.float32
    ndim = 4

    def __init__(
        self, pixels: np.ndarray, device: str | torch.device = "cpu", bounds: tuple[float, float] | None = None
    ) -> None:
        self._pixels, self.device, self._bounds = pixels, torch.device(device), bounds

    def __len__(self) -> int:
        return len(self._pixels)

    @property
    def shape(self) -> torch.Size:
        n, height, width, channels = self._pixels.shape
        return torch.Size((n, channels, height, width))

    def numel(self) -> int:
        return self._pixels.size

    def __getitem__(self, where: slice | Tensor) -> Tensor:
        index = where.cpu().numpy() if isinstance(where, Tensor) else where
        images = to_floats(np.array(self._pixels[index]), self.device)
        return images if self._bounds is None else images.clamp_(*self._bounds)

    def split(self, size: int) -> Iterator[Tensor]:
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def narrow(self, dim: int, start: int, length: int) -> StreamedImages:
        """Images `start` to `start + length`; `dim` is 0. Reads nothing."""
        assert dim == 0
        return StreamedImages(self._pixels[start : start + length], self.device, self._bounds)

    def to(self, device: str | torch.device) -> StreamedImages:
        """The same images, for another device. Reads nothing."""
        return StreamedImages(self._pixels, device, self._bounds)

    def clamp(self, low: float, high: float) -> StreamedImages:
        """The same images, with pixels in [low, high]. Reads nothing."""
        return StreamedImages(self._pixels, self.device, (low, high))

    def aminmax(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value, NaN if there is one; for uint8 the bounds of the format, without a look."""
        if self._pixels.dtype == np.uint8:
            return torch.tensor(0.0), torch.tensor(1.0)
        bounds = torch.stack([torch.stack(part.aminmax()) for part in self.split(1024)])
        return bounds[:, 0].amin(), bounds[:, 1].amax()


Images: TypeAlias = Tensor | StreamedImages
"""(n, C, H, W) images in memory or in a file."""


def to_floats(pixels: np.ndarray, device: str | torch.device = "cpu") -> Tensor:
    """NHWC uint8, or float in [0, 1], to NCHW float32 in one copy; raise `DataError` for what float32 does not hold."""
    whole = torch.from_numpy(pixels if pixels.dtype == np.uint8 else _as_float32(pixels))
    images = rearrange(whole.to(device), "n h w c -> n c h w")
    images = images.to(torch.float32, memory_format=torch.contiguous_format)
    return images.div_(255) if pixels.dtype == np.uint8 else aligned(images)


def _as_float32(pixels: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # told of below
        floats = pixels.astype(np.float32, copy=False)
    if floats is not pixels and not np.isfinite(floats).all() and np.isfinite(pixels).all():
        largest = float(np.abs(pixels).max())
        raise DataError(f"images have pixels of up to {largest:.3g}, too large for float32: divide them by that")
    return floats


def read_images(images: Images | np.ndarray) -> Images:
    """Images as (n, C, H, W), from a tensor or an array of this shape, or (n, H, W) of one channel.

    Raises
    ------
    InputError
        For anything else, an empty set, NaN or infinity.

    Warns
    -----
    UserWarning
        When images are uint8: networks mostly take [0, 1].
    """
    read: Images = images if isinstance(images, StreamedImages) else as_tensor("images", images)
    if isinstance(read, Tensor) and read.ndim == 3:
        read = read[:, None]
    if read.ndim != 4 or 0 in read.shape:
        raise InputError(f"images must be a non-empty (n, C, H, W) or (n, H, W) array; got shape {tuple(read.shape)}")
    if not all(bool(bound.isfinite()) for bound in read.aminmax()):
        raise InputError("images must be finite; found NaN or infinity; drop or mend them")
    if read.dtype == torch.uint8:
        warnings.warn(
            "images are uint8 and taken as 0 to 255; divide them by 255 for a network that takes [0, 1]", stacklevel=3
        )
    return read
