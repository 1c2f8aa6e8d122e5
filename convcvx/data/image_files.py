"""Image files, in folders, lists and tables: 8 bits a channel, or 16 of grey. Headers are read before any is decoded.

Images turn as their EXIF orientation says, and what is transparent is laid on white.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps

from convcvx.data.form import COLOUR, GREY, ImageForm, as_pixels
from convcvx.errors import DataError, one_line
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
LARGEST_16_BIT = 65535
"""What is white in 16 bits."""
DECODED_BYTES = 8
"""Bytes that a pixel takes while an image is decoded, turned and laid on white: two images of four channels."""

LIKELY_SIZE = 256
"""Rows and columns that are offered to images of several sizes, at most: larger ones may not fit the memory."""
SMALLER = f"give fewer, or smaller ones, such as by --resize {LIKELY_SIZE}"
"""What to do where they do not."""


@dataclass(frozen=True)
class Encoded:
    """An image file: where it lies or, of one inside a table, its bytes; and its name in messages."""

    file: Path | bytes
    name: str

    @classmethod
    def at(cls, path: Path) -> Encoded:
        return cls(path, str(path))


@dataclass(frozen=True)
class Header:
    """What the first bytes of an image tell."""

    size: tuple[int, int]
    """Width and height, upright."""
    grey: bool
    deep: bool
    """16 bits a channel."""


def read_images(parts: Mapping[str, Sequence[Encoded]], form: ImageForm) -> dict[str, np.ndarray]:
    """The images of each part, (n, H, W) of grey ones or (n, H, W, 3), uint8; float32 if one of them has 16 bits.

    Raises
    ------
    DataError
        For files that are no images, of several sizes unless `form` says which, or too many for the memory.
    """
    headers = {file: header(file) for files in parts.values() for file in files}
    sizes = {found.size: file for file, found in headers.items()}
    if form.size is None and len(sizes) > 1:
        (a, file), (b, other) = list(sizes.items())[:2]
        found = f"{file.name} is {a[0]}x{a[1]}, {other.name} is {b[0]}x{b[1]}"
        such = f"{a[1]}x{a[0]}" if max(a) <= LIKELY_SIZE else str(LIKELY_SIZE)
        raise DataError(f"all images must have one size: pass resize, such as --resize {such}; {found}")
    height, width = form.size or next(iter(sizes))[::-1]
    channels = form.channels or (GREY if all(found.grey for found in headers.values()) else COLOUR)
    dtype = np.dtype(np.float32 if any(found.deep for found in headers.values()) else np.uint8)
    numbers = sum(map(len, parts.values())) * height * width * channels
    what = f"{len(headers)} images of {width}x{height}"
    decoding = 0 if form.size is None else DECODED_BYTES * max(w * h for w, h in sizes)
    # As they are stored, and once more in float32.
    check_memory((dtype.itemsize + 4) * numbers + decoding, what, SMALLER, DataError)
    form = ImageForm(form.size, channels)

    def image(file: Encoded) -> np.ndarray:
        return form.image(pixels(file, channels))

    return {part: stacked(map(image, files), len(files), dtype) for part, files in parts.items()}


def stacked(images: Iterable[np.ndarray], n: int, dtype: np.dtype) -> np.ndarray:
    """`n` images in one array, (n, H, W) of those with one channel; 8 bits become floats where `dtype` is that."""
    made = np.empty(0, dtype)
    for row, image in enumerate(images):
        one = image[..., 0] if image.shape[2] == GREY else image
        if row == 0:
            made = np.empty((n, *one.shape), dtype)
        made[row] = one if one.dtype == dtype else one / np.float32(255)
    return made


def header(file: Encoded) -> Header:
    """Raise `DataError` for what is no image, or has more bits than Pillow would keep."""
    try:
        with _open(file) as image:
            deep = _is_deep(image)
            if image.mode == "F" or (image.mode.startswith("I") or deep) != (image.mode.startswith("I") and deep):
                raise DataError(
                    f"{file.name} has more than 8 bits a channel, or 16 of grey: convert it, or give arrays of floats"
                )
            # A JPEG with further views (MPO) has the image itself first.
            if image.format != "MPO" and (pages := getattr(image, "n_frames", 1)) > 1:
                raise DataError(f"{file.name} has {pages} pages, an image has one: save each in a file of its own")
            # That of the base class: a PNG's own decodes the image, for what may stand behind it.
            turned = Image.Image.getexif(image).get(ORIENTATION, 1) in (5, 6, 7, 8)
            grey = deep or image.mode in ("1", "L", "LA", "La")
            return Header(image.size[::-1] if turned else image.size, grey, deep)
    except DataError:
        raise
    except Exception as error:  # of Pillow's plugins: no closed list is documented
        raise _unfit(file, error) from None


def pixels(file: Encoded, channels: int) -> np.ndarray:
    """The image as `decoded` has it."""
    try:
        with _open(file) as stored:
            return decoded(stored, channels)
    except Exception as error:
        raise _unfit(file, error) from None


def decoded(stored: Image.Image, channels: int | None = None) -> np.ndarray:
    """An image of Pillow's (H, W, C), upright, on white where it is transparent, with so many channels or its own.

    uint8, or float32 in [0, 1] where grey has 16 bits.
    """
    image: Image.Image = ImageOps.exif_transpose(stored)
    if image.mode.startswith("I"):
        values = as_pixels(image).astype(np.float32) / LARGEST_16_BIT
        return np.repeat(values, channels or GREY, axis=2)
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        has_colour = image.mode not in ("LA", "La", "L", "1")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    else:
        has_colour = image.mode not in ("L", "1")
    mode = "RGB" if channels == COLOUR or (channels is None and has_colour) else "L"
    return as_pixels(image.convert("RGB").convert(mode))


def read_sequence(n: int, image: Callable[[int], Any], form: ImageForm, name: str) -> np.ndarray:
    """The `n` images that `image` gives by number, of Pillow's or arrays (H, W) or (H, W, C); as of `read_images`.

    What the first one is the others must be, unless `form` says what all are.

    Raises
    ------
    DataError
        For other things, several sizes, or too many images for the memory.
    """
    if n == 0:
        raise DataError(f"{name} has no images: give at least one")
    first = _one_of(image, 0, form, name)
    needed = n * (first.nbytes + 4 * first.size)  # as they are stored, and once more in float32
    rows, columns = first.shape[:2]
    check_memory(needed, f"{n} images of {columns}x{rows}", SMALLER, DataError)

    def alike() -> Iterator[np.ndarray]:
        yield first
        for number in range(1, n):
            one = _one_of(image, number, form, name)
            if one.shape != first.shape or one.dtype != first.dtype:
                raise DataError(
                    f"all images must be alike: pass resize (--resize 32) or channels (--channels 3); of {name} the "
                    f"first is {first.dtype} {first.shape}, number {number} {one.dtype} {one.shape}"
                )
            yield one

    return stacked(alike(), n, first.dtype)


def _one_of(image: Callable[[int], Any], number: int, form: ImageForm, name: str) -> np.ndarray:
    """An image of a sequence (H, W, C), in this form."""
    try:
        given = image(number)
        one = decoded(given, form.channels) if isinstance(given, Image.Image) else as_pixels(given)
    except Exception as error:  # whatever another package has against one of its images
        raise DataError(f"image {number} of {name} cannot be read: replace or delete it ({one_line(error)})") from None
    if one.ndim != 3 or (one.dtype != np.uint8 and one.dtype.kind != "f"):
        kind = type(given).__name__
        raise DataError(f"image {number} of {name} must be one of Pillow's, or uint8 (H, W, C); got {kind} {one.dtype}")
    return form.image(one)


def _open(file: Encoded) -> ImageFile.ImageFile:
    with warnings.catch_warnings():
        # Sizes are looked at before anything is decoded.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        where = BytesIO(file.file) if isinstance(file.file, bytes) else file.file
        return Image.open(where, formats=list(FORMATS))


def _is_deep(image: ImageFile.ImageFile) -> bool:
    """Whether it has 16 bits a channel: Pillow's decoders are told so by the name of a mode, or by a largest value."""
    for tile in image.tile:
        mode, *others = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if ";16" in str(mode) or (image.format == "PPM" and others and others[0] > 255):
            return True
    return False


def _unfit(file: Encoded, error: Exception) -> DataError:
    return DataError(f"{file.name} is no complete image: replace or delete it ({one_line(error)})")
