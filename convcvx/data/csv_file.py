"""A list of images with their labels: FILE.csv with a column of paths and one of labels."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np

from convcvx.data.image_files import Encoded, read_images
from convcvx.data.source import Order, Raw, Source, kept_rows, part_of, with_classes
from convcvx.errors import DataError, one_line, shown
from convcvx.machine.memory import check_memory
from convcvx.terms.numbers import NUMBER, PLAIN, WHOLE

COLUMNS = {
    "path": ("path", "image", "image_path", "file", "filename", "file_name", "filepath"),
    "label": ("label", "class", "target", "y", "category"),
    "part": ("split", "set", "part", "subset"),
    "weight": ("weight", "sample_weight"),
}
"""Columns, and what they may be called; without these names the first two are paths and labels."""
BYTES_A_CHARACTER = 60
"""Bytes that a character of a table takes once it stands in lists of texts, at most: short ones are mostly overhead."""


def read_csv(order: Order) -> Raw:
    """Images and labels of a list; training images in an order drawn with seed 0.

    A column `split` says which set an image is of; without it a test set is taken out of all of them.

    Raises
    ------
    DataError
        For a table that is none, and files that are missing or unfit.
    """
    rows = _rows(order.path)
    parts: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        parts.setdefault(row["part"], []).append(row)
    if "train" not in parts:
        raise DataError(f"{order.path} has no training images: write train into the column split")
    kind = _kind_of([row["label"] for row in rows], order.path)
    labels, classes = with_classes({part: np.array([kind(row["label"]) for row in parts[part]]) for part in parts})
    for part in parts:
        kept = kept_rows(part, len(parts[part]), parts, order.limit)
        parts[part], labels[part] = [parts[part][row] for row in kept], labels[part][kept]
    here = order.path.parent
    files = {f"x_{p}": [Encoded.at(here / Path(row["path"]).expanduser()) for row in parts[p]] for p in parts}
    if missing := [file.name for found in files.values() for file in found if not Path(file.name).is_file()]:
        raise DataError(f"{order.path} names {missing[0]}, which is no file: paths count from where the list lies")
    arrays = read_images(files, order.form) | {f"y_{part}": y for part, y in labels.items()}
    if "weight" in rows[0]:
        arrays |= {f"w_{part}": np.array([float(row["weight"]) for row in found]) for part, found in parts.items()}
    return Raw(order.path.stem, arrays, classes)


def _rows(path: Path) -> list[dict[str, str]]:
    """One record an image with path, label, part and, perhaps, weight."""
    try:
        check_memory(BYTES_A_CHARACTER * path.stat().st_size, str(path), "give fewer images", DataError)
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            table = [(lines.line_num, row) for row in lines if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no table of text: write it again, in UTF-8 ({one_line(error)})") from None
    if not table:
        raise DataError(f"{path} is empty: write a path and a label a line")
    first = table[0][1]
    names = [cell.strip().lower() for cell in first]
    places = {key: names.index(name) for key, known in COLUMNS.items() for name in reversed(known) if name in names}
    if {"path", "label"} <= places.keys():
        table = table[1:]
    else:
        if len(names) != 2 or not (path.parent / first[0]).is_file():
            raise DataError(f"{path} must have the columns path and label; its first line is {shown(','.join(first))}")
        places = {"path": 0, "label": 1}
    rows = []
    for number, row in table:
        if len(row) <= max(places.values()):
            raise DataError(f"{path} has {len(row)} cells in line {number}, the first line {len(names)}: complete it")
        record = {key: row[place].strip() for key, place in places.items()}
        part = part_of(record.get("part", "train"))
        if part is None:
            raise DataError(f"{path} has the split {shown(record['part'])} in line {number}: write train, val or test")
        if not record["label"] or not NUMBER.fullmatch(weight := record.get("weight", "1")):
            raise DataError(f"{path} lacks a label or a weight in line {number}: complete it")
        if not math.isfinite(float(weight)):
            raise DataError(f"{path} has the weight {shown(weight)} in line {number}: write 0 to leave the image out")
        rows.append(record | {"part": part})
    if not rows:
        raise DataError(f"{path} lists no images: write a path and a label a line")
    return rows


def _kind_of(labels: list[str], path: Path) -> type:
    """What all labels are: whole numbers, real ones, or names.

    Whole numbers of which one is written in another way than Python would, such as 007 or +1, are names: a network says
    its classes as the list does.
    """
    if all(WHOLE.fullmatch(label) for label in labels):
        return int if all(PLAIN.fullmatch(label) for label in labels) else str
    if not all(NUMBER.fullmatch(label) for label in labels):
        return str
    odd = [label for label in labels if not math.isfinite(float(label))]
    if odd and len(odd) < len(labels):  # a gap among numbers; alone they may be names
        raise DataError(f"{path} has the label {shown(odd[0])} among numbers: drop its image, or rename the class")
    return str if odd else float


SOURCE = Source(
    "FILE.csv with a column of paths and one of labels, and perhaps one that says split: train, val or test",
    lambda order: order.path.suffix.lower() == ".csv" and order.path.is_file(),
    read_csv,
)
