"""Mean and covariance of patches, and what follows from them: rank, principal directions, coordinates for steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg.lapack import dpstrf
from torch import Tensor

from convcvx.data.images import Images
from convcvx.machine.memory import check_memory
from convcvx.patches.pixel_moments import suits, sum_over_patches
from convcvx.patches.spec import PatchSpec

CHUNK = 256
"""Images that are gathered at once at most: their patches are then few enough for a product to be quick."""
CHUNK_BYTES = 8 << 20
"""Bytes of images and their patch rows in float64 that are gathered at once: with four times as many, which lie beyond
a processor's caches, normalised contrast takes up to twice as long."""
RANK_TOLERANCE = 1e-12
"""Directions with less than this share of the largest second moment about the mean do not count towards the rank."""
ROUNDED = 8.0
"""Units of rounding of the longest direction, of the square root of the second moment, below which others are none."""
SAME_ROWS = 1e-15
"""Share of their length below which the spread of rows is rounding."""
FAR = 4.0
"""Rows further from zero than so many times their spread need steps of their own along their mean."""
SPARSE = 2
"""A share 1 / `SPARSE` of all directions at most is told by a pivoted Cholesky factor."""
DAMPING = 1e-2
"""Of second moments that steps are conditioned by, as a share of their mean diagonal entry."""


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of patch rows, each as exact as its own size allows.

    Their sum of squares about zero would drown what tells rows far from zero apart.

    Attributes
    ----------
    mean : Tensor (d,) float64
    covariance : Tensor (d, d) float64
    dense : bool
        Whether to work out all its directions, be they 0 or not.
    """

    mean: Tensor
    covariance: Tensor
    dense: bool = False

    @classmethod
    def of(cls, images: Images, spec: PatchSpec, chunk: int = CHUNK, weights: Tensor | None = None) -> Moments:
        """Those of all patches, without a constant that ends them, with one pass over the images.

        With `weights` (n,) of the images, none of them 0, an image of weight 2 counts twice.
        """
        about = provisional_mean(images, spec)
        return cls.about(about, shifted_moment(images, spec, about, chunk, weights))

    @classmethod
    def of_rows(cls, rows: Tensor) -> Moments:
        """Those of (N, d) rows in memory."""
        mean = rows.mean(dim=0)
        centred = rows - mean
        return cls(mean, centred.T @ centred / len(rows))

    @classmethod
    def about(cls, about: Tensor, moment: Tensor) -> Moments:
        """Those of rows x for which the mean of (x - `about`, 1) times itself is `moment` (d + 1, d + 1)."""
        shift = moment[-1, :-1]
        return cls(about + shift, moment[:-1, :-1] - torch.outer(shift, shift))

    def mirrored(self, spec: PatchSpec, channels: int) -> Moments:
        """Those of the patches and of their mirror images together."""
        order = spec.mirrored(torch.arange(len(self.mean)).view(channels, *spec.kernel_size)).flatten()
        half = 0.5 * (self.mean - self.mean[order])
        covariance = 0.5 * (self.covariance + self.covariance[order][:, order])
        return Moments(self.mean - half, covariance + torch.outer(half, half))

    def embedded(self, basis: Tensor, spec: PatchSpec) -> Moments:
        """Those of the patches in the space of a `basis` (r, h), a constant that ends them included."""
        size = len(self.mean)
        if is_identity(basis):
            beyond = len(basis) - size
            return Moments(F.pad(self.mean, (0, beyond), value=1.0), F.pad(self.covariance, (0, beyond, 0, beyond)))
        constant = basis[:, -1] if spec.constant else 0.0
        return Moments(basis[:, :size] @ self.mean + constant, basis[:, :size] @ self.covariance @ basis[:, :size].T)

    @property
    def second(self) -> Tensor:
        """(d, d): the mean of row times row, about zero."""
        return self.covariance + torch.outer(self.mean, self.mean)

    @cached_property
    def distance(self) -> float:
        """How many times their spread the rows lie from zero; 0 for rows that are all the same."""
        spread = float(self.covariance.diagonal().sum().clamp_min(0).sqrt())
        length = float(self.mean.norm())
        return length / spread if spread > SAME_ROWS * length else 0.0

    @cached_property
    def principal(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (k,), largest first, and eigenvectors (k, d) of the covariance; others, if any, are 0 but for
        rounding.

        Of many directions to few rows k is small: a pivoted Cholesky factor shows these for a hundredth of the time.
        """
        factor, pivots, k, _ = dpstrf(self.covariance.numpy(), lower=1)
        if self.dense or not 0 < SPARSE * k <= len(factor):
            eigenvalues, vectors = torch.linalg.eigh(self.covariance)
            return eigenvalues.clamp_min(0).flip(0), vectors.T.flip(0)
        root = np.empty((len(factor), k))
        root[pivots - 1] = np.tril(factor)[:, :k]
        vectors, sizes, _ = torch.linalg.svd(torch.from_numpy(root), full_matrices=False)
        return sizes.square(), vectors.T.contiguous()

    def directions(self, most: int | None = None, *, centred: bool = False) -> tuple[Tensor, Tensor]:
        """Eigenvalues, largest first, and eigenvectors (rows) of the second moment, or of the covariance if `centred`.

        All d, or those not 0 but for rounding if that gives `most` of them. The singular values of a root of the second
        moment: their squares would be of no more than half its digits.
        """
        eigenvalues, vectors = self.principal
        if len(vectors) < (len(self.mean) if most is None else most):
            eigenvalues, vectors = replace(self, dense=True).principal
        if centred:
            return eigenvalues, vectors
        root = torch.cat([self.mean[None], eigenvalues.sqrt()[:, None] * vectors])
        _, sizes, vectors = torch.linalg.svd(root, full_matrices=False)
        return sizes.square(), vectors

    @property
    def span(self) -> Tensor:
        """(rank, d) orthonormal rows that span all rows but for rounding, largest directions first."""
        spread, _ = self.principal
        eigenvalues, vectors = self.directions(len(spread))
        largest = float(spread[0]) if self.distance else float(eigenvalues.max())
        rounded = (ROUNDED * torch.finfo(eigenvalues.dtype).eps) ** 2 * float(eigenvalues.max())
        return vectors[eigenvalues > max(RANK_TOLERANCE * largest, rounded, 1e-300)]

    @property
    def rank(self) -> int:
        return len(self.span)

    @property
    def far(self) -> bool:
        """Whether filters that tell these rows apart are all but orthogonal to their mean."""
        return self.distance > FAR

    def nearer(self) -> tuple[Tensor, Tensor]:
        """F (d, d) and its inverse: rows F x lie `FAR` mean deviations from zero where rows x are far; else identities.

        What a filter has along the mean is, times the length of the mean, a bias. In coordinates w of filters u = w F
        gradient steps are as good for that bias as for what meets the rows. It is the last of them alone, as what is
        linear on all rows may have a huge one.
        """
        identity = torch.eye(len(self.mean), dtype=torch.float64)
        if not self.far:
            return identity, identity
        length = float(self.mean.norm())
        mirror = self.mean / length - identity[-1]
        axes = identity - 2 / float(mirror.square().sum().clamp_min(1e-300)) * torch.outer(mirror, mirror)
        scales = torch.ones(len(axes), dtype=torch.float64)
        scales[-1] = FAR * float(self.covariance.diagonal().mean().sqrt()) / length
        return scales[:, None] * axes, axes / scales

    def damped(self) -> Tensor:
        """(d, d) second moment of rows F x of `nearer`, scaled to unit mean, damped by a hundredth."""
        moment = self.second
        if self.far:
            frame, _ = self.nearer()
            moment = Moments(frame @ self.mean, frame @ self.covariance @ frame.T).second
        moment = moment / moment.diagonal().mean().clamp_min(1e-300)
        moment.diagonal().add_(DAMPING)
        return moment

    def preconditioner(self) -> Tensor:
        """(d, d): the inverse square root of `damped`."""
        eigenvalues, vectors = self.principal
        if self.far or SPARSE * len(vectors) > len(self.mean):
            eigenvalues, vectors = torch.linalg.eigh(self.damped())
            return vectors * eigenvalues.rsqrt() @ vectors.T
        eigenvalues, vectors = self.directions(len(vectors))
        scale = (eigenvalues.sum() / len(self.mean)).clamp_min(1e-300)
        root = (eigenvalues / scale + DAMPING).rsqrt() - DAMPING**-0.5
        root = vectors.T * root @ vectors
        root.diagonal().add_(DAMPING**-0.5)
        return root


