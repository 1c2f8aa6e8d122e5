"""How images are gone through: a few at a time, on all cores, without ever holding what is computed of them all.

Nothing here is ever O(n·K·h), but for the patches of a small problem, which are unrolled once and kept: a few images at
a time are convolved, activated and pooled before they leave the cache, in the registers of a CPU (`Fused`) or by matrix
products (`Unrolled`), whichever is faster. Where filters have few coordinates, patches are put into these once (`Maps`,
O(n) times the pixels of an image). Pooled responses, O(n·m·P), are handed out in blocks. Products with as few columns
as there are outputs are taken transposed, as a few long rows: that is three to five times as fast. On a CPU each core
works on spans of images of its own, which scales where threads inside one product of this size do not; the spans are
summed in their order, so that results do not depend on the number of cores. Sums over images are accumulated in float64
whatever the dtype of the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from convcvx.activations import RELU, Activation
from convcvx.budget import NEVER
from convcvx.data.images import Images
from convcvx.errors import InputError
from convcvx.machine.devices import pick_device
from convcvx.machine.threads import SMALL, each
from convcvx.patches import PatchEmbedding
from convcvx.patches.moments import is_identity
from convcvx.pooling import Pooling
from convcvx.responses.fused import Fused
from convcvx.responses.maps import POINTS, Maps
from convcvx.responses.unrolled import Unrolled

CHUNK_BYTES = {"cpu": 1 << 22, "cuda": 1 << 28}
"""Patches or responses of one chunk: they stay in a cache, and the calls on them cost little beside the arithmetic."""
SPAN = 64
"""Images that one core works through at a time, at least: fewer would cost more in calls than in arithmetic."""
LARGEST_SPAN = 256
"""Images that it works through at a time at most: more would save nothing, and leave cores idle at the end."""
SPANS = 16
"""Spans that there are at least, images permitting: work for as many cores."""
BLOCK_BYTES = 16 << 20
"""Pooled responses handed out at once."""
KEPT_PARTS = 64
"""Parts of the images, one a thread at a time, of which a small problem's patches are kept: a few MB in all."""
PRECISE_SIZE = 2e7
"""Patch entries n·K·h up to which the arithmetic is float64 by default; above, it is float32."""
PRECISE_CANCELLATION = 200.0
"""`PatchEmbedding.cancellation`, or `distance`, from which on it is float64 all the same: float32 would be off by more
than 1e-5."""

Result = TypeVar("Result")


