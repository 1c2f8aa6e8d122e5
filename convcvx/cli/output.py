"""What commands print, and how they end.

Exit status 0: done; 1: a process of several was lost; 2: bad input; 3: stopped short of --tol; 130: interrupted.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import typer
from rich.console import Console

from convcvx.display.words import beside_stored, told
from convcvx.errors import ConvcvxError, WorkerError, one_line
from convcvx.oracles.scope import Scope
from convcvx.responses.team import Team
from convcvx.solution import SHORT, Status
from convcvx.storage.reading import json_text

OUT_OF_MEMORY = re.compile("out of memory|allocate memory|not enough memory")
"""What torch says in a RuntimeError when memory is short."""


def write_any_text() -> None:
    """Escape what a terminal or a file in another encoding than UTF-8 cannot show, as Python does in tracebacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not what a caller may have put there, nor None
            stream.reconfigure(errors="backslashreplace")


def open_console(json_output: bool, quiet: bool = False) -> Console:
    """Where text for people goes: standard error if JSON has the other, nowhere if `quiet`.

    Paths appear whole and as they are.
    """
    return Console(stderr=json_output, quiet=quiet, markup=False, emoji=False, highlight=False, soft_wrap=True)


def percent(value: float | None) -> str:
    """A share; a dash where there is none."""
    return "-" if value is None else f"{value:.2%}"


VAGUE = 0.5
"""Relative gap from which on an estimate beside a proof over a family is a half-sentence: it tells nothing."""
TOLD_COMPILING = 3.0
"""Seconds of compiling from which on a summary tells of them: a call may take so much longer than its time limit."""
SCORES = {"loss": "loss", "R2": "r2", "exact match": "exact_match", "macro F1": "macro_f1"}
"""Scores for targets that are no classes, by what they are called."""


def print_summary(console: Console, metrics: dict[str, Any]) -> None:
    """What a reader wants to know, in a few lines."""
    lines = {
        "accuracy": f"{percent(metrics['test_accuracy'])} test, {percent(metrics['train_accuracy'])} train",
        **{name: f"{metrics[f'test_{key}']:.4g} test" for name, key in SCORES.items() if f"test_{key}" in metrics},
        "objective": f"{metrics['primal']:.8g} at beta {metrics['beta']:.6g} ({metrics['loss']} loss)",
        **_bounds(metrics),
        **({"stored": beside_stored(metrics, metrics["stored"])} if "stored" in metrics else {}),
        "filters": f"{metrics['n_filters']}",
        "status": f"{metrics['status']} after {cost(metrics)}",
    }
    console.print("\n".join(f"{name:12} {text}" for name, text in lines.items()))


def _bounds(metrics: dict[str, Any]) -> dict[str, str]:
    """Lines on how far the network is from the best one, the strongest statement first."""
    scope, further = Scope(metrics["scope"]), told(metrics)
    weaker = not scope.for_all and metrics["proved"] is not None
    lines = {}
    if not scope.for_all and scope is not Scope.FAMILY and "family" in further:
        lines["family"] = further.pop("family")
        if not scope.proved and metrics["rel_gap"] >= VAGUE:
            known = f", {metrics['proved_gap']:.2e} proved by {metrics['proved_by']}" if weaker else ""
            gap = f"gap {metrics['rel_gap']:.2e} by a search (scope {scope}, an estimate){known}"
            return lines | {"others": f"what other filters would bring is not known: {gap}"}
    lines |= {
        "lower bound": f"{metrics['dual']:.8g}",
        "gap": f"{metrics['rel_gap']:.2e} relative",
        "scope": f"{scope}: {metrics['meaning']}",
        **further,
    }
    if weaker:
        by = metrics["proved_by"]
        lines["proved"] = f"lower bound {metrics['proved']:.8g}, gap {metrics['proved_gap']:.2e}, by {by}"
    return lines


