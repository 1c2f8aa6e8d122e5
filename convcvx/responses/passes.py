"""Pooled ReLU responses φ_p(x_i; u) = Σ_k w_pk (x_ik·u)_+ and their adjoints, streamed over the images.

Nothing here is ever O(n·K·h), but for the patches of a small problem, which are unrolled once and kept: a few images at
a time are convolved, rectified and pooled before they leave the cache, in the registers of a CPU (`Fused`) or by matrix
products (`Unrolled`), whichever is faster. Pooled responses, O(n·m·P), are handed out in blocks. Products with as few
columns as there are outputs are taken transposed, as a few long rows: that is three to five times as fast. On a CPU
each core works on spans of images of its own, which scales where threads inside one product of this size do not; the
spans are summed in their order, so that results do not depend on the number of cores. Sums over images are accumulated
in float64 whatever the dtype of the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from convcvx.budget import NEVER, Deadline
from convcvx.data.images import Images
from convcvx.errors import InputError
from convcvx.machine.devices import pick_device
from convcvx.machine.threads import each
from convcvx.patches import Moments, PatchEmbedding
from convcvx.pooling import Pooling
from convcvx.responses.fused import Fused
from convcvx.responses.unrolled import Unrolled

CHUNK_BYTES = {"cpu": 1 << 22, "cuda": 1 << 28}
"""Patches or responses of one chunk: they stay in a cache, and the calls on them cost little beside the arithmetic."""
SPAN, LARGEST_SPAN, SPANS = 64, 256, 16
"""Images that one core works through at a time: of many images more at a time, as each time costs a little, up to so
many, as long as there are so many spans for as many cores."""
BLOCK_BYTES = 16 << 20
"""Pooled responses handed out at once."""
STRIPE = 512
"""Columns of the Gram matrix computed at a time: of each stripe only what lies on and above the diagonal."""
MOMENT_SAMPLE = 256
"""Images at most from which the moments of the patches are estimated."""
SHIFT_SAMPLE = 8
"""Images by which the mean response of a filter is told well enough to be taken off before squares are summed."""
SMALL = 3e5
"""Patch entries n·K·h up to which a pass costs more in calls than in arithmetic: threads and batches only add to it."""
KEPT_PARTS = 64
"""Parts of the images, one a thread at a time, of which a small problem's patches are kept: a few MB in all."""
PRECISE_SIZE = 2e7
"""Patch entries n·K·h up to which the arithmetic is float64 by default; above, it is float32."""
PRECISE_CANCELLATION = 200.0
"""`PatchEmbedding.cancellation`, or `distance`, from which on it is float64 all the same: float32 would be off by more
than 1e-5."""

Residual = Callable[[Tensor, Tensor], Tensor]
"""(predictions (b, c), image indices (b,)) to the gradient of the objective in the predictions, (b, c).

It is called from several threads at once.
"""
Result = TypeVar("Result")


