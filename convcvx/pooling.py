"""Average pooling as a (P, K) matrix over the K patch positions of an image, and as a torch module.

Every solver sees the matrix, every exported network the module; `tests/test_patches.py` holds them equal.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convcvx.data.arrays import as_tensor
from convcvx.errors import InputError, is_count, shown

Line = tuple[tuple[int, int], ...]
"""Half-open ranges of positions along one axis."""
Ranges = tuple[Line, Line]
"""Rows and columns of cells: each cell is a range of rows by a range of columns."""


def _grid(length: int, cells: int) -> Line:
    """One axis of `nn.AdaptiveAvgPool2d`."""
    return tuple((i * length // cells, -(-(i + 1) * length // cells)) for i in range(cells))


def _window(length: int, size: int, stride: int) -> Line:
    """One axis of `nn.AvgPool2d` without padding."""
    return tuple((start, start + size) for start in range(0, length - size + 1, stride))


def _averages(length: int, line: Line) -> Tensor:
    """Rows that average the ranges of a line of `length` positions."""
    rows = torch.zeros(len(line), length, dtype=torch.float64)
    for row, (start, stop) in zip(rows, line, strict=True):
        row[start:stop] = 1.0 / (stop - start)
    return rows


@dataclass(frozen=True)
class Pooling:
    """Average pooling of a map of patch responses.

    Parameters
    ----------
    kind : {"grid", "window", "none"}
        `grid`: as `nn.AdaptiveAvgPool2d(size)`, a 1x1 grid being global average pooling; `window`: as
        `nn.AvgPool2d(size, stride)`; `none`: every position keeps its own output weights.
    size, stride : (int, int)
        Rows and columns.
    weights : Tensor (P, K), optional
        Any non-negative pooling of one's own, instead of a `kind`; such a network has no torch pooling module.
    """

    kind: str = "grid"
    size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    weights: Tensor | None = None

    @classmethod
    def of(cls, value: Any) -> Pooling:
        """Read what users write: None or "global", 4, "4", "4x2" or (4, 2) (a grid), "window:3,2", "none", a matrix.

        >>> Pooling.of("4").size
        (4, 4)
        >>> Pooling.of("window:3,2").stride
        (2, 2)
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, np.ndarray | Tensor | list):
            return cls._from_matrix(value)
        if value is None or value == "global":
            return cls()
        if isinstance(value, tuple) and len(value) == 2 and all(map(is_count, value)):
            return cls("grid", (int(value[0]), int(value[1])))
        text = str(value).strip().lower()
        if text == "none":
            return cls("none")
        number = r"([1-9][0-9]{0,5})(?:x([1-9][0-9]{0,5}))?"
        if match := re.fullmatch(number, text):
            rows = int(match[1])
            return cls("grid", (rows, int(match[2] or rows)))
        if match := re.fullmatch(f"window:{number}(?:,{number})?", text):
            size = int(match[1]), int(match[2] or match[1])
            stride = (int(match[3]), int(match[4] or match[3])) if match[3] else size
            return cls("window", size, stride)
        kinds = "global, none, a grid such as 4 or 4x2, or window:SIZE,STRIDE"
        raise InputError(f"pool must be {kinds}; got {shown(value)}")

    @classmethod
    def _from_matrix(cls, value: Any) -> Pooling:
        weights = as_tensor("pooling", value).double().clone()  # of its own: the array may change later
        if weights.ndim != 2:
            raise InputError(f"pooling must be a (P, K) matrix; got shape {tuple(weights.shape)}")
        if not bool((weights >= 0).all()) or not bool(weights.isfinite().all()):
            raise InputError("pooling must have finite non-negative entries: it averages responses")
        return cls("matrix", weights=weights)

    def __str__(self) -> str:
        if self.kind == "grid":
            return "global" if self.size == (1, 1) else f"{self.size[0]}x{self.size[1]}"
        size, stride = (str(a) if a == b else f"{a}x{b}" for a, b in (self.size, self.stride))
        return f"window:{size},{stride}" if self.kind == "window" else self.kind

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the pooled map; a matrix pools to (P, 1)."""
        if self.weights is not None:
            return len(self.weights), 1
        if self.kind == "none":
            return height, width
        if self.size[0] > height or self.size[1] > width:
            raise InputError(
                f"pool {self} is larger than the {height}x{width} map of patch responses; use a smaller one"
            )
        if self.kind == "grid":
            return self.size
        return (height - self.size[0]) // self.stride[0] + 1, (width - self.size[1]) // self.stride[1] + 1

    def ranges(self, height: int, width: int) -> Ranges | None:
        """The cells of a grid or of windows in row-major order; None for other kinds."""
        self.output_size(height, width)
        if self.kind == "grid":
            return _grid(height, self.size[0]), _grid(width, self.size[1])
        if self.kind == "window":
            return _window(height, self.size[0], self.stride[0]), _window(width, self.size[1], self.stride[1])
        return None

    def matrix(self, height: int, width: int) -> Tensor | None:
        """(P, K) float64 pooling weights over positions in row-major order; None stands for the identity."""
        if self.weights is not None:
            if self.weights.shape[1] != height * width:
                raise InputError(
                    f"pooling must have one column a patch, (P, {height * width}); got {tuple(self.weights.shape)}"
                )
            return self.weights
        ranges = self.ranges(height, width)
        if ranges is None:
            return None
        return torch.kron(_averages(height, ranges[0]), _averages(width, ranges[1]))

    def module(self) -> nn.Module:
        """The torch module that pools (n, m, H, W) maps the same way."""
        if self.weights is not None:
            raise InputError("pooling by a matrix of one's own has no torch module; use a grid, a window or none")
        if self.kind == "grid":
            return nn.AdaptiveAvgPool2d(self.size)
        return nn.AvgPool2d(self.size, self.stride) if self.kind == "window" else nn.Identity()


class Pool:
    """`Pooling` applied to rectified responses of a height x width map, and its adjoint.

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
        maps = self._maps(active, self._map)
        if self._kind == "grid":
            return self._flat(F.adaptive_avg_pool2d(maps, self._size))
        return self._flat(F.avg_pool2d(maps, self._size, self._stride))

    def pullback_(self, slopes: Tensor, active: Tensor) -> Tensor:
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
        maps, cells = self._maps(active, self._map), self._maps(slopes, self._cells)
        if self._kind == "grid":
            return self._flat(torch.ops.aten._adaptive_avg_pool2d_backward(cells, maps))
        return self._flat(
            torch.ops.aten.avg_pool2d_backward(cells, maps, self._size, self._stride, (0, 0), False, True, None)
        )

    @staticmethod
    def _maps(rows: Tensor, size: tuple[int, int]) -> Tensor:
        """(b, K, m) as (b, m, height, width), channels last in memory."""
        return rows.unflatten(1, size).permute(0, 3, 1, 2)

    @staticmethod
    def _flat(maps: Tensor) -> Tensor:
        return maps.permute(0, 2, 3, 1).flatten(1, 2)


def _mask_(slopes: Tensor, active: Tensor) -> Tensor:
    """`slopes` where `active` is positive, else zero; written into `active`."""
    return torch.ops.aten.threshold_backward.grad_input(slopes, active, 0, grad_input=active)
