"""The filters of a network one by one: how each looks, how much it counts, what it votes for, and where it fires."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from convcvx.data.images import Images
from convcvx.display.pictures import data_uri, image_shades, kernel_shades, marked
from convcvx.network.two_layer import TwoLayerCNN
from convcvx.patches import PatchSpec

FILTERS_SHOWN = 36
"""Filters shown one by one, those with the largest weights: the page stays one that opens at once."""
LOOKED_AT = 512
"""Images, evenly spread, among which the one is looked for that a filter fires at most."""
ENTRIES = 1 << 22
"""Entries of the maps of the filters shown that are computed at once: 16 MiB."""
VOTES = 2
"""Classes named on either side of a filter's vote."""
NOTEWORTHY = 0.25
"""Share of its largest vote from which on a filter's other votes are named."""


@dataclass(frozen=True)
class FilterCard:
    """What is shown of a filter.

    Attributes
    ----------
    index : int
        Its row in `0.weight` of the network.
    share : float
        Of the weight decay that all filters together pay.
    kernel : str
        Address of its picture.
    votes, against : list of str
        Outputs that it raises and lowers most.
    fires, box : str, tuple or None
        The image at which it responds most, with its responses over it; size of the picture and, in pixels of it, the
        patch with the largest one: width, height, x, y, patch width, patch height.
    """

    index: int
    share: float
    kernel: str
    votes: list[str]
    against: list[str]
    fires: str | None = None
    box: tuple[float, ...] = ()


def filter_cards(
    network: TwoLayerCNN,
    classes: Sequence[str],
    images: Images | None = None,
    seen: Callable[[Tensor], Tensor] = lambda images: images,
) -> list[FilterCard]:
    """The filters that count most, the heaviest first.

    Parameters
    ----------
    network : TwoLayerCNN
    classes : sequence of str
        Names of the outputs; empty for real targets.
    images : (n, C, H, W), optional
        To look where the filters fire.
    seen : callable
        What the network is given of images: features, where it is a stage of a stack.
    """
    state = network.state_dict()
    kernels, linear = state["0.weight"], state["4.weight"]
    m = len(kernels)
    weights = rearrange(linear, "c (m p) -> m p c", m=m)
    paid = weights.flatten(1).square().sum(dim=1)  # neurons are balanced: half of what weight decay is on
    order = paid.argsort(descending=True)[:FILTERS_SHOWN]
    order = order[paid[order] > 0]
    if not len(order):
        return []
    found = None if images is None else _where_they_fire(network, order, images, seen)
    pooled = torch.ones(weights.shape[:2])[order] if found is None else found.pooled
    votes = torch.einsum("mp,mpc->mc", pooled, weights[order])
    shades = kernel_shades(kernels[order])
    return [
        FilterCard(
            int(index),
            float(paid[index] / paid.sum()),
            data_uri(shades[k]),
            *_votes(votes[k], classes),
            *((None, ()) if found is None else found.picture(k)),
        )
        for k, index in enumerate(order.tolist())
    ]


def _votes(vote: Tensor, classes: Sequence[str]) -> tuple[list[str], list[str]]:
    """Outputs that are raised most, and lowered; of several classes only differences count."""
    vote = vote - vote.mean() if len(classes) > 1 else vote
    names = classes or [f"output {k}" for k in range(len(vote))] if len(vote) > 1 else ["the output"]
    least = NOTEWORTHY * float(vote.abs().max())

    def named(order: Tensor, sign: float) -> list[str]:
        return [names[k] for k in order[:VOTES].tolist() if sign * float(vote[k]) >= least > 0]

    return named(vote.argsort(descending=True), 1.0), named(vote.argsort(), -1.0)


@dataclass
class _Fired:
    """Of each filter shown: its mean pooled responses (m, P), and at which image its map is largest."""

    pooled: Tensor
    maps: list[Tensor]
    images: list[Tensor]
    network: TwoLayerCNN
    seen_size: tuple[int, int]

    def picture(self, k: int) -> tuple[str | None, tuple[float, ...]]:
        heat, image = self.maps[k], image_shades(self.images[k])
        if not float(heat.max()) > 0:
            return None, ()
        architecture = self.network.architecture
        height, width = image.shape[1:]
        down, across = height / self.seen_size[0], width / self.seen_size[1]
        top, left = divmod(int(heat.argmax()), heat.shape[1])
        (sy, sx), (py, px), (ky, kx) = architecture.stride, architecture.padding, architecture.spec.span
        box = (width, height, (left * sx - px) * across, (top * sy - py) * down, kx * across, ky * down)
        spread = _on_pixels(heat.clamp_min(0), self.seen_size, architecture.spec)  # it fires where it is positive
        return data_uri(marked(image, spread)), tuple(round(number, 2) for number in box)


def _where_they_fire(network: TwoLayerCNN, order: Tensor, images: Images, seen: Callable[[Tensor], Tensor]) -> _Fired:
    convolution, activation, pooling = network[0], network[1], network[2]
    few, kernels = copy(convolution), network.state_dict()["0.weight"]
    few._parameters = {
        name: None if parameter is None else nn.Parameter(parameter.detach()[order], requires_grad=False)
        for name, parameter in convolution._parameters.items()
    }
    tried = torch.linspace(0, len(images) - 1, min(len(images), LOOKED_AT), dtype=torch.float64).round().long().unique()
    at_once = max(1, ENTRIES // (len(order) * images.shape[2] * images.shape[3]))
    best, pooled = torch.full((len(order),), -math.inf), torch.zeros(())
    maps: list[Tensor] = [torch.empty(0)] * len(order)
    where: list[Tensor] = [torch.empty(0)] * len(order)
    size = 0, 0
    with torch.no_grad():
        for part in tried.split(at_once):
            chunk = images[part].to(kernels)
            given = seen(chunk)
            size = given.shape[2], given.shape[3]
            found = activation(few(given))
            pooled = pooled + pooling(found).flatten(2).sum(dim=0) / len(tried)
            largest, at = found.flatten(2).amax(dim=2).max(dim=0)
            for k in (largest > best).nonzero().flatten().tolist():
                maps[k], where[k] = found[at[k], k].clone(), chunk[at[k]].clone()
            best = torch.maximum(best, largest)
    return _Fired(pooled, maps, where, network, size)


def _on_pixels(heat: Tensor, size: tuple[int, int], spec: PatchSpec) -> Tensor:
    """Responses (h', w') at the centres of their patches among (h, w) pixels; 0 where no patch has its centre."""
    spread = heat
    for axis in (0, 1):
        centre = torch.arange(size[axis]) + spec.padding[axis] - (spec.span[axis] - 1) / 2
        index = (centre / spec.stride[axis]).round().long()
        inside = (index >= 0) & (index < heat.shape[axis])
        spread = spread.index_select(axis, index.clamp(0, heat.shape[axis] - 1))
        spread = spread * (inside[:, None] if axis == 0 else inside)
    return spread
