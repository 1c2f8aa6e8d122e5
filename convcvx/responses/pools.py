"""Pooling of rectified responses in torch, on any device: averages and maxima, and their adjoints."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from convcvx.pooling import Pooling

PullBack = Callable[[Tensor], Tensor]
"""Slopes (b, P, m) in pooled responses, which are overwritten, to slopes (b, K, m) before rectifying."""


def pool_of(
    pooling: Pooling, height: int, width: int, dtype: torch.dtype, device: torch.device
) -> AveragePool | LargestPool:
    """What pools responses of a height x width map, in this arithmetic on this device."""
    if pooling.maximum:
        return LargestPool(pooling, height, width)
    return AveragePool(pooling, height, width, dtype, device)


class AveragePool:
    """Average pooling of rectified responses of a height x width map, and its adjoint.

    Grids and windows run through torch's own pooling in its channels-last layout, which visits a response once;
    global pooling and matrices are matrix products.

    Parameters
    ----------
    pooling : Pooling
    height, width : int
        Rows and columns of patch positions.
    dtype, device
        Of the responses.
    """

    def __init__(self, pooling: Pooling, height: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        matrix = pooling.matrix(height, width)
        self.n_cells = height * width if matrix is None else len(matrix)
        self._map, self._cells = (height, width), pooling.output_size(height, width)
        self._kind, self._size, self._stride = pooling.kind, pooling.size, pooling.stride
        if pooling.kind == "grid" and height % pooling.size[0] == 0 and width % pooling.size[1] == 0:
            self._kind = "window"
            self._size = self._stride = height // pooling.size[0], width // pooling.size[1]
        if matrix is None or (len(matrix) == height * width and torch.equal(matrix, torch.eye(len(matrix)).double())):
            self._kind = "none"
        elif self.n_cells == 1:
            self._kind = "matrix"
        self._matrix = matrix.to(device, dtype) if matrix is not None and self._kind == "matrix" else None

    def __call__(self, active: Tensor) -> Tensor:
        """(b, K, m) responses to (b, P, m)."""
        if self._kind == "none":
            return active
        if self._matrix is not None:
            return self._matrix @ active
        maps = _maps(active, self._map)
        if self._kind == "grid":
            return _flat(F.adaptive_avg_pool2d(maps, self._size))
        return _flat(F.avg_pool2d(maps, self._size, self._stride))

    def vjp(self, active: Tensor) -> tuple[Tensor, PullBack]:
        """The pooled responses, and their adjoint, which writes into `active`."""
        return self(active), lambda slopes: self._pullback_(slopes, active)

    def _pullback_(self, slopes: Tensor, active: Tensor) -> Tensor:
        """Slopes (b, P, m) in the pooled responses to slopes (b, K, m) before rectifying, in place of `active`."""
        if self._kind == "window" and self._tiles:
            cells = slopes.mul_(1.0 / (self._size[0] * self._size[1]))
            cells = cells.view(len(cells), self._cells[0], 1, self._cells[1], 1, -1)
            tiles = active.view(len(cells), self._cells[0], self._size[0], self._cells[1], self._size[1], -1)
            _mask_(cells.expand_as(tiles), tiles)
            return active
        return _mask_(self._spread(slopes, active), active)

    @property
    def _tiles(self) -> bool:
        """Whether every position lies in exactly one window."""
        whole = tuple(size * count for size, count in zip(self._size, self._cells, strict=True))
        return self._size == self._stride and whole == self._map

    def _spread(self, slopes: Tensor, active: Tensor) -> Tensor:
        """(b, P, m) to (b, K, m), the adjoint of pooling alone."""
        if self._kind == "none":
            return slopes
        if self._matrix is not None:
            return self._matrix.T @ slopes
        maps, cells = _maps(active, self._map), _maps(slopes, self._cells)
        if self._kind == "grid":
            return _flat(torch.ops.aten._adaptive_avg_pool2d_backward(cells, maps))
        return _flat(
            torch.ops.aten.avg_pool2d_backward(cells, maps, self._size, self._stride, (0, 0), False, True, None)
        )


class LargestPool:
    """The maximum of rectified responses over each cell of a height x width map, and its adjoint.

    By torch's own pooling in its channels-last layout, which says where the maximum is: there its slope goes. Where
    several positions share it this is one of them, and the slope one of the subgradients.

    Parameters
    ----------
    pooling : Pooling
        A grid or windows, with `maximum`.
    height, width : int
        Rows and columns of patch positions.
    """

    def __init__(self, pooling: Pooling, height: int, width: int) -> None:
        self._map, self._size, self._stride = (height, width), pooling.size, pooling.stride
        self.n_cells = math.prod(pooling.output_size(height, width))
        self._adaptive = pooling.kind == "grid"
        self._whole = self._adaptive and pooling.size == (1, 1)  # a single window need not cover the map
        if self._adaptive and height % pooling.size[0] == 0 and width % pooling.size[1] == 0:
            self._adaptive = False
            self._size = self._stride = height // pooling.size[0], width // pooling.size[1]
        self._overlapping = self._adaptive or any(
            stride < size for stride, size in zip(self._stride, self._size, strict=True)
        )

    def __call__(self, active: Tensor) -> Tensor:
        """(b, K, m) responses to (b, P, m)."""
        return self._where(active)[0]

    def vjp(self, active: Tensor) -> tuple[Tensor, PullBack]:
        """The pooled responses, and their adjoint, which writes into `active`."""
        pooled, places = self._where(active)
        silent = pooled <= 0  # whose slope before rectifying is 0

        def pull_back(slopes: Tensor) -> Tensor:
            slopes.masked_fill_(silent, 0.0)
            active.zero_()
            return active.scatter_add_(1, places, slopes) if self._overlapping else active.scatter_(1, places, slopes)

        return pooled, pull_back

    def _where(self, active: Tensor) -> tuple[Tensor, Tensor]:
        """The pooled responses (b, P, m), and at which of the K positions they are."""
        if self._whole:
            values, places = active.max(dim=1, keepdim=True)
            return values, places
        maps = _maps(active, self._map)
        if self._adaptive:
            values, places = F.adaptive_max_pool2d(maps, self._size, return_indices=True)
        else:
            values, places = F.max_pool2d(maps, self._size, self._stride, return_indices=True)
        return _flat(values), _flat(places)


def _maps(rows: Tensor, size: tuple[int, int]) -> Tensor:
    """(b, K, m) as (b, m, height, width), channels last in memory."""
    return rows.unflatten(1, size).permute(0, 3, 1, 2)


def _flat(maps: Tensor) -> Tensor:
    return maps.permute(0, 2, 3, 1).flatten(1, 2)


def _mask_(slopes: Tensor, active: Tensor) -> Tensor:
    """`slopes` where `active` is positive, else zero; written into `active`."""
    return torch.ops.aten.threshold_backward.grad_input(slopes, active, 0, grad_input=active)
