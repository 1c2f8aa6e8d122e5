"""`convcvx data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convcvx.cli import flags as f
from convcvx.cli.ending import finish, guard, open_console
from convcvx.data import downloads
from convcvx.data.downloads import default_data_dir, find_download
from convcvx.data.sources import SOURCES
from convcvx.data.torchvision_sets import DOWNLOADS
from convcvx.storage.reading import user_path

DataDir = Annotated[Path | None, typer.Option(help="Where data sets lie or are downloaded to.")]


WIDTH = max(map(len, DOWNLOADS))
"""Characters of the longest name of a set."""


def data(data_dir: DataDir = None, json_output: f.Json = False, quiet: f.Quiet = False) -> None:
    """List the data sets that --data knows by name, where they lie, and what else it takes.

    Example:

      convcvx data --data-dir datasets
    """
    console = open_console(json_output, quiet)
    with guard(json_output):
        root = default_data_dir() if data_dir is None else user_path(data_dir)
        found = {name: find_download(name, root) for name in DOWNLOADS}
        for name, place in found.items():
            where = "" if place is None else f": {place}"
            console.print(f"{name:<{WIDTH}} {DOWNLOADS[name].about}{where}")
        console.print(
            f"\nWhat has no place here is not in {root} yet: its first use downloads it there. --data takes as well:\n"
        )
        for source in SOURCES:
            if source is not downloads.SOURCE:
                console.print(f"- {source.about}")
        places = {name: None if place is None else str(place) for name, place in found.items()}
        finish({"data_dir": str(root), "sets": places, "status": "done"}, json_output)
