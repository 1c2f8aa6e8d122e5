"""Pooled ReLU responses φ_p(x_i; u) = Σ_k w_pk (x_ik·u)_+ and their adjoints, streamed over the images.

Nothing here is ever O(n·K·h): images are unrolled into patch rows a cache-sized chunk at a time, multiplied
with all filters in one GEMM, rectified and pooled. Pooled responses, O(n·m·P), are handed out in blocks.
Sums over images are accumulated in float64 whatever the dtype of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from convcvx.errors import InputError
from convcvx.patches import PatchEmbedding
from convcvx.pooling import Pooling

CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 1 << 28}
"""Patch rows and responses of one chunk: about the L2 cache on a CPU, large enough to fill a GPU."""
BLOCK_BYTES = 16 << 20
"""Pooled responses handed out at once."""
PRECISE_SIZE = 2e7
"""Patch entries n·K·h up to which the arithmetic is float64 by default; above, it is float32."""

Residual = Callable[[Tensor, Tensor], Tensor]
"""(predictions (b, c), image indices (b,)) to the gradient of the objective in the predictions, (b, c)."""


class Responses:
    """The map from filters to pooled responses on a fixed set of images.

    Parameters
    ----------
    images : Tensor (n, C, H, W)
    embedding : PatchEmbedding
    pooling : Pooling
    dtype : torch.dtype, optional
        Arithmetic of the streamed passes: float32 is fast, float64 precise; by the size of the data by default.
    device : str or torch.device
    chunk_bytes : int, optional
        Size of the patch rows and responses in flight.

    Attributes
    ----------
    n, n_positions, n_cells, dim : int
        n images, K positions and P pooling cells an image, r entries a filter.
    """

    def __init__(
        self,
        images: Tensor,
        embedding: PatchEmbedding,
        pooling: Pooling | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        chunk_bytes: int | None = None,
    ) -> None:
        if images.ndim != 4 or len(images) == 0:
            raise InputError(f"images must be a non-empty (n, C, H, W) tensor; got shape {tuple(images.shape)}")
        if images.shape[1] != embedding.channels:
            raise InputError(
                f"images must have {embedding.channels} channels as the embedding has; got {images.shape[1]}"
            )
        self.embedding, self.pooling = embedding, pooling or Pooling()
        self.device = torch.device(device)
        self.images = images.to(self.device)
        self.n = len(images)
        self.map_size = embedding.spec.output_size(*images.shape[2:])
        self.n_positions = self.map_size[0] * self.map_size[1]
        self.dim = embedding.dim
        if dtype is None:
            size = self.n * self.n_positions * embedding.basis.shape[1]
            dtype = torch.float64 if size <= PRECISE_SIZE else torch.float32
        self.dtype = dtype
        self.chunk_bytes = chunk_bytes or CHUNK_BYTES[self.device.type]
        pool = self.pooling.matrix(*self.map_size)
        self.n_cells = self.n_positions if pool is None else len(pool)
        identity = pool is None or (pool.shape[0] == pool.shape[1] and torch.equal(pool, torch.eye(len(pool)).double()))
        self._pool = None if pool is None or identity else pool.to(self.device, dtype)
        self._basis = embedding.basis.to(self.device, dtype)

    def to(self, *, dtype: torch.dtype | None = None, images: Tensor | None = None) -> Responses:
        """The same map in another dtype or on other images."""
        return Responses(
            self.images if images is None else images,
            self.embedding,
            self.pooling,
            dtype=dtype or self.dtype,
            device=self.device,
            chunk_bytes=self.chunk_bytes,
        )

    # -- one chunk ------------------------------------------------------------------------------------

    def _chunks(self, m: int, start: int, stop: int) -> Iterator[slice]:
        """Slices of images whose rows and responses to `m` filters fill about `chunk_bytes`."""
        width = max(self._basis.shape[1], m) * self.n_positions * self.dtype.itemsize
        size = max(1, self.chunk_bytes // width)
        for first in range(start, stop, size):
            yield slice(first, min(first + size, stop))

    def rows(self, where: slice | Tensor) -> Tensor:
        """(b, K, h) raw patch rows of some images."""
        return self.embedding.spec.rows(self.images[where].to(self.dtype))

    def _activate(self, rows: Tensor, raw: Tensor) -> Tensor:
        """(x_ik·u_j)_+ as (b, K, m)."""
        return (rows.flatten(0, 1) @ raw.T).relu_().unflatten(0, rows.shape[:2])

    def _pooled(self, active: Tensor) -> Tensor:
        """(b, K, m) to (b, P, m)."""
        return active if self._pool is None else self._pool @ active

    def _pullback(self, slopes: Tensor, active: Tensor, rows: Tensor) -> Tensor:
        """Gradient (m, h) in the raw kernels of <slopes (b, P, m), pooled responses>; overwrites `active`."""
        spread = slopes if self._pool is None else self._pool.T @ slopes
        spread = spread.mul_(active.sign_()) if spread is not slopes else spread * active.sign_()
        return spread.flatten(0, 1).T @ rows.flatten(0, 1)

    def _raw(self, filters: Tensor) -> Tensor:
        return filters.to(self.device, self.dtype) @ self._basis

    # -- passes over all images -----------------------------------------------------------------------

    def blocks(self, filters: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield (images, Φ (b, m, P)) until all images are through, at most about BLOCK_BYTES at a time."""
        raw, m = self._raw(filters), len(filters)
        size = max(1, BLOCK_BYTES // max(1, m * self.n_cells * self.dtype.itemsize))
        for start in range(0, self.n, size):
            stop = min(start + size, self.n)
            block = torch.empty(stop - start, m, self.n_cells, dtype=self.dtype, device=self.device)
            for part in self._chunks(m, start, stop):
                pooled = self._pooled(self._activate(self.rows(part), raw))
                block[part.start - start : part.stop - start] = pooled.transpose(1, 2)
            yield slice(start, stop), block

    def matrix(self, filters: Tensor) -> Tensor:
        """All pooled responses Φ (n, m, P) at once: for small problems and tests."""
        return torch.cat([block for _, block in self.blocks(filters)])

    def predict(self, filters: Tensor, weights: Tensor, intercept: Tensor) -> Tensor:
        """f (n, c) float64 on the CPU, for filters (m, r), weights (m, P, c), intercept (c,)."""
        predictions = intercept.double().cpu().expand(self.n, -1).clone()
        if len(filters):
            matrix = weights.to(self.device, self.dtype).flatten(0, 1)
            for where, block in self.blocks(filters):
                predictions[where] += (block.flatten(1) @ matrix).double().cpu()
        return predictions

    def gram(self, filters: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(AᵀA / n, AᵀY / n) in float64 for A = [Φ flattened to (n, m·P), 1] and targets Y (n, c)."""
        size = len(filters) * self.n_cells + 1
        gram = torch.zeros(size, size, dtype=torch.float64, device=self.device)
        moments = torch.zeros(size, targets.shape[1], dtype=torch.float64, device=self.device)
        for where, block in self.blocks(filters):
            design = torch.cat([block.flatten(1), block.new_ones(len(block), 1)], dim=1)
            gram += design.T @ design
            moments += design.T @ targets[where].to(design)
        return gram.cpu().div_(self.n), moments.cpu().div_(self.n)

    def correlate(self, filters: Tensor, dual: Tensor) -> Tensor:
        """G (m, P, c) float64 with G_j[p] = Σ_i φ_p(x_i; u_j) Z_i, for Z = `dual` (n, c); g(u_j) = ‖G_j‖_F."""
        total = torch.zeros(len(filters), self.n_cells, dual.shape[1], dtype=torch.float64, device=self.device)
        for where, block in self.blocks(filters):
            total += (block.flatten(1).T @ dual[where].to(block)).view(total.shape)
        return total.cpu()

    def ascent(self, filters: Tensor, dual: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """G as `correlate` gives it, and the gradient (m, r) of Σ_j <directions_j (P, c), G_j>, in one pass."""
        raw, m = self._raw(filters), len(filters)
        towards = directions.to(self.device, self.dtype).permute(2, 1, 0).flatten(1)  # (c, P·m)
        total = torch.zeros(self.n_cells * m, dual.shape[1], dtype=torch.float64, device=self.device)
        gradient = torch.zeros(raw.shape, dtype=torch.float64, device=self.device)
        dual = dual.to(self.device, self.dtype)
        for part in self._chunks(m, 0, self.n):
            rows = self.rows(part)
            active = self._activate(rows, raw)
            total += self._pooled(active).flatten(1).T @ dual[part]
            gradient += self._pullback((dual[part] @ towards).unflatten(1, (-1, m)), active, rows)
        correlations = total.view(self.n_cells, m, -1).transpose(0, 1).cpu()
        return correlations, (gradient @ self._basis.T.double()).cpu()

    def gradients(
        self,
        filters: Tensor,
        weights: Tensor,
        intercept: Tensor,
        residual: Residual,
        images: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients in filters (m, r), weights (m, P, c) and intercept (c,) of a function of the predictions.

        One pass over `images` (indices; all by default). `residual` is called once a chunk.
        """
        raw, m = self._raw(filters), len(filters)
        matrix = weights.to(self.device, self.dtype).transpose(0, 1).flatten(0, 1)  # (P·m, c)
        shift = intercept.to(self.device, self.dtype)
        kernel_gradient = torch.zeros(raw.shape, dtype=torch.float64, device=self.device)
        weight_gradient = torch.zeros(matrix.shape, dtype=torch.float64, device=self.device)
        intercept_gradient = torch.zeros(shift.shape, dtype=torch.float64, device=self.device)
        order = torch.arange(self.n, device=self.device) if images is None else images.to(self.device)
        for part in self._chunks(m, 0, len(order)):
            rows = self.rows(part if images is None else order[part])
            active = self._activate(rows, raw)
            pooled = self._pooled(active).flatten(1)
            slopes = residual(torch.addmm(shift, pooled, matrix), order[part])
            weight_gradient += pooled.T @ slopes
            intercept_gradient += slopes.sum(dim=0)
            kernel_gradient += self._pullback((slopes @ matrix.T).unflatten(1, (-1, m)), active, rows)
        return (
            (kernel_gradient @ self._basis.T.double()).cpu(),
            weight_gradient.view(self.n_cells, m, -1).transpose(0, 1).cpu(),
            intercept_gradient.cpu(),
        )
