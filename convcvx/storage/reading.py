"""Files that runs leave, read back strictly: JSON, and safetensors files that describe themselves.

A *form* says what JSON must hold: a type; a dict of forms by key, those that end in "?" optional; [form] a list of any
length, [form, form] one of two; (form, form) one of either. `float` is any number, and no number is a boolean.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from safetensors import SafetensorError, safe_open

from convcvx.errors import RunError, one_line, shown

if TYPE_CHECKING:
    from torch import Tensor

NAMES: dict[type | None, str] = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    dict: "an object",
    None: "null",
}
"""Kinds of JSON values, and what they are called in messages."""

REMEDY = "restore it, or remove it and train again"
"""What to do about a damaged file of a run."""


def is_a(value: Any, kind: type | None) -> bool:
    """Whether `value` is of a kind of `NAMES`."""
    if kind is None or isinstance(value, bool):
        return value is None if kind is None else kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def user_path(path: str | os.PathLike[str]) -> Path:
    """`path` with its folder for the home ~ or ~USER that it begins with; raise `RunError` where there is no such."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        home = Path(path).parts[0]
        raise RunError(
            f"{shown(os.fspath(path))} begins with the home of a user whom this machine does not know: write ./{home} "
            "for a folder of that name, or another path"
        ) from None


def check_file(path: Path) -> None:
    """Raise `FileNotFoundError` for what is no file: a pipe, say, may never end."""
    if not path.is_file():
        raise FileNotFoundError("it is no file" if path.exists() else "there is no such file")


def read_json(path: Path, form: Any) -> Any:
    """What a JSON file holds; raise `RunError` if that is not of the `form`."""
    try:
        check_file(path)
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"cannot read {path}: {one_line(error)}; {REMEDY}") from None
    return check_form(value, form, path)


def check_form(value: Any, form: Any, path: Path) -> Any:
    """Return `value`; raise `RunError` if it is not of the `form`."""
    if fault := form_fault(value, form):
        raise RunError(f"{path} is not as convcvx writes it: {fault}; {REMEDY}")
    return value


def read_tensors(path: Path, shapes: Mapping[str, str], form: Any) -> tuple[dict[str, Tensor], Any]:
    """The tensors and the description in a safetensors file of convcvx; raise `RunError` if they are not as they must.

    `shapes` names the axes of each tensor: "m r" and "m p c" share the length m. Names that end in "?" are optional.
    """
    try:
        tensors, described = open_tensors(path)
    except RunError as error:
        raise RunError(f"{error}; {REMEDY}") from None
    check_form(described, form, path)
    lengths: dict[str, int] = {}
    for name, axes in shapes.items():
        tensor = tensors.get(name.removesuffix("?"))
        if tensor is None and name.endswith("?"):
            continue
        fits = tensor is not None and tensor.is_floating_point() and tensor.ndim == len(axes.split())
        if (
            tensor is None
            or not fits
            or any(
                lengths.setdefault(axis, length) != length
                for axis, length in zip(axes.split(), tensor.shape, strict=True)
            )
        ):
            found = "none" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise RunError(
                f"{path} is not as convcvx writes it: {name.removesuffix('?')} must be floats ({axes}); got {found}; "
                f"{REMEDY}"
            )
        if not bool(tensor.isfinite().all()):
            raise RunError(f"{path} has NaN or infinity in {name}: {REMEDY}")
    return tensors, described


def open_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors in any safetensors file, and what convcvx wrote about them, None if it did not."""
    path = user_path(path)
    try:
        check_file(path)
        with safe_open(str(path), framework="pt") as file:
            # Copied to aligned memory: on unaligned operands BLAS rounds otherwise, and rounds would not repeat.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - no mapping
            described = (file.metadata() or {}).get("convcvx")
        return tensors, None if described is None else json.loads(described)
    except (OSError, SafetensorError, ValueError, RecursionError, AttributeError) as error:  # of dtypes torch lacks
        raise RunError(f"cannot read {path}: {one_line(error)}") from None


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON of `value`, with null for the infinite numbers that JSON does not know."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def form_of(record: type) -> dict[str, Any]:
    """The form of a dataclass in a file: fields with a default are optional, and null is for numbers without end."""
    hints, form = get_type_hints(record), dict[str, Any]()
    for field in fields(record):
        hint = hints[field.name]
        kinds = tuple(map(_form_of_type, get_args(hint) if isinstance(hint, UnionType) else (hint,)))
        needed = field.default is MISSING and field.default_factory is MISSING
        form[field.name + "?" * (not needed)] = (*kinds, None) if float in kinds else kinds
    return form


def _form_of_type(kind: Any) -> Any:
    if kind is NoneType:
        return None
    if get_origin(kind) is tuple:  # of any length
        return [get_args(kind)[0]]
    plain = get_origin(kind) or kind
    if plain is dict:
        return {}
    return str if issubclass(plain, str) else plain


def form_fault(value: Any, form: Any, place: str = "it") -> str | None:
    """What is not of the form, and where; None if all is."""
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return f"{place} must be an object; got {shown(value)}"
        for name, part in form.items():
            key = name.removesuffix("?")
            if key not in value and name == key:
                return f"{key} is missing"
            if key in value and (fault := form_fault(value[key], part, key)):
                return fault
        return None
    if isinstance(form, list):
        if not isinstance(value, list) or (len(form) > 1 and len(value) != len(form)):
            return f"{place} must be a list{f' of {len(form)}' if len(form) > 1 else ''}; got {shown(value)}"
        parts = zip(value, form if len(form) > 1 else form * len(value), strict=True)
        faults = (form_fault(entry, part, f"{place}[{k}]") for k, (entry, part) in enumerate(parts))
        return next((fault for fault in faults if fault), None)
    if isinstance(form, tuple):
        either = [form_fault(value, part, place) for part in form]
        return None if None in either else either[0]
    return None if is_a(value, form) else f"{place} must be {NAMES[form]}; got {shown(value)}"
