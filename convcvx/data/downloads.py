"""The sets of torchvision that have images and their classes, by name; whatever case they are written in.

No file of unknown checksum is unpickled; a download that breaks leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from difflib import get_close_matches
from http.client import HTTPException
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from convcvx._compat import import_torchvision
from convcvx.data.array_files import KEYS, read_npz
from convcvx.data.form import COLOUR
from convcvx.data.idx_files import read_idx_folder
from convcvx.data.image_files import Encoded, pixels, read_sequence
from convcvx.data.source import Order, Raw, Source, kept_rows
from convcvx.errors import DataError, one_line

TRAIN_OR_TEST = {"train": {"train": True}, "test": {"train": False}}
"""Arguments of a class of torchvision that asks whether its training set is meant, by part."""
ONE_SET: dict[str, dict[str, Any]] = {"train": {}}
"""Those of a class that has one set only."""


def _splits(train: str = "train", val: str | None = None, test: str | None = "test") -> dict[str, dict[str, Any]]:
    """Those of a class that asks for the name of a split."""
    names = {"train": train, "val": val, "test": test}
    return {part: {"split": name} for part, name in names.items() if name is not None}


class Download(NamedTuple):
    """A set of torchvision: its class in `torchvision.datasets`, where that class keeps its files, what it holds, and
    the arguments of the class for each part.
    """

    class_name: str
    folder: str
    about: str
    parts: dict[str, dict[str, Any]]


DOWNLOADS = {
    "mnist": Download("MNIST", "MNIST/raw", "handwritten digits, grey 28x28: 60,000 + 10,000", TRAIN_OR_TEST),
    "fashion-mnist": Download(
        "FashionMNIST", "FashionMNIST/raw", "clothes, grey 28x28: 60,000 + 10,000", TRAIN_OR_TEST
    ),
    "cifar10": Download(
        "CIFAR10", "cifar-10-batches-py", "things in 10 classes, 32x32 RGB: 50,000 + 10,000", TRAIN_OR_TEST
    ),
    "cifar100": Download("CIFAR100", "cifar-100-python", "the same in 100 classes: 50,000 + 10,000", TRAIN_OR_TEST),
    "kmnist": Download("KMNIST", "KMNIST/raw", "cursive Japanese, grey 28x28: 60,000 + 10,000", TRAIN_OR_TEST),
    "qmnist": Download(
        "QMNIST", "QMNIST/raw", "MNIST with its whole test set, grey 28x28: 60,000 + 60,000", TRAIN_OR_TEST
    ),
    "svhn": Download("SVHN", "train_32x32.mat", "house numbers, 32x32 RGB: 73,257 + 26,032", _splits()),
    "stl10": Download("STL10", "stl10_binary", "things in 10 classes, 96x96 RGB: 5,000 + 8,000", _splits()),
    "usps": Download("USPS", "usps.bz2", "handwritten digits, grey 16x16: 7,291 + 2,007", TRAIN_OR_TEST),
    "semeion": Download("SEMEION", "semeion.data", "handwritten digits, 16x16: 1,593", ONE_SET),
    "eurosat": Download("EuroSAT", "eurosat", "land from above, 64x64 RGB: 27,000", ONE_SET),
    "food101": Download("Food101", "food-101", "dishes, of several sizes: 75,750 + 25,250", _splits()),
    "flowers102": Download("Flowers102", "flowers-102", "flowers, of several sizes: 1,020 + 6,149", _splits(val="val")),
    "oxford-iiit-pet": Download(
        "OxfordIIITPet", "oxford-iiit-pet", "cats and dogs, of several sizes: 3,680 + 3,669", _splits("trainval")
    ),
    "gtsrb": Download("GTSRB", "gtsrb", "traffic signs, of several sizes: 26,640 + 12,630", _splits()),
    "dtd": Download("DTD", "dtd", "textures, of several sizes: 1,880 + 1,880", _splits(val="val")),
    "fgvc-aircraft": Download(
        "FGVCAircraft", "fgvc-aircraft-2013b", "aircraft, of several sizes: 3,334 + 3,333", _splits(val="val")
    ),
    "pcam": Download("PCAM", "pcam", "tissue, 96x96 RGB: 262,144 + 32,768 (needs h5py)", _splits(val="val")),
    "rendered-sst2": Download(
        "RenderedSST2", "rendered-sst2", "sentences as images, 448x448: 6,920 + 1,821", _splits(val="val")
    ),
    "stanford-cars": Download("StanfordCars", "stanford_cars", "cars, of several sizes: 8,144 + 8,041", _splits()),
    "sun397": Download("SUN397", "SUN397", "scenes, of several sizes: 108,754", ONE_SET),
    "country211": Download(
        "Country211", "country211", "places by country, of several sizes: 31,650 + 21,100", _splits(val="valid")
    ),
    "caltech101": Download("Caltech101", "caltech101", "objects, of several sizes: 8,677", ONE_SET),
    "caltech256": Download("Caltech256", "caltech256", "objects, of several sizes: 30,607", ONE_SET),
    "celeba": Download("CelebA", "celeba", "faces and 40 labels, 178x218 RGB: 162,770 + 19,962", _splits(val="valid")),
    "lfw-people": Download("LFWPeople", "lfw-py", "faces by name, 250x250 RGB: 9,525 + 3,708", _splits()),
    "fer2013": Download("FER2013", "fer2013", "moods of faces, grey 48x48: 28,709 + 7,178", _splits()),
    "clevr": Download(
        "CLEVRClassification", "clevr", "solids to count, 320x480: 70,000 + 15,000", _splits(val="val", test=None)
    ),
    "imagenette": Download(
        "Imagenette", "imagenette2", "10 classes of ImageNet, of several sizes: 9,469 + 3,925", _splits(test="val")
    ),
    "imagenet": Download(
        "ImageNet", "meta.bin", "1,000 classes, of several sizes: 1,281,167 + 50,000", _splits(test="val")
    ),
    **{
        f"emnist-{kind}": Download(
            "EMNIST",
            "EMNIST/raw",
            f"handwritten {what}, grey 28x28: {size}",
            {part: {"split": kind} | arguments for part, arguments in TRAIN_OR_TEST.items()},
        )
        for kind, what, size in (
            ("letters", "letters", "124,800 + 20,800"),
            ("digits", "digits", "240,000 + 40,000"),
            ("balanced", "letters and digits", "112,800 + 18,800"),
        )
    },
}
"""By name. The first ones are read by convcvx itself, the others as torchvision gives them."""
FILE_BY_FILE = ("mnist", "fashion-mnist", "cifar10", "cifar100", "kmnist")
"""Sets that are known file by file: arrays as they are stored."""

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""Classes of cifar10 by their labels, which an .npz file of the set leaves out."""
TIMEOUT = 10.0
"""Seconds that a download waits for a silent server: without a limit a wrong proxy would keep it waiting for ever."""


