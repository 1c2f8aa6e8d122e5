"""What images count for in the mean loss: weights as they are given, and those that make up for rare classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convcvx.data.arrays import as_array
from convcvx.errors import ConvcvxError, InputError, check_positive, shown
from convcvx.terms.names import BALANCED
from convcvx.terms.numbers import read_number

FAINTEST = 2.0**-100
"""Least positive weight, as a share of the largest: quotients of others would leave float32, and nobody means them."""


def read_weights(
    sample_weight: Any, n: int, name: str = "sample_weight", error: type[ConvcvxError] = InputError
) -> Tensor:
    """(n,) float64 weights; messages use `name`.

    Raises
    ------
    InputError, or `error`
        Unless there is one an image, finite and >= 0, one of them positive, and none so faint that float32 loses it.
    """
    array = as_array(name, sample_weight, error)
    if array.shape != (n,):
        raise error(f"{name} must be one number an image, ({n},); got shape {array.shape}")
    weights = torch.from_numpy(array.astype(np.float64))

    def refuse(bad: Tensor, must: str, remedy: str) -> None:
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            raise error(f"{name} must {must}; got {float(weights[first]):g} for image {first}: {remedy}")

    refuse(~weights.isfinite(), "be finite", "set it to 0 to leave the image out")
    refuse(weights < 0, "be 0 or positive", "set it to 0 to leave the image out")
    largest = weights.max()
    if not bool(largest > 0):
        raise error(f"{name} must be positive for some image; got zero weights alone: leave it out to weigh none")
    faint = (weights > 0) & (weights < FAINTEST * largest)
    refuse(faint, f"be 0 or at least 2^-100 of the largest, {float(largest):g}", "set it to 0 to leave the image out")
    return weights


def with_class_weight(
    weights: Tensor | None, class_weight: str | None, targets: Tensor, classes: Sequence[str]
) -> Tensor | None:
    """(n,): what images of these classes count for in training, from what they count for by themselves.

    Parameters
    ----------
    weights : Tensor (n,), optional
        None where all count alike.
    class_weight : str, optional
        `BALANCED`: a class counts for as much as any other, whatever its images are. Or as `class_weight_text` has it.
    targets : Tensor (n,) of 0..c-1
    classes : sequence of str (c,)
        Their names.

    Raises
    ------
    InputError
        For real targets, and names that are no class.
    """
    if class_weight is None:
        return weights
    if targets.is_floating_point() or not classes:
        raise InputError(f"class_weight needs classes, not real targets; got {shown(class_weight)}: leave it out")
    counts = torch.ones(len(targets), dtype=torch.float64) if weights is None else weights
    if class_weight == BALANCED:
        sums = torch.zeros(len(classes), dtype=torch.float64).index_add_(0, targets, counts)
        factors = counts.sum() / ((sums > 0).sum() * sums.clamp_min(torch.finfo(torch.float64).tiny))
    else:
        factors = torch.ones(len(classes), dtype=torch.float64)
        for name, factor in _named(class_weight).items():
            if name not in classes:
                known = ", ".join(classes[:20])
                raise InputError(f"class_weight names {shown(name)}, which is no class; the classes are {known}")
            factors[classes.index(name)] = factor
    return counts * factors[targets]


def class_weight_text(value: Any) -> Any:
    """{"cat": 2, "dog": 1} as "cat=2,dog=1"; a text once it is found to be one of those; other kinds as they are."""
    if isinstance(value, dict):
        names = [str(name) for name in value]
        if odd := [name for name in names if re.search(r"[=,]", name)]:
            raise InputError(f"class_weight cannot name {shown(odd[0])}, for its = or comma: pass sample_weight")
        factors = [check_positive(f"class_weight of {shown(name)}", value[name]) for name in value]
        value = ",".join(f"{name}={factor:.17g}" for name, factor in zip(names, factors, strict=True))
    if isinstance(value, str) and value != BALANCED:
        _named(value)
    return value


def _named(text: str) -> dict[str, float]:
    """The weights in "cat=2,dog=1", by class."""
    found = {}
    for part in text.split(","):
        name, equals, factor = (piece.strip() for piece in part.rpartition("="))
        try:
            number = read_number(factor)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise InputError(
                f"class_weight must be {BALANCED}, or a weight by class such as 3=2,8=0.5; got {shown(text)}"
            )
        found[name] = check_positive(f"class_weight of {shown(name)}", number)
    return found
