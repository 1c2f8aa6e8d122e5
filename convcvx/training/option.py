"""An option: declared once, as a field of a record, with all that flags, TOML, Python and documentation say of it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from inspect import Parameter
from textwrap import wrap
from typing import Any

import numpy as np

from convcvx.errors import InputError, check_choice, check_count, check_positive, is_count, shown
from convcvx.storage.reading import NAMES, is_a

KINDS: dict[str, type] = {"str": str, "bool": bool, "int": int, "float": float}
DATA = "Data"
"""The panel of `--help` for the images."""
MODEL = "Model"
"""The panel for the network and its objective."""
SOLVER = "Solver"
"""The panel for the search for its optimum."""
STAGES = "Stages (one value, or one a stage by commas)"
"""The panel of `convcvx stack --help` for what may differ from stage to stage."""
NO_FLAG = ""
"""The panel of what no user sets."""
SIZE = "a whole number, or a pair of them, rows and columns"
"""What a kernel, a stride, a padding and a dilation are."""
LARGEST_SIDE = 4096
"""Pixels of a kernel, stride, padding, dilation or move of an image: of an image whose patches fit in memory."""


@dataclass(frozen=True)
class Option:
    """What is known of an option beside its name, kind and default, which are those of the field.

    Attributes
    ----------
    help, panel : str
        Text and panel of `--help`; the documentation has the same text.
    low, high : float
        The least and the largest value; of a size, each of the two.
    choices : collection of str
        The values of a text, if those are few.
    per_stage : str, optional
        It may differ from stage to stage of a stack; a note for `convcvx stack --help`, or "".
    may_change : bool
        A resumed run may change it: where it stops or where things are, not what it trains.
    any_model : bool
        It says nothing of the network or of the search for it: what fits the data still does, whatever it is.
    read : callable, optional
        Reads what Python or TOML may give in place of the text that runs keep.
    form : str
        What those are, in words.
    means : callable, optional
        What a text stands for: texts that stand for the same are one value, however they are written.
    strength : str, optional
        For a switch, the option that says how much: Python gives a number for both.
    command_only : bool
        Python gives the data themselves.
    """

    help: str
    panel: str
    low: float = -math.inf
    high: float = math.inf
    choices: Collection[str] = ()
    per_stage: str | None = None
    may_change: bool = False
    any_model: bool = False
    read: Callable[[Any], Any] | None = None
    form: str = ""
    means: Callable[[Any], Any] | None = None
    strength: str | None = None
    command_only: bool = False


@dataclass(frozen=True)
class Declared:
    """An option with its name, kind and default; `optional` if it may be None."""

    name: str
    kind: type
    optional: bool
    default: Any
    option: Option

    def check(self, value: Any) -> None:
        """Raise `InputError` for a value out of bounds."""
        about = self.option
        if value is None:
            return
        if about.choices:
            check_choice(self.name, value, about.choices)
        if about.low == -math.inf:
            return
        if self.kind is str:
            if min(parse_pair(self.name, value)) < about.low:
                least = f"a whole number >= {about.low:g}, or a pair of them"
                raise InputError(f"{self.name} must be {least}; got {shown(value)}")
        elif self.kind is int:
            check_count(self.name, value, minimum=int(about.low), maximum=about.high)
        else:
            check_positive(self.name, value, zero=about.low == 0, maximum=about.high)
            if value < about.low:
                raise InputError(f"{self.name} must be at least {about.low:g}; got {shown(value)}")

    def check_kind(self, value: Any) -> None:
        """Raise `InputError` for a value of another kind; None is what runs of earlier versions have for off."""
        absent = value is None and not self.default
        if not (absent or is_a(value, self.kind)):
            raise InputError(f"{self.name} must be {self.option.form or NAMES[self.kind]}; got {shown(value)}")

    def same(self, one: Any, other: Any) -> bool:
        """Whether two values are one, however they are written."""
        means = self.option.means
        if means is None or None in (one, other):
            return one == other
        try:
            return means(one) == means(other)
        except InputError:
            return False


def option(default: Any, panel: str, text: str, **about: Any) -> Any:
    """The field of a record that declares an option; `about` as for `Option`."""
    return field(default=default, metadata={"option": Option(text, panel, **about)})


def same_as(declared: Declared) -> Any:
    """The field of another record for an option that is declared already."""
    return field(default=declared.default, metadata={"option": declared.option})


def options_of(record: Any) -> dict[str, Declared]:
    """The options that a record, a dataclass, declares; a field without `option` is none."""
    found = {}
    for declared in fields(record):
        if "option" in declared.metadata:
            kind, _, none = str(declared.type).partition(" | ")
            parts = declared.name, KINDS[kind], bool(none), declared.default, declared.metadata["option"]
            found[declared.name] = Declared(*parts)
    return found


def check_names(given: Iterable[str], known: Collection[str]) -> None:
    """Raise `InputError` for what is no option."""
    for name in given:
        if name not in known:
            close = get_close_matches(name, known, 1)
            meant = f" (is {close[0]} meant?)" if close else ""
            raise InputError(f"unknown option {shown(name)}{meant}; the options are {', '.join(sorted(known))}")


def check_options(record: Any) -> None:
    """Raise `InputError` for an option of a record out of its bounds."""
    for declared in options_of(record).values():
        declared.check(getattr(record, declared.name))


def as_kept(record: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What Python or TOML gave, as runs keep it: sizes as text, a number for a switch as switch and strength."""
    kept = {name: value.item() if isinstance(value, np.generic) else value for name, value in given.items()}
    for name, declared in options_of(record).items():
        if name not in kept:
            continue
        value = kept[name]
        if declared.option.read is not None:
            kept[name] = declared.option.read(value)
        elif (strength := declared.option.strength) and value is not None and not isinstance(value, bool):
            kept |= {name: True, strength: check_positive(name, value)}
    return kept


