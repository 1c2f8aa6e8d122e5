"""The losses by name."""

from __future__ import annotations

from convcvx.errors import check_choice
from convcvx.losses.base import Loss
from convcvx.losses.binary_cross_entropy import BinaryCrossEntropy
from convcvx.losses.cross_entropy import CrossEntropy
from convcvx.losses.squared import Squared

LOSSES: dict[str, Loss] = {loss.name: loss for loss in (Squared(), CrossEntropy(), BinaryCrossEntropy())}


def get_loss(name: str) -> Loss:
    """The loss called `name`."""
    return LOSSES[check_choice("loss", name, LOSSES)]
