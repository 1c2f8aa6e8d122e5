"""Images that Python hands over, in whatever form torch's users have them, as a `Dataset`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data import Dataset as TorchDataset

from convcvx.data.arrays import aligned, as_array, as_tensor
from convcvx.data.datasets import ARRAYS, AS_THEY_ARE, Dataset, assembled, check_images, load_sets
from convcvx.data.form import ImageForm, channels_last
from convcvx.data.hugging_face import is_hugging_face, raw_of
from convcvx.data.images import Images, StreamedImages, to_floats
from convcvx.data.weights import read_weights
from convcvx.errors import DataError, InputError, one_line, shown

Given: TypeAlias = tuple[Dataset, Dataset | None, Dataset | None]
"""Training, test and validation set, as far as they are there."""

CHANNELS_LAST = {1: 4, 3: 4, 4: 17}
"""Rows and columns from which on images with so many entries in the last axis are taken for ones with channels last;
maps of features are often four columns wide, but seldom beside so many channels and rows."""
ALIKE = "targets must be numbers, tensors or texts, alike for all images"
"""What is asked of those that a torch `Dataset` gives one by one."""


def given_dataset(
    images: Any,
    targets: Any = None,
    sample_weight: Any = None,
    *,
    form: ImageForm = AS_THEY_ARE,
    classes: Sequence[str] | None = None,
) -> Given:
    """A training set and, where there are any, its test and validation set.

    Parameters
    ----------
    images : Tensor or ndarray (n, C, H, W) or (n, H, W); StreamedImages; torch Dataset or DataLoader; str or path; pair
        uint8 pixels are divided by 255, floats taken as they are. A torch `Dataset` gives pairs of an image, PIL or
        tensor, and its target; a `DataLoader` batches of them. A name or a path is what `convcvx.data.load` takes, and
        has a test set as well. A `Dataset` or `DatasetDict` of Hugging Face has columns of images and labels. A pair is
        (images, targets).
    targets : Tensor, ndarray or sequence, optional
        (n,) classes, any whole numbers or texts, or (n, c) real values; None where `images` hold them.
    sample_weight : Tensor, ndarray or sequence (n,), optional
        What each image counts for, 0 to leave it out; for a data set that has weights, instead of them.
    form : ImageForm
        Size and channels that all images are made to have.
    classes : sequence of str, optional
        Of the network that is to be judged on the images: they number the labels, some of which may be missing. Without
        them the labels that are there are the classes.

    Raises
    ------
    InputError, DataError
        For anything else, targets that are missing, double or do not fit; NaN and infinity; labels that are none of the
        `classes`.
    """
    train, test, validation = _given(images, targets, sample_weight, form, training=classes is None)
    return (
        train.numbered_by(classes),
        None if test is None else test.numbered_by(classes),
        None if validation is None else validation.numbered_by(classes),
    )


def _given(images: Any, targets: Any, sample_weight: Any, form: ImageForm, *, training: bool) -> Given:
    """The sets, their classes numbered by the training set's own; a single one is an error only with `training`."""
    if isinstance(images, str | os.PathLike):
        _check_absent(targets, "a data set that has its own")
        train, test, validation = load_sets(images, form=form)
        return _weighted(train, sample_weight), test, validation
    if isinstance(images, Dataset):
        _check_absent(targets, "a data set that has its own")
        return _weighted(replace(images, images=form.images(images.images)), sample_weight), None, None
    if is_hugging_face(images):
        _check_absent(targets, f"a {type(images).__name__} of Hugging Face, which has its own")
        return _of_hugging_face(images, sample_weight, form)
    if isinstance(images, tuple | list) and len(images) == 2 and targets is None:
        images, targets = images
    elif isinstance(images, DataLoader | TorchDataset):
        _check_absent(targets, f"a {type(images).__name__}, which has its own")
        images, targets = _collected(images, form)
    if targets is None:
        raise InputError("targets must be given with an array of images; got None: pass them, or a pair, or a Dataset")
    pixels = form.images(_pixels(images))
    targets, classes = _classes(targets)
    pixels, targets = check_images(pixels, targets, training=training)
    return _weighted(Dataset(pixels, targets, classes, ARRAYS), sample_weight), None, None


def held(data: Any, sample_weight: Any = None, classes: Sequence[str] | None = None) -> tuple[Any, Any, Any]:
    """Images, targets and weights of what holds them, classes numbered and pixels scaled as they are.

    Of data sets that `convcvx.data.load` reads they are what that gives, numbered by the `classes` of a network, where
    these are known.
    """
    if isinstance(data, tuple | list) and len(data) == 2:
        return *data, sample_weight
    if isinstance(data, DataLoader | TorchDataset):
        return *_collected(data, AS_THEY_ARE), sample_weight
    read, *_ = given_dataset(data, None, sample_weight, classes=classes)
    return read.images, read.targets, read.weights


def _of_hugging_face(data: Any, sample_weight: Any, form: ImageForm) -> Given:
    """The parts of a `DatasetDict`; a `Dataset` alone is all to train on, as other data that Python gives are."""
    raw = raw_of(data, ARRAYS, form)
    if "x_test" in raw.arrays or "x_val" in raw.arrays:
        train, test, validation = assembled(raw)
        return _weighted(train, sample_weight), test, validation
    whole = {f"{key}_test": raw.arrays[f"{key}_train"] for key in "xy"}
    train, *_ = assembled(replace(raw, arrays=raw.arrays | whole))
    return _weighted(train, sample_weight), None, None


