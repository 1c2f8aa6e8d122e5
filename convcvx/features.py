"""Frozen features: what a trained stage makes of images, for the next stage to train on.

The stage's rectified maps are averaged down and projected on their principal channels, which keeps the patches of
the next stage small. Features are streamed batch by batch, into a half-precision file where they are used again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from convcvx.evaluate import stream
from convcvx.images import Images
from convcvx.network import TwoLayerCNN
from convcvx.stacked_network import Link

LINK_IMAGES = 4000
"""Images whose maps a link is fitted to, evenly spread."""
LINK_ROWS = 4096
"""Positions of maps that are multiplied at once, about."""


@torch.no_grad()
def fit_link(
    stage: TwoLayerCNN, images: Images, channels: int, downsample: int, device: str = "cpu", *, paired: bool = False
) -> Link:
    """The link that keeps the principal channels of the maps of `stage` on `images`, scaled to mean square 1.

    The directions are eigenvectors of the second moment of the maps, not centred: a stage has no free bias that could
    take up a mean. At most as many channels as the stage has filters.

    `paired`: the second half of the filters are the mirror images of the first. Either half then gets half of the
    channels, in the same directions, so that the features of a mirrored image are the mirrored ones, halves swapped.
    """
    n_filters = stage.architecture.n_filters
    copies = 2 if paired else 1
    channels = min(channels, n_filters) // copies
    stage, link = stage.to(device), Link(n_filters, copies * channels, downsample, paired).to(device)
    moment, count = torch.zeros(n_filters, n_filters, dtype=torch.float64), 0
    sample = images[torch.arange(0, len(images), math.ceil(len(images) / LINK_IMAGES))]
    waiting: list[Tensor] = []
    for maps in stream(lambda part: link[0](_maps(stage, part)).movedim(1, -1).flatten(0, -2), stage, sample):
        waiting.append(maps)
        count += len(maps)
        if sum(map(len, waiting)) >= LINK_ROWS:
            moment += _moment(waiting, device)
            waiting = []
    if waiting:
        moment += _moment(waiting, device)
    moment /= copies * count
    halves = moment.unflatten(0, (copies, -1)).unflatten(2, (copies, -1))
    eigenvalues, vectors = torch.linalg.eigh(halves.diagonal(dim1=0, dim2=2).sum(dim=2))
    largest = eigenvalues.argsort(descending=True)[:channels]
    directions = vectors[:, largest].T
    # The sign of an eigenvector is arbitrary: fix it, so that a resumed stack goes on with the same features.
    directions = directions * directions.gather(1, directions.abs().argmax(dim=1, keepdim=True)).sign()
    scale = eigenvalues[largest].mean().clamp_min(1e-30).sqrt()
    weight = torch.block_diag(*copies * [directions / scale])
    link.load_state_dict({"1.weight": weight[:, :, None, None]})
    return link


def _moment(rows: list[Tensor], device: str) -> Tensor:
    """Σ x xᵀ over all rows (·, m), in float64."""
    together = torch.cat(rows).to(device)
    return (together.T @ together).double().cpu()


def stream_features(stage: nn.Module, link: nn.Module, images: Images, device: str = "cpu") -> Iterator[Tensor]:
    """The features of the images (n, C, H, W) in half precision, batch by batch."""
    stage, link = stage.to(device), link.to(device)
    return stream(lambda part: link(_maps(stage, part)).half(), stage, images)


def feature_shape(stage: nn.Module, link: nn.Module, images: Images) -> tuple[int, ...]:
    """Channels, height and width of the features."""
    return tuple(next(stream_features(stage, link, images[:1])).shape[1:])


def cache_features(file: Path, stage: nn.Module, link: nn.Module, images: Images, device: str = "cpu") -> Tensor:
    """The features of all images, float16, mapped from `file`, which may be the one that `images` are mapped from."""
    shape = feature_shape(stage, link, images)
    fresh = file.with_suffix(".new")
    size = len(images) * math.prod(shape)
    features = torch.from_file(str(fresh), shared=True, size=size, dtype=torch.float16).view(len(images), *shape)
    filled = 0
    for part in stream_features(stage, link, images, device):
        features[filled : filled + len(part)] = part
        filled += len(part)
    fresh.replace(file)  # a mapping of the file that was there stays valid until it is let go
    return features


def _maps(stage: nn.Module, images: Tensor) -> Tensor:
    """The rectified maps of a `TwoLayerCNN`."""
    convolution, relu, *_ = stage.children()
    return relu(convolution(images))
