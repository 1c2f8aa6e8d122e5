"""How a set of torchvision comes: from the folder that holds it, from NAME.npz beside it, or downloaded.

No file of unknown checksum is unpickled; a download that breaks leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from http.client import HTTPException
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from convcvx._compat import import_torchvision
from convcvx.data.array_files import KEYS, read_npz
from convcvx.data.form import COLOUR
from convcvx.data.idx_files import read_idx_folder
from convcvx.data.image_files import Encoded, pixels, read_sequence
from convcvx.data.source import Order, Raw, Source, kept_rows
from convcvx.data.torchvision_sets import DOWNLOADS, FILE_BY_FILE, names_set, set_named
from convcvx.errors import DataError, one_line

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""Classes of cifar10 by their labels, which an .npz file of the set leaves out."""
TIMEOUT = 10.0
"""Seconds that a download waits for a silent server: without a limit a wrong proxy would keep it waiting for ever."""


def default_data_dir() -> Path:
    """The `datasets/` folder of a source checkout, otherwise `./datasets`."""
    root = Path(__file__).resolve().parents[2]  # in site-packages, `datasets` is another project's package
    return root / "datasets" if (root / "pyproject.toml").is_file() else Path("datasets")


def find_download(name: str, root: Path) -> Path | None:
    """What in `root` holds the set: a folder, a file or NAME.npz; None where nothing does."""
    folder, npz = DOWNLOADS[name].folder, root / f"{name}.npz"
    for place in (root / folder, root / name / folder):
        if place.is_file() or (place.is_dir() and any(place.iterdir())):
            return place
    return npz if npz.is_file() else None


def read_download(order: Order) -> Raw:
    """The arrays of a set of `DOWNLOADS`, downloaded if need be."""
    name, root = set_named(order.name), order.root
    assert name is not None
    found = find_download(name, root)
    if found is not None and found.suffix == ".npz":
        return Raw(name, read_npz(found), CIFAR10 if name == "cifar10" else None)
    cls = getattr(import_torchvision().datasets, DOWNLOADS[name].class_name, None)
    if cls is None:
        raise DataError(f"{name} is not in this version of torchvision: give it as {name}.npz in --data-dir")
    if found is None:
        _fetch(name, cls, root, order.download)
    place = _holder(name, root)
    folder = place / DOWNLOADS[name].folder
    try:
        return _read_own(name, cls, place, folder) if name in FILE_BY_FILE else _read_any(name, cls, place, order)
    except DataError:
        raise
    except Exception as error:  # what files of another kind hold has no bounds
        advice = "delete that folder and run again to download it again"
        raise DataError(f"{name} in {folder} is damaged: {advice} ({one_line(error)})") from None


def _holder(name: str, root: Path) -> Path:
    """The folder that torchvision is to look in: `root`, as its users have it, or one of that name below."""
    folder = DOWNLOADS[name].folder
    return root if (root / folder).exists() else root / name


