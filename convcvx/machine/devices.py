"""Where a pass over the images runs."""

from __future__ import annotations

import torch

from convcvx.errors import InputError


def pick_device(device: str | torch.device) -> str:
    """Resolve "auto"; raise `InputError` for a device that is not there."""
    name = str(device)
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise InputError(f"device must be auto, cpu or cuda; got {name!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name} was asked for but torch sees none; use device cpu")
    if kind == "cuda" and number and int(number) >= torch.cuda.device_count():
        raise InputError(f"device {name} was asked for but torch sees {torch.cuda.device_count()}; use device cuda")
    return name
