"""Where data sets come from: every source read into the Keras convention, x_train, y_train, x_test, y_test.

Images are NHW or NHWC. No file of unknown checksum is unpickled; a download that breaks leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import sys
import tarfile
import tempfile
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convcvx._compat import import_torchvision
from convcvx.data.array_files import KEYS, read_npz
from convcvx.data.idx_files import read_idx_folder
from convcvx.errors import DataError, one_line

Source = tuple[dict[str, np.ndarray], tuple[str, ...] | None]
"""Arrays by `KEYS`, and the names of the classes; None where the labels in y_train are the classes."""


class Download(NamedTuple):
    """A set that is downloaded: its class in `torchvision.datasets`, the folder where that class keeps its files, and
    what it holds.
    """

    class_name: str
    folder: str
    about: str


DOWNLOADS = {
    "mnist": Download("MNIST", "MNIST/raw", "handwritten digits, grey 28x28: 60,000 + 10,000"),
    "fashion-mnist": Download("FashionMNIST", "FashionMNIST/raw", "clothes, grey 28x28: 60,000 + 10,000"),
    "cifar10": Download("CIFAR10", "cifar-10-batches-py", "things in 10 classes, 32x32 RGB: 50,000 + 10,000"),
    "cifar100": Download("CIFAR100", "cifar-100-python", "the same in 100 classes: 50,000 + 10,000"),
}
"""By name."""

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""Classes of cifar10 by their labels, which an .npz file of the set leaves out."""
TIMEOUT = 10.0
"""Seconds that a download waits for a silent server: without a limit a wrong proxy would keep it waiting for ever."""


def read_digits() -> Source:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    x, y = (digits.images / 16).astype(np.float32), digits.target
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=360, random_state=0, stratify=y)
    return dict(zip(KEYS, (x_train, y_train, x_test, y_test), strict=True)), tuple("0123456789")


def find_download(name: str, root: Path) -> Path | None:
    """The folder or the NAME.npz in `root` that holds the set; None where neither does."""
    folder, npz = root / DOWNLOADS[name].folder, root / f"{name}.npz"
    if folder.is_dir() and any(folder.iterdir()):
        return folder
    return npz if npz.is_file() else None


def read_download(name: str, root: Path, download: bool) -> Source:
    class_name, subfolder, _ = DOWNLOADS[name]
    folder, found = root / subfolder, find_download(name, root)
    if found is not None and found != folder:
        return read_npz(found), CIFAR10 if name == "cifar10" else None
    present = found is not None
    cls = getattr(import_torchvision().datasets, class_name)
    packed = root / getattr(cls, "filename", "")  # CIFAR comes as one archive
    if not present and not packed.is_file() and not download:
        raise DataError(f"{name} is not in {root}: allow its download, or give the --data-dir that holds it")
    if not present:
        try:
            _download(cls, root, subfolder, packed if packed.is_file() else None)
        except (OSError, RuntimeError, HTTPException, EOFError, zlib.error, tarfile.TarError) as error:
            advice = f"try again with a network, give the --data-dir that holds it, or put {name}.npz there"
            raise DataError(f"{name} could not be downloaded to {root}: {advice} ({one_line(error)})") from None
    try:
        return _read_download(name, cls, root, folder)
    except DataError:
        raise
    except Exception as error:  # what batches of another kind hold has no bounds
        advice = "delete that folder and run again to download it again"
        raise DataError(f"{name} in {folder} is damaged: {advice} ({one_line(error)})") from None


def _read_download(name: str, cls: Any, root: Path, folder: Path) -> Source:
    if "mnist" in name:
        return read_idx_folder(folder), tuple(label.split(" - ")[0] for label in cls.classes)  # MNIST says "0 - zero"
    train, test = cls(root, train=True), cls(root, train=False)  # which compare checksums, then unpickle
    arrays = (train.data, train.targets, test.data, test.targets)
    return {key: np.asarray(array) for key, array in zip(KEYS, arrays, strict=True)}, tuple(train.classes)


def _download(cls: Any, root: Path, subfolder: str, packed: Path | None) -> None:
    """Download beside the final place, or take what is `packed`, and move the finished folder there.

    No half-written set can remain.
    """
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as scratch:
            if packed is not None:
                if not import_torchvision().datasets.utils.check_integrity(packed, cls.tgz_md5):
                    raise OSError(f"{packed} is damaged: delete it")
                shutil.copyfile(packed, Path(scratch) / packed.name)
            with contextlib.redirect_stdout(sys.stderr):  # standard output belongs to --json
                cls(scratch, download=True)
            (root / subfolder).mkdir(parents=True, exist_ok=True)
            (root / subfolder).rmdir()  # empty, as the caller made sure
            (Path(scratch) / subfolder).rename(root / subfolder)
    finally:
        socket.setdefaulttimeout(timeout)
