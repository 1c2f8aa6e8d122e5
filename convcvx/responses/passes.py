"""Pooled responses φ_p(x_i; u) = Σ_k w_pk σ(x_ik·u), or the maximum over the positions of a cell: sums of them over all
images, and their adjoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from convcvx.activations import LINEAR, RELU
from convcvx.budget import Deadline
from convcvx.data.images import Images
from convcvx.losses.shares import Shares
from convcvx.patches import Moments
from convcvx.responses.streams import Stream
from convcvx.responses.table import ASCENT, CORRELATE, GRAM, PREDICT, Pass, Residual, gradients
from convcvx.rounding import UNIT

MOMENT_SAMPLE = 256
"""Images at most from which the moments of the patches are estimated."""
SHIFT_SAMPLE = 8
"""Images by which the mean response of a filter is told well enough to be taken off before squares are summed."""


class Responses(Stream):
    """The map from filters to pooled responses on a fixed set of images. Parameters and attributes: see `Stream`."""

    @property
    def n_processes(self) -> int:
        """How many processes go over the images."""
        return 1

    @property
    def share_here(self) -> float:
        """The share of them that this machine has, and so of what they hold together."""
        return 1.0

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
        fusible = {} if images is None else {"fusible": None}  # others may be brighter
        other = Responses(
            self.images if images is None else images, self.embedding, self.pooling, **self.options | changed | fusible
        )
        if images is None:
            other.kept = self.kept
        return other.until(self.deadline)

    def rectified(self) -> Responses:
        """The same with the ReLU, in this process."""
        if self.activation == RELU:
            return self
        options = self.options | {"activation": RELU}
        return Responses(self.images, self.embedding, self.pooling, **options).until(self.deadline)

    def mirrored(self) -> Responses:
        """The same map on the mirror images of these images, which are in memory."""
        assert isinstance(self.images, Tensor)
        return self.to(images=self.embedding.spec.mirrored(self.images))

    @property
    def symmetric(self) -> bool:
        """Whether a filter and its negative are one and the same but for the sign of weights: φ(-u) = -slope φ(u).

        So it is of the absolute value and the square, whose σ(-t) = σ(t), and without activation where cells average.
        """
        return self.activation.slope == -1 or (self.activation == LINEAR and not self.pooling.maximum)

    @property
    def alike(self) -> Callable[[Any], Any]:
        """How alike filters with these cosines, a tensor or an array, are: where `symmetric` their sign is nothing."""
        return abs if self.symmetric else _as_they_are

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
        names = "dtype", "patch_dtype", "device", "chunk_bytes", "fusible", "small", "activation"
        return {name: getattr(self, name) for name in names}

    @property
    def subspaces(self) -> list[Responses]:
        """The maps for filters of one subspace each, made once an arithmetic; of their images no copies are."""
        if self.embedding.spec.subspaces == 1:
            return [self]
        kept: dict[Any, list[Responses]] = self.kept.setdefault("subspaces", {})
        own = self.dtype, self.patch_dtype
        if own not in kept:
            if kept:  # what is kept with these, such as patch rows, is of use in any arithmetic
                others = next(iter(kept.values()))
                kept[own] = [part.to(dtype=self.dtype, patch_dtype=self.patch_dtype) for part in others]
            else:
                options = {name: value for name, value in self.options.items() if name != "small"}
                spaces = map(self.embedding.subspace, range(self.embedding.spec.subspaces))
                kept[own] = [Responses(self.images, space, self.pooling, **options) for space in spaces]
        return [responses.until(self.deadline) for responses in kept[own]]

    # -- single patches -------------------------------------------------------------------------------

    def rows(self, where: slice | Tensor) -> Tensor:
        """(b, K, h) raw patch rows of some images."""
        self.deadline.check()
        return self.embedding.spec.rows(self.images[where].to(self.dtype))

    def patches(self, images: Tensor, positions: Tensor) -> Tensor:
        """(b, s, h) raw patch rows: of each of `images` (b,) those at `positions` (b, s) among its K."""
        spec, (_, width) = self.embedding.spec, self.map_size
        windows = spec.windows(self.pixels(images.to(self.device)))
        windows = rearrange(windows, "c h w b rows columns -> b c rows columns h w")
        positions = positions.to(self.device)
        every = torch.arange(len(images), device=self.device)[:, None]
        found = windows[every, :, positions // width, positions % width]  # (b, s, C, kh, kw), the only ones copied
        alone = replace(spec, padding=(0, 0), dilation=(1, 1))
        return alone.rows(found.flatten(0, 1))[:, 0].unflatten(0, positions.shape)

    def patch_norms(self, images: Tensor, basis: Tensor | None = None) -> Tensor:
        """(b, K) norms of `basis` (s, h) times the patch rows of some images (indices), on the CPU, in float64.

        None stands for the identity: the norms of the raw rows.
        """
        size = max(1, self.chunk_bytes // (8 * self.n_positions * self.embedding.basis.shape[1]))
        norms = []
        for part in images.to(self.device).split(size):
            rows = self.rows(part).double().cpu()
            norms.append((rows if basis is None else rows @ basis.double().T).norm(dim=2))
        return torch.cat(norms)

    @property
    def position_weights(self) -> Tensor:
        """(K,) Σ_p w_pk: what a position counts for in all cells together, 1 in each that takes the maximum."""
        return self.pooling.reach(*self.map_size)

    def reach(self, columns: Tensor | None = None) -> Tensor:
        """(n,) Σ_pk w_pk (Σ_j |x_ikj| c_j)^d, or more, for raw patch rows x_ik and c = `columns` (h,) >= 0.

        d is the degree of the activation.

        By default c_j = ‖b_j‖ of the columns of the basis: no filter of unit norm responds more, and rounding errors of
        responses are in proportion to it, whatever a whitening or a low-rank basis cancels.
        """
        columns = self.embedding.basis.norm(dim=0) if columns is None else columns
        n_entries = len(columns) - self.embedding.spec.constant
        # By Cauchy and Schwarz, but for the constant, which may be far larger than all pixels or far smaller.
        return self.reach_of(float(columns[:n_entries].norm()), float(columns[n_entries:].sum()))

    def reach_of(self, along: float, constant: float) -> Tensor:
        """(n,) Σ_pk w_pk (‖x_ik‖ along + constant)^d, or more, for patches x_ik without the constant."""
        degree = self.activation.degree
        parts = self.lengths() * along**degree + float(self.position_weights.sum()) * constant**degree
        return 2 ** (degree - 1) * parts  # (a + b)² <= 2a² + 2b²

    def contrast_error(self) -> float:
        """By how much normalised contrast may have changed the pooled responses of an image, all cells together, to a
        filter of unit norm: what `embedding_errors` says of a row, for the brightest pixel of all.

        Where the mean is taken off the kernels k instead, k is off by (s + 1)ε ‖k‖, and its product with s pixels up
        to M rounds by (s + 1)ε M √s ‖k‖: no more than that.
        """
        spec, basis = self.embedding.spec, self.embedding.basis
        if spec.contrast is None:
            return 0.0
        s = basis.shape[1] - spec.constant
        largest = max(abs(float(bound)) for bound in self.images.aminmax())
        off = (2 * s + 4) * math.sqrt(s / spec.contrast) * largest + self.convolution.contrast_error(
            s, largest**2 / spec.contrast
        ) * math.sqrt(s)
        return UNIT * float(basis[:, :s].norm()) * off * float(self.position_weights.sum())

    def lengths(self) -> Tensor:
        """(n,) Σ_pk w_pk ‖x_ik‖^d for patches x_ik without the constant and the degree d of the activation, or a little
        more; worked out once."""
        if "lengths" not in self.kept:
            size = max(1, self.chunk_bytes // (8 * self.images.shape[1:].numel()))
            norms = []
            for start in range(0, self.n, size):
                self.deadline.check()
                pixels = self.images[start : start + size].cpu().double()
                norms.append(self.embedding.spec.norms(pixels) ** self.activation.degree @ self.position_weights)
            self.kept["lengths"] = torch.cat(norms)
        return self.kept["lengths"]

    def patch_moments(self) -> Moments:
        """Those of the embedded patches, of some images."""
        if "patch_moments" not in self.kept:
            images = self.images[torch.arange(0, self.n, -(-self.n // MOMENT_SAMPLE), device=self.device)]
            spec, basis = self.embedding.spec, self.embedding.basis
            self.kept["patch_moments"] = Moments.of(images.cpu(), spec).embedded(basis, spec)
        return self.kept["patch_moments"]

    # -- passes over all images -----------------------------------------------------------------------

    def run(
        self,
        wanted: Pass,
        rows: Sequence[Tensor],
        *common: Any,
        where: Tensor | None = None,
        beside: Sequence[Responses] = (),
    ) -> list[Tensor]:
        """The results of a pass: `rows` are what belongs to each image, (n, ...), `common` its other arguments.

        Over the images `where` (b,) alone if that is given: `rows` are what belongs to these. `beside` are responses
        to the same images, or to features of them, of a pass over several.
        """
        return wanted.of([responses.at(where) for responses in (self, *beside)], *rows, *common)

    def at(self, where: Tensor | None) -> Responses:
        """The same map on some of the images (indices), in this process; on all of them for None."""
        if where is None:
            return self
        other = self._on(self.images[where.to(self.device)])
        if self.mapped:
            other.kept["maps"] = self.maps.at(where, self._chosen)
        return other

    @property
    def owners(self) -> Tensor:
        """(n,): which process goes over each image."""
        return torch.zeros(self.n, dtype=torch.int64)

    def apply(self, work: Callable[..., Tensor], items: Sequence[Tensor], *common: Any) -> list[Tensor]:
        """`work`, a function of a module, on each of some items, shared out among the processes as the images are."""
        return [work(item, *common) for item in items]

    def matrix(self, filters: Tensor) -> Tensor:
        """All pooled responses Φ (n, m, P) at once: for small problems and tests."""
        return torch.cat([block for _, block in self.blocks(filters)])

    def predict(self, filters: Tensor, weights: Tensor, intercept: Tensor) -> Tensor:
        """f (n, c) float64 on the CPU, for filters (m, r), weights (m, P, c), intercept (c,)."""
        return self.run(PREDICT, (), filters, weights, intercept)[0]

    def shift(self, filters: Tensor) -> Tensor:
        """(m·P,) float64: about the mean of the pooled responses, by a few images."""
        few = self._on(self.images[: min(SHIFT_SAMPLE, self.n)])
        pooled = few.convolution(few.seen(slice(0, few.n)), few.kernels(filters))  # (b, P, m)
        return pooled.double().mean(dim=0).T.flatten().cpu()

    def gram(
        self, filters: Tensor, targets: Tensor, shares: Shares | None = None, shift: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Means of A_iᵀA_i and A_iᵀY_i in float64, for A = [Φ flattened to (n, m·P), 1] and targets Y (n, c).

        Over images that count for their `shares`, 1/n each by default. With a `shift` (m·P,) it is subtracted from Φ:
        what tells images apart is lost in squares far above it.
        """
        shares = shares or Shares.equal(self.n)
        gram, moments = self.run(GRAM, (targets, shares.counts), filters, shift)
        gram = gram.div_(shares.total).triu_()
        gram += gram.triu(1).T
        return gram, moments.div_(shares.total)

    def correlate(self, filters: Tensor, dual_point: Tensor) -> Tensor:
        """G (m, P, c) float64 with G_j[p] = Σ_i φ_p(x_i; u_j) Z_i, for Z = `dual_point` (n, c); g(u_j) = ‖G_j‖_F."""
        return self.run(CORRELATE, (dual_point,), filters)[0]

    def ascent(self, filters: Tensor, dual_point: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """G as `correlate` gives it, and the gradient (m, r) of Σ_j <directions_j (P, c), G_j>, in one pass."""
        correlations, slopes = self.run(ASCENT, (dual_point,), filters, directions)
        return correlations, slopes

    def gradients(
        self, filters: Tensor, weights: Tensor, intercept: Tensor, residual: Residual
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients in filters (m, r), weights (m, P, c) and intercept (c,) of a function of the predictions.

        One pass over the images. `residual` is called once a chunk. The gradients stay on the device, where
        a descent steps.
        """
        kernel, weight, bias = gradients(self, filters, weights, intercept, residual)
        return kernel, weight, bias


def _as_they_are(cosines: Any) -> Any:
    return cosines
