"""Folders of images, train/CLASS/IMAGE and test/CLASS/IMAGE. Headers are read before any image is decoded.

What is hidden (a leading dot) is passed over; links to other folders below a class and things that are no files are
passed over with a word. Transparency is laid on white, and images turn as their EXIF orientation says.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image, ImageFile, ImageOps

from convcvx.errors import DataError, DataWarning, one_line
from convcvx.machine.memory import check_memory

FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "PPM": (".ppm", ".pgm"),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
"""Formats that Pillow may read, and how their files' names end. Pillow knows others, some of which start a program."""
ENDINGS = tuple(ending for endings in FORMATS.values() for ending in endings)
"""How the names of image files end; other files are passed over."""
ORIENTATION = 0x0112
"""The EXIF tag of how a camera was held, 1 to 8; from 5 on rows and columns change places."""


def read_folder(root: Path, limit: int | None) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The arrays of a folder of images and the names of its classes; `limit` training images, drawn with seed 0."""
    passed_over: list[str] = []
    try:
        found = {part: dict(_classes(root / part, passed_over)) for part in ("train", "test")}
    except (OSError, RecursionError) as error:
        raise DataError(f"{root} must hold train/CLASS/IMAGE and test/CLASS/IMAGE ({one_line(error)})") from None
    if passed_over:
        some = ", ".join(passed_over[:5]) + (f" and {len(passed_over) - 5} more" if len(passed_over) > 5 else "")
        warnings.warn(f"passed over, as no files or links to folders: {some}", DataWarning, stacklevel=2)
    classes = tuple(found["train"])
    if empty := [name for name in classes if not found["train"][name]]:
        known = ", ".join(ENDINGS)
        raise DataError(f"{root / 'train'} has no images of the classes {', '.join(empty)}: add some ({known})")
    unknown = [name for name in found["test"] if name not in classes]
    if unknown or not any(found["test"].values()):
        what = f"classes that train lacks, {', '.join(unknown)}" if unknown else "no images"
        raise DataError(f"{root / 'test'} has {what}: make it like {root / 'train'}")
    if not classes:
        raise DataError(f"{root / 'train'} has no folder of a class: make train/CLASS/IMAGE")
    samples = {
        part: [(file, number) for number, name in enumerate(classes) for file in found[part].get(name, [])]
        for part in found
    }
    order = np.random.default_rng(0).permutation(len(samples["train"]))[:limit]
    samples["train"] = [samples["train"][row] for row in order]
    return _read(samples), classes


def _read(samples: dict[str, list[tuple[Path, int]]]) -> dict[str, np.ndarray]:
    """The arrays of these files with their labels."""
    headers = {file: _header(file) for part in samples.values() for file, _ in part}
    sizes = {header.size: file for file, header in headers.items()}
    if len(sizes) > 1:
        (a, file), (b, other) = list(sizes.items())[:2]
        found = f"{file} is {a[0]}x{a[1]}, {other} is {b[0]}x{b[1]}"
        raise DataError(f"all images of a folder must have one size: resize them; {found}")
    ((width, height),) = sizes
    channels = () if all(header.grey for header in headers.values()) else (3,)
    numbers = len(headers) * width * height * (channels or (1,))[0]
    check_memory(5 * numbers, f"{len(headers)} images of {width}x{height}", "give fewer or smaller ones", DataError)
    arrays: dict[str, np.ndarray] = {}
    for part, files in samples.items():
        pixels = np.empty((len(files), height, width, *channels), np.uint8)
        for row, (file, _) in enumerate(files):
            pixels[row] = _pixels(file, "RGB" if channels else "L")
        arrays |= {f"x_{part}": pixels, f"y_{part}": np.array([number for _, number in files], np.int64)}
    return arrays


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


@dataclass(frozen=True)
class _Header:
    """What the first bytes of an image tell."""

    size: tuple[int, int]
    """Width and height, upright."""
    grey: bool


def _header(file: Path) -> _Header:
    try:
        with _open(file) as image:
            if image.mode.startswith(("I", "F")) or _is_deep(image):
                raise ValueError("more than 8 bits a channel: convert it, or give arrays of floats in [0, 1]")
            # A JPEG with further views (MPO) has the image itself first.
            if image.format != "MPO" and (pages := getattr(image, "n_frames", 1)) > 1:
                raise ValueError(f"it has {pages} pages: save each in a file of its own")
            # That of the base class: a PNG's own decodes the image, for what may stand behind it.
            turned = Image.Image.getexif(image).get(ORIENTATION, 1) in (5, 6, 7, 8)
            return _Header(image.size[::-1] if turned else image.size, image.mode in ("1", "L", "LA", "La"))
    except Exception as error:  # of Pillow's plugins: no closed list is documented
        raise _unfit(file, error) from None


def _pixels(file: Path, mode: str) -> np.ndarray:
    """The image upright, on white where it is transparent, as 8-bit grey ("L") or "RGB"."""
    try:
        with _open(file) as stored:
            image: Image.Image = ImageOps.exif_transpose(stored)
            if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(image.convert("RGB").convert(mode))
    except Exception as error:
        raise _unfit(file, error) from None


def _open(file: Path) -> ImageFile.ImageFile:
    with warnings.catch_warnings():
        # Sizes are looked at before anything is decoded.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(file, formats=list(FORMATS))


def _is_deep(image: ImageFile.ImageFile) -> bool:
    """Whether Pillow would drop low bits: its decoders are told of 16 by the name of a mode, or by a largest value."""
    for tile in image.tile:
        mode, *others = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if ";16" in str(mode) or (image.format == "PPM" and others and others[0] > 255):
            return True
    return False


def _unfit(file: Path, error: Exception) -> DataError:
    return DataError(f"{file} is no complete 8-bit image: replace or delete it ({one_line(error)})")
