"""Images to patch rows, and the linear embedding in which filters live.

A patch row is a patch flattened as a `Conv2d` kernel is, (channels, rows, columns), contrast-normalised if
asked, with a constant 1 appended where the model needs one. A filter `u` of unit norm lives in the embedded
space R^r; its raw kernel is `u @ basis`, so that (basis @ row) . u = row . (u @ basis). Low rank, whitening
and the hidden bias are nothing but this (r, h) basis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convcvx.data.images import Images
from convcvx.errors import InputError, check_count, check_positive, is_count
from convcvx.machine.memory import check_memory

CHUNK, CHUNK_BYTES = 256, 32 << 20
"""Images, and bytes of them and their patch rows in float64, that are gathered at once."""
WHITENING_PRODUCTS = 5e10
"""Products of patch entries that whitening is fitted to: those of so many images, evenly spread."""
SAME_SPACE = 1e-6
"""Largest difference of two Gram matrices of a basis, as a share of their largest entry, that rounding may leave."""
RANK_TOLERANCE = 1e-12
"""Directions with less than this share of the largest second moment about the mean do not count towards the rank."""
ROUNDED = 8.0
"""Units of rounding of the longest direction, of the square root of the second moment, below which others are none."""
SAME_ROWS = 1e-15
"""Share of their length below which the spread of rows is rounding."""
FAR = 4.0
"""Rows further from zero than so many times their spread need steps of their own along their mean."""
DAMPING = 1e-2
"""Of second moments that steps are conditioned by, as a share of their mean diagonal entry."""


def pair(value: Any, name: str, minimum: int = 1) -> tuple[int, int]:
    """Read 3 or (3, 5) as (rows, columns)."""
    numbers = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(numbers) != 2 or not all(is_count(v, minimum) for v in numbers):
        raise InputError(f"{name} must be a whole number >= {minimum}, or a pair of them; got {value!r}")
    return int(numbers[0]), int(numbers[1])


@dataclass(frozen=True)
class PatchSpec:
    """Which patches an image has, and in which space filters act on them.

    Parameters
    ----------
    kernel_size, stride, padding : int or (int, int)
        As in `torch.nn.Conv2d` (zero padding).
    hidden_bias : bool
        Append a constant channel to the patch: a bias that is regularised with the filter.
    contrast : float, optional
        Local contrast normalisation: each patch becomes (x - mean) / sqrt(variance + contrast).
    whiten : float, optional
        ZCA whitening with this epsilon: (x - mean over patches) times (covariance + epsilon)^(-1/2).
    rank : int, optional
        Restrict filters to the first `rank` principal directions of the patches.
    paired : bool
        Mirroring an image also swaps the two halves of its channels, as it does in the features of a stage whose
        filters come in mirror pairs.
    """

    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    hidden_bias: bool = False
    contrast: float | None = None
    whiten: float | None = None
    rank: int | None = None
    paired: bool = False

    def __post_init__(self) -> None:
        for name, minimum in (("kernel_size", 1), ("stride", 1), ("padding", 0)):
            object.__setattr__(self, name, pair(getattr(self, name), name, minimum))
        for name in ("contrast", "whiten"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        if self.rank is not None:
            check_count("rank", self.rank)

    def mirrored(self, kernels: Tensor) -> Tensor:
        """Kernels (..., C, kh, kw) that see in an image what `kernels` see, at the mirrored places, in its mirror."""
        kernels = kernels.flip(-1)
        return kernels.roll(kernels.shape[-3] // 2, dims=-3) if self.paired else kernels

    @property
    def constant(self) -> bool:
        """Whether a constant 1 ends each row: for the hidden bias, or for the mean that whitening subtracts."""
        return self.hidden_bias or self.whiten is not None

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patch positions, as `Conv2d` has them."""
        padded = height + 2 * self.padding[0], width + 2 * self.padding[1]
        if padded[0] < self.kernel_size[0] or padded[1] < self.kernel_size[1]:
            raise InputError(
                f"kernel_size {self.kernel_size[0]}x{self.kernel_size[1]} is larger than the images, "
                f"{height}x{width} with padding {self.padding[0]}x{self.padding[1]}; "
                "use a smaller kernel or more padding"
            )
        return (
            (padded[0] - self.kernel_size[0]) // self.stride[0] + 1,
            (padded[1] - self.kernel_size[1]) // self.stride[1] + 1,
        )

    def windows(self, images: Tensor) -> Tensor:
        """(b, C, H, W) images to their patches (C, kh, kw, b, rows, columns): without padding a view."""
        if any(self.padding):
            vertical, horizontal = self.padding
            images = F.pad(images, (horizontal, horizontal, vertical, vertical))
        windows = images.unfold(2, self.kernel_size[0], self.stride[0]).unfold(3, self.kernel_size[1], self.stride[1])
        return windows.permute(1, 4, 5, 0, 2, 3)

    def columns(self, images: Tensor) -> Tensor:
        """(b, C, H, W) images to (h, b*K) patches, one a column, K in row-major order, h = C*kh*kw (+1 if `constant`).

        Columns, not rows: neighbouring positions are then neighbours in memory, and unrolling copies whole lines.
        """
        windows = self.windows(images)
        size = windows[..., 0, 0, 0].numel()
        columns = images.new_empty(size + self.constant, windows[0, 0, 0].numel())
        patches = columns[:size]
        if self.contrast is None:
            patches.view(windows.shape).copy_(windows)
        else:
            # From its first pixel on: a patch that is bright and flat would lose its contrast to rounding.
            torch.sub(windows, windows[:1, :1, :1], out=patches.view(windows.shape))
            # Ten times faster than torch.var_mean down the columns, and as exact.
            patches.sub_(patches.mean(dim=0))
            patches.mul_(patches.square().mean(dim=0).add_(self.contrast).rsqrt_())
        if self.constant:
            columns[size] = 1.0
        return columns

    def rows(self, images: Tensor) -> Tensor:
        """(b, C, H, W) images to (b, K, h) patch rows, a view of `columns`."""
        return self.columns(images).T.unflatten(0, (len(images), -1))


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
    """

    spec: PatchSpec
    channels: int
    basis: Tensor
    patch_rank: int
    energy: float = 1.0
    distance: float = 0.0

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
    def fit(cls, images: Images, spec: PatchSpec, chunk: int = CHUNK, *, flips: bool = False) -> PatchEmbedding:
        """Fit the basis to (n, C, H, W) images, and with `flips` to their mirror images, with one pass over them."""
        size = images.shape[1] * math.prod(spec.kernel_size)
        products = len(images) * math.prod(spec.output_size(*images.shape[2:])) * size**2
        # The reported rank is of all patches.
        step = 1 if spec.whiten is None else math.ceil(products / WHITENING_PRODUCTS)
        sample = images[torch.arange(0, len(images), step)] if step > 1 else images
        moments = Moments.of(sample, spec, chunk)
        if flips:
            moments = moments.mirrored(spec, images.shape[1])
        return cls.of_moments(moments, images.shape[1], spec)

    @classmethod
    def of_moments(cls, moments: Moments, channels: int, spec: PatchSpec) -> PatchEmbedding:
        """Fit the basis to images of which the moments of the patches are known."""
        size = channels * math.prod(spec.kernel_size)
        if spec.rank is not None and spec.rank > size:
            raise InputError(f"rank must be at most the patch size, {size}; got {spec.rank}")
        basis, energy = _basis(moments, spec)
        embedded = moments.embedded(basis, spec)
        return cls(spec, channels, basis, embedded.rank, energy, embedded.distance)

    def same_space(self, other: PatchEmbedding) -> bool:
        """Whether filters have the same kernels and the same norms in both, up to a rotation of them."""
        if self.spec != other.spec or self.basis.shape != other.basis.shape:
            return False
        mine, others = (basis.T @ basis for basis in (self.basis, other.basis))
        # NaN is in no space: the comparison must hold.
        return float((mine - others).abs().max()) <= SAME_SPACE * float(others.abs().max())

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
            raise InputError("the network has a convolution bias but the problem has none; set hidden_bias=True")
        if raw.shape[1] != self.basis.shape[1]:
            raise InputError(f"kernels must have {self.basis.shape[1]} entries a filter; got {raw.shape[1]}")
        filters = torch.linalg.lstsq(self.basis.T, raw.T).solution.T
        if not torch.allclose(filters @ self.basis, raw, atol=1e-5 * float(raw.abs().max()) + 1e-30, rtol=0):
            raise InputError(
                "the network's kernels lie outside the filter space of the problem (rank or whitening): "
                "certify it as a plain network, without the run's embedding"
            )
        return filters


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of patch rows, each as exact as its own size allows.

    Their sum of squares about zero would drown what tells rows far from zero apart.

    Attributes
    ----------
    mean : Tensor (d,) float64
    covariance : Tensor (d, d) float64
    """

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, images: Images, spec: PatchSpec, chunk: int = CHUNK) -> Moments:
        """Those of all patches, without a constant that ends them, with one pass over the images."""
        about = provisional_mean(images, spec)
        return cls.about(about, shifted_moment(images, spec, about, chunk))

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

    def directions(self, *, centred: bool = False) -> tuple[Tensor, Tensor]:
        """Eigenvalues, largest first, and eigenvectors (rows) of the second moment, or of the covariance if `centred`.

        The singular values of a root of the second moment: their squares would be of no more than half its digits.
        """
        eigenvalues, vectors = torch.linalg.eigh(self.covariance)
        eigenvalues, vectors = eigenvalues.clamp_min(0).flip(0), vectors.T.flip(0)
        if centred:
            return eigenvalues, vectors
        root = torch.cat([self.mean[None], eigenvalues.sqrt()[:, None] * vectors])
        _, sizes, vectors = torch.linalg.svd(root, full_matrices=False)
        return sizes.square(), vectors

    @property
    def span(self) -> Tensor:
        """(rank, d) orthonormal rows that span all rows but for rounding, largest directions first."""
        eigenvalues, vectors = self.directions()
        spread = float(torch.linalg.eigvalsh(self.covariance)[-1]) if self.distance else float(eigenvalues.max())
        rounded = (ROUNDED * torch.finfo(eigenvalues.dtype).eps) ** 2 * float(eigenvalues.max())
        return vectors[eigenvalues > max(RANK_TOLERANCE * spread, rounded, 1e-300)]

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
        frame, _ = self.nearer()
        moment = Moments(frame @ self.mean, frame @ self.covariance @ frame.T).second
        moment = moment / moment.diagonal().mean().clamp_min(1e-300)
        moment.diagonal().add_(DAMPING)
        return moment