def cost(metrics: dict[str, Any]) -> str:
    """Time, what of it was spent on compiling, and memory, where the system tells it."""
    peak, compiling = metrics["peak_memory_mb"], metrics.get("compiling_seconds", 0.0)
    parts = [f"{metrics['seconds']:.1f} s"]
    if compiling >= TOLD_COMPILING:
        parts[0] += (
            f" ({compiling:.0f} s of them to compile functions, once on a machine, which no --time-limit counts)"
        )
    return ", ".join(parts if peak is None else [*parts, f"{peak:.0f} MiB"])


def explain_short(console: Console, metrics: dict[str, Any], remedy: str, further: str = "") -> None:
    """Say what exit status 3 means, if that is how a command with the status of `metrics` ends.

    What is to be done about it has a line of its own, `further`. A quiet command says the first line alone, on standard
    error: whoever reads the log of a job that has failed wants to know why.
    """
    reached = Status(metrics["status"])
    if reached.exit_code == SHORT:
        why = "" if reached is Status.GAP_ABOVE_TOL else f", as {reached.meaning}"
        over = " over all filters" if metrics.get("family_gap") is not None and metrics["scope"] != Scope.FAMILY else ""
        # A search that time cut short may have found nothing above tol, which it is not known to be the end of.
        short = "not known to be within" if reached is Status.TIME_LIMIT else "above"
        line = f"exit status {SHORT}: the gap{over} is {short} --tol{why}; {remedy}"
        if console.quiet:
            print(line, file=sys.stderr)
        else:
            console.print("\n".join(filter(None, (line, further))))


def as_flags(remedy: str) -> str:
    """The remedy of a `Status`, which names options as Python does, with those of the command line."""
    named = re.sub(r"(\w+)='([^']+)'", r"--\1 \2", remedy)
    return re.sub(r"\b(tol|max_filters|max_rounds|time_limit)\b", lambda name: f"--{name[0].replace('_', '-')}", named)


def finish(metrics: dict[str, Any], json_output: bool, team: Team | None = None) -> NoReturn:
    """Print the JSON object if asked for, and end with the exit status that `metrics["status"]` stands for.

    A training that stopped short is done all the same: a `team` that would be started anew for it ends with 0.
    """
    if json_output:
        print(json_text(metrics), flush=True)
    code = Status(metrics["status"]).exit_code
    raise typer.Exit(0 if code == SHORT and team is not None and team.replaceable else code)


@contextmanager
def guard(json_output: bool) -> Iterator[None]:
    """Turn what convcvx refuses, an interrupt and what the machine refuses into one line on standard error."""
    try:
        yield
    except typer.Exit:  # a RuntimeError too
        raise
    except WorkerError as error:
        _end(one_line(error), "lost_worker", 1, json_output)
    except ConvcvxError as error:
        _end(one_line(error), "bad_input", 2, json_output)
    except OSError as error:  # paths that cannot be used, full disks, readers that have gone
        _end(f"the system refuses: {one_line(error)}; give another path, or make room", "bad_input", 2, json_output)
    except (MemoryError, RuntimeError) as error:
        if "Symlink loop" in str(error):  # as Python before 3.13 says it
            _end(f"the system refuses: {one_line(error)}; give another path", "bad_input", 2, json_output)
        if isinstance(error, RuntimeError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        _end("out of memory: give fewer or smaller images, or ask for fewer filters", "bad_input", 2, json_output)
    except KeyboardInterrupt:
        print("convcvx: interrupted; train and stack go on with --resume", file=sys.stderr)
        _print_last(json_output, {"error": "interrupted", "status": "interrupted"})
        raise typer.Exit(130) from None


def _end(message: str, status: str, code: int, json_output: bool) -> NoReturn:
    with suppress(OSError):
        print(f"convcvx: error: {message}", file=sys.stderr)
    _print_last(json_output, {"error": message, "status": status})
    raise typer.Exit(code) from None


def _print_last(json_output: bool, result: dict[str, Any]) -> None:
    """Print JSON if asked for; where standard output takes nothing any more, let Python's own last flush be silent."""
    try:
        if json_output:
            print(json_text(result), flush=True)
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
