"""Data sets to pairs of `Dataset`: images float32 NCHW in [0, 1], targets classes 0..c-1 or real values.

Every source is first read into the Keras convention, numpy arrays x_train, y_train, x_test, y_test with
images NHW or NHWC, which `_assemble` checks and converts. Images on a memory map stay in their file. No file of
unknown checksum is unpickled.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import sys
import tarfile
import tempfile
import zlib
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from convcvx._compat import import_torchvision
from convcvx.errors import DataError, InputError, check_count
from convcvx.images import Images, StreamedImages, to_floats

KEYS = ("x_train", "y_train", "x_test", "y_test")
Source = tuple[dict[str, np.ndarray], tuple[str, ...] | None]
"""Arrays by these keys and the class names; None: the labels in y_train are the classes."""

DOWNLOADS = {
    "mnist": ("MNIST", "MNIST/raw"),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST/raw"),
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
}
"""Name of a set: its class in `torchvision.datasets` and the folder where that class keeps its files."""

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TIMEOUT = 10.0
"""Seconds that a download waits for a silent server."""


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
    """

    images: Images
    targets: Tensor
    classes: tuple[str, ...]
    name: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def n_classes(self) -> int:
        """Number of classes, with those that a `limit` left without images; 0 for real targets."""
        return len(self.classes)


def default_data_dir() -> Path:
    """The `datasets/` folder of a source checkout, otherwise `./datasets`."""
    root = Path(__file__).resolve().parents[1]  # in site-packages, `datasets` is another project's package
    return root / "datasets" if (root / "pyproject.toml").is_file() else Path("datasets")


def load(
    name: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    *,
    download: bool = True,
) -> tuple[Dataset, Dataset]:
    """Load the training and the test set called `name`.

    Parameters
    ----------
    name : str or path
        `digits`: scikit-learn's 1,797 embedded 8x8 digits, split with seed 0 and by class into 1,437 and 360.
        `mnist`, `fashion-mnist`, `cifar10`, `cifar100`: from `data_dir`.
        FILE.npz: x_train, y_train, x_test, y_test; images NHW or NHWC, uint8 or float in [0, 1]; integer y
        are classes, float y real targets.
        FOLDER: train/CLASS/IMAGE and test/CLASS/IMAGE; or x_train.npy, y_train.npy, x_test.npy, y_test.npy, as in
        an .npz file: such images stay on disk and are read a chunk at a time. (Write `./mnist` for a folder called
        like a set.)
    data_dir : path, optional
        Holds the downloaded sets in torchvision's layout, or as NAME.npz; see `default_data_dir`.
    limit : int, optional
        Keep the first `limit` training images; the test set stays whole. A folder has its images by class, so
        its training images are shuffled first, with seed 0.
    download : bool
        Download a set that `data_dir` lacks.

    Raises
    ------
    DataError
        For a set that is missing, damaged or unfit for training.

    Examples
    --------
    >>> train, test = load("digits")
    >>> train.images.shape, test.images.shape
    (torch.Size([1437, 1, 8, 8]), torch.Size([360, 1, 8, 8]))
    """
    limit = None if limit is None else check_count("limit", limit)
    path = Path(name).expanduser()
    if name == "digits":
        return _assemble("digits", _read_digits(), limit)
    if name in DOWNLOADS:
        root = default_data_dir() if data_dir is None else Path(data_dir).expanduser()
        return _assemble(str(name), _read_download(str(name), root, download), limit)
    if path.is_dir() and any(path.glob("[xy]_*.npy")):
        return _assemble(path.resolve().name, _read_arrays(path), limit)
    if path.is_dir():
        return _assemble(path.resolve().name, _read_folder(path, limit), limit)
    if path.suffix == ".npz":
        return _assemble(path.stem, _read_npz(path), limit)
    known = ", ".join(["digits", *DOWNLOADS])
    raise DataError(f"data must be {known}, an .npz file or a folder of images or .npy files; got {str(name)!r}")


