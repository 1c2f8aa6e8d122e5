"""Average pooling as a (P, K) matrix over the K patch positions of an image, and as a torch module.

Every solver sees the matrix, every exported network the module; `tests/test_patches.py` holds them equal.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convcvx.errors import InputError


def _cells(length: int, bounds: list[tuple[int, int]]) -> Tensor:
    """Rows that average the half-open ranges `bounds` of a line of `length` positions."""
    rows = torch.zeros(len(bounds), length, dtype=torch.float64)
    for row, (start, stop) in zip(rows, bounds, strict=True):
        row[start:stop] = 1.0 / (stop - start)
    return rows


def _grid(length: int, cells: int) -> Tensor:
    """The one-dimensional factor of `nn.AdaptiveAvgPool2d`."""
    return _cells(length, [(i * length // cells, -(-(i + 1) * length // cells)) for i in range(cells)])


def _window(length: int, size: int, stride: int) -> Tensor:
    """The one-dimensional factor of `nn.AvgPool2d` without padding."""
    return _cells(length, [(start, start + size) for start in range(0, length - size + 1, stride)])


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
        """Read what users write: None or "global", 4 or "4" or "4x2" (a grid), "window:3,2", "none", a matrix.

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
        text = str(value).strip().lower()
        if text == "none":
            return cls("none")
        if match := re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text):
            rows = int(match[1])
            return cls("grid", (rows, int(match[2] or rows)))
        number = r"([1-9]\d*)(?:x([1-9]\d*))?"
        if match := re.fullmatch(f"window:{number}(?:,{number})?", text):
            size = int(match[1]), int(match[2] or match[1])
            stride = (int(match[3]), int(match[4] or match[3])) if match[3] else size
            return cls("window", size, stride)
        raise InputError(f"pool must be global, none, a grid such as 4 or 4x2, or window:SIZE,STRIDE; got {value!r}")

    @classmethod
    def _from_matrix(cls, value: Any) -> Pooling:
        try:
            weights = torch.as_tensor(value, dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"pooling must be a (P, K) matrix; {error}") from None
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

    def matrix(self, height: int, width: int) -> Tensor | None:
        """(P, K) float64 pooling weights over positions in row-major order; None stands for the identity."""
        if self.weights is not None:
            if self.weights.shape[1] != height * width:
                raise InputError(
                    f"pooling must have one column a patch, (P, {height * width}); got {tuple(self.weights.shape)}"
                )
            return self.weights
        self.output_size(height, width)
        if self.kind == "none":
            return None
        if self.kind == "grid":
            factors = _grid(height, self.size[0]), _grid(width, self.size[1])
        else:
            factors = (
                _window(height, self.size[0], self.stride[0]),
                _window(width, self.size[1], self.stride[1]),
            )
        return torch.kron(*factors)

    def module(self) -> nn.Module:
        """The torch module that pools (n, m, H, W) maps the same way."""
        if self.weights is not None:
            raise InputError("pooling by a matrix of one's own has no torch module; use a grid, a window or none")
        if self.kind == "grid":
            return nn.AdaptiveAvgPool2d(self.size)
        return nn.AvgPool2d(self.size, self.stride) if self.kind == "window" else nn.Identity()
