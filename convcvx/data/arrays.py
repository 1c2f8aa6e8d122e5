"""What users hand over as arrays, as arrays of numbers that torch can take."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from convcvx.errors import ConvcvxError, InputError, one_line

ALIGNMENT = 64
"""Bytes to which torch aligns what it allocates: a cache line."""


REMEDIES = dict.fromkeys("USO", "number the classes") | {"c": "split complex numbers"}
"""What to do with arrays of other kinds, by numpy's letter for these."""


def as_array(name: str, values: Any, error: type[ConvcvxError] = InputError) -> np.ndarray:
    """`values` as whole or real numbers in the machine's own order of bytes; raise `error` if they are none."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values  # which numpy lacks
    elif not (isinstance(values, list | tuple | int | float) or hasattr(values, "__array__")):
        kind = type(values).__name__
        raise error(f"{name} must be a tensor or an array of numbers; got {kind}: stack what it holds")
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, OverflowError, RuntimeError) as fault:
        raise error(f"{name} must be an array of numbers: {one_line(fault)}") from None
    if array.dtype.kind not in "biuf":
        raise error(
            f"{name} must be whole or real numbers; got {array.dtype}: {REMEDIES.get(array.dtype.kind, 'convert them')}"
        )
    array = array.astype(np.float64 if array.dtype.itemsize > 8 else array.dtype.newbyteorder("="), copy=False)
    return np.require(array, requirements=["C", "W"])  # torch warns of read-only arrays, and takes no negative strides


def as_tensor(name: str, values: Any, error: type[ConvcvxError] = InputError) -> Tensor:
    """`values` as a tensor of real or whole numbers, one that is a tensor where it is; raise `error` for others."""
    if isinstance(values, Tensor) and not values.is_complex():
        return values.detach()
    return torch.as_tensor(as_array(name, values, error))


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied if its memory is numpy's, which begins anywhere: BLAS rounds otherwise there, so that equal
    data would not give equal results."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()
