"""Pooled responses straight from the pixels: convolution, activation and pooling in the registers of a CPU.

Nothing is unrolled, and no response but the pooled ones is written to memory. It pays where patches are small, so that
products with them are over before their operands and results have been moved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from convcvx.activations import RELU, Activation
from convcvx.data.images import Images, StreamedImages
from convcvx.patches import PatchSpec
from convcvx.pooling import Line, Pooling, Ranges
from convcvx.responses._fused_kernels import POSITIONS, VECTORS, lanes, pull_back, respond

LARGEST = 256
"""Entries of a patch up to which this is the faster way: with 196 by a half, with 400 matrix products are by a third
(benchmarks/convolutions.py)."""
START = 5
"""What a tile costs beside its positions, in positions: measured with tiles of 1 to 6 positions, 9 to 144 taps."""
DEAREST = 6.5
"""Cost of the tiles over the number of positions, at most: with 6, 3x3 cells two apart, this was still the faster way
(benchmarks/convolutions.py)."""
RANGE = 200.0
"""Largest pixel over the square root of the contrast constant up to which float32 is right to about 1e-5."""


@dataclass(frozen=True)
class _Plan:
    """Where everything lies.

    Tiles belong to parts of the map: its pooling cells, or the smaller rectangles into which these cut each other where
    they overlap, so that no position is visited twice.

    Attributes
    ----------
    taps : (h,) int64
        Where the taps of a position lie in a padded image, from where the position lies.
    tiles : (T, 7) int64
        As `respond` takes them.
    shares : Tensor (P, 1) or, `divided`, (P, S)
        What the sum over each part counts for: in the cell that it is, or in every cell.
    """

    taps: np.ndarray
    tiles: np.ndarray
    shares: Tensor
    divided: bool = False

    @property
    def n_parts(self) -> int:
        return self.shares.shape[1 if self.divided else 0]

    @property
    def visits(self) -> int:
        """Positions of all tiles."""
        return int(self.tiles[:, 3].sum())

    @property
    def cost(self) -> float:
        """Of the pooled responses of one filter to an image, in products with a whole patch."""
        merging = self.shares.numel() / len(self.taps) if self.divided else 0.0
        return self.visits + START * len(self.tiles) + merging

    def merged(self, parts: Tensor) -> Tensor:
        """(b, S, m) of the parts to (b, P, m) of the cells."""
        shares = self.shares.to(parts)
        return shares @ parts if self.divided else parts * shares

    def spread(self, cells: Tensor) -> Tensor:
        """Slopes (b, P, m) in the cells to those (b, S, m) in the parts."""
        shares = self.shares.to(cells)
        return shares.T @ cells if self.divided else cells * shares


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
        self._plan = _plan(spec, ranges, shape, pooling.maximum)
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
        return _plan(spec, ranges, shape, pooling.maximum).cost <= DEAREST * height * width

    @classmethod
    def is_exact(cls, spec: PatchSpec, images: Images) -> bool:
        """Whether the contrast of patches is right to rounding: their mean is taken off the kernels, not off them."""
        if spec.contrast is None:
            return True
        bounds = () if isinstance(images, StreamedImages) else images.aminmax()  # what is streamed lies in [0, 1]
        largest = max([1.0, *(abs(float(bound)) for bound in bounds)])
        return largest <= RANGE * math.sqrt(spec.contrast)

    @staticmethod
    def contrast_error(size: int, brightness: float) -> float:
        """By how much a patch of `size` pixels and contrast 1 may be scaled too much or too little in float64, in ε.

        With pixels up to M, `brightness` M² / contrast: mean square and squared mean are sums of s terms, off by
        (s + 3)ε M² and (2s + 5)ε M², and their difference rounds; the scale is a root of it and the contrast.
        """
        return (1.5 * size + 5) * brightness + 7

    def bytes_per_image(self, m: int) -> int:
        """Memory in flight for `m` filters."""
        return m * (self._plan.visits // 8 + 2 * self._plan.n_parts * self._dtype.itemsize)

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
        pooled = torch.full((len(pixels), plan.n_parts, blocks, self._width), lowest, dtype=self._dtype)
        how = kept, self._below, self._maximum
        respond(pixels, plan.taps, plan.tiles, weights.numpy(), scales, pooled.numpy(), signs, *how)
        return plan.merged(pooled.flatten(2)[..., :m])

    def _pull_back(self, pixels: np.ndarray, scales: np.ndarray | None, slopes: Tensor, signs: np.ndarray) -> Tensor:
        plan, m, blocks = self._plan, slopes.shape[-1], signs.shape[1]
        padded = torch.zeros(len(slopes), plan.n_parts, blocks, self._width, dtype=self._dtype)
        padded.flatten(2)[..., :m] = plan.spread(slopes)
        gradient = torch.zeros(blocks, len(plan.taps) + 1, self._width, dtype=self._dtype)
        how = self._below, self._maximum
        pull_back(pixels, plan.taps, plan.tiles, gradient.numpy(), scales, padded.numpy(), signs, *how)
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
def _plan(spec: PatchSpec, ranges: Ranges, shape: tuple[int, int, int], maximum: bool) -> _Plan:
    """The cheaper of two: tiles of the cells, or, of averages, of the parts into which cells cut each other."""
    sizes = torch.kron(*(_lengths(line) for line in ranges))
    means = (torch.ones_like(sizes) if maximum else 1 / sizes)[:, None]
    whole = _Plan(*_tiles(spec, shape, ranges), means)
    parts = _cut(ranges[0]), _cut(ranges[1])
    if maximum or parts == ranges:
        return whole
    inside = torch.kron(*(_inside(line, cut) for line, cut in zip(ranges, parts, strict=True)))
    return min(whole, _Plan(*_tiles(spec, shape, parts), means * inside, divided=True), key=lambda plan: plan.cost)


def _tiles(spec: PatchSpec, shape: tuple[int, int, int], parts: Ranges) -> tuple[np.ndarray, np.ndarray]:
    """Taps, and the tiles of every part: its rows or its columns, in pieces of about equal length."""
    channels, height, width = shape[0], shape[1] + 2 * spec.padding[0], shape[2] + 2 * spec.padding[1]
    place = np.arange(channels * height * width).reshape(channels, height, width)
    (down, along), (tall, wide) = spec.dilation, spec.span
    first = place[0, :: spec.stride[0], :: spec.stride[1]]
    columns = spec.output_size(*shape[1:])[1]
    right, below = (spec.stride[1], 1), (spec.stride[0] * width, columns)  # steps in place and in number
    tiles: list[tuple[int, ...]] = []
    before = 0
    for part, ((top, bottom), (start, stop)) in enumerate(product(*parts)):
        across = (bottom - top) * len(_pieces(start, stop)) <= (stop - start) * len(_pieces(top, bottom))
        if across:
            places = [(row, begin, end - begin) for row in range(top, bottom) for begin, end in _pieces(start, stop)]
        else:
            places = [(begin, col, end - begin) for col in range(start, stop) for begin, end in _pieces(top, bottom)]
        for row, column, length in places:
            steps = right if across else below
            tiles.append((part, first[row, column], row * columns + column, length, before, *steps))
            before += length
    return place[:, :tall:down, :wide:along].flatten(), np.array(tiles)


def _pieces(start: int, stop: int) -> list[tuple[int, int]]:
    """A range in as few of about equal length as fit into tiles."""
    count = -(-(stop - start) // POSITIONS)
    return list(pairwise(start + piece * (stop - start) // count for piece in range(count + 1)))


def _lengths(line: Line) -> Tensor:
    return torch.tensor([stop - start for start, stop in line], dtype=torch.float64)


def _cut(line: Line) -> Line:
    """Ranges cut where one of them begins or ends: none overlaps another."""
    edges = sorted({edge for span in line for edge in span})
    return tuple(piece for piece in pairwise(edges) if _inside(line, (piece,)).any())


def _inside(line: Line, parts: Line) -> Tensor:
    """(ranges, parts) 1 where a part lies in a range, else 0."""
    return torch.tensor([[float(start <= a and b <= stop) for a, b in parts] for start, stop in line]).double()
