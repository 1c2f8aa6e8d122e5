"""What a source of data is: a way to know what is meant, and to read it into arrays."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np

from convcvx.data.form import ImageForm

PARTS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
"""The sets of a source, and what folders, files and columns call them."""


@dataclass(frozen=True)
class Order:
    """What is asked for.

    Parameters
    ----------
    name : str
        As it was given.
    path, root : Path
        The same as a path; the folder of what is downloaded.
    limit : int, optional
        Training images that are enough.
    download : bool
        Whether what is missing may be downloaded.
    form : ImageForm
        What images of several sizes, or of colour and grey, are to be made.
    """

    name: str
    path: Path
    root: Path
    limit: int | None = None
    download: bool = True
    form: ImageForm = field(default=ImageForm())


@dataclass(frozen=True, eq=False)
class Raw:
    """What a source has: arrays by `array_files.KEYS` and `FURTHER`, images NHW or NHWC.

    Parameters
    ----------
    name : str
        What the data set is called.
    arrays : dict of ndarray
        x_train and y_train; x_test or x_val with their labels, or neither. Labels are numbers or texts.
    classes : tuple of str, optional
        Their names where labels are their numbers; None where the labels in y_train are the classes.
    """

    name: str
    arrays: dict[str, np.ndarray]
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Source:
    """A kind of data: what it is in a few words, whether an order means it, and how it is read."""

    about: str
    claims: Callable[[Order], bool]
    read: Callable[[Order], Raw]


def part_of(name: str) -> str | None:
    """Which of `PARTS` a name begins with, as "validation-00000-of-00001" does; None for others."""
    word = name.lower()
    for part, names in PARTS.items():
        if any(word == n or word.startswith((f"{n}-", f"{n}_", f"{n}.")) for n in names):
            return part
    return None


Labels: TypeAlias = dict[str, np.ndarray]
"""The labels of every image, by part."""


def with_classes(labels: Labels, classes: tuple[str, ...] | None = None) -> tuple[Labels, tuple[str, ...] | None]:
    """The labels with the names of their classes, before images are left out and rare classes with them.

    Whole numbers and texts (n,) without names become texts, their own names; other labels have no classes.
    """
    train = labels["train"]
    if classes is not None or train.ndim != 1 or train.dtype.kind not in "biuUS":
        return labels, classes
    names = tuple(map(str, np.unique(train).tolist()))
    return {part: y.astype(str) for part, y in labels.items()}, names


def kept_rows(part: str, n: int, parts: Collection[str], limit: int | None) -> np.ndarray:
    """Which of the `n` images of a part are read: all; `limit` training images, where the source has `parts` besides.

    Training images come in an order drawn with seed 0, as in files they often stand by class. Where they are alone a
    test set is taken out of them, so that none may be left out before.
    """
    if part != "train":
        return np.arange(n)
    return np.random.default_rng(0).permutation(n)[: limit if len(parts) > 1 else None]
