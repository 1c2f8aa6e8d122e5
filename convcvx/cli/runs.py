"""`convcvx runs`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from convcvx.cli import flags as f
from convcvx.cli.ending import finish, guard, open_console, percent
from convcvx.errors import RunError, shown
from convcvx.stack.run import StackRun
from convcvx.storage.reading import user_path
from convcvx.terms.scope import Scope
from convcvx.training.run import Run

Folder = Annotated[Path, typer.Argument(help="A folder of run folders, or one of these.", metavar="[FOLDER]")]
KEPT = ("test_accuracy", "rel_gap", "scope", "family_gap", "n_filters", "seconds", "status")
"""What is told of a run, or of the last stage that a stack kept; the accuracy, seconds and status of a whole stack."""
WIDEST = 10_000
"""Columns that the table may take: a path that is cut can be neither told from another nor copied."""


def runs(folder: Folder = Path("checkpoints"), json_output: f.Json = False, quiet: f.Quiet = False) -> None:
    """List run folders with accuracy, gap and scope.

    Of a stack: the accuracy of the whole, the gap of the last stage kept.

    Example:

      convcvx runs checkpoints
    """
    console = open_console(json_output, quiet)
    with guard(json_output):
        folder = user_path(folder)
        if not folder.is_dir():
            raise RunError(f"{shown(str(folder))} is no folder: train into one first, or name another")
        places = [folder] if _begun(folder) else sorted(filter(_begun, folder.iterdir()))
        found = [{"run": str(place)} | _described(place) for place in places]
        if not found:
            console.print(f"no run folder in {folder}; to begin: convcvx train --preset demo --out {folder / 'demo'}")
        table = Table(box=None, header_style="bold")
        for column in ("run", "test", "gap", "scope", "filters", "status"):
            table.add_column(column, justify="right" if column in ("test", "gap", "filters") else "left")
        for run in found:
            gap, scope = _strongest(run)
            cells = percent(run.get("test_accuracy")), "-" if gap is None else f"{gap:.1e}", scope
            table.add_row(run["run"], *cells, str(run.get("n_filters", "-")), run["status"])
        if found:
            console.width = max(console.width, WIDEST)
            console.print(table)
        finish({"runs": found, "status": "done"}, json_output)


def _strongest(run: dict[str, Any]) -> tuple[float | None, str]:
    """The gap to show, and its scope: what is proved over a family before an estimate for all filters."""
    if run.get("scope") == Scope.HEURISTIC and run.get("family_gap") is not None:
        return run["family_gap"], Scope.FAMILY
    return run.get("rel_gap"), run.get("scope", "-")


def _begun(folder: Path) -> bool:
    return Run(folder).begun or StackRun(folder).begun


def _described(folder: Path) -> dict[str, Any]:
    """What `KEPT` names, as far as it is there."""
    run = StackRun(folder) if StackRun(folder).begun else Run(folder)
    if not run.finished:
        return {"status": f"unfinished: {run.go_on}" if run.ours else "no run of convcvx, or a damaged one"}
    try:
        metrics = run.metrics
    except RunError as error:
        return {"status": f"damaged: {error}"}
    last: dict[str, Any] = next((stage for stage in reversed(metrics.get("stages", [])) if stage["kept"]), {})
    return {name: (last | metrics)[name] for name in KEPT if name in last | metrics}