class Responses:
    """The map from filters to pooled responses on a fixed set of images.

    Parameters
    ----------
    images : Tensor or StreamedImages (n, C, H, W)
    embedding : PatchEmbedding
    pooling : Pooling
    dtype : torch.dtype, optional
        Arithmetic of the streamed passes: float32 is fast, float64 precise; by the size of the data by default,
        and by what whitening asks for.
    patch_dtype : torch.dtype, optional
        What patches and filters are multiplied in, and their products rectified and averaged; `dtype` by default.
        bfloat16 is several times as fast on hardware that has it, with two to three digits.
    device : str or torch.device
        "auto", "cpu" or "cuda".
    chunk_bytes : int, optional
        Size of the patch rows and responses in flight.
    small : bool, optional
        Whether patches are unrolled once and kept, which saves small problems the calls; by the size of the data by
        default. Copies on other images take it over: a sample of a large problem is no small one.

    Attributes
    ----------
    n, n_positions, n_cells, dim : int
        n images, K positions and P pooling cells an image, r entries a filter.
    kept : dict
        What was worked out once from these images, embedding and pooling; the copies that `to` makes of the same map in
        another arithmetic share it. The images must not change.
    deadline : Deadline
        A pass that goes on beyond it raises `OutOfTime`.
    """

    def __init__(
        self,
        images: Images,
        embedding: PatchEmbedding,
        pooling: Pooling | None = None,
        *,
        dtype: torch.dtype | None = None,
        patch_dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        chunk_bytes: int | None = None,
        small: bool | None = None,
    ) -> None:
        if images.ndim != 4 or len(images) == 0:
            raise InputError(f"images must be a non-empty (n, C, H, W) tensor; got shape {tuple(images.shape)}")
        if images.shape[1] != embedding.channels:
            raise InputError(
                f"images must have {embedding.channels} channels as the embedding has; got {images.shape[1]}"
            )
        self.embedding, self.pooling = embedding, pooling or Pooling()
        self.deadline = NEVER
        self.device = torch.device(pick_device(device))
        self.images: Images = images.to(self.device)
        self.n = len(images)
        self.map_size = embedding.spec.output_size(*images.shape[2:])
        self.n_positions = self.map_size[0] * self.map_size[1]
        self.dim = embedding.dim
        size = self.n * self.n_positions * embedding.basis.shape[1]
        if dtype is None:
            cancellation = max(embedding.cancellation, embedding.distance)
            precise = size <= PRECISE_SIZE or cancellation > PRECISE_CANCELLATION
            dtype = torch.float64 if precise else torch.float32
        self.dtype, self.patch_dtype = dtype, patch_dtype or dtype
        self.chunk_bytes = chunk_bytes or CHUNK_BYTES[self.device.type]
        self.small = size <= SMALL if small is None else small
        self.n_cells = math.prod(self.pooling.output_size(*self.map_size))
        self.kept: dict[str, Any] = {}
        self._basis = embedding.basis.to(self.device, dtype)
        self._convolution = self._fastest_convolution()

    def _fastest_convolution(self) -> Fused | Unrolled:
        channels, height, width = self.images.shape[1:]
        arguments = self.embedding.spec, self.pooling, (channels, height, width), self.patch_dtype
        exact = Fused.is_exact(self.embedding.spec, self.images, self.patch_dtype)
        if not self.small and self.device.type == "cpu" and exact and Fused.suits(*arguments):
            return Fused(*arguments)
        return Unrolled(*arguments, self.device)

    def to(
        self,
        *,
        dtype: torch.dtype | None = None,
        patch_dtype: torch.dtype | None = None,
        images: Images | None = None,
    ) -> Responses:
        """The same map in another arithmetic or on other images; a new `dtype` is that of the patches as well."""
        if images is not None and images.shape[1:] == self.images.shape[1:] and not (dtype or patch_dtype):
            return self._on(images)
        changed = {"dtype": dtype or self.dtype, "patch_dtype": patch_dtype or dtype or self.patch_dtype}
        other = Responses(
            self.images if images is None else images, self.embedding, self.pooling, **self.options | changed
        )
        if images is None:
            other.kept = self.kept
        return other.until(self.deadline)

    def until(self, deadline: Deadline) -> Responses:
        """The same map, with passes that end by `deadline`."""
        other = self.__class__.__new__(self.__class__)
        other.__dict__ |= self.__dict__ | {"deadline": deadline}
        return other

    def _on(self, images: Images) -> Responses:
        """The same map on other images of this size: every mini-batch is such, so nothing of the map is made again."""
        other = Responses.__new__(Responses)
        other.__dict__ |= self.__dict__ | {"images": images.to(self.device), "n": len(images), "kept": {}}
        other.small = self.small and len(images) <= self.n
        return other

    @property
    def options(self) -> dict[str, Any]:
        """How the passes run: what the constructor takes besides the map and the images."""
        return {name: getattr(self, name) for name in ("dtype", "patch_dtype", "device", "chunk_bytes", "small")}

    # -- one chunk ------------------------------------------------------------------------------------

    def _chunks(self, m: int, span: slice) -> Iterator[slice]:
        """Slices of images with which `m` filters have about `chunk_bytes` in flight."""
        image_bytes = self.images.shape[1:].numel() * self.dtype.itemsize
        size = max(1, self.chunk_bytes // max(image_bytes, self._convolution.bytes_per_image(m)))
        for first in range(span.start, span.stop, size):
            yield slice(first, min(first + size, span.stop))

    def rows(self, where: slice | Tensor) -> Tensor:
        """(b, K, h) raw patch rows of some images."""
        self.deadline.check()
        return self.embedding.spec.rows(self.images[where].to(self.dtype))

    def patches(self, images: Tensor, positions: Tensor) -> Tensor:
        """(b, s, h) raw patch rows: of each of `images` (b,) those at `positions` (b, s) among its K."""
        spec, (_, width) = self.embedding.spec, self.map_size
        windows = spec.windows(self._images(images.to(self.device))).permute(3, 0, 4, 5, 1, 2)
        positions = positions.to(self.device)
        every = torch.arange(len(images), device=self.device)[:, None]
        found = windows[every, :, positions // width, positions % width]  # (b, s, C, kh, kw), the only ones copied
        return replace(spec, padding=(0, 0)).rows(found.flatten(0, 1))[:, 0].unflatten(0, positions.shape)

    def patch_norms(self, images: Tensor, basis: Tensor | None = None) -> Tensor:
        """(b, K) norms of `basis` (s, h) times the patch rows of some images (indices), on the CPU, in float64.

        None stands for the identity: the norms of the raw rows.
        """
        size = max(1, self.chunk_bytes // (8 * self.n_positions * self.embedding.basis.shape[1]))
        norms = []
        for part in images.to(self.device).split(size):
            rows = self.rows(part).double().cpu()
            norms.append((rows if basis is None else rows @ basis.T).norm(dim=2))
        return torch.cat(norms)

    def reach(self) -> Tensor:
        """(n,) Σ_pk w_pk ‖x_ik‖ ‖B‖_F, for raw patch rows x_ik and the basis B: no filter of unit norm responds more.

        Rounding errors of responses are in proportion to it, whatever a whitening or a low-rank basis cancels.
        """
        pool = self.pooling.matrix(*self.map_size)
        weights = torch.ones(self.n_positions).double() if pool is None else pool.sum(dim=0)
        return self.patch_norms(torch.arange(self.n)) @ weights * float(self.embedding.basis.norm())

    def patch_moments(self) -> Moments:
        """Those of the embedded patches, of some images."""
        if "patch_moments" not in self.kept:
            images = self.images[torch.arange(0, self.n, -(-self.n // MOMENT_SAMPLE), device=self.device)]
            spec, basis = self.embedding.spec, self.embedding.basis
            self.kept["patch_moments"] = Moments.of(images.cpu(), spec).embedded(basis, spec)
        return self.kept["patch_moments"]

    def _images(self, where: slice | Tensor) -> Tensor:
        return self.images[where].to(self.dtype)

    def _seen(self, part: slice) -> Tensor:
        """What the convolution takes of some images: their pixels, or the patches that a small problem keeps."""
        if not self.small or isinstance(self._convolution, Fused):
            return self._images(part)
        kept = self.kept.setdefault("columns", {})
        key = self.dtype, self.patch_dtype, part.start, part.stop
        if key in kept:
            return kept[key]
        columns = self._convolution.columns(self._images(part))
        if len(kept) < KEPT_PARTS:
            kept[key] = columns
        return columns

    def _kernels(self, filters: Tensor) -> Tensor:
        """(m, h), in `patch_dtype`."""
        return (filters.to(self.device, self.dtype) @ self._basis).to(self.patch_dtype)

    def _each(self, work: Callable[[slice], Result], start: int, stop: int) -> Iterator[Result]:
        """`work` on each span of the images from `start` to `stop`, in their order, on all cores."""
        size = max(SPAN, min(LARGEST_SPAN, (stop - start) // SPANS)) if self.device.type == "cpu" else stop - start
        spans = [slice(first, min(first + size, stop)) for first in range(start, stop, size)]
        return (map if len(spans) == 1 else each)(work, self._timely(spans))

    def _timely(self, spans: list[slice]) -> Iterator[slice]:
        for span in spans:
            self.deadline.check()
            yield span

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    # -- passes over all images -----------------------------------------------------------------------

    def blocks(self, filters: Tensor, block_bytes: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Yield (images, Φ (b, m, P)) until all images are through, at most about `block_bytes` at a time."""
        kernels, m = self._kernels(filters), len(filters)
        size = max(1, (block_bytes or BLOCK_BYTES) // max(1, m * self.n_cells * self.dtype.itemsize))
        for start in range(0, self.n, size):
            stop = min(start + size, self.n)
            block = torch.empty(stop - start, m, self.n_cells, dtype=self.dtype, device=self.device)

            def fill(span: slice, block: Tensor = block, start: int = start) -> None:
                for part in self._chunks(m, span):
                    pooled = self._convolution(self._seen(part), kernels)
                    block[part.start - start : part.stop - start] = pooled.transpose(1, 2)

            if m:
                _exhaust(self._each(fill, start, stop))
            yield slice(start, stop), block

    def matrix(self, filters: Tensor) -> Tensor:
        """All pooled responses Φ (n, m, P) at once: for small problems and tests."""
        return torch.cat([block for _, block in self.blocks(filters)])

    def predict(self, filters: Tensor, weights: Tensor, intercept: Tensor) -> Tensor:
        """f (n, c) float64 on the CPU, for filters (m, r), weights (m, P, c), intercept (c,)."""
        kernels, m = self._kernels(filters), len(filters)
        matrix = weights.to(self.device, self.dtype).permute(2, 1, 0).flatten(1)  # (c, P·m)
        predictions = intercept.double().to(self.device).expand(self.n, -1).clone()

        def work(span: slice) -> None:
            for part in self._chunks(m, span):
                pooled = self._convolution(self._seen(part), kernels).to(self.dtype)
                predictions[part] += (matrix @ pooled.flatten(1).T).T

        if m:
            _exhaust(self._each(work, 0, self.n))
        return predictions.cpu()

    def shift(self, filters: Tensor) -> Tensor:
        """(m·P,) float64: about the mean of the pooled responses, by a few images."""
        part = slice(0, min(SHIFT_SAMPLE, self.n))
        pooled = self._convolution(self._images(part), self._kernels(filters))  # (b, P, m)
        return pooled.double().mean(dim=0).T.flatten().cpu()

    def gram(self, filters: Tensor, targets: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(AᵀA / n, AᵀY / n) in float64 for A = [Φ flattened to (n, m·P), 1] and targets Y (n, c).

        With a `shift` (m·P,) it is subtracted from Φ: what tells images apart is lost in squares far above it.
        """
        size = len(filters) * self.n_cells + 1
        gram, moments = self._zeros(size, size), self._zeros(size, targets.shape[1])
        # Blocks of at least so many images keep the products, not their accumulation, the cost.
        for where, block in self.blocks(filters, max(BLOCK_BYTES, 1024 * size * self.dtype.itemsize)):
            design = torch.cat([block.flatten(1), block.new_ones(len(block), 1)], dim=1)
            if shift is not None:
                design[:, :-1] -= shift.to(design)
            for first in range(0, size, STRIPE):
                stripe = slice(first, first + STRIPE)
                gram[stripe, first:] += design[:, stripe].T @ design[:, first:]
            moments += design.T @ targets[where].to(design)
        gram = gram.cpu().div_(self.n).triu_()
        gram += gram.triu(1).T
        return gram, moments.cpu().div_(self.n)

    def correlate(self, filters: Tensor, dual: Tensor) -> Tensor:
        """G (m, P, c) float64 with G_j[p] = Σ_i φ_p(x_i; u_j) Z_i, for Z = `dual` (n, c); g(u_j) = ‖G_j‖_F."""
        total = self._zeros(dual.shape[1], len(filters) * self.n_cells)
        for where, block in self.blocks(filters):
            total += dual[where].to(block).T @ block.flatten(1)
        return total.T.unflatten(0, (len(filters), self.n_cells)).cpu()

    def ascent(self, filters: Tensor, dual: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """G as `correlate` gives it, and the gradient (m, r) of Σ_j <directions_j (P, c), G_j>, in one pass."""
        kernels, m = self._kernels(filters), len(filters)
        towards = directions.to(self.device, self.dtype).permute(2, 1, 0).flatten(1)  # (c, P·m)
        dual = dual.to(self.device, self.dtype)

        def work(span: slice) -> tuple[Tensor, Tensor]:
            total, slope = self._zeros(dual.shape[1], self.n_cells * m), self._zeros(*kernels.T.shape)
            for part in self._chunks(m, span):
                pooled, pull_back = self._convolution.vjp(self._seen(part), kernels)
                total += dual[part].T @ pooled.to(self.dtype).flatten(1)
                slope += pull_back((dual[part] @ towards).unflatten(1, (-1, m)))
            return total, slope

        total, slope = _sum(self._each(work, 0, self.n))
        correlations = total.T.unflatten(0, (self.n_cells, m)).transpose(0, 1).cpu()
        return correlations, (self._basis.double() @ slope).T.cpu()

    def gradients(
        self,
        filters: Tensor,
        weights: Tensor,
        intercept: Tensor,
        residual: Residual,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients in filters (m, r), weights (m, P, c) and intercept (c,) of a function of the predictions.

        One pass over the images. `residual` is called once a chunk. The gradients stay on the device, where
        a descent steps.
        """
        kernels, m = self._kernels(filters), len(filters)
        matrix = weights.to(self.device, self.dtype).permute(2, 1, 0).flatten(1)  # (c, P·m)
        shift = intercept.to(self.device, self.dtype)
        images = torch.arange(self.n, device=self.device)

        def work(span: slice) -> tuple[Tensor, Tensor, Tensor]:
            kernel, weight, bias = self._zeros(*kernels.T.shape), self._zeros(*matrix.shape), self._zeros(*shift.shape)
            for part in self._chunks(m, span):
                pooled, pull_back = self._convolution.vjp(self._seen(part), kernels)
                pooled = pooled.to(self.dtype).flatten(1)
                slopes = residual((matrix @ pooled.T).T + shift, images[part])
                weight += slopes.T @ pooled
                bias += slopes.sum(dim=0)
                kernel += pull_back((slopes @ matrix).unflatten(1, (-1, m)))
            return kernel, weight, bias

        kernel, weight, bias = _sum(self._each(work, 0, self.n))
        return (
            (self._basis.double() @ kernel).T,
            weight.T.unflatten(0, (self.n_cells, m)).transpose(0, 1),
            bias,
        )


def _exhaust(results: Iterator) -> None:
    for _ in results:
        pass


def _sum(results: Iterator[Sequence[Tensor]]) -> list[Tensor]:
    """Sum tuples of tensors entry by entry, in place of the first."""
    totals = list(next(results))
    for result in results:
        for total, part in zip(totals, result, strict=True):
            total += part
    return totals
