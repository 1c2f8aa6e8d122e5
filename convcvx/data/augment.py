"""Images moved by a few pixels, to train on besides the images as they are."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from convcvx.data.datasets import Dataset
from convcvx.data.images import StreamedImages
from convcvx.errors import InputError, check_count

VERSIONS = 5
"""Versions of an image that `shifted` makes."""


def shifted(dataset: Dataset, pixels: int) -> Dataset:
    """All images, then all moved by so many pixels left, right, up, down: `VERSIONS` of them. Zeros move in."""
    check_count("shifts", pixels)
    if isinstance(dataset.images, StreamedImages):
        raise InputError(f"images that stay on disk, as those of {dataset.name} do, cannot be shifted; drop shifts")
    height, width = dataset.images.shape[2:]
    if pixels >= min(height, width):
        raise InputError(f"shifts must be smaller than the images, {height}x{width}; got {pixels}")
    wide = F.pad(dataset.images, 4 * (pixels,))
    corners = [(1, 1), (1, 2), (1, 0), (2, 1), (0, 1)]
    versions = [wide[:, :, y * pixels :, x * pixels :][:, :, :height, :width] for y, x in corners]
    targets = dataset.targets.repeat(VERSIONS, *[1] * (dataset.targets.ndim - 1))
    weights = None if dataset.weights is None else dataset.weights.repeat(VERSIONS)
    return replace(dataset, images=torch.cat(versions), targets=targets, weights=weights)


def random_moves(count: int, pixels: int, generator: torch.Generator) -> Tensor:
    """(count, 2): by how many pixels an image is moved up and left, where `pixels` of them leave it where it is."""
    return torch.randint(2 * pixels + 1, (2, count), generator=generator).T


def moved(images: Tensor, pixels: int, moves: Tensor) -> Tensor:
    """Each of the images (b, C, H, W) moved by its `random_moves` (b, 2) of up to so many pixels. Zeros move in."""
    height, width = images.shape[2:]
    windows = F.pad(images, 4 * (pixels,)).unfold(2, height, 1).unfold(3, width, 1)  # (b, C, moves, moves, H, W)
    down, right = moves.T.to(images.device)
    return windows[torch.arange(len(images), device=images.device), :, down, right]
