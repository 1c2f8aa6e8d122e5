"""Pooling: averages over cells of the K patch positions of an image, as a (P, K) matrix, or the maximum in each cell.

Every solver sees the matrix or the cells, every exported network the torch module; `tests/test_patches.py` and
`tests/test_max_pooling.py` hold them equal.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convcvx.data.arrays import as_tensor
from convcvx.errors import InputError, is_count, shown

Line = tuple[tuple[int, int], ...]
"""Half-open ranges of positions along one axis."""
Ranges = tuple[Line, Line]
"""Rows and columns of cells: each cell is a range of rows by a range of columns."""
LARGEST = "max:"
"""What stands before the shape of the cells where each takes the maximum over its positions."""


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
    """Pooling of a map of patch responses, by averages or, with `maximum`, by the maximum in each cell.

    Parameters
    ----------
    kind : {"grid", "window", "none"}
        `grid`: as `nn.AdaptiveAvgPool2d(size)`, a 1x1 grid being global average pooling; `window`: as
        `nn.AvgPool2d(size, stride)`; `none`: every position keeps its own output weights.
    size, stride : (int, int)
        Rows and columns.
    weights : Tensor (P, K), optional
        Any non-negative pooling of one's own, instead of a `kind`; such a network has no torch pooling module.
    maximum : bool
        Take the maximum over a cell, φ_p(u) = max_k (x_k·u)_+, as `nn.AdaptiveMaxPool2d` and `nn.MaxPool2d` do. It is
        convex and positively homogeneous in u like an average, but no matrix times the responses.
    """

    kind: str = "grid"
    size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    weights: Tensor | None = None
    maximum: bool = False

    @classmethod
    def of(cls, value: Any) -> Pooling:
        """Read what users write: None or "global", 4, "4", "4x2" or (4, 2) (a grid), "window:3,2", "none", a matrix.

        With "max:" before a grid or a window, "max:4", the maximum over each cell.

        >>> Pooling.of("4").size
        (4, 4)
        >>> Pooling.of("max:4").maximum
        True
        >>> Pooling.of("window:3,2").stride
        (2, 2)
        """
        if isinstance(value, cls):
            return value
        counts = isinstance(value, tuple | list) and len(value) == 2 and all(map(is_count, value))
        if counts and not any(isinstance(number, float) for number in value):  # which are weights
            return cls("grid", (int(value[0]), int(value[1])))
        if isinstance(value, np.ndarray | Tensor | list):
            return cls._from_matrix(value)
        if value is None or value == "global":
            return cls()
        text = str(value).strip().lower()
        if text == "none":
            return cls("none")
        if text.startswith(LARGEST):
            cells = text.removeprefix(LARGEST)
            if cells.startswith(LARGEST) or (plain := cls.of(cells)).kind == "none":
                raise InputError(f"pool max: takes global, a grid such as 4 or 4x2, or window:SIZE,STRIDE; got {text}")
            return replace(plain, maximum=True)
        number = r"([1-9][0-9]{0,5})(?:x([1-9][0-9]{0,5}))?"
        if match := re.fullmatch(number, text):
            rows = int(match[1])
            return cls("grid", (rows, int(match[2] or rows)))
        if match := re.fullmatch(f"window:{number}(?:,{number})?", text):
            size = int(match[1]), int(match[2] or match[1])
            stride = (int(match[3]), int(match[4] or match[3])) if match[3] else size
            return cls("window", size, stride)
        kinds = "global, none, a grid such as 4 or 4x2, or window:SIZE,STRIDE, with max: in front for the maximum"
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
        if self.maximum:
            return LARGEST + str(self.average)
        if self.kind == "grid":
            return "global" if self.size == (1, 1) else f"{self.size[0]}x{self.size[1]}"
        size, stride = (str(a) if a == b else f"{a}x{b}" for a, b in (self.size, self.stride))
        return f"window:{size},{stride}" if self.kind == "window" else self.kind

    @property
    def average(self) -> Pooling:
        """Averages over the same cells."""
        return replace(self, maximum=False)

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
        """(P, K) float64 pooling weights over positions in row-major order; None stands for the identity.

        Raises
        ------
        InputError
            For the maximum, which is not linear in the responses: what needs this says so (`needs.AVERAGES`).
        """
        if self.maximum:
            raise InputError(f"average pooling is needed; got pool {self}, which no matrix is; use pool {self.average}")
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

    def cells(self, height: int, width: int) -> Tensor | None:
        """(P, K) what the positions count for in a cell: as `matrix` says, or 1 where the maximum is over them."""
        if not self.maximum:
            return self.matrix(height, width)
        averages = self.average.matrix(height, width)
        assert averages is not None
        return (averages > 0).double()

    def reach(self, height: int, width: int) -> Tensor:
        """(K,) float64: no more than so many times as much do all cells change as a response of that position does."""
        cells = self.cells(height, width)
        return torch.ones(height * width).double() if cells is None else cells.sum(dim=0)

    def module(self) -> nn.Module:
        """The torch module that pools (n, m, H, W) maps the same way."""
        if self.weights is not None:
            raise InputError("pooling by a matrix of one's own has no torch module; use a grid, a window or none")
        if self.kind == "none":
            return nn.Identity()
        if self.kind == "grid":
            return nn.AdaptiveMaxPool2d(self.size) if self.maximum else nn.AdaptiveAvgPool2d(self.size)
        return (nn.MaxPool2d if self.maximum else nn.AvgPool2d)(self.size, self.stride)
