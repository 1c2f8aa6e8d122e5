"""Frozen features: what a trained stage makes of images, for the next stage to train on.

The stage's activated maps are averaged down and projected on their principal channels, which keeps the patches of
the next stage small. They are streamed as pooled responses are, which is faster than the torch module, into a
half-precision file where they are used again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from convcvx.activations import Activation
from convcvx.data.images import Images
from convcvx.machine.watch import watched
from convcvx.network.two_layer import TwoLayerCNN
from convcvx.patches import PatchEmbedding
from convcvx.pooling import Pooling
from convcvx.responses.passes import Responses
from convcvx.responses.streams import SPAN
from convcvx.responses.team import Team
from convcvx.stack.network import Link

LINK_IMAGES = 4000
"""Images whose maps a link is fitted to, evenly spread."""


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
    link = Link(n_filters, copies * channels, downsample, paired)
    sample = images[torch.arange(0, len(images), math.ceil(len(images) / LINK_IMAGES))]
    moment, count = torch.zeros(n_filters, n_filters, dtype=torch.float64), 0
    for maps in _maps(stage, downsample, sample, device):
        rows = rearrange(maps, "n c h w -> (n h w) c")
        moment += (rows.T @ rows).double().cpu()
        count += len(rows)
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


def stream_features(stage: TwoLayerCNN, link: Link, images: Images, device: str = "cpu") -> Iterator[Tensor]:
    """The features of the images (n, C, H, W) in half precision, some images at a time."""
    weight = link.state_dict()["1.weight"].flatten(1).to(device, torch.float32)
    for maps in _maps(stage, link.downsample, images, device):
        yield (weight @ maps.flatten(2)).unflatten(2, maps.shape[2:]).half().cpu()


def feature_shape(stage: TwoLayerCNN, link: Link, images: Images) -> tuple[int, ...]:
    """Channels, height and width of the features."""
    return tuple(next(stream_features(stage, link, images[:1])).shape[1:])


def cache_features(file: Path, stage: TwoLayerCNN, link: Link, images: Images, device: str = "cpu") -> Tensor:
    """The features of all images, float16, mapped from `file`, which may be the one that `images` are mapped from."""
    with _new_file(file, len(images), feature_shape(stage, link, images)) as features:
        filled = 0
        streamed = stream_features(stage, link, images, device)
        for part in watched("features of the images", streamed, len(images), size=len):
            features[filled : filled + len(part)] = part
            filled += len(part)
    return features


@contextmanager
def _new_file(file: Path, n: int, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Features (n, *shape) to be written, mapped from a file that takes the place of `file` when they are."""
    fresh = file.with_suffix(".new")
    yield torch.from_file(str(fresh), shared=True, size=n * math.prod(shape), dtype=torch.float16).view(n, *shape)
    fresh.replace(file)  # a mapping of the file that was there stays valid until it is let go


def share_features(
    team: Team, file: Path, stage: TwoLayerCNN, link: Link, images: Images, device: str = "cpu"
) -> Tensor:
    """`cache_features` of the images that `team` shares: each process makes those of its own images, and keeps them."""
    if team.size == 1:
        features = cache_features(file, stage, link, images, device)
    else:
        team.transform(_own_features, (stage.cpu(), link, device))
        with _new_file(file, len(images), feature_shape(stage, link, images)) as features:
            for where, part in team.gathered():
                features[where] = part
    team.keep(features)
    return features


def _own_features(images: Images, source: tuple[TwoLayerCNN, Link, str]) -> Tensor:
    """What one process makes of its images, in a file without a name."""
    stage, link, device = source
    with TemporaryDirectory(prefix="convcvx-") as folder:
        return cache_features(Path(folder) / "features", stage, link, images, device)


def _maps(stage: TwoLayerCNN, downsample: int, images: Images, device: str) -> Iterator[Tensor]:
    """The activated maps (b, m, H, W) of `stage`, averaged down, some images at a time."""
    a = stage.architecture
    state = stage.state_dict()
    kernels = state["0.weight"].flatten(1)
    if a.hidden_bias:
        kernels = torch.cat([kernels, state["0.bias"][:, None]], dim=1)
    activation, size = Activation.of(a.activation), kernels.shape[1]
    embedding = PatchEmbedding(a.spec, a.image_shape[0], torch.eye(size, dtype=torch.float64), size, 1.0)
    pooling = Pooling("window", (downsample, downsample), (downsample, downsample))
    how: dict[str, Any] = {"dtype": torch.float32, "device": device, "activation": activation}
    responses = Responses(images, embedding, pooling, **how)
    grid = pooling.output_size(*responses.map_size)
    at_once = SPAN * torch.get_num_threads()
    filters = activation.filters(kernels)
    for _, block in responses.blocks(filters, at_once * len(filters) * responses.n_cells * responses.dtype.itemsize):
        yield block.unflatten(2, grid)