def size_text(value: Any) -> Any:
    """3 as "3", (3, 5) as "3x5"; what is neither is left to the check."""
    if isinstance(value, tuple | list) and len(value) == 2 and all(is_count(part, 0) for part in value):
        return f"{value[0]}x{value[1]}"
    return shown(int(value)) if is_count(value, 0) else value


def parse_pair(name: str, text: str) -> tuple[int, int]:
    """Read "3" or "3x5" as (rows, columns)."""
    found = re.fullmatch(r"\s*(\d{1,9})\s*(?:x\s*(\d{1,9})\s*)?", text.lower(), re.ASCII)
    if found is None:
        raise InputError(f"{name} must be a whole number such as 3, or rows x columns such as 3x5; got {shown(text)}")
    rows, columns = int(found[1]), int(found[2] or found[1])
    check_count(name, max(rows, columns), minimum=0, maximum=LARGEST_SIDE)
    return rows, columns


def size(text: str) -> tuple[int, int]:
    """What the text of a size stands for."""
    return parse_pair("a size", text)


def parameters(record: Any, **defaults: Any) -> list[Parameter]:
    """The options of `record` as keyword arguments of a Python function; `defaults` are those of this function.

    Sizes are numbers, and a switch with a strength is one number, or None.
    """
    declared = options_of(record).values()
    strengths = {o.option.strength for o in declared}
    shown = [o for o in declared if o.option.panel != NO_FLAG and not o.option.command_only and o.name not in strengths]
    return [Parameter(o.name, Parameter.KEYWORD_ONLY, default=defaults.get(o.name, _python_default(o))) for o in shown]


def _python_default(declared: Declared) -> Any:
    if declared.option.strength:
        return None
    by_number = declared.option.read is not None and str(declared.default).isdigit()
    return int(declared.default) if by_number else declared.default


def described(record: Any, parameters: Iterable[Parameter]) -> str:
    """The options among `parameters` for a docstring, as numpy's style has it."""
    options = options_of(record)
    lines = []
    for parameter in parameters:
        if (declared := options.get(parameter.name)) is not None:
            kind = "number or bool" if declared.option.strength else declared.kind.__name__
            lines.append(f"{parameter.name} : {kind}, default {parameter.default!r}")
            lines += wrap(declared.option.help, 112, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)
