"""Where a pass over the images runs."""

from __future__ import annotations

import re

import torch

from convcvx.errors import InputError

DEVICE = re.compile(r"(cpu|cuda)(:(0|[1-9][0-9]?))?")
"""A device and, perhaps, its number: torch takes no other digits, no zeros before them, and counts to 127."""


def pick_device(device: str | torch.device) -> str:
    """Resolve "auto"; raise `InputError` for a device that is not there."""
    name = str(device)
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not DEVICE.fullmatch(name):
        raise InputError(f"device must be auto, cpu or cuda; got {name!r}")
    kind, _, number = name.partition(":")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name} was asked for but torch sees none; use device cpu")
    if kind == "cuda" and number and int(number) >= torch.cuda.device_count():
        raise InputError(f"device {name} was asked for but torch sees {torch.cuda.device_count()}; use device cuda")
    return name
