"""The losses by name."""

from __future__ import annotations

from convcvx.errors import InputError, check_choice, check_positive, shown
from convcvx.losses.base import Loss
from convcvx.losses.binary_cross_entropy import BinaryCrossEntropy
from convcvx.losses.cross_entropy import CrossEntropy
from convcvx.losses.huber import Huber
from convcvx.losses.squared import Squared
from convcvx.losses.squared_hinge import SquaredHinge
from convcvx.terms.numbers import read_number

LOSSES: dict[str, Loss] = {
    loss.name: loss for loss in (Squared(), CrossEntropy(), BinaryCrossEntropy(), Huber(), SquaredHinge())
}


def get_loss(name: str) -> Loss:
    """The loss called `name`; "huber:0.5" has a δ of its own."""
    if isinstance(name, str) and name.startswith("huber:"):
        try:
            delta = read_number(name.removeprefix("huber:"))
        except ValueError:
            raise InputError(f"loss huber:DELTA needs a number; got {shown(name)}") from None
        return Huber(check_positive("DELTA of loss huber", delta, maximum=1e30))
    return LOSSES[check_choice("loss", name, LOSSES)]
