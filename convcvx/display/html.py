"""Jinja as every page here uses it: what is filled in is escaped, what is missing is an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from convcvx.display.words import number, percent

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff]")
"""Characters that no page may hold."""
TEMPLATES = Path(__file__).parent / "templates"
"""The templates of this package."""


def environment(*folders: Path) -> Environment:
    """Templates of `folders`, and of this package."""
    made = Environment(
        loader=FileSystemLoader([*folders, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    made.filters |= {"number": number, "percent": percent}
    return made


def notebook(**values: Any) -> str:
    """What a notebook shows of an object; `values` as templates/notebook.html has them."""
    shown = {"title": "", "claims": [], "rows": [], "pictures": [], "columns": [], "table": [], "note": ""} | values
    return environment().get_template("notebook.html").render(shown)


def _printable(value: Any) -> Any:
    return CONTROL.sub("\ufffd", value) if type(value) is str else value  # Markup is a str too, and is ours
