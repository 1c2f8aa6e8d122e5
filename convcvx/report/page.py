"""A page: its parts are filled into templates; figures are drawn for both colour schemes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from convcvx.display.html import environment
from convcvx.display.theme import svg
from convcvx.display.words import SETS, label, rows, text
from convcvx.errors import RunError
from convcvx.storage.reading import read_json
from convcvx.terms.status import Status
from convcvx.training.folder import ENVIRONMENT, Folder
from convcvx.training.options import OPTIONS, TrainConfig

TEMPLATES = Path(__file__).parent / "templates"
"""The templates of reports."""
MACHINE = {
    "began": "Began (UTC)",
    "command": "Command line",
    "commit": "Commit",
    "platform": "System",
    "cpus": "CPU cores",
    "threads": "Threads",
    "cuda": "GPU",
    "python": "Python",
}
"""What environment.json tells of a machine, and what it is called; earlier versions told less."""


@dataclass(frozen=True)
class Drawn:
    """A figure in a page: its SVG, what it shows, and what is to be said of it."""

    image: Markup
    title: str
    caption: str = ""

    @classmethod
    def of(cls, figure: Figure, name: str, title: str, caption: str = "") -> Drawn:
        """`name`, of letters and digits, is the figure's own in the page."""
        return cls(Markup(svg(figure, name)), title, caption)


@dataclass(frozen=True)
class Table:
    """Numbers with a column for each of several things: its heads, and rows of a label and the cells."""

    caption: str
    heads: list[str]
    lines: list[tuple[str, list[str]]]

    @classmethod
    def of(cls, caption: str, columns: Mapping[str, Mapping[str, Any]], names: tuple[str, ...]) -> Table:
        """A line for each of `names` that some column has."""
        lines = [
            (label(name), [said(name, column.get(name)) for column in columns.values()])
            for name in names
            if any(column.get(name) is not None for column in columns.values())
        ]
        return cls(caption, list(columns), lines)


def render(template: str, **values: Any) -> str:
    return environment(TEMPLATES).get_template(template).render(values)


def said(name: str, value: Any) -> str:
    """The text of a number of a run; why it ended in words."""
    if name == "status" and value in set(Status):
        return Status(value).meaning
    return text(name, value)


def result_rows(metrics: Mapping[str, Any], hidden: tuple[str, ...]) -> list[tuple[str, str]]:
    """Label and text of the numbers of a run, but for those that the page says elsewhere."""
    return [
        (label(name), said(name, value))
        for name, value in metrics.items()
        if name not in hidden and value is not None and not isinstance(value, dict | list)
    ]


def option_rows(config: TrainConfig) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The options that are not at their defaults, and the others."""
    values = config.to_dict()
    chosen = {name: value for name, value in values.items() if value != OPTIONS[name].default or name == "data"}
    return rows(chosen), rows({name: value for name, value in values.items() if name not in chosen})


def provenance(folder: Folder) -> list[tuple[str, str]]:
    """What is known of machine, versions, command and data; less of runs of earlier versions."""
    found: list[tuple[str, str]] = []
    if (folder.folder / ENVIRONMENT).exists():
        known = read_json(folder.folder / ENVIRONMENT, {})
        found = [(name, str(known[key])) for key, name in MACHINE.items() if known.get(key) is not None]
        versions = known.get("versions")
        if isinstance(versions, dict):
            found.append(("Versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)))
    origin = folder.origin
    for name, part in {} if origin is None else origin.sets.items():
        n, *shape = part.get("shape") or [0]
        form = f"{n:,} images of {' × '.join(map(str, shape))}" if type(n) is int else "unknown"
        found.append((f"{SETS.get(name, name)} set", f"{form}, fingerprint {part.get('blake2b')}"))
    return found


def files(folder: Folder, told: Mapping[str, str], prefix: str = "") -> list[tuple[str, str]]:
    """Address beside the report, and what it is, of the files of a run that are there."""
    there = [(name, what) for name, what in told.items() if (folder.folder / name).exists() and name != "report.html"]
    return [(f"{prefix}{name}", what) for name, what in there]


def optional_json(folder: Folder, name: str, form: Any) -> dict[str, Any]:
    """What a file holds that runs of earlier versions may lack; {} where it is missing or of another version."""
    if not (folder.folder / name).exists():
        return {}
    try:
        found: dict[str, Any] = read_json(folder.folder / name, form)
    except RunError:
        return {}
    return found
