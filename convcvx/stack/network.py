"""The stacked network: two-layer networks, each on the maps of the one before, as one torch module.

A stage is a whole `TwoLayerCNN` with a head of its own. The link to the next one takes its activated maps,
averages them down and keeps their principal channels with a 1x1 convolution. Files are safetensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from convcvx.errors import RunError, one_line
from convcvx.network.architecture import ARCHITECTURE, Architecture
from convcvx.network.export import export
from convcvx.network.pretrained import find_pretrained
from convcvx.network.two_layer import TwoLayerCNN
from convcvx.storage.places import MODEL
from convcvx.storage.reading import form_fault, open_tensors, user_path

DESCRIPTION = {
    "stages": [ARCHITECTURE],
    "links": [{"n_filters": int, "channels": int, "downsample": int, "paired?": bool}],
    "ensemble": bool,
    "meta": {},
}
"""Form of what a file says of its network."""


class Link(nn.Sequential):
    """Activated maps (n, m, H, W) to the features (n, channels, H // downsample, W // downsample) of the next stage.

    `paired`: mirroring an image mirrors its features and swaps the two halves of their channels.
    """

    def __init__(self, n_filters: int, channels: int, downsample: int, paired: bool = False) -> None:
        super().__init__(nn.AvgPool2d(downsample), nn.Conv2d(n_filters, channels, 1, bias=False))
        self.downsample, self.paired = downsample, paired
        self.description = {
            "n_filters": n_filters,
            "channels": channels,
            "downsample": downsample,
            "paired": paired,
        }


class StackedCNN(nn.Module):
    """Stages with links between them; the scores are those of the last head, or the mean over all heads.

    Parameters
    ----------
    stages : sequence of TwoLayerCNN
    links : sequence of Link
        One fewer than the stages.
    ensemble : bool
        Average the heads of all stages.
    """

    def __init__(self, stages: Sequence[TwoLayerCNN], links: Sequence[Link], *, ensemble: bool = False) -> None:
        super().__init__()
        self.stages, self.links, self.ensemble = nn.ModuleList(stages), nn.ModuleList(links), ensemble
        self.meta: dict[str, Any] = {}
        self._described = {
            "stages": [asdict(stage.architecture) for stage in stages],
            "links": [link.description for link in links],
            "ensemble": ensemble,
        }

    def _layers(self) -> list[tuple[nn.Module, ...]]:
        """Convolution, activation, pooling, Flatten and Linear of every stage."""
        return [tuple(stage.children()) for stage in self.stages]

    def forward(self, images: Tensor) -> Tensor:
        """(n, C, H, W) to (n, c)."""
        scores, features = [], images
        for k, (convolution, activation, pooling, flatten, linear) in enumerate(self._layers()):
            maps, last = activation(convolution(features)), k == len(self.links)
            if last or self.ensemble:
                scores.append(linear(flatten(pooling(maps))))
            if not last:
                features = self.links[k](maps)
        return torch.stack(scores).mean(dim=0)

    def features(self, images: Tensor, stage: int) -> Tensor:
        """What `stage` (0 is the first) sees of the images (n, C, H, W)."""
        for (convolution, activation, *_), link in zip(self._layers()[:stage], self.links[:stage], strict=True):
            images = link(activation(convolution(images)))
        return images

    def sequential(self) -> nn.Sequential:
        """The layers behind the last head, shared with this module, as a plain `nn.Sequential`."""
        *earlier, last = self._layers()
        body: list[nn.Module] = []
        for (convolution, activation, *_), link in zip(earlier, self.links, strict=True):
            body += [convolution, activation, *link.children()]
        return nn.Sequential(*body, *last)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], *, revision: str | None = None) -> StackedCNN:
        """As `TwoLayerCNN.from_pretrained`."""
        return stacked_cnn(find_pretrained(name, revision))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images it takes."""
        first: TwoLayerCNN = self.stages[0]  # type: ignore[assignment]
        return first.image_shape

    def export_onnx(self, path: str | Path) -> None:
        """As `TwoLayerCNN.export_onnx`."""
        export(self, self.image_shape, path, "onnx")

    def to_bytes(self) -> bytes:
        """A self-describing safetensors file: weights, architecture of every stage and link, and `meta`."""
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        return save(tensors, {"convcvx": json.dumps(self._described | {"meta": self.meta})})


def stacked_cnn(path: str | Path) -> StackedCNN:
    """Load the `StackedCNN` of a file or of a folder that `convcvx stack` left."""
    path = user_path(path)
    path = path / MODEL if path.is_dir() else path
    state, described = open_tensors(path)
    if fault := form_fault(described, DESCRIPTION):
        raise RunError(f"cannot read a stacked network from {path}: {fault}")
    try:
        stages = [Architecture.from_dict(stage) for stage in described["stages"]]

        def build() -> StackedCNN:
            networks, links = [TwoLayerCNN(stage) for stage in stages], [Link(**link) for link in described["links"]]
            return StackedCNN(networks, links, ensemble=described["ensemble"])

        with torch.device("meta"):  # takes no memory, however large the described network is
            expected = {name: tensor.shape for name, tensor in build().state_dict().items()}
        if expected != {name: tensor.shape for name, tensor in state.items()}:
            raise ValueError("the weights do not fit the architecture")
        network = build()
        network.load_state_dict(state)
    except (AttributeError, OverflowError, ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise RunError(f"cannot read a stacked network from {path}: {one_line(error)}") from None
    network.meta = described["meta"]
    return network.eval()
