"""How good a network is on data: predictions, loss, accuracy, confusion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from convcvx.data.images import Images
from convcvx.losses.table import get_loss
from convcvx.losses.targets import LABELLED, encode_targets
from convcvx.machine.threads import each
from convcvx.machine.watch import watched
from convcvx.responses.passes import Responses
from convcvx.responses.streams import Stream
from convcvx.responses.table import Pass

HIDDEN_SIZE = {"cpu": 1 << 21, "cuda": 1 << 27}
"""Entries of the widest layer's maps, at the images' resolution, that are computed at once, by device: larger maps
leave the cache of a CPU, which then takes several times as long; a GPU wants many, within its memory. Devices that are
not named here get as many as a CPU."""
ROUNDED = 64 * torch.finfo(torch.float64).eps
"""Share of their length by which targets that are equal seem to vary at most, by rounding."""
SHARE = 1024
"""Images that each process gets at a time, where several compute outputs: so many are in memory besides."""


def predict(network: nn.Module, images: Images, responses: Responses | None = None) -> Tensor:
    """Network outputs (n, c) on the CPU in evaluation mode, computed on the network's own device.

    Of `responses` that are shared among processes these have a part of the work; any images will do.
    """
    if responses is not None and responses.n_processes > 1:
        parts = images.split(SHARE * responses.n_processes)
        return torch.cat([out for part in parts for out in responses.apply(_outputs, part.split(SHARE), network)])
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        return outputs_of(network, images)
    finally:
        for module, training in modes.items():
            module.training = training


def _outputs(images: Tensor, network: nn.Module) -> Tensor:
    return predict(network, images)


def outputs_of(network: nn.Module, images: Images) -> Tensor:
    """Network outputs (n, c) on the CPU in the mode that the network is in, computed on its own device.

    So many images at once that the maps of the widest layer have about `HIDDEN_SIZE` entries.
    """
    parameters = list(network.parameters())
    device = parameters[0].device.type
    widest = max([1, *(parameter.shape[0] for parameter in parameters if parameter.ndim)])  # a number has no axes
    size = max(1, HIDDEN_SIZE.get(device, HIDDEN_SIZE["cpu"]) // (widest * images.shape[2] * images.shape[3]))

    def outputs(part: Tensor) -> Tensor:
        with torch.no_grad():
            return network(part.to(parameters[0])).cpu()

    parts = images.split(size)
    # Copied at once: small results that are kept lie between the large arrays of later parts, whose memory then grows.
    together, filled = torch.empty(0), 0
    with _channels_last(parameters if device == "cpu" and _takes_any_layout(network) else ()):
        found = map(outputs, parts) if device != "cpu" else each(outputs, parts)
        for part in watched("outputs of the network", found, len(images), size=len):
            if not filled:
                together = part.new_empty(len(images), *part.shape[1:])
            together[filled : filled + len(part)] = part
            filled += len(part)
    return together[:filled]  # of a network that gives fewer rows than there are images


def _of_stream(stream: Stream, network: nn.Module) -> list[Tensor]:
    """The outputs for the images that responses are to."""
    return [outputs_of(network, stream.images)]


OUTPUTS = Pass(_of_stream, ("cat",), exact=False)
"""Not exact: nothing is summed, and a process has its images at once, as one alone has them all."""


def _takes_any_layout(network: nn.Module) -> bool:
    """Whether all modules are torch's or ours; others may `view` maps, which their layout has to allow."""
    return all(type(module).__module__.startswith(("torch.nn", "convcvx")) for module in network.modules())


@contextmanager
def _channels_last(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Kernels laid out with their channels last, for a while: as oneDNN, on a CPU, convolves 1.5 to 3 times as fast."""
    kernels = [(part, part.data) for part in parameters if part.ndim == 4 and part.dtype == torch.float32]
    try:
        for part, data in kernels:
            part.data = data.to(memory_format=torch.channels_last)  # `contiguous` leaves kernels of one channel alone
        yield
    finally:
        for part, data in kernels:
            part.data = data


def accuracy(predictions: Tensor, targets: Tensor, weights: Tensor | None = None) -> float:
    """Share of rows whose largest output is the class, each counting for its weight (n,)."""
    return _mean((predictions.argmax(dim=1) == targets).double(), weights)


def mean_loss(predictions: Tensor, targets: Tensor, loss: str, weights: Tensor | None = None) -> float:
    """(1/n) Σ ℓ(f_i, y_i), or Σ w_i ℓ(f_i, y_i) / Σ w_i with weights (n,)."""
    encoded = encode_targets(targets, loss, predictions.shape[1])
    return _mean(get_loss(loss).value(predictions.double(), encoded), weights)


def real_scores(predictions: Tensor, targets: Tensor, loss: str, weights: Tensor | None = None) -> dict[str, float]:
    """Scores of outputs (n, c) for targets (n, c) that are no classes: the loss and what its users look at.

    For labels the share of rows with all of them right, and the F1 score of each label, averaged: a label is predicted
    where its output is above 0. For real values, where they vary, R²: the share of the variance of all outputs that is
    explained.
    """
    scores = {"loss": mean_loss(predictions, targets, loss, weights)}
    if loss not in LABELLED and not get_loss(loss).takes_real:
        return scores
    if loss not in LABELLED:
        total = _mean((targets - _means(targets, weights)).square().sum(dim=1), weights)
        residual = _mean((predictions.double() - targets).square().sum(dim=1), weights)
        rounding = ROUNDED**2 * _mean(targets.square().sum(dim=1), weights)
        return scores | ({"r2": 1 - residual / total} if total > rounding else {})
    found, there = predictions > 0, targets > 0.5
    counts = torch.ones(len(targets), dtype=torch.float64) if weights is None else weights
    hits, named = counts @ (found & there).double(), counts @ found.double() + counts @ there.double()
    f1 = torch.where(named > 0, 2 * hits / named.clamp_min(1e-300), 0.0)
    return scores | {"exact_match": _mean((found == there).all(dim=1).double(), weights), "macro_f1": float(f1.mean())}


def _means(rows: Tensor, weights: Tensor | None) -> Tensor:
    return rows.mean(dim=0) if weights is None else weights @ rows / weights.sum()


def _mean(values: Tensor, weights: Tensor | None) -> float:
    return float(values.mean() if weights is None else weights @ values / weights.sum())


def confusion(predictions: Tensor, targets: Tensor) -> Tensor:
    """(c, c) counts: row the true class, column the predicted one."""
    c = predictions.shape[1]
    return torch.bincount(targets * c + predictions.argmax(dim=1), minlength=c * c).view(c, c)
