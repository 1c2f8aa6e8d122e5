"""One family of exceptions. Each message names the parameter, the value and the remedy, on one line."""

from __future__ import annotations

import math
from collections.abc import Collection


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


class ConvergenceWarning(UserWarning):
    """A solver stopped before its gap reached `tol`; the message names the gap and what to try."""


def check_positive(name: str, value: float, *, zero: bool = False) -> float:
    """Return `value` as a float; raise `InputError` unless it is finite and > 0 (>= 0 with `zero`)."""
    kind = "non-negative" if zero else "positive"
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"{name} must be a {kind} float; got {value!r}") from None
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise InputError(f"{name} must be a {kind} float; got {value!r}")
    return number


def check_count(name: str, value: int, *, minimum: int = 1) -> int:
    """Return `value` as an int; raise `InputError` unless it is a whole number >= `minimum`."""
    if not is_count(value, minimum):
        raise InputError(f"{name} must be a whole number >= {minimum}; got {value!r}")
    return int(value)


def is_count(value: object, minimum: int = 1) -> bool:
    """Whether `value` is a whole number >= `minimum`."""
    try:
        return not isinstance(value, bool) and int(value) == value >= minimum  # type: ignore[call-overload,operator]
    except (TypeError, ValueError, OverflowError):
        return False


def check_choice(name: str, value: str, choices: Collection[str]) -> str:
    """Return `value`; raise `InputError` unless it is one of `choices`."""
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
    return value
