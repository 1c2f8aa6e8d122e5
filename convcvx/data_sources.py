"""Where data sets come from: every source read into the Keras convention, x_train, y_train, x_test, y_test.

Images are NHW or NHWC. No file of unknown checksum is unpickled; a download that breaks leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import math
import socket
import sys
import tarfile
import tempfile
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from convcvx._compat import import_torchvision
from convcvx.errors import DataError

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


def read_digits() -> Source:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    x, y = (digits.images / 16).astype(np.float32), digits.target
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=360, random_state=0, stratify=y)
    return dict(zip(KEYS, (x_train, y_train, x_test, y_test), strict=True)), tuple("0123456789")


def read_npz(path: Path, classes: tuple[str, ...] | None = None) -> Source:
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
        raise DataError(f"{path} is no complete .npz file: write it again ({one_line(error)})") from None
    if missing := [key for key in KEYS if key not in arrays]:
        raise DataError(f"{path} lacks {', '.join(missing)}: add them; it holds {', '.join(found) or 'nothing'}")
    return arrays, classes


def read_arrays(root: Path) -> Source:
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
            raise DataError(f"{file} is no complete .npy file: write it again ({one_line(error)})") from None
    return arrays, None


def read_folder(root: Path, limit: int | None) -> Source:
    folder = import_torchvision().datasets.folder
    try:
        classes, numbers = folder.find_classes(root / "train")
        unknown = sorted(set(folder.find_classes(root / "test")[0]) - set(classes))
        samples = {
            part: folder.make_dataset(root / part, numbers, folder.IMG_EXTENSIONS, allow_empty=part == "test")
            for part in ("train", "test")
        }
    except OSError as error:
        raise DataError(f"{root} must hold train/CLASS/IMAGE and test/CLASS/IMAGE ({one_line(error)})") from None
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
        raise DataError(f"{file} is no complete 8-bit image: replace or delete it ({one_line(error)})") from None


def read_download(name: str, root: Path, download: bool) -> Source:
    class_name, subfolder = DOWNLOADS[name]
    folder, npz = root / subfolder, root / f"{name}.npz"
    present = folder.is_dir() and any(folder.iterdir())
    if not present and npz.is_file():
        return read_npz(npz, CIFAR10 if name == "cifar10" else None)
    cls = getattr(import_torchvision().datasets, class_name)
    if not present and not download:
        raise DataError(f"{name} is not in {root}: allow its download, or give the --data-dir that holds it")
    if not present:
        try:
            _download(cls, root, subfolder)
        except (OSError, RuntimeError, HTTPException, EOFError, zlib.error, tarfile.TarError) as error:
            advice = f"try again with a network, give the --data-dir that holds it, or put {npz.name} there"
            raise DataError(f"{name} could not be downloaded to {root}: {advice} ({one_line(error)})") from None
    try:
        for file in sorted(folder.glob("*-ubyte")):
            _check_idx(file)
        train, test = cls(root, train=True), cls(root, train=False)
    except (OSError, RuntimeError, ValueError) as error:
        advice = "delete that folder and run again to download it again"
        raise DataError(f"{name} in {folder} is damaged: {advice} ({one_line(error)})") from None
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


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
