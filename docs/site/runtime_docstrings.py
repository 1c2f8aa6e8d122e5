"""Docstrings as they are at run time, where options that are declared in records are written into them."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from typing import Any

import griffe

SLOT = re.compile(r"^\s*\{\w+\}$", re.MULTILINE)
"""A line of a docstring that convcvx fills when it is imported."""


class RuntimeDocstrings(griffe.Extension):
    """Read these from the imported object."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None and SLOT.search(obj.docstring.value):
            found = getattr(import_module(obj.parent.path), obj.name)
            obj.docstring.value = inspect.getdoc(found)
