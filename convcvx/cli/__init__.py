"""The command line: `convcvx train`, `certify`, `stack`, `compare`, `report`, `export`, `runs` and `data`, one module
each, which is imported when its command is called. torch, which takes seconds, they import where they compute: lists,
help, completion and refusals do without.

With --json, standard output carries one JSON object and nothing else; human text goes to standard error. `ending`
says how commands end.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from convcvx import __version__
from convcvx.cli.ending import (
    check_place,
    end_on_sigterm,
    guard,
    leave_at_once,
    open_console,
    say_warnings,
    write_any_text,
)
from convcvx.terms.launch import leads

COMMANDS = {
    "train": "Train a two-layer convolutional network to the optimum of its objective.",
    "certify": "Say how far a network is from the optimum over all networks of any width, whoever trained it.",
    "stack": "Train layer after layer, each to the optimum of its objective on the frozen features of those before.",
    "compare": "Train the twin of a run, the same network, with SGD or Adam, and say how far from the optimum it ends.",
    "report": "Write report.html into the folder of a run or a stack: "
    "certificates, plots, filters, comparisons, in one file.",
    "export": "Write the network of a run or a stack as model.onnx, model.pt2 or model.joblib into its folder, "
    "and check it.",
    "runs": "List run folders with accuracy, gap and scope.",
    "data": "List the data sets that --data knows by name, where they lie, and what else it takes.",
}
"""By name; the first line of the docstring of each command says the same, for `convcvx --help` imports none."""
TOGETHER = ("train", "stack")
"""Commands that the processes of torchrun work on together; any other each of them does alone."""
HELP = ("-h", "--help")
"""Flags that have any command say what it does, and end."""
STYLE: dict[str, Any] = {
    "rich_markup_mode": "rich",  # the default of typer has changed, and with it what a bracket in a help text has to be
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": list(HELP)},
}


class OnCall(TyperGroup):
    """Commands of which only names and first lines are known, until one is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        with guard("--json" in args):
            check_place()  # torch, which a command may load, cannot be without one
            name, command, rest = super().resolve_command(ctx, args)
            return name, None if command is None else loaded(str(name)), rest


def loaded(name: str) -> Any:
    """The command called `name`, with its options: the function of that name in the module of that name."""
    alone = typer.Typer(add_completion=False, **STYLE)
    alone.command(name)(getattr(import_module(f"convcvx.cli.{name}"), name))
    return get_command(alone)


app = typer.Typer(name="convcvx", cls=OnCall, **STYLE)
for name, about in COMMANDS.items():
    app.command(name, help=about)(lambda: None)


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


def _follows(asked: list[str]) -> bool:
    """Whether another process reads what is `asked`, and this one does as it says: see `leads`."""
    return bool(asked) and asked[0] in TOGETHER and set(HELP).isdisjoint(asked) and not leads()


def _follow() -> None:
    """Serve the process that leads, to the end of this one: where that refuses what it reads, torchrun ends both."""
    from convcvx.responses.team import Team  # torch

    with Team.of_torchrun():
        raise AssertionError("who follows ends where the team does")


def main() -> None:
    """Entry point of the `convcvx` command."""
    asked = sys.argv[1:]
    write_any_text()
    end_on_sigterm()
    say_warnings(quiet=not {"--quiet", "-q"}.isdisjoint(asked))
    try:
        try:
            with guard("--json" in asked):  # of what no command's own guard sees, such as a help text on a full disk
                _follow() if _follows(asked) else app()
        except typer.Exit as end:
            raise SystemExit(end.exit_code) from None
    except SystemExit as end:
        leave_at_once(end.code)
        raise