def provisional_mean(images: Images, spec: PatchSpec) -> Tensor:
    """(d,): the mean patch of the first image, without a constant that ends it."""
    _image_bytes(images, spec)
    return replace(spec, hidden_bias=False, whiten=None).columns(images[:1].cpu().double()).mean(dim=1)


def shifted_moment(images: Images, spec: PatchSpec, about: Tensor, chunk: int = CHUNK) -> Tensor:
    """(d + 1, d + 1) mean of row rowᵀ over all rows (patch - `about`, 1), accumulated in float64."""
    spec = replace(spec, hidden_bias=True)  # which ends rows with a one
    total, count = torch.zeros((), dtype=torch.float64), 0
    for part in images.split(min(chunk, max(1, CHUNK_BYTES // _image_bytes(images, spec)))):
        columns = spec.columns(part.cpu().double())
        columns[:-1] -= about[:, None]
        total = total + columns @ columns.T
        count += columns.shape[1]
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


def _basis(moments: Moments, spec: PatchSpec) -> tuple[Tensor, float]:
    """The (r, h) basis of `spec` for patches with these moments, and the energy it keeps."""
    size = len(moments.mean)
    energy = 1.0
    if spec.rank is None and spec.whiten is None:
        directions = torch.eye(size, dtype=torch.float64)
    else:
        eigenvalues, vectors = moments.directions(centred=spec.whiten is not None)
        kept, directions = eigenvalues[: spec.rank or size], vectors[: spec.rank or size].contiguous()
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
