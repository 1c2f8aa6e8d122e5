"""Folders of images: train/CLASS/IMAGE, val/CLASS/IMAGE and test/CLASS/IMAGE, or CLASS/IMAGE alone.

What is hidden (a leading dot) is passed over; links to other folders below a class and things that are no files are
passed over with a word.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np

from convcvx.data.image_files import ENDINGS, Encoded, read_images
from convcvx.data.source import PARTS, Order, Raw, Source, kept_rows
from convcvx.errors import DataError, DataWarning, one_line

HAVE = "train/CLASS/IMAGE and test/CLASS/IMAGE"
"""What a folder of images is asked to hold."""


def read_folder(order: Order) -> Raw:
    """The images of a folder with their classes; training images in an order drawn with seed 0.

    Raises
    ------
    DataError
        For classes without images or unknown to the training set, and for unfit images.
    """
    root, passed_over = order.path, list[str]()
    try:
        places = _parts(root, passed_over)
        found = {part: dict(_classes(place, passed_over)) for part, place in places.items()}
    except (OSError, RecursionError) as error:
        raise DataError(f"{root} must hold {HAVE}, or CLASS/IMAGE ({one_line(error)})") from None
    if passed_over:
        some = ", ".join(passed_over[:5]) + (f" and {len(passed_over) - 5} more" if len(passed_over) > 5 else "")
        warnings.warn(f"passed over, as no files or links to folders: {some}", DataWarning, stacklevel=2)
    classes, train = tuple(found["train"]), places["train"]
    if not classes:
        raise DataError(f"{train} has no folder of a class: make train/CLASS/IMAGE")
    if empty := [name for name in classes if not found["train"][name]]:
        known = ", ".join(ENDINGS)
        raise DataError(f"{train} has no images of the classes {', '.join(empty)}: add some ({known})")
    for part, place in places.items():
        unknown = [name for name in found[part] if name not in classes]
        if unknown or not any(found[part].values()):
            what = f"classes that train lacks, {', '.join(unknown)}" if unknown else "no images"
            raise DataError(f"{place} has {what}: make it like {train}")
    samples = {
        part: [(file, number) for number, name in enumerate(classes) for file in found[part].get(name, [])]
        for part in found
    }
    for part, pairs in samples.items():
        samples[part] = [pairs[row] for row in kept_rows(part, len(pairs), samples, order.limit)]
    arrays = read_images(
        {f"x_{p}": [Encoded.at(file) for file, _ in pairs] for p, pairs in samples.items()}, order.form
    )
    labels = {f"y_{part}": np.array([number for _, number in pairs], np.int64) for part, pairs in samples.items()}
    return Raw(root.resolve().name, arrays | labels, classes)


def _parts(root: Path, passed_over: list[str]) -> dict[str, Path]:
    """Where the sets lie, by part: in folders of their names, or all in `root`."""
    folders = {path.name: path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")}
    found = {part: folders[name] for part, names in PARTS.items() for name in names if name in folders}
    if not found and folders:
        return {"train": root}
    if "train" not in found:
        raise FileNotFoundError("it has no train" if found else "it has no folders")
    passed_over += [str(path) for path in folders.values() if path not in found.values()]
    return found


SOURCE = Source(
    "a FOLDER of train/CLASS/IMAGE, test/CLASS/IMAGE and, perhaps, val/CLASS/IMAGE; or of CLASS/IMAGE",
    lambda order: order.path.is_dir(),
    read_folder,
)


def _classes(part: Path, passed_over: list[str]) -> Iterator[tuple[str, list[Path]]]:
    """The classes of a part with their files, in alphabetical order.

    The folder of a class may be a link, but not one to the part itself, or to what contains it or is a class already.
    """
    taken = {part.resolve(), *part.resolve().parents}
    for entry in sorted(path for path in part.iterdir() if path.is_dir() and not path.name.startswith(".")):
        place = entry.resolve()
        if place in taken:
            passed_over.append(str(entry))
            continue
        taken.add(place)
        yield entry.name, list(_files(entry, passed_over))


def _files(folder: Path, passed_over: list[str]) -> Iterator[Path]:
    """The image files below a folder: those of each folder in it together, in alphabetical order."""
    for root, folders, names in sorted(os.walk(folder, onerror=_fail)):
        if any(name.startswith(".") for name in Path(root).relative_to(folder).parts):
            continue
        passed_over += [link for name in folders if os.path.islink(link := os.path.join(root, name))]
        for name in sorted(names):
            if name.startswith(".") or not name.lower().endswith(ENDINGS):
                continue
            file = Path(root, name)
            if file.is_file():
                yield file
            else:
                passed_over.append(str(file))


def _fail(error: OSError) -> NoReturn:
    """What cannot be listed is not left out in silence."""
    raise error
