"""Losses: value, gradient, conjugate, and their part of the dual problem."""

from convcvx.losses.base import Loss
from convcvx.losses.table import LOSSES, get_loss
from convcvx.losses.targets import encode_targets

__all__ = [
    "LOSSES",
    "Loss",
    "encode_targets",
    "get_loss",
]
