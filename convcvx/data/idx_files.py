"""MNIST's own files, IDX: a magic number, the shape, the bytes. Read by every name that they are handed on by."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np

from convcvx.errors import DataError
from convcvx.machine.memory import check_memory

NAMES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}
"""The files of MNIST and of sets like it, without ".gz", by `KEYS`."""


def read_idx_folder(folder: Path) -> dict[str, np.ndarray]:
    """The four arrays; raise `ValueError` or `OSError` for one that is missing or damaged."""
    return {key: read_idx(_find(folder, name)) for key, name in NAMES.items()}


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of an IDX file, packed or not, of as many axes as its name says."""
    axes = 3 if "idx3" in path.name else 1
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        magic, shape = file.read(4), np.frombuffer(file.read(4 * axes), ">u4").tolist()
        size, header = path.stat().st_size, 4 + 4 * axes
        if magic == bytes((0, 0, 8, axes)):
            check_memory(5 * math.prod(shape), str(path), "give fewer images", DataError)
            content = file.read(math.prod(shape) + 1)
            size = header + len(content)
            if len(content) == math.prod(shape):
                return np.frombuffer(content, np.uint8).reshape(shape).copy()  # which torch may write to
    promised = header + math.prod(shape)
    raise ValueError(f"{path.name} has {size} bytes, its header {magic.hex()} {shape} promises {promised}")


def _find(folder: Path, name: str) -> Path:
    """The file called `name`, or as some sites call it."""
    for stem in (name, name.replace("-idx", ".idx")):
        for found in (folder / stem, folder / f"{stem}.gz"):
            if found.is_file():
                return found
    raise FileNotFoundError(f"{name}, or {name}.gz, is not there")
