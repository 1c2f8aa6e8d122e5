"""The command line: `convcvx train`, `certify`, `stack`, `compare`, `report` and `export`,
one module each.

With --json, standard output carries one JSON object and nothing else; human text goes to standard error. `output`
says how commands end.
"""

from __future__ import annotations

from typing import Annotated

import typer

from convcvx import __version__
from convcvx.cli.certify import certify
from convcvx.cli.compare import compare
from convcvx.cli.export import export
from convcvx.cli.output import write_any_text
from convcvx.cli.report import report
from convcvx.cli.stack import stack
from convcvx.cli.train import train

app = typer.Typer(
    name="convcvx",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",  # the default of typer has changed, and with it what a bracket in a help text has to be
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (train, certify, stack, compare, report, export):
    app.command()(command)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"convcvx {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
]


@app.callback()
def _main(version: Version = False) -> None:
    """Two-layer convolutional ReLU networks with weight decay are convex programs in disguise: convcvx solves them.

    Start with: convcvx train --preset demo --out checkpoints/demo
    """


def main() -> None:
    """Entry point of the `convcvx` command."""
    write_any_text()
    app()
