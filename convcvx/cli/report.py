"""`convcvx report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from convcvx.cli import options as o
from convcvx.cli.output import finish, guard
from convcvx.report import write_report
from convcvx.runs import Run

Folder = Annotated[Path, typer.Argument(help="A finished run folder.", metavar="RUN")]


def report(run: Folder, json_output: o.Json = False) -> None:
    """Write report.html into a run folder: certificate, plots, filters, comparisons, options, in one file.

    Example:

      convcvx report checkpoints/demo
    """
    console = Console(stderr=json_output)
    with guard(json_output):
        path = write_report(Run.open(run))
        console.print(f"wrote {path}", highlight=False)
        finish({"report": str(path), "status": "done"}, json_output)
