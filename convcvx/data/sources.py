"""The table of sources: what `--data` may name, in the order in which it is looked at. A new one is a line here."""

from __future__ import annotations

import numpy as np

from convcvx.data import array_files, csv_file, downloads, hugging_face, image_folder
from convcvx.data.array_files import KEYS
from convcvx.data.source import Order, Raw, Source
from convcvx.data.torchvision_sets import names_set, nearest, other_task
from convcvx.errors import DataError, shown

ARRAYS = "arrays"
"""What data are called that Python gave, so that no name leads back to them."""
DIGITS = "digits"
"""What scikit-learn's digits are called."""


def _read_digits(order: Order) -> Raw:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    x, y = (digits.images / 16).astype(np.float32), digits.target
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=360, random_state=0, stratify=y)
    arrays = dict(zip(KEYS, (x_train, y_train, x_test, y_test), strict=True))
    return Raw(DIGITS, arrays, tuple("0123456789"))


SOURCES = (
    Source("digits: handwritten digits, grey 8x8, with scikit-learn", lambda order: order.name == DIGITS, _read_digits),
    downloads.SOURCE,
    array_files.NPZ_SOURCE,
    array_files.FOLDER_SOURCE,
    csv_file.SOURCE,
    hugging_face.SAVED_SOURCE,
    hugging_face.PARQUET_SOURCE,
    image_folder.SOURCE,
)
"""The first whose `claims` holds reads the data."""


def read(order: Order) -> Raw:
    """The arrays of what is asked for.

    Raises
    ------
    DataError
        For what no source claims; names that are like it are suggested.
    """
    for source in SOURCES:
        if source.claims(order):
            return source.read(order)
    if order.name == ARRAYS:
        raise DataError(
            "data were given as arrays, which a run folder does not keep: pass them to convcvx.certify or "
            "convcvx.compare in Python, or `convcvx certify` with --data, a file or a folder with the same training "
            "set, and a test set"
        )
    if task := other_task(order.name):
        raise DataError(f"data {shown(order.name)} is {task} of torchvision, whose images have no classes to learn")
    if order.path.exists() and not (order.path.is_file() or order.path.is_dir()):
        raise DataError(f"data {shown(order.name)} is neither a file nor a folder: save what it yields as a file")
    close = nearest(order.name)
    meant = f" (is {' or '.join(close)} meant?)" if close else ""
    raise DataError(
        f"data {shown(order.name)} is no set of a known name{meant}, and no .npz, .csv or .parquet file or folder that "
        "is there; `convcvx data` lists the names"
    )


def is_path(given: str) -> bool:
    """Whether what was given as data names a place, not a set."""
    return given not in (DIGITS, ARRAYS) and not names_set(given)
