"""Data sets to `Dataset`s: images float32 NCHW in [0, 1], targets classes 0..c-1 or real values.

What `sources` reads is checked and converted here. Images on a memory map stay in their file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from convcvx.data.array_files import KEYS as KEYS
from convcvx.data.checks import check_images as check_images
from convcvx.data.checks import check_targets as check_targets
from convcvx.data.downloads import default_data_dir
from convcvx.data.form import ImageForm
from convcvx.data.images import Images, StreamedImages, to_floats
from convcvx.data.source import Order, Raw
from convcvx.data.sources import ARRAYS as ARRAYS
from convcvx.data.sources import read
from convcvx.data.weights import read_weights
from convcvx.errors import DataError, InputError, check_count, one_line, shown
from convcvx.storage.reading import user_path

TEST_SHARE = 0.2
"""Share of the images that is taken out to test with, where a source has neither a test nor a validation set."""
TEST_SEED = 0
"""By which those are drawn, whatever the seed of a training is: all trainings are tested alike."""
AS_THEY_ARE = ImageForm()
"""Images keep their size and their channels."""
OVERSHOOT = 1e-6
"""How far pixels in [0, 1] may lie outside: what float32 leaves of a division by 255, or of resizing."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images with their targets.

    Parameters
    ----------
    images : Tensor or StreamedImages (n, C, H, W) float32 in [0, 1]
    targets : Tensor
        (n,) int64 classes 0..c-1, or (n, c) float64 real values.
    classes : tuple of str
        Names of the classes, shared by training and test set; () for real targets.
    name : str
    weights : Tensor (n,) float64, optional
        What each image counts for, in any unit; None: all alike.
    """

    images: Images
    targets: Tensor
    classes: tuple[str, ...]
    name: str
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def n_classes(self) -> int:
        """Number of classes, with those that a `limit` left without images; 0 for real targets."""
        return len(self.classes)

    def part(self, rows: slice | Tensor) -> Dataset:
        """The images at these places."""
        weights = None if self.weights is None else self.weights[rows]
        return replace(self, images=self.images[rows], targets=self.targets[rows], weights=weights)

    def numbered_by(self, classes: Sequence[str] | None) -> Dataset:
        """With classes as a network knows them: their numbers are its outputs, and it may know others besides.

        `classes` are the names of these; none for one that was trained on real targets, None where nothing is known.
        Real targets stay as they are.

        Raises
        ------
        DataError
            For labels that the network does not know.
        """
        known = None if classes is None else tuple(map(str, classes))
        if known is None or not self.classes or self.classes == known:
            return self
        if not known:
            raise DataError(f"{self.name}: targets must be real values, as in training: pass floats, not classes")
        places = {name: place for place, name in enumerate(known)}
        present = self.targets.unique().tolist()
        if unknown := [self.classes[label] for label in present if self.classes[label] not in places][:5]:
            told = f"labels that are no class of the network: {unknown}; its classes are {', '.join(known[:20])}"
            raise DataError(f"{self.name}: {told}: drop their images")
        own = torch.tensor([places.get(name, -1) for name in self.classes])
        return replace(self, targets=own[self.targets], classes=known)

    def counting(self) -> Dataset:
        """Without the images of weight 0: nothing of them is to shape what is trained.

        Raises
        ------
        DataError
            Where none is left, or images stay on disk, which are not picked out one by one.
        """
        if self.weights is None or bool((self.weights > 0).all()):
            return self
        kept = self.weights > 0
        if not bool(kept.any()):
            raise DataError(f"{self.name}: the weights of all {len(self)} images are 0: give others, or more images")
        if isinstance(self.images, StreamedImages):
            raise DataError(f"{self.name}: images that stay on disk must have positive weights: leave out those of 0")
        return self.part(kept)


Sets: TypeAlias = "tuple[Dataset, Dataset, Dataset | None]"
"""Training, test and, where the source has one, validation set."""


def load(
    name: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    *,
    download: bool = True,
    resize: int | tuple[int, int] | None = None,
    channels: int | None = None,
) -> tuple[Dataset, Dataset]:
    """Load the training and the test set called `name`.

    Parameters
    ----------
    name : str or path
        `digits`: scikit-learn's 1,797 embedded 8x8 digits, split with seed 0 and by class into 1,437 and 360.
        `mnist`, `cifar10` and the other names of `convcvx.data.torchvision_sets.DOWNLOADS`, in any case: sets
        of torchvision in `data_dir`.
        FILE.npz: x_train, y_train and, perhaps, x_test, y_test; images NHW or NHWC, uint8 or float in [0, 1]; integer
        y or texts are classes, float y real targets. Or the arrays of MedMNIST.
        FOLDER: train/CLASS/IMAGE and test/CLASS/IMAGE, or CLASS/IMAGE alone, images of the formats in
        `image_files.FORMATS`; their EXIF orientation is honoured, and what is transparent is laid on white. Or
        x_train.npy, y_train.npy, x_test.npy, y_test.npy, as in an .npz file: such images stay on disk and are read a
        chunk at a time. (Write `./mnist` for a folder called like a set.) Arrays may have w_train and w_test beside
        them, what each image counts for.
        FILE.csv with paths and labels; FILE.parquet or a FOLDER of Hugging Face's `datasets`.
        Where there is no test set, a validation set stands in for it, or `TEST_SHARE` of the images, taken by class.
    data_dir : path, optional
        Holds the downloaded sets in torchvision's layout, or as NAME.npz; see `default_data_dir`.
    limit : int, optional
        Keep the first `limit` training images; the test set stays whole. Files have their images by class, so
        their training images are shuffled first, with seed 0.
    download : bool
        Download a set that `data_dir` lacks.
    resize : int or (int, int), optional
        Rows and columns that all images are made to have; see `convcvx.data.form`.
    channels : int, optional
        1 for grey images, 3 for colour.

    Raises
    ------
    DataError
        For a set that is missing, damaged or unfit for training.
    InputError
        For a size or channels that images cannot have.

    Examples
    --------
    >>> train, test = load("digits")
    >>> train.images.shape, test.images.shape
    (torch.Size([1437, 1, 8, 8]), torch.Size([360, 1, 8, 8]))
    >>> load("digits", resize=4, channels=3)[1].images.shape
    torch.Size([360, 3, 4, 4])
    """
    size = (resize, resize) if isinstance(resize, int) else resize
    return load_sets(name, data_dir, limit, download=download, form=ImageForm(size, channels))[:2]


def load_sets(
    name: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    *,
    download: bool = True,
    form: ImageForm = AS_THEY_ARE,
) -> Sets:
    """As `load`, with the validation set, where the source has one beside its test set."""
    limit = None if limit is None else check_count("limit", limit)
    try:
        path = user_path(name)
        root = default_data_dir() if data_dir is None else user_path(data_dir)
        raw = read(Order(os.fspath(name), path, root, limit, download, form))
    except (OSError, RuntimeError) as error:  # paths that are too long, users that are not there, links to themselves
        raise DataError(f"cannot read data {shown(str(name))}: give another path ({one_line(error)})") from None
    return assembled(raw, limit, form)


def split(dataset: Dataset, validation: float = 0.1, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Hold out the fraction `validation` of the images, by class; both parts keep the order of the images."""
    if not 0 < validation < 1:
        raise InputError(f"validation must be a fraction between 0 and 1; got {validation!r}")
    if isinstance(dataset.images, StreamedImages):
        raise InputError(f"validation cannot be held out of images that stay on disk, as those of {dataset.name} do")
    by_class = dataset.targets.numpy() if dataset.classes else None
    kept, held_out = map(torch.from_numpy, _split_rows(dataset.name, len(dataset), validation, seed, by_class))
    return dataset.part(kept), dataset.part(held_out)


