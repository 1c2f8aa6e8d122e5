"""The command line: `convcvx train`, `certify`, `stack`, `compare`, `report`, `export`, `runs` and `data`, one module
each.

With --json, standard output carries one JSON object and nothing else; human text goes to standard error. `output`
says how commands end.
"""

from __future__ import annotations

from typing import Annotated

import typer

from convcvx import __version__
from convcvx.cli.certify import certify
from convcvx.cli.compare import compare
from convcvx.cli.data import data
from convcvx.cli.export import export
from convcvx.cli.output import open_console, write_any_text
from convcvx.cli.report import report
from convcvx.cli.runs import runs
from convcvx.cli.stack import stack
from convcvx.cli.train import train

app = typer.Typer(
    name="convcvx",
    rich_markup_mode="rich",  # the default of typer has changed, and with it what a bracket in a help text has to be
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (train, certify, stack, compare, report, export, runs, data):
    app.command()(command)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"convcvx {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
]


START = """\
convcvx trains a convolutional layer to the global optimum, and says how far
from it the result can be.

Start here; the digits come with convcvx:
  convcvx train --preset demo --out checkpoints/demo
  convcvx certify checkpoints/demo    the bound again, from weights and data
  convcvx report checkpoints/demo     filters, plots, certificate: one HTML file

Then:
  convcvx data                        the data sets, and where they lie
  convcvx train --data mnist          by options that fit the data
  convcvx runs                        what was trained: accuracy, gap, scope
  convcvx --help                      all commands
  convcvx train --help                all options of one of them"""
"""What `convcvx` alone prints, in lines of at most 80 columns."""


@app.callback(invoke_without_command=True)
def _main(context: typer.Context, version: Version = False) -> None:
    """Train convolutional layers to the global optimum, with a certificate.

    Start with: convcvx train --preset demo --out checkpoints/demo
    """
    if context.invoked_subcommand is None:
        open_console(json_output=False).print(START)


def main() -> None:
    """Entry point of the `convcvx` command."""
    write_any_text()
    app()
