"""Targets as losses take them: classes to one-hot rows, real values to float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from convcvx.data.arrays import as_array
from convcvx.errors import InputError

LARGEST_WHOLE = 2**53
"""Whole numbers up to this one are float64 as they are: a proof about others would be one about their neighbours."""

LABELLED = ("bce", "squared-hinge")
"""Losses whose outputs are labels, none of which excludes another."""


def encode_targets(
    targets: Tensor | np.ndarray, loss: str, n_classes: int | None = None, *, intercept: bool = True
) -> Tensor:
    """Integer classes (n,) or (n, 1) to one-hot (n, c) float64; real targets (n,) or (n, c) to (n, c) float64.

    Where a loss has labels (`LABELLED`), these are (n, c) of 0 and 1, also for c = 1.

    c is `n_classes`, and then the classes are 0..c-1; without it the number of distinct ids, which stand for the
    classes in their order, as in scikit-learn. Without an `intercept` rows that all name one class are a problem as any
    other; with one nothing is left to train.

    Raises
    ------
    InputError
        For NaN, classes out of range, a single class, real targets that are no probabilities where a loss wants these,
        or whole numbers that float64 would round.
    """
    array = as_array("targets", targets)
    if array.ndim not in (1, 2) or array.size == 0:
        raise InputError(f"targets must be (n,) classes or (n, c) real values; got shape {array.shape}")
    if array.dtype.kind != "f" and (array.ndim == 1 or (array.shape[1] == 1 and loss not in LABELLED)):
        ids, places = np.unique(array, return_inverse=True)
        _check_two(len(ids), ids[0], n_classes)
        if n_classes is not None:
            if int(ids[0]) < 0:
                raise InputError(f"targets must be classes 0, 1, ...; got {ids[0]}")
            if int(ids[-1]) >= n_classes:
                raise InputError(f"targets must be classes below {n_classes}; got {ids[-1]}")
            places = array
        classes = torch.from_numpy(places.reshape(-1).astype(np.int64))
        return torch.nn.functional.one_hot(classes, n_classes or len(ids)).double()
    if array.dtype.kind in "iu" and max(int(array.max()), -int(array.min())) > LARGEST_WHOLE:
        raise InputError(
            "targets must be whole numbers up to 2^53, which float64 holds, or a column of classes; got "
            f"{max(map(int, (array.max(), array.min())), key=abs)}: subtract a number from all of them"
        )
    real = torch.from_numpy(array.astype(np.float64).reshape(len(array), -1))
    if not bool(real.isfinite().all()):
        raise InputError("targets must be finite; found NaN or infinity")
    if (
        intercept
        and real.shape[1] > 1
        and torch.equal(real[:1].sort().values[0], torch.eye(real.shape[1]).double()[-1])
    ):
        _check_two(1 + int((real != real[0]).any()), int(real[0].argmax()), n_classes)
    if loss == "bce" and not bool(((real >= 0) & (real <= 1)).all()):
        raise InputError("targets must be integer classes, or (n, c) labels from 0 to 1, with loss='bce'")
    if loss == "squared-hinge" and not bool(((real == 0) | (real == 1)).all()):
        raise InputError("targets must be integer classes, or (n, c) labels of 0 and 1, with loss='squared-hinge'")
    if loss == "cross-entropy":
        mass = real.sum(dim=1, keepdim=True)
        if not (bool((real >= 0).all()) and torch.allclose(mass, torch.ones_like(mass))):
            raise InputError("targets must be integer classes or rows of probabilities with loss='cross-entropy'")
        real = real / mass  # with a free intercept, what rounding leaves above 1 would be worth minus infinity
    return real


def _check_two(n_present: int, only: object, n_classes: int | None) -> None:
    """Raise `InputError` if there is a single class and nothing says that there are others."""
    if n_present == 1 and n_classes is None:
        raise InputError(f"targets must have at least two classes; all of them are {only}")