class Stream:
    """Some images, and how the responses of filters to them are computed, a few images at a time.

    Parameters
    ----------
    images : Tensor or StreamedImages (n, C, H, W)
    embedding : PatchEmbedding
    pooling : Pooling
    dtype : torch.dtype, optional
        Arithmetic of the streamed passes: float32 is fast, float64 precise; by the size of the data by default,
        and by what whitening asks for.
    patch_dtype : torch.dtype, optional
        What patches and filters are multiplied in, and their products activated and averaged; `dtype` by default.
        bfloat16 is several times as fast on hardware that has it, with two to three digits.
    device : str or torch.device
        "auto", "cpu" or "cuda".
    chunk_bytes : int, optional
        Size of the patch rows and responses in flight.
    fusible : bool, optional
        Whether contrast may be normalised in the kernels, as `Fused` does, by the brightest pixel if that is not said:
        of images that are shared out all parts have to do alike, for one allowance for rounding to hold.
    small : bool, optional
        Whether patches are unrolled once and kept, which saves small problems the calls; by the size of the data by
        default. Copies on other images take it over: a sample of a large problem is no small one.
    activation : Activation
        σ of the responses φ_p(x_i; u) = Σ_k w_pk σ(x_ik·u), or max σ(x_ik·u) over the positions of a cell; of the
        square Σ_k w_pk (x_ik·u)²/‖u‖.

    Attributes
    ----------
    n, n_positions, n_cells, dim : int
        n images, K positions and P pooling cells an image, r entries a filter.
    mapped : bool
        Whether passes go over `Maps` of the images, which are then what is convolved, by filters instead of kernels.
    convolution : Fused or Unrolled
        What makes pooled responses of images and kernels.
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
        fusible: bool | None = None,
        small: bool | None = None,
        activation: Activation = RELU,
    ) -> None:
        if images.ndim != 4 or len(images) == 0:
            raise InputError(f"images must be a non-empty (n, C, H, W) tensor; got shape {tuple(images.shape)}")
        if images.shape[1] != embedding.channels:
            raise InputError(
                f"images must have {embedding.channels} channels as the embedding has; got {images.shape[1]}"
            )
        self.embedding, self.pooling, self.activation = embedding, pooling or Pooling(), activation
        if activation.degree > 1 and (self.pooling.maximum or embedding.spec.contrast is not None):
            raise InputError(
                f"activation {activation} must come with average pooling and without contrast; got pool "
                f"{self.pooling} and contrast {embedding.spec.contrast}"
            )
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
        in_coordinates = not self.small and self.patch_dtype == dtype
        self.mapped = in_coordinates and Maps.suit(embedding, self.images, self.map_size, dtype)
        basis = torch.eye(self.dim) if self.mapped else embedding.basis
        self._basis = basis.to(self.device, dtype)
        self._plain = is_identity(self._basis)
        self.fusible = Fused.is_exact(embedding.spec, self.images) if fusible is None else fusible
        self.convolution = self._fastest_convolution()

    def _fastest_convolution(self) -> Fused | Unrolled:
        channels, height, width = self.images.shape[1:]
        spec, shape, exact = self.embedding.spec, (channels, height, width), self.fusible
        if self.mapped:
            spec, shape, exact = POINTS, (self.dim, *self.map_size), True
        arguments = spec, self.pooling, shape, self.patch_dtype
        if not self.small and self.device.type == "cpu" and exact and Fused.suits(*arguments, self.activation):
            return Fused(*arguments, self.activation)
        return Unrolled(*arguments, self.device, self.activation)

    def chunks(self, m: int, span: slice) -> Iterator[slice]:
        """Slices of images with which `m` filters have about `chunk_bytes` in flight."""
        image_bytes = self.images.shape[1:].numel() * self.dtype.itemsize
        size = max(1, self.chunk_bytes // max(image_bytes, self.convolution.bytes_per_image(m)))
        for first in range(span.start, span.stop, size):
            yield slice(first, min(first + size, span.stop))

    def pixels(self, where: slice | Tensor) -> Tensor:
        """(b, C, H, W) some images, in the arithmetic of the passes."""
        return self.images[where].to(self.dtype)

    def seen(self, part: slice) -> Tensor:
        """What the convolution takes of some images: their pixels, or the patches that a small problem keeps, or maps
        of these."""
        if self.mapped:
            return self.maps.of(part, self._chosen)
        if not self.small or isinstance(self.convolution, Fused):
            return self.pixels(part)
        kept = self.kept.setdefault("columns", {})
        key = self.dtype, self.patch_dtype, part.start, part.stop
        if key in kept:
            return kept[key]
        columns = self.convolution.columns(self.pixels(part))
        if len(kept) < KEPT_PARTS:
            kept[key] = columns
        return columns

    @property
    def maps(self) -> Maps:
        """Those of the images, where passes go over such."""
        if "maps" not in self.kept:  # of threads that come at once the first has made those of all
            size = self.map_size
            maps = Maps(self.embedding, self.n, size, self.dtype, self.device, self.chunk_bytes)
            self.kept.setdefault("maps", maps)
        return self.kept["maps"]

    def _chosen(self, where: Tensor) -> Tensor:
        """(b, C, H, W): `pixels` of images (indices) on any device."""
        return self.pixels(where.to(self.device))

    def kernels(self, filters: Tensor) -> Tensor:
        """(m, r) filters to (m, h) kernels, or (m, r) such for maps, in `patch_dtype`."""
        kernels = self.activation.kernels(filters.to(self.device, self.dtype))
        return (kernels.contiguous() if self._plain else kernels @ self._basis).to(self.patch_dtype)

    def pulled_back(self, slopes: Tensor, filters: Tensor) -> Tensor:
        """Slopes (h, m) in the `kernels` to those (m, r) in the `filters` (m, r)."""
        found = (slopes.double() if self._plain else self._basis.double() @ slopes).T
        return self.activation.pulled_back(found, filters.to(found))

    def each(self, work: Callable[[slice], Result], start: int, stop: int) -> Iterator[Result]:
        """`work` on each span of the images from `start` to `stop`, in their order, on all cores."""
        size = max(SPAN, min(LARGEST_SPAN, (stop - start) // SPANS)) if self.device.type == "cpu" else stop - start
        spans = [slice(first, min(first + size, stop)) for first in range(start, stop, size)]
        return (map if len(spans) == 1 else each)(work, self._timely(spans))

    def _timely(self, spans: list[slice]) -> Iterator[slice]:
        for span in spans:
            self.deadline.check()
            yield span

    def zeros(self, *shape: int) -> Tensor:
        """Where sums over images begin: in float64, on the device."""
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def blocks(self, filters: Tensor, block_bytes: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Yield (images, Φ (b, m, P)) until all images are through, at most about `block_bytes` at a time."""
        kernels, m = self.kernels(filters), len(filters)
        size = max(1, (block_bytes or BLOCK_BYTES) // max(1, m * self.n_cells * self.dtype.itemsize))
        for start in range(0, self.n, size):
            stop = min(start + size, self.n)
            block = torch.empty(stop - start, m, self.n_cells, dtype=self.dtype, device=self.device)

            def fill(span: slice, block: Tensor = block, start: int = start) -> None:
                for part in self.chunks(m, span):
                    pooled = self.convolution(self.seen(part), kernels)
                    block[part.start - start : part.stop - start] = pooled.transpose(1, 2)

            if m:
                exhaust(self.each(fill, start, stop))
            yield slice(start, stop), block


def exhaust(results: Iterator) -> None:
    """Have all of the work done whose results are written elsewhere."""
    for _ in results:
        pass


def sum_up(results: Iterator[Sequence[Tensor]]) -> list[Tensor]:
    """Sum tuples of tensors entry by entry, in place of the first."""
    totals = list(next(results))
    for result in results:
        for total, part in zip(totals, result, strict=True):
            total += part
    return totals
