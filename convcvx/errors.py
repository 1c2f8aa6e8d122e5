"""One family of exceptions. Each message names the parameter, the value and the remedy, on one line."""

from __future__ import annotations

import math
from collections.abc import Collection
from enum import StrEnum
from typing import Any, NoReturn

WORD = 2**63 - 1
"""The largest whole number that a machine counts with."""


class ConvcvxError(Exception):
    """Base of every error that convcvx raises on purpose."""


class InputError(ConvcvxError, ValueError):
    """A parameter or an array that cannot be used."""


class DataError(ConvcvxError, ValueError):
    """A data set that is missing, damaged or unfit for the task."""


class RunError(ConvcvxError, RuntimeError):
    """A run folder or a weights file that cannot be used."""


class WorkerError(ConvcvxError, RuntimeError):
    """A process of a run over several was lost or failed."""


class DataWarning(UserWarning):
    """Something in a data set was passed over, or lost before it came; the message names it."""


class ConvergenceWarning(UserWarning):
    """A solver stopped before its gap reached `tol`; the message names the gap and what to try."""


class GridWarning(UserWarning):
    """The best value of a grid is at its edge, and a better one may lie beyond; the message says what to extend."""


WARNINGS = DataWarning, ConvergenceWarning, GridWarning
"""Its own kinds of warnings, which say what to do; that a machine is odd is said in one of Python's."""


def one_line(error: Exception) -> str:
    """What an error says, or is called where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def shown(value: object) -> str:
    """`value` as a message quotes it: on one line, and cut where it is long."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # of a whole number with thousands of digits, of lists in lists without end
        return f"a {type(value).__name__} that is too large to print"
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_positive(name: str, value: float, *, zero: bool = False, maximum: float = math.inf) -> float:
    """Return `value` as a float; raise `InputError` unless it is finite, > 0 (>= 0 with `zero`) and <= `maximum`."""
    kind = "non-negative" if zero else "positive"
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise InputError(f"{name} must be a {kind} float; got {shown(value)}")
    if number > maximum:
        raise InputError(f"{name} must be at most {maximum:g}; got {shown(value)}")
    return number


def check_count(name: str, value: int, *, minimum: int = 1, maximum: float = WORD) -> int:
    """Return `value` as an int; raise `InputError` unless it is a whole number from `minimum` to `maximum`."""
    if not is_count(value, minimum):
        raise InputError(f"{name} must be a whole number >= {minimum}; got {shown(value)}")
    if value > (largest := min(maximum, WORD)):
        raise InputError(f"{name} must be at most {largest}; got {shown(value)}")
    return int(value)


def is_count(value: object, minimum: int = 1) -> bool:
    """Whether `value` is a whole number >= `minimum`."""
    try:
        return not isinstance(value, bool) and int(value) == value >= minimum  # type: ignore[call-overload,operator]
    except (TypeError, ValueError, OverflowError):
        return False


def check_choice(name: str, value: str, choices: Collection[str]) -> str:
    """Return `value`; raise `InputError` unless it is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}; got {shown(value)}")
    return value


class Word(StrEnum):
    """One of a few words that mean something: it compares, prints and is stored as its text.

    What is said of a word stands behind its text, as the arguments of `__init__`. Any other text raises `InputError`.
    """

    def __new__(cls, text: str, *_: Any) -> Word:
        word = str.__new__(cls, text)
        word._value_ = text
        return word

    @classmethod
    def _missing_(cls, value: object) -> NoReturn:
        raise InputError(f"{cls.__name__.lower()} must be one of {', '.join(cls)}; got {shown(value)}")

    __repr__ = str.__repr__
