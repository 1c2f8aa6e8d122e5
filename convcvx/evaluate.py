"""How good a network is on data: predictions, loss, accuracy, confusion."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from convcvx.images import Images
from convcvx.losses import encode_targets, get_loss


@torch.no_grad()
def predict(network: nn.Module, images: Images, batch: int = 8) -> Tensor:
    """Network outputs (n, c), computed in batches on the network's own device."""
    parameter = next(network.parameters())
    was_training = network.training
    network.eval()
    outputs = [network(part.to(parameter)).cpu() for part in images.split(batch)]
    network.train(was_training)
    return torch.cat(outputs)


def accuracy(predictions: Tensor, targets: Tensor) -> float:
    """Share of rows whose largest output is the class."""
    return float((predictions.argmax(dim=1) == targets).double().mean())


def mean_loss(predictions: Tensor, targets: Tensor, loss: str) -> float:
    """(1/n) Σ ℓ(f_i, y_i)."""
    encoded = encode_targets(targets, loss, predictions.shape[1])
    return float(get_loss(loss).value(predictions.double(), encoded).mean())


def confusion(predictions: Tensor, targets: Tensor) -> Tensor:
    """(c, c) counts: row the true class, column the predicted one."""
    c = predictions.shape[1]
    return torch.bincount(targets * c + predictions.argmax(dim=1), minlength=c * c).view(c, c)
