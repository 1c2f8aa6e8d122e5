"""Pooled responses straight from the pixels: convolution, activation and pooling in the registers of a CPU.

Nothing is unrolled, and no response but the pooled ones is written to memory. It pays where patches are small, so that
products with them are over before their operands and results have been moved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from convcvx.activations import RELU, Activation
from convcvx.data.images import Images, StreamedImages
from convcvx.patches import PatchSpec
from convcvx.pooling import Pooling, Ranges
from convcvx.responses._fused_kernels import POSITIONS, VECTORS, lanes, pull_back, respond

LARGEST = 150
"""Entries of a patch up to which this is the faster way; with 196 it was level, with 400 matrix products were faster
(benchmarks/convolutions.py)."""
WASTE = 2.5
"""Positions visited over positions, at most, a position in several cells being visited once for each: at 2.25 this was
still the faster way."""

RANGE = 200.0
"""Largest pixel over the square root of the contrast constant up to which float32 is right to about 1e-5."""


@dataclass(frozen=True)
class _Plan:
    """Where everything lies."""

    taps: np.ndarray
    tiles: np.ndarray
    means: Tensor
    """(P, 1) one over the positions of a cell."""

    @property
    def visits(self) -> int:
        """Positions of all tiles."""
        return int(self.tiles[-1, 3:].sum())


class Fused:
    """Activated and pooled products of patches and kernels, and their adjoint, for images of one shape.

    Parameters
    ----------
    spec : PatchSpec
    pooling : Pooling
        A grid or windows.
    shape : (int, int, int)
        Channels, rows and columns of an image.
    dtype : torch.dtype
        float32 or float64: of the arithmetic.
    activation : Activation
        Of maxima one that does not change the order of responses.
    """

    def __init__(
        self,
        spec: PatchSpec,
        pooling: Pooling,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        activation: Activation = RELU,
    ) -> None:
        self._spec, self._dtype = spec, dtype
        self._maximum = True if pooling.maximum else None
        bent = activation != RELU
        self._below = torch.tensor([activation.slope], dtype=dtype).numpy() if bent and not pooling.maximum else None
        self._largest = activation if bent and pooling.maximum else None  # σ of the maximum is the maximum of σ
        ranges = pooling.ranges(*spec.output_size(*shape[1:]))
        assert ranges is not None
        self._plan = _plan(spec, ranges, shape)
        self._means = torch.ones_like(self._plan.means) if pooling.maximum else self._plan.means
        self._width = VECTORS * lanes(dtype.itemsize)

    @classmethod
    def suits(
        cls,
        spec: PatchSpec,
        pooling: Pooling,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        activation: Activation = RELU,
    ) -> bool:
        """Whether this is the fast way on a CPU."""
        if activation.degree > 1:  # whose slopes are no signs
            return False
        if pooling.maximum and activation.slope < 0:  # whose bits would have to tell a maximum and a sign
            return False
        height, width = spec.output_size(*shape[1:])
        ranges = pooling.ranges(height, width)
        small = shape[0] * math.prod(spec.kernel_size) <= LARGEST
        if ranges is None or not small or dtype not in (torch.float32, torch.float64):
            return False
        if spec.contrast is not None and spec.dilation != (1, 1):  # torch has no averages over such windows
            return False
        return _plan(spec, ranges, shape).visits <= WASTE * height * width

    @classmethod
    def is_exact(cls, spec: PatchSpec, images: Images, dtype: torch.dtype) -> bool:
        """Whether the contrast of patches is right to rounding: their mean is taken off the kernels, not off them."""
        if spec.contrast is None:
            return True
        if dtype == torch.float64:  # which proofs are made in
            return False
        bounds = () if isinstance(images, StreamedImages) else images.aminmax()  # what is streamed lies in [0, 1]
        largest = max([1.0, *(abs(float(bound)) for bound in bounds)])
        return largest <= RANGE * math.sqrt(spec.contrast)

    def bytes_per_image(self, m: int) -> int:
        """Memory in flight for `m` filters."""
        cells = len(self._plan.means)
        return m * (self._plan.visits // 8 + 2 * cells * self._dtype.itemsize)

    def __call__(self, images: Tensor, kernels: Tensor) -> Tensor:
        """(b, C, H, W) images and (m, h) kernels to (b, P, m) pooled responses."""
        unkept = np.empty((1, 1, POSITIONS * VECTORS), dtype=np.uint16)
        pooled = self._respond(*self._pixels(images), kernels, unkept, kept=False)
        return pooled if self._largest is None else pooled * self._gains(pooled)

    def vjp(self, images: Tensor, kernels: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The pooled responses, and the map from slopes (b, P, m) in them to the gradient (h, m) in the kernels."""
        pixels, scales = self._pixels(images)
        blocks = -(-len(kernels) // self._width)
        signs = np.empty((len(images), blocks, self._plan.visits * VECTORS), dtype=np.uint16)
        pooled = self._respond(pixels, scales, kernels, signs, kept=True)
        if self._largest is None:
            return pooled, lambda slopes: self._pull_back(pixels, scales, slopes, signs)
        gains = self._gains(pooled)
        return pooled * gains, lambda slopes: self._pull_back(pixels, scales, slopes * gains, signs)

    def _gains(self, largest: Tensor) -> Tensor:
        """The slopes of the activation at the largest responses of cells."""
        assert self._largest is not None
        return self._largest.slopes_(largest, torch.empty_like(largest))

    def _pixels(self, images: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """Padded images (b, entries), and what the responses of each patch are scaled with, (b, K)."""
        padded = F.pad(images, (*[self._spec.padding[1]] * 2, *[self._spec.padding[0]] * 2))
        scales = None if self._spec.contrast is None else self._scales(padded).to(self._dtype).numpy()
        return padded.to(self._dtype).flatten(1).contiguous().numpy(), scales

    def _respond(
        self, pixels: np.ndarray, scales: np.ndarray | None, kernels: Tensor, signs: np.ndarray, *, kept: bool
    ) -> Tensor:
        plan, m = self._plan, len(kernels)
        blocks = -(-m // self._width)
        weights = torch.zeros(blocks * self._width, len(plan.taps) + 1, dtype=self._dtype)
        weights[:m, : kernels.shape[1]] = self._centred(kernels)
        weights = weights.view(blocks, self._width, -1).transpose(1, 2).contiguous()
        lowest = 0.0 if self._largest is None else -math.inf
        pooled = torch.full((len(pixels), len(plan.means), blocks, self._width), lowest, dtype=self._dtype)
        stride = self._spec.stride[1]
        how = kept, self._below, self._maximum
        respond(pixels, plan.taps, stride, plan.tiles, weights.numpy(), scales, pooled.numpy(), signs, *how)
        return pooled.flatten(2)[..., :m] * self._means.to(self._dtype)

    def _pull_back(self, pixels: np.ndarray, scales: np.ndarray | None, slopes: Tensor, signs: np.ndarray) -> Tensor:
        plan, m, blocks = self._plan, slopes.shape[-1], signs.shape[1]
        padded = torch.zeros(*slopes.shape[:2], blocks, self._width, dtype=self._dtype)
        padded.flatten(2)[..., :m] = slopes * self._means.to(slopes)
        gradient = torch.zeros(blocks, len(plan.taps) + 1, self._width, dtype=self._dtype)
        stride = self._spec.stride[1]
        how = self._below, self._maximum
        pull_back(pixels, plan.taps, stride, plan.tiles, gradient.numpy(), scales, padded.numpy(), signs, *how)
        gradient = gradient.transpose(0, 1).flatten(1)[: len(plan.taps) + self._spec.constant, :m]
        return self._centred(gradient.T).T

    def _centred(self, kernels: Tensor) -> Tensor:
        """(m, h) kernels of zero mean, but for the constant, if patches lose theirs to contrast normalisation."""
        if self._spec.contrast is None:
            return kernels
        size = len(self._plan.taps)
        taps, constant = kernels[:, :size], kernels[:, size:]
        return torch.cat([taps - taps.mean(dim=1, keepdim=True), constant], dim=1)

    def _scales(self, padded: Tensor) -> Tensor:
        """(b, K) one over the deviation of each patch, damped by the contrast constant."""
        assert self._spec.contrast is not None
        # In float64 the variance may be taken as a difference.
        images = padded.double()
        mean, square = (
            F.avg_pool2d(part, self._spec.kernel_size, self._spec.stride).mean(dim=1) for part in (images, images**2)
        )
        return (square - mean**2).clamp_min_(0).add_(self._spec.contrast).rsqrt_().flatten(1)


@lru_cache(maxsize=64)
def _plan(spec: PatchSpec, ranges: Ranges, shape: tuple[int, int, int]) -> _Plan:
    """The tiles of every cell, rows of a cell in pieces of about equal length."""
    channels, height, width = shape[0], shape[1] + 2 * spec.padding[0], shape[2] + 2 * spec.padding[1]
    place = np.arange(channels * height * width).reshape(channels, height, width)
    (down, along), (tall, wide) = spec.dilation, spec.span
    taps = place[:, :tall:down, :wide:along].flatten()
    columns = spec.output_size(*shape[1:])[1]
    rows_of, columns_of = ranges
    tiles: list[tuple[int, ...]] = []
    means: list[float] = []
    before = 0
    for top, bottom in rows_of:
        for left, right in columns_of:
            pieces = -(-(right - left) // POSITIONS)
            edges = [left + piece * (right - left) // pieces for piece in range(pieces + 1)]
            for row in range(top, bottom):
                for start, stop in pairwise(edges):
                    pixel = place[0, row * spec.stride[0], start * spec.stride[1]]
                    tiles.append((len(means), pixel, row * columns + start, stop - start, before))
                    before += stop - start
            means.append(1.0 / ((bottom - top) * (right - left)))
    return _Plan(taps, np.array(tiles), torch.tensor(means, dtype=torch.float64)[:, None])
