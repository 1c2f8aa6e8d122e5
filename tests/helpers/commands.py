"""Trainings as a user starts them: the command line in this process, and a report that keeps quiet."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NoReturn

from typer.testing import CliRunner, Result

from convcvx.cli import app

DIGITS = Path(__file__).parents[2] / "checkpoints" / "digits"
"""The run that is shipped, of an earlier version: to be read or copied, never to be written to."""
NO_SEARCH = ("--tol", "1", "--time-limit", "0.001")
"""For `convcvx certify` where the bound is not looked at: no time for a search, which is what takes time."""


def invoke(command: str, *options: object) -> Result:
    """What `convcvx COMMAND OPTIONS` prints and how it ends, in this process; whatever it fails to catch is raised.

    Of the arguments only `command` is split at its spaces.
    """
    return CliRunner().invoke(app, [*command.split(), *map(str, options)], catch_exceptions=False)


def cli(command: str, *options: object, code: int = 0) -> Result:
    """The same, and it has to end with the exit status `code`."""
    result = invoke(command, *options)
    assert result.exit_code == code, result.output
    return result


def refused(command: str, *options: object) -> str:
    """What it says of input that it does not take."""
    return said(cli(command, *options, code=2))


def said(result: Result) -> str:
    """All that was printed, on one line: where lines are broken goes by the terminal."""
    return " ".join(result.output.split())


def answer(result: Result) -> dict:
    """The one JSON object that stands alone on standard output."""
    lines = result.stdout.splitlines()
    assert len(lines) == 1
    return strict_json(lines[0])


def strict_json(text: str) -> dict:
    """The object, without the Infinity and NaN that JSON does not know."""

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


class Quiet:
    """A report that prints nothing, remembers what it was told, and stops the training at a round of a stage.

    Parameters
    ----------
    stop : (int, int), optional
        The stage, from 1, and its round, from 0.
    """

    def __init__(self, stop: tuple[int, int] | None = None) -> None:
        self.said: list[str] = []
        self.rounds: list[int] = []
        self.stop = stop

    def begin(self, text: str) -> None:
        self.said.append(text)
        if "training on" in text:
            self.rounds.append(0)

    def __call__(self, solution, beta, left=math.inf) -> None:
        if (len(self.rounds), self.rounds[-1]) == self.stop:
            raise KeyboardInterrupt
        self.rounds[-1] += 1