def set_named(name: str) -> str | None:
    """The name in `DOWNLOADS` that is meant, in whatever case, with or without hyphens; None for others."""
    return next(
        (known for known in DOWNLOADS if _bare(name) in (_bare(known), _bare(DOWNLOADS[known].class_name))), None
    )


def names_set(data: str) -> bool:
    """Whether a set is meant. A path that is there comes first, but for the sets that convcvx reads itself."""
    return set_named(data) is not None and (data in FILE_BY_FILE or not Path(data).exists())


def nearest(name: str) -> list[str]:
    """Names in `DOWNLOADS` that are like this one."""
    by_bare = {_bare(known): known for known in DOWNLOADS}
    return [by_bare[close] for close in get_close_matches(_bare(name), by_bare, 3, 0.7)]


def other_task(name: str) -> str | None:
    """The class of torchvision of that name whose images have no classes to learn; None where there is no such."""
    known = import_torchvision().datasets.__all__ if _bare(name) else ()
    return next((cls for cls in known if _bare(cls) == _bare(name) and set_named(cls) is None), None)


def _bare(name: str) -> str:
    return re.sub(r"[-_\s]", "", name).lower()


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
    packed = root / (
        cls.filename if name in FILE_BY_FILE and hasattr(cls, "filename") else ""
    )  # CIFAR comes as one archive
    advice = f"give the --data-dir that holds it, or put {name}.npz there"
    if not packed.is_file() and not download:
        raise DataError(f"{name} is not in {root}: allow its download, or give the --data-dir that holds it")
    if not _downloads(cls):
        raise DataError(f"{name} is not in {root}, and torchvision cannot download it: {advice}")
    try:
        if name in FILE_BY_FILE:
            _download_own(cls, root, DOWNLOADS[name].folder, packed if packed.is_file() else None)
        else:
            _download_any(name, cls, root)
    except (OSError, RuntimeError, ImportError, HTTPException, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(
            f"{name} could not be downloaded to {root}: try again with a network, {advice} ({one_line(error)})"
        ) from None


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
            if not import_torchvision().datasets.utils.check_integrity(packed, cls.tgz_md5):
                raise OSError(f"{packed} is damaged: delete it")
            shutil.copyfile(packed, scratch / packed.name)
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