def _weighted(dataset: Dataset, sample_weight: Any) -> Dataset:
    return dataset if sample_weight is None else replace(dataset, weights=read_weights(sample_weight, len(dataset)))


def _check_absent(targets: Any, what: str) -> None:
    if targets is not None:
        raise InputError(f"targets must be left out beside {what}; got {shown(type(targets).__name__)}")


def _pixels(images: Any) -> Images:
    """(n, C, H, W), floats."""
    if isinstance(images, StreamedImages):
        return images
    pixels = as_tensor("images", images)
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    if pixels.ndim != 4:
        raise InputError(f"images must be (n, C, H, W) or (n, H, W); got shape {tuple(pixels.shape)}")
    if min(pixels.shape[1:3]) >= CHANNELS_LAST.get(pixels.shape[3], math.inf):
        raise InputError(
            f"images seem to be (n, height, width, channels), {tuple(pixels.shape)}: pass images.permute(0, 3, 1, 2), "
            "or transpose(0, 3, 1, 2) of an array"
        )
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else aligned(pixels)


def _classes(targets: Any) -> tuple[Any, tuple[str, ...]]:
    """Targets as classes 0..c-1 with their names, in order; real ones as they are, without."""
    if isinstance(targets, Tensor):
        targets = targets.detach().cpu().numpy() if not targets.is_floating_point() else targets
    elif not hasattr(targets, "dtype"):
        targets = _array(targets)
    if isinstance(targets, np.ndarray) and targets.dtype.kind == "O":
        texts = [isinstance(target, str) for target in targets]
        targets = _array(targets.tolist())
        if targets.dtype.kind == "O" or (any(texts) and not all(texts)):
            raise InputError("targets must be all numbers or all texts; got a mixture, or gaps: drop or mend them")
    if isinstance(targets, np.ndarray) and targets.dtype.kind in "US":
        targets = targets.astype(str)
    else:
        targets = as_array("targets", targets)
    column = targets[:, 0] if targets.ndim == 2 and targets.shape[1] == 1 else targets
    if targets.dtype.kind == "f" or column.ndim != 1:
        return targets, ()
    labels, places = np.unique(column, return_inverse=True)
    return places, tuple(map(str, labels.tolist()))


def _array(targets: Any) -> np.ndarray:
    try:
        return np.asarray(targets)
    except ValueError:  # lists of several lengths
        raise InputError("targets must be one an image, or as many for each; got several lengths: mend them") from None


def _collected(source: DataLoader | TorchDataset, form: ImageForm) -> tuple[Tensor, Tensor | np.ndarray]:
    """All images and targets of a torch `Dataset` or `DataLoader`, in the order in which it gives them."""
    images: list[Tensor] = []
    targets: list[Tensor | list[str]] = []
    batches = isinstance(source, DataLoader)
    for item in _items(source):
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise DataError(f"images must come in pairs (image, target); {type(source).__name__} gives {_kind(item)}")
        image = _image(item[0]) if batches else _image(item[0])[None]
        images.append(image if form.keeps_all else to_floats(form.array(channels_last(_pixels(image)))))
        targets.append(_targets(item[1] if batches else [item[1]]))
    if not images:
        raise DataError(f"images is an empty {type(source).__name__}: give at least one image")
    shapes = {tuple(part.shape[1:]) for part in images}
    if len(shapes) > 1:
        raise DataError(f"images must be of one size; got {' and '.join(map(str, sorted(shapes)[:3]))}: pass resize")
    return torch.cat(images), _joined(targets)


def _targets(batch: Any) -> Tensor | list[str]:
    """Those of a batch: numbers or tensors stacked, or texts."""
    try:
        if isinstance(batch, Tensor):
            return batch
        if all(isinstance(target, str) for target in batch):
            return list(batch)
        return torch.stack([torch.as_tensor(target) for target in batch])
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DataError(f"{ALIKE} ({one_line(error)})") from None


def _joined(parts: list[Tensor | list[str]]) -> Tensor | np.ndarray:
    """The targets of all batches: texts as an array, others as a tensor."""
    texts = [part for part in parts if isinstance(part, list)]
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if not tensors:
        return np.array([text for part in texts for text in part])
    shapes = {tuple(part.shape[1:]) for part in tensors}
    if texts or len(shapes) > 1 or not all(part.ndim for part in tensors):
        found = "texts among numbers" if texts else f"shapes {' and '.join(map(str, sorted(shapes)[:3]))}"
        raise DataError(f"{ALIKE}; got {found}: mend them")
    return torch.cat(tensors)


def _items(source: Any) -> Iterable[Any]:
    if isinstance(source, DataLoader | IterableDataset):
        return source
    return (source[i] for i in range(len(source)))


def _image(image: Any) -> Tensor:
    """(C, H, W), or a batch (b, C, H, W), of a tensor, an array or a PIL image."""
    if isinstance(image, Tensor):
        return image.detach().cpu()
    array = np.array(image)
    if array.dtype == object or array.ndim not in (2, 3):
        raise DataError(f"images must be tensors, arrays or PIL images; got {_kind(image)}: give the set a transform")
    if hasattr(image, "getbands"):  # PIL has channels last, or none
        array = array[None] if array.ndim == 2 else rearrange(array, "h w c -> c h w")
    return torch.from_numpy(np.ascontiguousarray(array))


def _kind(item: Any) -> str:
    return f"a {type(item).__name__}" + (f" of {len(item)}" if isinstance(item, tuple | list) else "")
