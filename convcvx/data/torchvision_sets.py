"""The sets of torchvision that have images and their classes, by name; whatever case they are written in."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from convcvx._compat import import_torchvision

TRAIN_OR_TEST = {"train": {"train": True}, "test": {"train": False}}
"""Arguments of a class of torchvision that asks whether its training set is meant, by part."""
ONE_SET: dict[str, dict[str, Any]] = {"train": {}}
"""Arguments of a class that has one set only."""


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
