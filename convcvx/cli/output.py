"""What commands print, and how they end.

Exit status 0: done; 1: a process of several was lost; 2: bad input; 3: stopped short of --tol; 130: interrupted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from rich.console import Console

from convcvx.errors import ConvcvxError, WorkerError
from convcvx.reading import json_text


def open_console(json_output: bool) -> Console:
    """Where text for people goes: standard error if JSON has the other. Paths appear whole and as they are."""
    return Console(stderr=json_output, markup=False, emoji=False, highlight=False, soft_wrap=True)


def print_summary(console: Console, metrics: dict[str, Any]) -> None:
    """What a reader wants to know, in a few lines."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.2%}"

    lines = [
        f"accuracy     {percent(metrics['test_accuracy'])} test, {percent(metrics['train_accuracy'])} train",
        f"objective    {metrics['primal']:.8g} at beta {metrics['beta']:.6g} ({metrics['loss']} loss)",
        f"lower bound  {metrics['dual']:.8g}",
        f"gap          {metrics['rel_gap']:.2e} relative",
        f"scope        {metrics['scope']}: {metrics['meaning']}",
        f"filters      {metrics['n_filters']}",
        f"status       {metrics['status']} after {metrics['seconds']:.1f} s, {metrics['peak_memory_mb']:.0f} MiB",
    ]
    console.print("\n".join(lines))


def finish(metrics: dict[str, Any], json_output: bool) -> NoReturn:
    """Print the JSON object if asked for, and end with the exit status that `metrics["status"]` stands for."""
    if json_output:
        print(json_text(metrics), flush=True)
    raise typer.Exit(0 if metrics["status"] in ("converged", "done") else 3)


@contextmanager
def guard(json_output: bool) -> Iterator[None]:
    """Turn the errors that convcvx raises on purpose, and an interrupt, into one line on standard error."""
    try:
        yield
    except ConvcvxError as error:
        message = " ".join(str(error).split())
        print(f"convcvx: error: {message}", file=sys.stderr)
        status, code = ("lost_worker", 1) if isinstance(error, WorkerError) else ("bad_input", 2)
        if json_output:
            print(json.dumps({"error": message, "status": status}), flush=True)
        raise typer.Exit(code) from None
    except KeyboardInterrupt:
        print("convcvx: interrupted; train and stack go on with --resume", file=sys.stderr)
        if json_output:
            print(json.dumps({"error": "interrupted", "status": "interrupted"}), flush=True)
        raise typer.Exit(130) from None
