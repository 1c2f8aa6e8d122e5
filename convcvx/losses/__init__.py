"""Losses: value, gradient, conjugate, and their part of the dual problem."""

from convcvx.losses.table import (
    LOSSES,
    Loss,
    encode_targets,
    get_loss,
)

__all__ = [
    "LOSSES",
    "Loss",
    "encode_targets",
    "get_loss",
]
