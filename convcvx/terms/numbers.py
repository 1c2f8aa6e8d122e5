"""Texts that are numbers. Python takes 1_0, and digits of other scripts, for numbers too: here these are mistakes, or
names.
"""

from __future__ import annotations

import re

WHOLE = re.compile(r"[+-]?[0-9]+")
"""A whole number as people write it."""
PLAIN = re.compile(r"0|-?[1-9][0-9]{0,17}")
"""A whole number of 64 bits as Python writes it, so that no text is lost where it becomes one: 007 would be 7."""
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?(inf|infinity|nan)", re.IGNORECASE)
"""What tables and options call a number."""


def read_whole(text: str) -> int:
    """The whole number that `text` is; raise `ValueError` if it is none."""
    if not WHOLE.fullmatch(text := text.strip()):
        raise ValueError(f"{text!r} is no whole number")
    return int(text)


def read_number(text: str) -> float:
    """The number that `text` is; raise `ValueError` if it is none."""
    if not NUMBER.fullmatch(text := text.strip()):
        raise ValueError(f"{text!r} is no number")
    return float(text)
