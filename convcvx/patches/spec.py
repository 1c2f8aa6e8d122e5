"""Images to patch rows.

A patch row is a patch flattened as a `Conv2d` kernel is, (channels, rows, columns), contrast-normalised if asked, with
a constant 1 appended where the model needs one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from convcvx.errors import InputError, check_count, check_positive, is_count

FAINT = 2.0**-511
"""Size up to which the square of a number may underflow in float64: about 1.5e-154."""


def pair(value: Any, name: str, minimum: int = 1) -> tuple[int, int]:
    """Read 3 or (3, 5) as (rows, columns)."""
    numbers = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(numbers) != 2 or not all(is_count(v, minimum) for v in numbers):
        raise InputError(f"{name} must be a whole number >= {minimum}, or a pair of them; got {value!r}")
    return int(numbers[0]), int(numbers[1])


@dataclass(frozen=True)
class PatchSpec:
    """Which patches an image has, and in which space filters act on them.

    Parameters
    ----------
    kernel_size, stride, padding : int or (int, int)
        As in `torch.nn.Conv2d` (zero padding).
    hidden_bias : bool
        Append a constant channel to the patch: a bias that is regularised with the filter.
    contrast : float, optional
        Local contrast normalisation: each patch becomes (x - mean) / sqrt(variance + contrast).
    whiten : float, optional
        ZCA whitening with this epsilon: (x - mean over patches) times (covariance + epsilon)^(-1/2).
    rank : int, optional
        Restrict filters to the first `rank` principal directions of the patches.
    paired : bool
        Mirroring an image also swaps the two halves of its channels, as it does in the features of a stage whose
        filters come in mirror pairs.
    dilation : int or (int, int)
        As in `torch.nn.Conv2d`: pixels from one entry of a patch to the next.
    subspaces : int
        With a `rank` r: each filter lies in one of so many subspaces, of the first r principal directions of the
        patches, of the next r, and so on. A proof costs the sum of what it costs in each, not what it would in all
        directions at once.
    """

    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    hidden_bias: bool = False
    contrast: float | None = None
    whiten: float | None = None
    rank: int | None = None
    paired: bool = False
    dilation: tuple[int, int] = (1, 1)
    subspaces: int = 1

    def __post_init__(self) -> None:
        for name, minimum in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            object.__setattr__(self, name, pair(getattr(self, name), name, minimum))
        for name in ("contrast", "whiten"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        if self.rank is not None:
            check_count("rank", self.rank)
        check_count("subspaces", self.subspaces)
        if self.subspaces > 1 and (self.rank is None or self.hidden_bias):
            instead = "a hidden bias, which is in none of them" if self.hidden_bias else "none"
            raise InputError(
                f"subspaces {self.subspaces} need a rank, which each of them has, and filters without bias; got "
                f"{instead}: pass --rank R, or subspaces 1"
            )

    def __str__(self) -> str:
        """Which patches, and which filters on them, in words: "3x3, padding 1x1", and what else is not the default."""
        said = ["x".join(map(str, self.kernel_size))]
        for name in ("stride", "padding", "dilation"):
            if (own := getattr(self, name)) != getattr(PatchSpec, name):
                said.append(f"{name} {own[0]}x{own[1]}")
        said += [f"{name} {own}" for name in ("contrast", "whiten", "rank") if (own := getattr(self, name)) is not None]
        if self.subspaces > 1:
            said[-1] += f" in each of {self.subspaces} subspaces"
        return ", ".join([*said, "hidden bias"] if self.hidden_bias else said)

    def mirrored(self, kernels: Tensor) -> Tensor:
        """Kernels (..., C, kh, kw) that see in an image what `kernels` see, at the mirrored places, in its mirror."""
        kernels = kernels.flip(-1)
        return kernels.roll(kernels.shape[-3] // 2, dims=-3) if self.paired else kernels

    @property
    def constant(self) -> bool:
        """Whether a constant 1 ends each row: for the hidden bias, or for the mean that whitening subtracts."""
        return self.hidden_bias or self.whiten is not None

    @property
    def span(self) -> tuple[int, int]:
        """Rows and columns of pixels from the first entry of a patch to its last."""
        (tall, wide), (down, along) = self.kernel_size, self.dilation
        return (tall - 1) * down + 1, (wide - 1) * along + 1

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patch positions, as `Conv2d` has them."""
        padded = height + 2 * self.padding[0], width + 2 * self.padding[1]
        if padded[0] < self.span[0] or padded[1] < self.span[1]:
            apart = "" if self.dilation == (1, 1) else f" with dilation {self.dilation[0]}x{self.dilation[1]}"
            raise InputError(
                f"kernel_size {self.kernel_size[0]}x{self.kernel_size[1]}{apart} is larger than the images, "
                f"{height}x{width} with padding {self.padding[0]}x{self.padding[1]}; "
                "use a smaller kernel or more padding"
            )
        return (
            (padded[0] - self.span[0]) // self.stride[0] + 1,
            (padded[1] - self.span[1]) // self.stride[1] + 1,
        )

    def windows(self, images: Tensor) -> Tensor:
        """(b, C, H, W) images to their patches (C, kh, kw, b, rows, columns): without padding a view."""
        if any(self.padding):
            vertical, horizontal = self.padding
            images = F.pad(images, (horizontal, horizontal, vertical, vertical))
        spans = images.unfold(2, self.span[0], self.stride[0]).unfold(3, self.span[1], self.stride[1])
        return spans[..., :: self.dilation[0], :: self.dilation[1]].permute(1, 4, 5, 0, 2, 3)

    def columns(self, images: Tensor) -> Tensor:
        """(b, C, H, W) images to (h, b*K) patches, one a column, K in row-major order, h = C*kh*kw (+1 if `constant`).

        Columns, not rows: neighbouring positions are then neighbours in memory, and unrolling copies whole lines.
        """
        windows = self.windows(images)
        size = windows[..., 0, 0, 0].numel()
        columns = images.new_empty(size + self.constant, windows[0, 0, 0].numel())
        patches = columns[:size]
        if self.contrast is None:
            patches.view(windows.shape).copy_(windows)
        else:
            # From its first pixel on: a patch that is bright and flat would lose its contrast to rounding.
            torch.sub(windows, windows[:1, :1, :1], out=patches.view(windows.shape))
            # Ten times faster than torch.var_mean down the columns, and as exact.
            patches.sub_(patches.mean(dim=0))
            patches.mul_(patches.square().mean(dim=0).add_(self.contrast).rsqrt_())
        if self.constant:
            columns[size] = 1.0
        return columns

    def rows(self, images: Tensor) -> Tensor:
        """(b, C, H, W) images to (b, K, h) patch rows, a view of `columns`."""
        return rearrange(self.columns(images), "h (b k) -> b k h", b=len(images))

    def norms(self, images: Tensor) -> Tensor:
        """(b, C, H, W) images to (b, K) norms of their patches, to rounding; where contrast is normalised, to the
        largest norm that such a patch can have. What squares lose by underflow is added.

        Nothing is unrolled: squares of pixels are summed up along the sides of the windows.
        """
        rows, columns = self.output_size(*images.shape[2:])
        if self.contrast is not None:
            return images.new_full(
                (len(images), rows * columns), math.sqrt(images.shape[1] * math.prod(self.kernel_size))
            )
        largest = images.abs().flatten(1).amax(dim=1).clamp_min(torch.finfo(images.dtype).tiny)
        squares = (images / largest[:, None, None, None]).square().sum(dim=1, keepdim=True)
        vertical, horizontal = self.padding
        squares = F.pad(squares, (horizontal, horizontal, vertical, vertical))
        for axis, (span, stride, step) in enumerate(zip(self.span, self.stride, self.dilation, strict=True)):
            # In float64 a tenth of the time that avg_pool2d takes.
            squares = squares.unfold(2 + axis, span, stride)[..., ::step].sum(dim=-1)
        lost = math.sqrt(images.shape[1] * math.prod(self.kernel_size)) * FAINT
        return (squares.flatten(1).sqrt() + lost) * largest[:, None]
