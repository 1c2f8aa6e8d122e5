"""Data sets of arrays: .npz files and folders of .npy files. Headers are read and compared before any data are.

Nothing is unpickled.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from convcvx.data.source import PARTS, Raw, Source
from convcvx.errors import DataError, one_line
from convcvx.machine.memory import check_memory

KEYS = ("x_train", "y_train", "x_test", "y_test")
"""Names of the arrays of a data set: images and targets to train on and to test with, by the Keras convention."""
NEEDED, TEST = KEYS[:2], KEYS[2:]
"""Those that a file needs, and those to test with: where a file has neither these nor a validation set,
`datasets.assembled` takes a test set out of its images."""
FURTHER = ("x_val", "y_val", "w_train", "w_val", "w_test")
"""Names of those that it may have besides: a validation set, and what each image counts for."""
MEDMNIST = {f"{kind}_{part}": f"{part}_{name}" for kind, name in (("x", "images"), ("y", "labels")) for part in PARTS}
"""What MedMNIST calls the same arrays."""
Arrays = dict[str, np.ndarray]
"""The arrays of a data set by `KEYS` and `FURTHER`, images NHW or NHWC."""


def read_npz(path: Path) -> Arrays:
    if not path.is_file():
        lacks = "is no file" if path.exists() else "does not exist"
        raise DataError(f"{path} {lacks}: give an .npz file with {', '.join(NEEDED)} and, perhaps, {', '.join(TEST)}")
    try:
        forms, names = _forms_in_zip(path)
    except Exception as error:  # of zip, zlib, numpy's header: no closed list is documented
        raise DataError(f"{path} is no complete .npz file: write it again ({one_line(error)})") from None
    if missing := [key for key in NEEDED if key not in forms]:
        raise DataError(f"{path} lacks {', '.join(missing)}: add them; it holds {', '.join(forms) or 'nothing'}")
    check_forms(forms, path)
    check_memory(
        # As they are stored, and images once more in float32.
        sum(forms[key].nbytes + 4 * forms[key].size * key.startswith("x") for key in (*KEYS, *FURTHER) if key in forms),
        f"{path} unpacked",
        "give fewer images, or save the arrays as .npy files in a folder: such images stay on disk",
        DataError,
    )
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[names[key]] for key in (*KEYS, *FURTHER) if key in forms}
    except Exception as error:
        raise DataError(f"{path} is no complete .npz file: write it again ({one_line(error)})") from None


def read_arrays(root: Path) -> Arrays:
    """The .npy files of a folder, images on a memory map."""
    files = {key: file for key in (*KEYS, *FURTHER) if (file := root / f"{key}.npy").is_file()}
    needed = NEEDED if "x_val" in files else KEYS  # no test set is taken out of images that stay on disk
    if missing := [f"{key}.npy" for key in needed if key not in files]:
        raise DataError(f"{root} lacks {', '.join(missing)}: add them")
    arrays = {}
    for key, file in files.items():
        try:
            with file.open("rb") as opened:
                form = _form(opened)
            # There is no map of nothing; a file that is shorter than its header says has none either.
            mapped = form.size and not form.dtype.hasobject
            arrays[key] = np.load(file, mmap_mode="r", allow_pickle=False) if mapped else form
        except Exception as error:
            raise DataError(f"{file} is no complete .npy file: write it again ({one_line(error)})") from None
    check_forms(arrays, root)
    labels = sum(array.nbytes for key, array in arrays.items() if not key.startswith("x"))
    check_memory(labels, f"the labels in {root}", "give fewer of them", DataError)
    return {key: array if key.startswith("x") else np.array(array) for key, array in arrays.items()}


def check_forms(arrays: Arrays, place: Path) -> None:
    """Raise `DataError` for dtypes and shapes that no data set has; looks at no entry."""
    for key in (*KEYS, *FURTHER):
        if key in arrays and arrays[key].dtype.hasobject:
            raise DataError(f"{key} of {place} holds Python objects, which are never unpickled: save plain arrays")
    for part in PARTS:
        if (f"x_{part}" in arrays) != (f"y_{part}" in arrays):
            raise DataError(f"{place} has one of x_{part} and y_{part}: give both, or neither")
        if f"w_{part}" in arrays and f"x_{part}" not in arrays:
            raise DataError(f"{place} has w_{part}, weights of images that it has not: give x_{part} too, or neither")
    for part in (part for part in PARTS if f"x_{part}" in arrays):
        x, y, w = arrays[f"x_{part}"], arrays[f"y_{part}"], arrays.get(f"w_{part}")
        check_pixels(x, f"x_{part}")
        if w is not None and w.shape != (len(x),):
            raise DataError(f"w_{part} must be one number an image, ({len(x)},); got shape {w.shape}")
        if not y.ndim:
            raise DataError(f"y_{part} is a single label for {len(x)} images: give each image one")
        if len(x) != len(y):
            raise DataError(f"x_{part} has {len(x)} images but y_{part} has {len(y)} labels: give each image one")


def check_pixels(x: np.ndarray, key: str) -> None:
    """Raise `DataError` unless dtype and shape are those of images NHW or NHWC."""
    if x.ndim not in (3, 4):
        raise DataError(f"{key} must be (n, height, width) or (n, height, width, channels); got {x.shape}")
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise DataError(f"{key} must be uint8, or float in [0, 1]; got {x.dtype}: convert it")
    if x.ndim == 4 and _channels_first(*x.shape[1:]):
        raise DataError(
            f"{key} must have its channels last; got {x.shape}: transpose it with (0, 2, 3, 1), or, if that is what "
            f"{x.shape[3]} means, lay an edge of zeros around the images"
        )


def _channels_first(first: int, second: int, third: int) -> bool:
    """Whether the axes of an image seem to be channels, height, width: few, many, many, or a square after another."""
    return third > 4 and (first <= 4 or first != second == third)


def _forms_in_zip(path: Path) -> tuple[Arrays, dict[str, str]]:
    """What the headers in an .npz file promise and what its arrays are called there, and the names of the others."""
    forms: Arrays = {}
    with zipfile.ZipFile(path) as archive:
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        told = MEDMNIST if MEDMNIST["x_train"] in members and KEYS[0] not in members else {}
        names = {told.get(key, key): key for key in (*KEYS, *FURTHER)}
        for stored, member in members.items():
            key = names.get(stored, stored)
            forms[key] = np.zeros(0)
            if stored in names:
                with archive.open(member) as file:
                    forms[key] = _form(file)
                    size = file.tell() + forms[key].nbytes
                if size != member.file_size and not forms[key].dtype.hasobject:
                    raise ValueError(f"{key} promises {size} bytes and has {member.file_size}")
    return forms, {key: stored for stored, key in names.items()}


def _form(file: IO[bytes]) -> np.ndarray:
    """An array of zeros that takes no memory, of the dtype and the shape in the header of an .npy file."""
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):  # later ones are for names of fields
        raise ValueError(f"its format {version} is not one of plain arrays")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(file)
    return np.broadcast_to(np.zeros((), dtype), shape)


NPZ_SOURCE = Source(
    "FILE.npz with x_train, y_train and, perhaps, x_test, y_test, x_val, y_val; or as MedMNIST calls them",
    lambda order: order.path.suffix == ".npz",
    lambda order: Raw(order.path.stem, read_npz(order.path)),
)
FOLDER_SOURCE = Source(
    "a FOLDER of x_train.npy, y_train.npy, x_test.npy, y_test.npy (or x_val, y_val), which stay on disk",
    lambda order: order.path.is_dir() and any(order.path.glob("[xy]_*.npy")),
    lambda order: Raw(order.path.resolve().name, read_arrays(order.path)),
)
