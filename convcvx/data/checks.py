"""Whether images and targets are fit for training, and as the tensors that they then are."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convcvx.data.arrays import as_array, as_tensor
from convcvx.data.images import Images, StreamedImages
from convcvx.errors import DataError, DataWarning

DISTANCE_SAMPLE = 1 << 22
"""Pixels, of images evenly spread, by which their distance from zero is told: it need not be known to a digit."""
LOST = 1e-2
"""Share of their spread by which images, or sums over them, may be rounded before that is worth a warning."""
ALIKE = 1e-13
"""Share of its distance from zero below which what a channel differs by is the rounding of its mean."""


def check_targets(targets: Any, n: int, names: tuple[str, str] = ("images", "targets")) -> Tensor:
    """Targets of `n` images as (n,) int64 classes or (n, c) float64 real values, else a `DataError`.

    Integers of shape (n, 1) are classes, floats of shape (n,) real values with c = 1; (n, c) of 0 and 1 are labels,
    real values as well. Messages use `names`.
    """
    y = as_array(names[1], targets, DataError)
    name, width = names[1], math.prod(y.shape[1:])
    labels = y.dtype.kind in "biu" and y.ndim == 2 and width > 1 and bool(((y == 0) | (y == 1)).all())
    real = labels or y.dtype.kind == "f"
    if y.ndim not in (1, 2) or width < 1 or (width > 1 and not real):
        raise DataError(f"{name} must be (n,) integer classes or (n, c) floats; got {y.dtype} {y.shape}")
    if len(y) != n:
        raise DataError(f"{names[0]} has {n} images but {name} has {len(y)} labels: give each image one")
    if not np.isfinite(y).all():
        raise DataError(f"{name} has NaN or infinite values: repair them or remove their images")
    return torch.from_numpy(y.reshape(n, width).astype(np.float64) if real else y.reshape(n).astype(np.int64))


def check_images(
    images: Any, targets: Any, names: tuple[str, str] = ("images", "targets"), *, training: bool = True
) -> tuple[Images, Tensor]:
    """Check images (n, C, H, W) and their targets and return them as tensors; raise `DataError` if unfit.

    A single class is an error only with `training`. The range of the pixels is left to the caller.
    """
    name = names[0]
    if not isinstance(images, StreamedImages):
        images = as_tensor(name, images, DataError)
        images = images if images.is_floating_point() else images.float()
    if images.ndim != 4:
        raise DataError(f"{name} must be (n, channels, height, width); got {tuple(images.shape)}")
    if images.numel() == 0:
        raise DataError(f"{name} is empty, {tuple(images.shape)}: give at least one image")
    if not all(math.isfinite(value) for value in images.aminmax()):  # NaN propagates
        bad = sum(int((~part.flatten(1).isfinite().all(dim=1)).sum()) for part in images.split(1024))
        raise DataError(f"{name} has NaN or infinite pixels in {bad} images: repair or remove them")
    targets = check_targets(targets, len(images), names)
    if training:
        check_two_classes(targets, names[1])
    return images, targets


def check_two_classes(targets: Tensor, name: str) -> None:
    """Raise `DataError` where targets are classes, and all the same: nothing is there to be learnt of them."""
    if not targets.is_floating_point() and bool((targets == targets[0]).all()):
        advice = "training needs two or more: raise the limit, shuffle or extend the set"
        raise DataError(f"{name} has a single class in {len(targets)} images; {advice}")


def distance_from_zero(images: Images) -> float:
    """How many times their spread images (n, C, H, W) lie from zero, channel by channel; 0 where all are alike.

    That spread is all there is to learn of, and rounding goes by the distance: the offset itself cannot be taken off,
    as a filter without a bias responds to it, and the network is to take the images as they are. A channel that is the
    same everywhere, a column of ones say, hides nothing: filters weigh it as little as makes it a bias.
    """
    step = -(-images.numel() // DISTANCE_SAMPLE)
    sample = images[torch.arange(0, len(images), step)]  # in memory, of images that stay on disk as well
    pixels = sample.detach().cpu().double().transpose(0, 1).flatten(1).numpy()
    # The largest entry to about 1, exactly: squares of 1e155 overflow, and those of 1e-170 are 0.
    pixels = np.ldexp(pixels, -math.frexp(float(np.abs(pixels).max(initial=0.0)))[1])
    variances, means = torch.var_mean(torch.from_numpy(pixels), dim=1, correction=0)
    varied = variances.sqrt() > ALIKE * means.abs()
    spread, length = float(variances[varied].sum().sqrt()), float(means[varied].norm())
    return length / spread if spread > 0 else 0.0


def warn_of_lost_digits(name: str, images: Images, kind: torch.dtype) -> None:
    """Warn of images so far from zero that numbers of the `kind` they came in, or sums over them, lose what they say.

    A sum over N patches is off by N roundings at worst, and what is less than that counts as nothing in a beta_max.
    """
    if not kind.is_floating_point:  # whole numbers are exact
        return
    distance, pixels = distance_from_zero(images), images.shape[0] * images.shape[2:].numel()
    stored, summed = distance * torch.finfo(kind).eps, distance * 2 * pixels * torch.finfo(torch.float64).eps
    if max(stored, summed) <= LOST:
        return
    what = f"{str(kind).removeprefix('torch.')} rounds them" if stored > LOST else "float64 rounds sums over them"
    warnings.warn(
        f"{name} lie {distance:.1g} times their spread from zero, and {what} by {max(stored, summed):.1g} times it: "
        "subtract their mean, in float64, before anything is rounded; a hidden bias, or a column of ones, makes up for "
        "it",
        DataWarning,
        stacklevel=4,
    )