def _fetch(name: str, cls: Any, root: Path, download: bool) -> None:
    """Download what is missing, or say why not."""
    packed = _packed(name, cls, root)
    advice = f"give the --data-dir that holds it, or put {name}.npz there"
    if packed is None and not download:
        raise DataError(f"{name} is not in {root}: allow its download, or give the --data-dir that holds it")
    if not _downloads(cls):
        raise DataError(f"{name} is not in {root}, and torchvision cannot download it: {advice}")
    try:
        if name in FILE_BY_FILE:
            _download_own(cls, root, DOWNLOADS[name].folder, packed)
        else:
            _download_any(name, cls, root)
    except ImportError as error:  # which some sets are read with
        raise DataError(f"{name} needs a package that is not here: pip install it ({one_line(error)})") from None
    except (OSError, RuntimeError, ValueError, HTTPException, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(
            f"{name} could not be downloaded to {root}: try again with a network, {advice} ({one_line(error)})"
        ) from None


def _packed(name: str, cls: Any, root: Path) -> Path | None:
    """The one archive that CIFAR comes as, by whatever name it was saved in `root` or in a folder called as the set.

    What it is is told by its checksum, without which nothing is unpacked, as what is in it are pickles.
    """
    if name not in FILE_BY_FILE or not hasattr(cls, "filename"):
        return None
    stem = cls.filename.removesuffix(".tar.gz")
    near = [path for place in (root, root / name) for path in sorted(place.glob(f"{stem}*gz")) if path.is_file()]
    good = import_torchvision().datasets.utils.check_integrity
    found = next((path for path in near if good(path, cls.tgz_md5)), None)
    if near and found is None:
        raise DataError(
            f"{near[0]} is not the archive that torchvision knows, by its checksum, and is not unpacked: download it "
            f"anew, or put {name}.npz in its place"
        )
    return found


def _read_any(name: str, cls: Any, place: Path, order: Order) -> Raw:
    """The arrays of a set that torchvision reads; training images in an order drawn with seed 0."""
    arrays, parts = dict[str, np.ndarray](), DOWNLOADS[name].parts
    classes: tuple[str, ...] | None = None
    for part, arguments in parts.items():
        own = {"loader": _load_image} if "loader" in signature(cls).parameters else {}
        kept = {"download": False} if _downloads(cls) else {}  # some download unless told not to
        data = cls(place, **arguments, **own, **kept)
        if part == "train":
            classes = _class_names(data)
        # Without names of classes only all labels tell them.
        rows = kept_rows(part, len(data), parts, None if classes is None else order.limit)
        labels: list[Any] = [None] * len(rows)

        def image(row: int, data: Any = data, rows: np.ndarray = rows, labels: list[Any] = labels) -> Any:
            picture, labels[row] = data[int(rows[row])]
            return picture

        arrays[f"x_{part}"] = read_sequence(len(rows), image, order.form, name)
        arrays[f"y_{part}"] = np.stack([np.asarray(label) for label in labels])
    return Raw(name, arrays, classes)


def _downloads(cls: type) -> bool:
    """Whether a class of torchvision can download its set, by itself or as the class that it is made from does."""
    return any("download" in signature(base).parameters for base in cls.__mro__ if base is not object)


def _class_names(data: Any) -> tuple[str, ...] | None:
    """Of a set of torchvision, which keeps several for a class at times; None where it keeps none."""
    names = getattr(data, "classes", getattr(data, "categories", None))
    if not isinstance(names, list | tuple):
        return None
    return tuple(name if isinstance(name, str) else ", ".join(map(str, name)) for name in names)


def _load_image(path: Any) -> Image.Image:
    """For torchvision, whose own way knows no orientation and reads any format."""
    return Image.fromarray(pixels(Encoded.at(Path(path)), COLOUR))


def _read_own(name: str, cls: Any, root: Path, folder: Path) -> Raw:
    if "mnist" in name:
        classes = tuple(label.split(" - ")[0] for label in cls.classes)  # MNIST says "0 - zero"
        return Raw(name, read_idx_folder(folder), classes)
    train, test = cls(root, train=True), cls(root, train=False)  # which compare checksums, then unpickle
    arrays = (train.data, train.targets, test.data, test.targets)
    return Raw(name, {key: np.asarray(array) for key, array in zip(KEYS, arrays, strict=True)}, tuple(train.classes))


def _download_own(cls: Any, root: Path, subfolder: str, packed: Path | None) -> None:
    """Download beside the final place, or take what is `packed`, and move the finished folder there.

    No half-written set can remain.
    """
    with _scratch(root) as scratch:
        if packed is not None:
            shutil.copyfile(packed, scratch / cls.filename)
        cls(scratch, download=True)
        (root / subfolder).mkdir(parents=True, exist_ok=True)
        (root / subfolder).rmdir()  # empty, as the caller made sure
        (scratch / subfolder).rename(root / subfolder)


def _download_any(name: str, cls: Any, root: Path) -> None:
    """Download all parts beside the final place, `root / name`, and move the finished folder there."""
    with _scratch(root) as scratch:
        (scratch / name).mkdir()
        for arguments in DOWNLOADS[name].parts.values():
            cls(scratch / name, **arguments, download=True)
        (scratch / name).rename(root / name)


@contextlib.contextmanager
def _scratch(root: Path) -> Iterator[Path]:
    """A folder in `root` that goes away, while downloads wait for no silent server and print nothing."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=root, prefix=".download-") as scratch,
            contextlib.redirect_stdout(sys.stderr),  # standard output belongs to --json
        ):
            yield Path(scratch)
    finally:
        socket.setdefaulttimeout(timeout)


SOURCE = Source(
    "a set of torchvision by name, in any case: see `convcvx data`",
    lambda order: names_set(order.name),
    read_download,
)
