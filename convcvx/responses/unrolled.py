"""Pooled responses by matrix products: images are unrolled into patches, multiplied with all kernels in one GEMM."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from convcvx.activations import RELU, Activation
from convcvx.patches import PatchSpec
from convcvx.pooling import Pooling
from convcvx.responses.pools import pool_of


class Unrolled:
    """Activated and pooled products of patches and kernels, and their adjoint, for images of one shape.

    Images are unrolled in each call; what `columns` made of them may be given in their place.

    Parameters
    ----------
    spec : PatchSpec
    pooling : Pooling
    shape : (int, int, int)
        Channels, rows and columns of an image.
    dtype : torch.dtype
        In which patches and kernels are multiplied, their products activated and pooled.
    device : torch.device
    activation : Activation
    """

    def __init__(
        self,
        spec: PatchSpec,
        pooling: Pooling,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        activation: Activation = RELU,
    ) -> None:
        self._spec, self._dtype, self._device, self._activation = spec, dtype, device, activation
        height, width = spec.output_size(*shape[1:])
        self._pool = pool_of(pooling, height, width, dtype, device)
        self._n_positions = height * width
        self._size = shape[0] * spec.kernel_size[0] * spec.kernel_size[1] + spec.constant
        self._buffers = threading.local()

    @staticmethod
    def contrast_error(size: int, brightness: float) -> float:
        """By how much a patch of `size` pixels is scaled too much or too little in float64, in ε: as exactly as its
        norm is known, however bright it is."""
        return size / 2 + 7

    def bytes_per_image(self, m: int) -> int:
        """Memory in flight for `m` filters."""
        return max(self._size, m) * self._n_positions * self._dtype.itemsize

    def __call__(self, images: Tensor, kernels: Tensor) -> Tensor:
        """(b, C, H, W) images and (m, h) kernels to (b, P, m) pooled responses."""
        return self._pool(self._activate(self.columns(images), kernels)[0])

    def vjp(self, images: Tensor, kernels: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The pooled responses, and the map from slopes (b, P, m) in them to the gradient (h, m) in the kernels.

        The map overwrites its argument, and serves once, before the thread's next pass.
        """
        columns = self.columns(images)
        pooled, spread = self._pool.vjp(*self._activate(columns, kernels))

        def pull_back(slopes: Tensor) -> Tensor:
            return columns @ spread(slopes.to(self._dtype)).flatten(0, 1)

        return pooled, pull_back

    def columns(self, images: Tensor) -> Tensor:
        """(h, b·K) patches, also of such."""
        if images.ndim == 2:
            return images
        # Copying takes less time in few bits; normalising contrast takes more of them.
        images = images if self._spec.contrast is not None else images.to(self._dtype)
        return self._spec.columns(images).to(self._dtype)

    def _activate(self, columns: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor | None]:
        """σ(x_ik·u_j) and σ'(x_ik·u_j) as (b, K, m), in memory that the thread's next call reuses.

        Of the ReLU no slopes: they are 1 where it is positive.
        """
        shape = columns.shape[1], len(kernels)
        products = torch.mm(columns.T, kernels.T, out=self._scratch("active", *shape))
        by_position = products.unflatten(0, (-1, self._n_positions))
        if self._activation == RELU:
            return by_position.relu_(), None
        slopes = self._activation.slopes_(by_position, self._scratch("slopes", *shape).view_as(by_position))
        active = by_position.mul_(slopes)
        return active if self._activation.degree == 1 else active.div_(self._activation.degree), slopes

    def _scratch(self, name: str, rows: int, m: int) -> Tensor:
        """(rows, m) uninitialised: fresh pages for every chunk would cost as much as the arithmetic."""
        buffer = getattr(self._buffers, name, None)
        if buffer is None or buffer.numel() < rows * m:
            buffer = torch.empty(rows * m, dtype=self._dtype, device=self._device)
            setattr(self._buffers, name, buffer)
        return buffer[: rows * m].view(rows, m)