def _split_rows(
    name: str, n: int, share: float, seed: int, by_class: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to keep and rows to hold out, in order."""
    from sklearn.model_selection import train_test_split  # a second to import, which other data need not wait for

    try:
        kept, held_out = train_test_split(np.arange(n), test_size=share, random_state=seed, stratify=by_class)
    except ValueError as error:
        wish = f"cannot hold out {share:g} of {n} images by class"
        raise DataError(f"{name}: {wish}; give more images ({one_line(error)})") from None
    return np.sort(kept), np.sort(held_out)


def spiral(n: int = 60, n_classes: int = 3, noise: float = 0.2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points (n, 2) on noisy spiral arms and their classes (n,): the toy problem of Sahiner et al. 2021.

    >>> x, y = spiral(60)
    >>> x.shape, np.bincount(y).tolist()
    ((60, 2), [20, 20, 20])
    """
    random, arm = np.random.default_rng(seed), check_count("n", n, minimum=n_classes) // n_classes
    radius = np.linspace(0.1, 1, arm)
    angles = [np.linspace(4 * k, 4 * (k + 1), arm) + noise * random.normal(size=arm) for k in range(n_classes)]
    points = [np.stack([radius * np.sin(angle), radius * np.cos(angle)], axis=1) for angle in angles]
    return np.concatenate(points), np.repeat(np.arange(n_classes), arm)


def assembled(raw: Raw, limit: int | None = None, form: ImageForm = AS_THEY_ARE) -> Sets:
    """The sets of a source, checked, in this form, with `limit` training images.

    Raises
    ------
    DataError
        For arrays that are unfit for training.
    """
    arrays, classes = _numbered(_with_test(raw))
    parts = [part for part in ("train", "test", "val") if f"x_{part}" in arrays]
    names = {part: (f"x_{part}", f"y_{part}") for part in parts}
    sizes = {part: len(arrays[f"x_{part}"]) for part in parts}
    rows = {part: slice(limit if part == "train" else None) for part in parts}
    x = {part: form.array(_to_nhwc(arrays[f"x_{part}"])[rows[part]]) for part in parts}
    y = {part: check_targets(arrays[f"y_{part}"], sizes[part], names[part]) for part in parts}
    for key, pair in (("x", x), ("y", y)):
        for part in parts[1:]:
            if pair["train"].shape[1:] != pair[part].shape[1:]:  # integer y are (n,), real y (n, c)
                found = (f"{k} is {arrays[k].dtype} {arrays[k].shape}" for k in (f"{key}_train", f"{key}_{part}"))
                raise DataError(f"{' but '.join(found)}: make them alike")
    if y["train"].is_floating_point():
        classes = ()
    else:
        labels = y["train"].unique() if classes is None else torch.arange(len(classes))
        for part in parts:
            if unknown := y[part][~torch.isin(y[part], labels)].unique().tolist()[:5]:
                raise DataError(f"y_{part} has labels that are no training class: {unknown}; drop their images")
            y[part] = torch.searchsorted(labels, y[part])
        classes = classes or tuple(str(label) for label in labels.tolist())

    sets = {}
    for part in parts:
        pixels, labels = x[part], y[part][rows[part]]
        images = StreamedImages(pixels) if isinstance(pixels, np.memmap) else to_floats(pixels)
        images, targets = check_images(images, labels, names[part], training=part == "train")
        low, high = (value.item() for value in images.aminmax())
        if low < -OVERSHOOT or high > 1 + OVERSHOOT:
            raise DataError(f"x_{part} must be uint8 or lie in [0, 1]; got [{low}, {high}]: rescale it")
        images = images if low >= 0 and high <= 1 else images.clamp(0, 1)
        given = arrays.get(f"w_{part}")
        weights = None if given is None else read_weights(given, sizes[part], f"w_{part}", DataError)[rows[part]]
        sets[part] = Dataset(images, targets, classes, raw.name, weights)
    return sets["train"], sets["test"], sets.get("val")


def _with_test(raw: Raw) -> Raw:
    """With a test set: its own; else the validation set; else `TEST_SHARE` of the images."""
    arrays = dict(raw.arrays)
    if "x_test" not in arrays and "x_val" in arrays:
        arrays |= {f"{key}_test": arrays.pop(f"{key}_val") for key in "xyw" if f"{key}_val" in arrays}
    elif "x_test" not in arrays:
        labels = _one_a_row(arrays["y_train"])
        by_class = labels if labels.ndim == 1 and labels.dtype.kind != "f" else None
        kept, held_out = _split_rows(raw.name, len(labels), TEST_SHARE, TEST_SEED, by_class)
        for key in [key for key in "xyw" if f"{key}_train" in arrays]:
            whole = arrays[f"{key}_train"]
            arrays |= {f"{key}_train": whole[kept], f"{key}_test": whole[held_out]}
    return replace(raw, arrays=arrays)


def _numbered(raw: Raw) -> tuple[dict[str, np.ndarray], tuple[str, ...] | None]:
    """The arrays, labels that are texts numbered in the order of the alphabet, and the names of the classes."""
    arrays = dict(raw.arrays)
    labels = {key: _one_a_row(y) for key, y in arrays.items() if key[0] == "y"}
    if not any(y.dtype.kind in "US" for y in labels.values()):
        return arrays, raw.classes
    texts = {key: y.astype(str) for key, y in labels.items()}
    names = raw.classes or tuple(np.unique(texts["y_train"]).tolist())
    order = {name: number for number, name in enumerate(names)}
    for key, y in texts.items():
        if unknown := sorted(set(y.ravel().tolist()) - order.keys())[:5]:
            raise DataError(f"{key} has labels that are no training class: {unknown}; drop their images")
        arrays[key] = np.array([order[name] for name in y.ravel().tolist()]).reshape(y.shape)
    return arrays, names


def _one_a_row(labels: np.ndarray) -> np.ndarray:
    """(n,) for (n, 1)."""
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def _to_nhwc(x: np.ndarray) -> np.ndarray:
    return x[..., None] if x.ndim == 3 else x