def split(dataset: Dataset, validation: float = 0.1, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Hold out the fraction `validation` of the images, by class; both parts keep the order of the images."""
    from sklearn.model_selection import train_test_split  # a second to import, which other data need not wait for

    if not 0 < validation < 1:
        raise InputError(f"validation must be a fraction between 0 and 1; got {validation!r}")
    if isinstance(dataset.images, StreamedImages):
        raise InputError(f"validation cannot be held out of images that stay on disk, as those of {dataset.name} do")
    rows, by_class = np.arange(len(dataset)), dataset.targets.numpy() if dataset.classes else None
    try:
        parts = train_test_split(rows, test_size=validation, random_state=seed, stratify=by_class)
    except ValueError as error:
        wish = f"cannot hold out {validation:g} of {len(dataset)} images by class"
        raise DataError(f"{dataset.name}: {wish}; give more images ({_one_line(error)})") from None
    kept, held_out = (torch.from_numpy(np.sort(part)) for part in parts)
    return (
        replace(dataset, images=dataset.images[kept], targets=dataset.targets[kept]),
        replace(dataset, images=dataset.images[held_out], targets=dataset.targets[held_out]),
    )


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


def check_targets(targets: Any, n: int, names: tuple[str, str] = ("images", "targets")) -> Tensor:
    """Targets of `n` images as (n,) int64 classes or (n, c) float64 real values, else a `DataError`.

    Integers of shape (n, 1) are classes, floats of shape (n,) real values with c = 1. Messages use `names`.
    """
    y = targets.detach().cpu().numpy() if isinstance(targets, Tensor) else np.asarray(targets)
    name, real, width = names[1], y.dtype.kind == "f", math.prod(y.shape[1:])
    if y.dtype.kind not in "biuf" or y.ndim not in (1, 2) or width < 1 or (width > 1 and not real):
        raise DataError(f"{name} must be (n,) integer classes or (n, c) floats; got {y.dtype} {y.shape}")
    if len(y) != n:
        raise DataError(f"{names[0]} has {n} images but {name} has {len(y)} labels: give each image one")
    if not np.isfinite(y).all():
        raise DataError(f"{name} has NaN or infinite values: repair them or remove their images")
    return torch.from_numpy(y.reshape(n, width).astype(np.float64) if real else y.reshape(n).astype(np.int64))


def check_images(
    images: Any, targets: Any, names: tuple[str, str] = ("images", "targets"), *, training: bool = True
) -> tuple[Images, Tensor]:
    """Check images (n, C, H, W) and their targets and return them as tensors; raise `DataError` if unfit.

    A single class is an error only with `training`. The range of the pixels is left to the caller.
    """
    name = names[0]
    if not isinstance(images, StreamedImages):
        images = torch.as_tensor(images)
    if images.ndim != 4:
        raise DataError(f"{name} must be (n, channels, height, width); got {tuple(images.shape)}")
    if images.numel() == 0:
        raise DataError(f"{name} is empty, {tuple(images.shape)}: give at least one image")
    if not all(math.isfinite(value) for value in images.aminmax()):  # NaN propagates
        bad = sum(int((~part.flatten(1).isfinite().all(dim=1)).sum()) for part in images.split(1024))
        raise DataError(f"{name} has NaN or infinite pixels in {bad} images: repair or remove them")
    targets = check_targets(targets, len(images), names)
    if training and not targets.is_floating_point() and bool((targets == targets[0]).all()):
        advice = "training needs two or more: raise the limit, shuffle or extend the set"
        raise DataError(f"{names[1]} has a single class in {len(targets)} images; {advice}")
    return images, targets


def _assemble(name: str, source: Source, limit: int | None) -> tuple[Dataset, Dataset]:
    arrays, classes = source
    x = {part: _to_nhwc(arrays[f"x_{part}"], f"x_{part}") for part in ("train", "test")}
    y = {part: check_targets(arrays[f"y_{part}"], len(x[part]), (f"x_{part}", f"y_{part}")) for part in x}
    for key, pair in (("x", x), ("y", y)):
        if pair["train"].shape[1:] != pair["test"].shape[1:]:  # integer y are (n,), real y (n, c)
            found = (f"{k} is {arrays[k].dtype} {arrays[k].shape}" for k in KEYS if k.startswith(key))
            raise DataError(f"{' but '.join(found)}: make them alike")
    if y["train"].is_floating_point():
        classes = ()
    else:
        labels = y["train"].unique() if classes is None else torch.arange(len(classes))
        for part in y:
            if unknown := y[part][~torch.isin(y[part], labels)].unique().tolist()[:5]:
                raise DataError(f"y_{part} has labels that are no training class: {unknown}; drop their images")
            y[part] = torch.searchsorted(labels, y[part])
        classes = classes or tuple(str(label) for label in labels.tolist())

    sets = []
    for part, rows in (("train", slice(limit)), ("test", slice(None))):
        names = f"x_{part}", f"y_{part}"
        pixels = x[part][rows]
        images = StreamedImages(pixels) if isinstance(pixels, np.memmap) else to_floats(pixels)
        images, targets = check_images(images, y[part][rows], names, training=part == "train")
        low, high = (value.item() for value in images.aminmax())
        if low < 0 or high > 1:
            raise DataError(f"x_{part} must be uint8 or lie in [0, 1]; got [{low}, {high}]: rescale it")
        sets.append(Dataset(images, targets, classes, name))
    return sets[0], sets[1]


def _to_nhwc(x: np.ndarray, key: str) -> np.ndarray:
    if x.ndim not in (3, 4):
        raise DataError(f"{key} must be (n, height, width) or (n, height, width, channels); got {x.shape}")
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise DataError(f"{key} must be uint8, or float in [0, 1]; got {x.dtype}: convert it")
    if x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[3] > 4:
        raise DataError(f"{key} must have its channels last; got {x.shape}: transpose it with (0, 2, 3, 1)")
    return x[..., None] if x.ndim == 3 else x


def _read_digits() -> Source:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    x, y = (digits.images / 16).astype(np.float32), digits.target
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=360, random_state=0, stratify=y)
    return dict(zip(KEYS, (x_train, y_train, x_test, y_test), strict=True)), tuple("0123456789")


def _read_npz(path: Path, classes: tuple[str, ...] | None = None) -> Source:
    if not path.is_file():
        raise DataError(f"{path} does not exist: give an .npz file with {', '.join(KEYS)}")
    try:
        with np.load(path, allow_pickle=False) as file:
            found, arrays = list(file), {key: file[key] for key in KEYS if key in file}
        if raw := [key for key, array in arrays.items() if isinstance(array, bytes)]:
            raise ValueError(f"{', '.join(raw)} without numpy's header")
    except Exception as error:  # of zip, zlib, numpy's header, pickle: no closed list is documented
        if "Object arrays" in str(error):
            raise DataError(f"{path} holds Python objects, which are never unpickled: save plain arrays") from None
        raise DataError(f"{path} is no complete .npz file: write it again ({_one_line(error)})") from None
    if missing := [key for key in KEYS if key not in arrays]:
        raise DataError(f"{path} lacks {', '.join(missing)}: add them; it holds {', '.join(found) or 'nothing'}")
    return arrays, classes


def _read_arrays(root: Path) -> Source:
    """The .npy files of a folder, images on a memory map."""
    files = {key: root / f"{key}.npy" for key in KEYS}
    if missing := [file.name for file in files.values() if not file.is_file()]:
        raise DataError(f"{root} lacks {', '.join(missing)}: add them")
    arrays = {}
    for key, file in files.items():
        try:
            arrays[key] = np.load(file, mmap_mode="r" if key.startswith("x") else None, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            if "Object arrays" in str(error) or "Python objects" in str(error):
                raise DataError(f"{file} holds Python objects, which are never unpickled: save a plain array") from None
            raise DataError(f"{file} is no complete .npy file: write it again ({_one_line(error)})") from None
    return arrays, None


def _read_folder(root: Path, limit: int | None) -> Source:
    folder = import_torchvision().datasets.folder
    try:
        classes, numbers = folder.find_classes(root / "train")
        unknown = sorted(set(folder.find_classes(root / "test")[0]) - set(classes))
        samples = {
            part: folder.make_dataset(root / part, numbers, folder.IMG_EXTENSIONS, allow_empty=part == "test")
            for part in ("train", "test")
        }
    except OSError as error:
        raise DataError(f"{root} must hold train/CLASS/IMAGE and test/CLASS/IMAGE ({_one_line(error)})") from None
    if unknown or not samples["test"]:
        what = f"classes that train lacks, {', '.join(unknown)}" if unknown else "no images"
        raise DataError(f"{root / 'test'} has {what}: make it like {root / 'train'}")
    order = np.random.default_rng(0).permutation(len(samples["train"]))[:limit]
    samples["train"] = [samples["train"][row] for row in order]

    pictures = {file: _read_image(file) for part in samples for file, _ in samples[part]}
    sizes = {picture.size: file for file, picture in pictures.items()}
    if len(sizes) > 1:
        (a, file), (b, other) = list(sizes.items())[:2]
        found = f"{file} is {a[0]}x{a[1]}, {other} is {b[0]}x{b[1]}"
        raise DataError(f"all images of a folder must have one size: resize them; {found}")
    mode = "L" if all(picture.mode == "L" for picture in pictures.values()) else "RGB"
    arrays = {}
    for part in samples:
        arrays[f"x_{part}"] = np.stack([np.asarray(pictures[file].convert(mode)) for file, _ in samples[part]])
        arrays[f"y_{part}"] = np.array([number for _, number in samples[part]])
    return arrays, tuple(classes)


def _read_image(file: str) -> Image.Image:
    """The image as 8-bit grey or RGB."""
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"mode {image.mode} has more than 8 bits a channel")
            return image.convert("L" if image.mode in ("1", "L") else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{file} is no complete 8-bit image: replace or delete it ({_one_line(error)})") from None


def _read_download(name: str, root: Path, download: bool) -> Source:
    class_name, subfolder = DOWNLOADS[name]
    folder, npz = root / subfolder, root / f"{name}.npz"
    present = folder.is_dir() and any(folder.iterdir())
    if not present and npz.is_file():
        return _read_npz(npz, CIFAR10 if name == "cifar10" else None)
    cls = getattr(import_torchvision().datasets, class_name)
    if not present and not download:
        raise DataError(f"{name} is not in {root}: allow its download, or give the --data-dir that holds it")
    if not present:
        try:
            _download(cls, root, subfolder)
        except (OSError, RuntimeError, HTTPException, EOFError, zlib.error, tarfile.TarError) as error:
            advice = f"try again with a network, give the --data-dir that holds it, or put {npz.name} there"
            raise DataError(f"{name} could not be downloaded to {root}: {advice} ({_one_line(error)})") from None
    try:
        for file in sorted(folder.glob("*-ubyte")):
            _check_idx(file)
        train, test = cls(root, train=True), cls(root, train=False)
    except (OSError, RuntimeError, ValueError) as error:
        advice = "delete that folder and run again to download it again"
        raise DataError(f"{name} in {folder} is damaged: {advice} ({_one_line(error)})") from None
    arrays = (train.data, train.targets, test.data, test.targets)
    classes = tuple(label.split(" - ")[0] for label in train.classes)  # MNIST says "0 - zero"
    return {key: np.asarray(array) for key, array in zip(KEYS, arrays, strict=True)}, classes


def _download(cls: Any, root: Path, subfolder: str) -> None:
    """Download beside the final place and move the finished folder there: no half-written set can remain."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as scratch:
            with contextlib.redirect_stdout(sys.stderr):  # standard output belongs to --json
                cls(scratch, download=True)
            (root / subfolder).mkdir(parents=True, exist_ok=True)
            (root / subfolder).rmdir()  # empty, as the caller made sure
            (Path(scratch) / subfolder).rename(root / subfolder)
    finally:
        socket.setdefaulttimeout(timeout)


def _check_idx(path: Path) -> None:
    """Compare magic number and size of an uncompressed IDX file with what its name and its header promise."""
    axes = 3 if "idx3" in path.name else 1
    with path.open("rb") as file:
        magic, shape = file.read(4), np.frombuffer(file.read(4 * axes), ">u4").tolist()
    size, promised = path.stat().st_size, 4 + 4 * axes + math.prod(shape)
    if magic != bytes((0, 0, 8, axes)) or size != promised:
        raise ValueError(f"{path.name} has {size} bytes, its header {magic.hex()} {shape} promises {promised}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
