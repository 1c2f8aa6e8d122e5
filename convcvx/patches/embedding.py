"""The linear embedding in which filters live.

A filter `u` of unit norm lives in the embedded space R^r; its raw kernel is `u @ basis`, so that (basis @ row) . u =
row . (u @ basis). Low rank, whitening and the hidden bias are nothing but this (r, h) basis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convcvx.data.images import Images
from convcvx.errors import InputError
from convcvx.machine.threads import SMALL, sparing
from convcvx.patches.moments import CHUNK, Moments, is_identity
from convcvx.patches.spec import PatchSpec

WHITENING_PRODUCTS = 5e10
"""Products of patch entries that whitening is fitted to: those of so many images, evenly spread."""
SAME_SPACE = 1e-6
"""Largest difference of two Gram matrices of a basis, as a share of their largest entry, that rounding may leave."""


@dataclass(frozen=True)
class PatchEmbedding:
    """A `PatchSpec` fitted to images: the basis of the space that filters live in.

    Attributes
    ----------
    spec : PatchSpec
    channels : int
        Channels of the images.
    basis : Tensor (r, h) float64
        A filter `u` in R^r has the raw kernel `u @ basis`; the last column is its bias if `spec.constant`.
    patch_rank : int
        Numerical rank of the embedded patch matrix; it, not the image, sets the cost of a proof.
    energy : float
        Share of the patches' second moment (variance if whitened) that the basis keeps.
    distance : float
        How many times their spread embedded patches lie from zero; 0 where it is not known.
    span : Tensor (s, d), optional
        Orthonormal rows that span all patches, without a constant, where the basis has directions beside these: of
        principal directions in which no patch lies rounding makes the choice. Not kept in files.
    """

    spec: PatchSpec
    channels: int
    basis: Tensor
    patch_rank: int
    energy: float = 1.0
    distance: float = 0.0
    span: Tensor | None = None

    @property
    def dim(self) -> int:
        """r, the dimension of a filter."""
        return len(self.basis)

    @property
    def size(self) -> int:
        """h, the dimension of a filter without `rank`."""
        return self.channels * math.prod(self.spec.kernel_size) + self.spec.hidden_bias

    @property
    def cancellation(self) -> float:
        """How far from zero whitened patches lie, in units of their spread, before their mean is taken off.

        What rounding of the patches and of the kernels is multiplied with.
        """
        return 1.0 if self.spec.whiten is None else float(self.basis[:, -1].abs().max())

    @classmethod
    def fit(
        cls,
        images: Images,
        spec: PatchSpec,
        chunk: int = CHUNK,
        *,
        flips: bool = False,
        weights: Tensor | None = None,
    ) -> PatchEmbedding:
        """Fit the basis to (n, C, H, W) images, and with `flips` to their mirror images, with one pass over them.

        `weights` (n,), none of them 0, say what each image counts for.
        """
        size = images.shape[1] * math.prod(spec.kernel_size)
        entries = len(images) * math.prod(spec.output_size(*images.shape[2:])) * size
        # The reported rank is of all patches.
        step = 1 if spec.whiten is None else math.ceil(entries * size / WHITENING_PRODUCTS)
        sample = images[torch.arange(0, len(images), step)] if step > 1 else images
        with sparing(entries <= SMALL):
            moments = Moments.of(sample, spec, chunk, None if weights is None else weights[::step])
            if flips:
                moments = moments.mirrored(spec, images.shape[1])
            return cls.of_moments(moments, images.shape[1], spec)

    @classmethod
    def of_moments(cls, moments: Moments, channels: int, spec: PatchSpec) -> PatchEmbedding:
        """Fit the basis to images of which the moments of the patches are known."""
        size = channels * math.prod(spec.kernel_size)
        if spec.rank is not None and spec.rank * spec.subspaces > size:
            times = (" times subspaces", f" times {spec.subspaces}") if spec.subspaces > 1 else ("", "")
            raise InputError(f"rank{times[0]} must be at most the patch size, {size}; got {spec.rank}{times[1]}")
        basis, energy = _basis(moments, spec)
        embedded = moments.embedded(basis, spec)
        whole = embedded.rank
        rank = whole if spec.subspaces == 1 else min(whole, spec.rank or size)
        span = moments.span if spec.rank is not None and whole < len(basis) else None
        return cls(spec, channels, basis, rank, energy, embedded.distance, span)

    def subspace(self, number: int) -> PatchEmbedding:
        """The space of the filters of one of the subspaces, 0, 1, ..."""
        own = self.coordinates(number)
        return replace(self, spec=replace(self.spec, subspaces=1), basis=self.basis[own])

    def coordinates(self, number: int) -> slice:
        """Those of a filter (r,) that it may have in one of the subspaces."""
        size = self.dim // self.spec.subspaces
        return slice(number * size, (number + 1) * size)

    def mask(self, filters: Tensor) -> Tensor:
        """(m, r): 1 for the coordinates of the subspace that each of some filters (m, r) lies in, else 0."""
        parts = filters.unflatten(1, (self.spec.subspaces, -1))
        own = torch.zeros_like(parts)
        own[torch.arange(len(parts)), parts.norm(dim=2).argmax(dim=1)] = 1.0
        return own.flatten(1)

    def same_space(self, other: PatchEmbedding) -> bool:
        """Whether filters have the same kernels and the same norms in both, up to a rotation of them.

        Of directions in which no patch of the `other` lies, the norms alone: kernels there do nothing.
        """
        if self.spec != other.spec or self.basis.shape != other.basis.shape:
            return False
        mine, others = (basis.mT @ basis for basis in (self._parts, other._parts))
        if other.span is not None and bool(self.basis.isfinite().all()):
            sizes = [torch.linalg.eigvalsh(basis @ basis.mT) for basis in (self._parts, other._parts)]
            if not float((sizes[0] - sizes[1]).abs().max()) <= SAME_SPACE * float(sizes[1].abs().max()):
                return False
            size = other.span.shape[1]
            seen = torch.eye(other.basis.shape[1], dtype=torch.float64)
            seen[:size, :size] = other.span.T @ other.span
            mine, others = seen @ mine @ seen, seen @ others @ seen
        # NaN is in no space: the comparison must hold.
        return float((mine - others).abs().max()) <= SAME_SPACE * float(others.abs().max())

    @property
    def _parts(self) -> Tensor:
        """(subspaces, r / subspaces, h): the bases of the subspaces."""
        return self.basis.unflatten(0, (self.spec.subspaces, -1))

    def kernels(self, filters: Tensor) -> tuple[Tensor, Tensor | None]:
        """(m, r) filters to `Conv2d` weight (m, C, kh, kw) and bias (m,) or None."""
        raw = filters @ self.basis.to(filters)
        weight, bias = (raw[:, :-1], raw[:, -1]) if self.spec.constant else (raw, None)
        return weight.unflatten(1, (self.channels, *self.spec.kernel_size)), bias

    def filters(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Invert `kernels`; raise `InputError` for a kernel that this embedding cannot express."""
        raw = weight.flatten(1).double()
        if self.spec.constant:
            raw = torch.cat([raw, (torch.zeros(len(raw)) if bias is None else bias).double()[:, None]], dim=1)
        elif bias is not None and bool(bias.any()):
            raise InputError(
                "the network has a convolution bias but the problem has none: certify it beside a run that was trained "
                "with hidden_bias (--hidden-bias), or as a plain network"
            )
        if raw.shape[1] != self.basis.shape[1]:
            raise InputError(f"kernels must have {self.basis.shape[1]} entries a filter; got {raw.shape[1]}")
        if is_identity(self.basis):
            return raw
        # Not by torch's default, which pivots by memory that nobody has set: last bits would differ from run to run.
        filters = torch.linalg.lstsq(self.basis.T, raw.T, driver="gelsd").solution.T
        if self.spec.subspaces > 1:
            filters = filters * self.mask(filters)
        if not torch.allclose(filters @ self.basis, raw, atol=1e-5 * float(raw.abs().max()) + 1e-30, rtol=0):
            raise InputError(
                "the network's kernels lie outside the filter space of the problem (rank, subspaces or whitening): "
                "certify it as a plain network, without the run's embedding, or beside a run whose filters are free"
            )
        return filters


