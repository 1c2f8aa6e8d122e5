"""How a benchmark is run that compares on data sets, `--sizes NAME=IMAGES,...`, and writes a page of results."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from machine import machine

RESULTS = Path(__file__).parent / "results"


def write_page(
    about: str,
    name: str,
    title: str,
    compare: Callable[[str, int, int, str], list[str]],
    *,
    sizes: str,
    filters: int,
    notes: Sequence[str] = (),
) -> None:
    """Read the command line of `benchmarks/NAME.py` and write what `compare` finds, one data set after the other.

    Parameters
    ----------
    about : str
        For `--help`.
    compare : callable
        Lines of Markdown, of the name of a data set, its images, a number of filters, and the folder of data sets.
    sizes, filters : str, int
        Defaults of the options so called.
    notes : sequence of str
        Lines that stand above the tables.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="../shared/data")
    parser.add_argument("--filters", type=int, default=filters)
    parser.add_argument("--sizes", default=sizes)
    parser.add_argument("--to", default=f"{name}.md", help="file in benchmarks/results")
    chosen = vars(parser.parse_args())
    folder = chosen.pop("data_dir")  # of this machine: it changes no number
    asked = "".join(f" --{key} {value}" for key, value in chosen.items() if value != parser.get_default(key))
    lines = [f"# {title}", "", f"`python benchmarks/{name}.py{asked}`, {machine()}.", ""]
    if notes:
        lines += [*notes, ""]
    for part in chosen["sizes"].split(","):
        data, size = part.split("=")
        lines += compare(data, int(size), chosen["filters"], folder)
        (RESULTS / chosen["to"]).write_text("\n".join(lines))
