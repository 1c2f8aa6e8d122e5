"""`convcvx report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from convcvx.cli import flags as f
from convcvx.cli.ending import finish, guard, open_console
from convcvx.stack.run import StackRun
from convcvx.training.panels.data import MOVED
from convcvx.training.run import Run

Folder = Annotated[Path, typer.Argument(help="The folder of a finished run or stack.", metavar="RUN")]
DataDir = Annotated[str | None, typer.Option(help=escape(MOVED))]


def report(run: Folder, data_dir: DataDir = None, json_output: f.Json = False, quiet: f.Quiet = False) -> None:
    """Write report.html into the folder of a run or a stack: certificates, plots, filters, comparisons, in one file.

    Example:

      convcvx report checkpoints/demo
    """
    console = open_console(json_output, quiet)
    with guard(json_output):
        source = StackRun(run) if StackRun(run).begun else Run.open(run)
        from convcvx.report import write_report, write_stack_report  # torch, matplotlib: a refusal waits for neither

        path = write_stack_report(source, data_dir) if isinstance(source, StackRun) else write_report(source, data_dir)
        console.print(f"wrote {path}")
        finish({"report": str(path), "status": "done"}, json_output)
