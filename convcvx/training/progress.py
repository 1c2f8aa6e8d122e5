"""One line a round on the terminal: round, objective, bound, gap, filters, time, and when to expect the end."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, Self

from rich.console import Console

from convcvx.display.words import short
from convcvx.machine.watch import Waiting
from convcvx.solution import Round, Solution
from convcvx.terms.scope import Scope
from convcvx.terms.status import Status

ESTIMATED = "~"
"""Before a gap that is no proof."""
HEADER = "round    objective  lower bound       gap   g/beta  filters     time     left"


class Report(Protocol):
    """Tells the user how a training goes."""

    def begin(self, text: str) -> None: ...

    def __call__(self, solution: Solution, beta: float, left: float = math.inf) -> object:
        """Called after every round, `left` seconds before time is over; the training ends where it returns True."""
        ...


class Silent:
    """Tells nobody."""

    def begin(self, text: str) -> None:
        pass

    def __call__(self, solution: Solution, beta: float, left: float = math.inf) -> None:
        pass


SILENT = Silent()


class Progress:
    """Prints a line for each round that `__call__` is given.

    As a context it also shows what is going on meanwhile, as `Waiting` does: a phase may be long.

    Parameters
    ----------
    console : rich.console.Console
    tol : float
        What the estimate of the time left aims at.
    """

    def __init__(self, console: Console, tol: float) -> None:
        self._console, self._tol = console, tol
        self._began = False
        self._images: int | None = None
        self._waiting = Waiting(console)

    def __enter__(self) -> Self:
        self._waiting.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._waiting.__exit__(*error)

    def begin(self, text: str) -> None:
        self._console.print(text)
        self._waiting.begin(short(text.splitlines()[0]))
        self._began, self._images = False, None  # what follows may be another training, with a table of its own

    def __call__(self, solution: Solution, beta: float, left: float = math.inf) -> None:
        if not self._began:
            self._console.print(HEADER, style="bold")
            self._began = True
        record = solution.history[-1]
        if (images := record.get("images")) != self._images:
            self._console.print(f"on a sample of {images:,} images" if images else "on all images")
            self._images = images
        end = seconds_left(solution.history, self._tol, left)
        if record["rel_gap"] <= self._tol and solution.status == Status.RUNNING:
            end = None  # more images or a proof are still to come, and nobody knows how long they take
        shown = "-", "-", "-"  # where time left none for a search
        if math.isfinite(record["g_max"]):
            gap = f"{'' if Scope(record['scope']).proved else ESTIMATED}{record['rel_gap']:.1e}"
            shown = f"{record['lower_bound']:.6g}", gap, f"{record['g_max'] / beta:.4g}"
        bound, gap, g = shown
        self._console.print(
            f"{record['round']:>5}  {record['objective']:>11.6g}  {bound:>11}  {gap:>8}  {g:>7}  "
            f"{record['n_filters']:>7}  {clock(record['seconds']):>7}  {clock(end) if end is not None else '?':>7}",
        )
        self._waiting.begin(f"round {record['round'] + 1}")


@contextmanager
def reported(verbose: bool, tol: float) -> Iterator[Report]:
    """Tell of a training in Python: nothing unless `verbose`."""
    if not verbose:
        yield SILENT
        return
    with Progress(Console(markup=False, soft_wrap=True), tol) as progress:
        yield progress


def seconds_left(history: list[Round], tol: float, limit: float) -> float | None:
    """Extrapolate the fall of log gap over the last rounds to `tol`, up to `limit`; None while nothing tells."""
    last = history[-1]
    if last["rel_gap"] <= tol:
        return 0.0
    first = history[max(0, len(history) - 4)]
    fall = math.log(max(first["rel_gap"], 1e-300) / last["rel_gap"])
    if fall <= 0:
        return limit if limit < math.inf else None
    estimate = math.log(last["rel_gap"] / tol) * (last["seconds"] - first["seconds"]) / fall
    return min(estimate, limit)


def clock(seconds: float) -> str:
    """12.3 s as "12s", longer times as "3m05" or "2h07"."""
    if seconds < 60:
        return f"{seconds:.0f}s"
    minutes = round(seconds) // 60
    if minutes < 60:
        return f"{minutes}m{round(seconds) % 60:02d}"
    return f"{minutes // 60}h{minutes % 60:02d}" if minutes < 6000 else ">99h"


def peak_memory_mb() -> float | None:
    """Largest resident size of this process so far; None where the system does not tell, as on Windows.

    `getrusage` would count the parent's memory from before this program was executed; Linux knows better.
    """
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) / 2**10
    try:
        import resource  # there is none on Windows
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