def _basis(moments: Moments, spec: PatchSpec) -> tuple[Tensor, float]:
    """The (r, h) basis of `spec` for patches with these moments, and the energy it keeps."""
    size = len(moments.mean)
    energy = 1.0
    if spec.rank is None and spec.whiten is None:
        directions = torch.eye(size, dtype=torch.float64)
    else:
        most = (spec.rank or size) * spec.subspaces
        eigenvalues, vectors = moments.directions(most, centred=spec.whiten is not None)
        kept, directions = eigenvalues[:most], vectors[:most].contiguous()
        # The sign of an eigenvector is arbitrary: fix it, so that equal data give equal filters.
        largest = directions.abs().argmax(dim=1, keepdim=True)
        directions = directions * directions.gather(1, largest).sign()
        energy = float(kept.sum() / eigenvalues.sum().clamp_min(1e-300))
        if spec.whiten is not None:
            directions = directions / (kept + spec.whiten).sqrt()[:, None]
    basis = torch.zeros(len(directions) + spec.hidden_bias, size + spec.constant, dtype=torch.float64)
    basis[: len(directions), :size] = directions
    if spec.whiten is not None:
        basis[: len(directions), -1] = -(directions @ moments.mean)
    if spec.hidden_bias:
        basis[-1, -1] = 1.0
    return basis, energy