def is_identity(basis: Tensor) -> bool:
    """Whether filters are kernels: products with a basis of thousands of rows, which take minutes, can be left out."""
    square = len(basis) == basis.shape[1]  # the first of more directions are fewer than a kernel has
    return square and torch.equal(basis, torch.eye(len(basis), dtype=basis.dtype, device=basis.device))


def provisional_mean(images: Images, spec: PatchSpec) -> Tensor:
    """(d,): the mean patch of the first image, without a constant that ends it."""
    _image_bytes(images, spec)
    return replace(spec, hidden_bias=False, whiten=None).columns(images[:1].cpu().double()).mean(dim=1)


def shifted_moment(
    images: Images, spec: PatchSpec, about: Tensor, chunk: int = CHUNK, weights: Tensor | None = None
) -> Tensor:
    """(d + 1, d + 1) mean of row rowᵀ over all rows (patch - `about`, 1), accumulated in float64.

    With `weights` (n,) of the images a weighted mean.
    """
    image_bytes = _image_bytes(images, spec)
    spec = replace(spec, hidden_bias=False, whiten=None, subspaces=1)
    if suits(spec, images):
        moment = sum_over_patches(images, spec, about, chunk, weights)
        return moment / moment[-1, -1]
    chunk = min(chunk, max(1, CHUNK_BYTES // image_bytes))
    spec = replace(spec, hidden_bias=True)  # which ends rows with a one
    total, count, seen = torch.zeros((), dtype=torch.float64), 0.0, 0
    for part in images.split(chunk):
        columns = spec.columns(part.cpu().double())
        columns[:-1] -= about[:, None]
        if weights is None:
            total = total + columns @ columns.T
            count += columns.shape[1]
        else:
            each = weights[seen : seen + len(part)].double().repeat_interleave(columns.shape[1] // len(part))
            total = total + columns @ (columns * each).T
            count += float(each.sum())
        seen += len(part)
    return total / count


def _image_bytes(images: Images, spec: PatchSpec) -> int:
    """Of an image and its patches in float64, for which there has to be memory."""
    positions = math.prod(spec.output_size(*images.shape[2:]))
    size = images.shape[1] * math.prod(spec.kernel_size) + 1
    image_bytes = 8 * math.prod(images.shape[1:]) + 8 * positions * size
    check_memory(
        3 * image_bytes + 24 * size**2,  # a copy or two of an image's patches, and of the moment
        f"kernel_size {spec.kernel_size} with stride {spec.stride} and padding {spec.padding} on these images",
        "take a smaller kernel, a larger stride or less padding",
    )
    return image_bytes
