"""`convcvx data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convcvx.cli import flags as f
from convcvx.cli.output import finish, guard, open_console
from convcvx.data.datasets import default_data_dir
from convcvx.data.sources import DOWNLOADS, find_download

DataDir = Annotated[Path | None, typer.Option(help="Where data sets lie or are downloaded to.")]
OWN = """\
your own       FILE.npz with x_train, y_train, x_test and y_test; or a FOLDER:
               of train/CLASS/IMAGE and test/CLASS/IMAGE, or of x_train.npy,
               y_train.npy, x_test.npy and y_test.npy, which stay on disk"""


def data(data_dir: DataDir = None, json_output: f.Json = False, quiet: f.Quiet = False) -> None:
    """List the data sets that --data knows by name, and where they lie.

    Example:

      convcvx data --data-dir datasets
    """
    console = open_console(json_output, quiet)
    with guard(json_output):
        root = default_data_dir() if data_dir is None else data_dir.expanduser()
        found = {name: find_download(name, root) for name in DOWNLOADS}
        console.print(f"{'digits':<14} handwritten digits, grey 8x8: 1,437 + 360\n{'':<14} comes with scikit-learn")
        for name, place in found.items():
            where = f"not in {root}: its first use downloads it" if place is None else str(place)
            console.print(f"{name:<14} {DOWNLOADS[name].about}\n{'':<14} {where}")
        console.print(OWN)
        places = {name: None if place is None else str(place) for name, place in found.items()}
        finish({"data_dir": str(root), "sets": places, "status": "done"}, json_output)
