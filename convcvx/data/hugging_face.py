"""Data sets of Hugging Face's `datasets`: objects, folders that `save_to_disk` left, and parquet files.

Objects are used by what they offer, so that nothing is imported for them. Nothing is downloaded, no script is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from convcvx.data.form import ImageForm
from convcvx.data.image_files import Encoded, read_images, read_sequence
from convcvx.data.source import Order, Raw, Source, kept_rows, part_of, with_classes
from convcvx.errors import DataError, one_line
from convcvx.machine.memory import check_memory

IMAGES = ("image", "img", "images", "pixels", "picture")
"""Names of a column of images, where no column has that kind."""
LABELS = ("label", "labels", "fine_label", "target", "targets", "class", "category")
"""Names of a column of labels, in this order."""
SAVED = ("dataset_dict.json", "state.json")
"""Files by which a folder of `save_to_disk` is known."""
HIDDEN = -1
"""The label of images whose label is not told."""


def is_hugging_face(data: Any) -> bool:
    """Whether `data` are a `Dataset`, or a mapping of such by part, as a `DatasetDict` is."""
    if isinstance(data, Mapping):
        return bool(data) and all(map(is_hugging_face, data.values()))
    return hasattr(data, "column_names") and hasattr(data, "features")


def raw_of(data: Any, name: str, form: ImageForm, limit: int | None = None) -> Raw:
    """The arrays of a `Dataset`, all of it to train on, or of a `DatasetDict`.

    Raises
    ------
    DataError
        Without a column of images and one of labels, for a stream, and for unfit images.
    """
    named = data if isinstance(data, Mapping) else {"train": data}
    parts = {part: data for key, data in named.items() if (part := part_of(str(key))) is not None}
    if "train" not in parts:
        raise DataError(f"{name} has no part train; it has {', '.join(map(str, named))}: name one of them so")
    if streams := [part for part, data in parts.items() if not hasattr(data, "__len__")]:
        raise DataError(f"{streams[0]} of {name} is a stream, which has no end: load it with streaming=False")
    columns = {part: _columns(data, name) for part, data in parts.items()}
    labels = {part: _labels(data[columns[part][1]], name) for part, data in parts.items()}
    parts = {part: data for part, data in parts.items() if part == "train" or not _is_hidden(labels[part])}
    names = _class_names(parts["train"].features[columns["train"][1]])
    labels, classes = with_classes({part: labels[part] for part in parts}, names)
    arrays: dict[str, np.ndarray] = {}
    for part, data in parts.items():
        rows, column = kept_rows(part, len(labels[part]), parts, limit), columns[part][0]

        def image(number: int, data: Any = data, column: str = column, rows: np.ndarray = rows) -> Any:
            value = data[int(rows[number])][column]
            return np.asarray(value, np.uint8) if isinstance(value, list) else value

        arrays |= {f"x_{part}": read_sequence(len(rows), image, form, name), f"y_{part}": labels[part][rows]}
    return Raw(name, arrays, classes)


def _labels(values: Iterable[Any], name: str) -> np.ndarray:
    """Of all images, (n,) or (n, c)."""
    try:
        return np.asarray(list(values))
    except ValueError:  # lists of several lengths
        raise DataError(f"the labels of {name} must be one an image, or as many for each: write 0 and 1") from None


def _is_hidden(labels: np.ndarray) -> bool:
    """Whether a contest keeps them to itself."""
    return len(labels) > 0 and labels.dtype.kind in "iu" and bool((labels == HIDDEN).all())


def _columns(data: Any, name: str) -> tuple[str, str]:
    """The columns of images and of labels."""
    kinds = {column: type(data.features[column]).__name__ for column in data.column_names}
    images = [c for c, kind in kinds.items() if kind == "Image"] + [c for c in IMAGES if c in kinds]
    labels = [c for c in LABELS if c in kinds] + [c for c, kind in kinds.items() if kind == "ClassLabel"]
    if not images or not labels:
        what = "images" if not images else "labels"
        raise DataError(f"{name} has no column of {what}; it has {', '.join(kinds)}: rename one to image, one to label")
    return images[0], labels[0]


def _class_names(feature: Any) -> tuple[str, ...] | None:
    names = feature.get("names") if isinstance(feature, Mapping) else getattr(feature, "names", None)
    return None if names is None else tuple(map(str, names))


def _read_saved(order: Order) -> Raw:
    try:
        load_from_disk = import_module("datasets").load_from_disk
    except (ImportError, AttributeError):  # a folder of that name is a package too, an empty one
        raise DataError(f"{order.path} needs Hugging Face's datasets: pip install 'convcvx[datasets]'") from None
    try:
        data = load_from_disk(str(order.path))
    except Exception as error:  # whatever that package has against the folder
        raise DataError(f"{order.path} is no complete data set: save it again ({one_line(error)})") from None
    return raw_of(data, order.path.resolve().name, order.form, order.limit)


def _parquet_files(path: Path) -> dict[str, list[Path]]:
    """The files by part: one file is all to train on, those of a folder, or of its folder data, say by their names."""
    if path.suffix.lower() == ".parquet" and path.is_file():
        return {"train": [path]}
    files = sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")]) if path.is_dir() else []
    found: dict[str, list[Path]] = {}
    for file in files:
        found.setdefault(part_of(file.name) or "", []).append(file)
    return found


def _read_parquet(order: Order) -> Raw:
    try:
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{order.path} needs pyarrow: pip install 'convcvx[datasets]'") from None
    found = _parquet_files(order.path)
    if "" in found or "train" not in found:
        odd = ", ".join(file.name for file in found.get("", [])[:3])
        raise DataError(f"{order.path} must have files train-*.parquet, others val or test; got {odd or 'no train'}")
    images: dict[str, list[Encoded]] = {}
    labels: dict[str, np.ndarray] = {}
    names: tuple[str, ...] | None = None
    for part, files in found.items():
        read = [_parquet_file(parquet, file) for file in files]
        images[part] = [image for encoded, _, _ in read for image in encoded]
        labels[part] = _labels((value for _, values, _ in read for value in values), str(order.path))
        names = names or read[0][2]
    labels, classes = with_classes(labels, names)
    for part in found:
        rows = kept_rows(part, len(labels[part]), found, order.limit)
        images[part], labels[part] = [images[part][row] for row in rows], labels[part][rows]
    arrays = read_images({f"x_{part}": encoded for part, encoded in images.items()}, order.form)
    return Raw(order.path.resolve().stem, arrays | {f"y_{part}": y for part, y in labels.items()}, classes)


def _parquet_file(parquet: Any, file: Path) -> tuple[list[Encoded], list[Any], tuple[str, ...] | None]:
    """Images, labels, and the names of the classes, where the file tells them."""
    try:
        opened = parquet.ParquetFile(file)
        groups = range(opened.metadata.num_row_groups)
        check_memory(
            sum(opened.metadata.row_group(group).total_byte_size for group in groups),
            str(file),
            "give fewer images",
            DataError,
        )
        schema = opened.schema_arrow
        told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        image = next((name for name in IMAGES if name in schema.names), None)
        label = next((name for name in LABELS if name in schema.names), None)
        if image is None or label is None:
            raise ValueError(f"its columns are {', '.join(schema.names)}: rename one to image, one to label")
        table = opened.read(columns=[image, label])
        cells, values = table.column(image).to_pylist(), table.column(label).to_pylist()
    except DataError:
        raise
    except Exception as error:  # whatever that package has against the file
        raise DataError(f"{file} is no parquet file of images and labels: write it again ({one_line(error)})") from None
    encoded = [Encoded(_bytes(cell, file, row), f"image {row} of {file}") for row, cell in enumerate(cells)]
    return encoded, values, _class_names(told.get(label, {}))


def _bytes(cell: Any, file: Path, row: int) -> bytes:
    """The image file in a cell, alone or as {"bytes": ..., "path": ...}."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(content, bytes):
        raise DataError(f"image {row} of {file} is not in it: write the files' bytes into the table")
    return content


SAVED_SOURCE = Source(
    "a FOLDER that save_to_disk of Hugging Face's datasets left (pip install 'convcvx[datasets]')",
    lambda order: any((order.path / name).is_file() for name in SAVED),
    _read_saved,
)
PARQUET_SOURCE = Source(
    "FILE.parquet with images and labels, or a FOLDER of train-*.parquet, test-*.parquet (convcvx[datasets])",
    lambda order: bool(_parquet_files(order.path)),
    _read_parquet,
)
