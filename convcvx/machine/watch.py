"""What is being done, and how far a long loop is: they say so as they go, and whoever watches shows it: a terminal the
time that it takes, and a bar where its length is known, a pipe or a file the name of each phase as it begins.

What is watched goes by a context variable, so that a loop in the depths needs no parameter for it. Where nobody
watches, which is so in all processes but the one that was started, a loop pays for looking at that variable only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from time import perf_counter
from typing import Any, Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

REFRESHED = 4
"""Times a second that a terminal is told of what changed: a spinner turns, and no training is slower."""
BAR = 24
"""Characters of a bar."""
EARLY = 2.0
"""Seconds from the beginning in which a file or a pipe is given no names: a command that ends by then, with an error
perhaps, says nothing else."""
SILENCE = 10.0
"""Seconds without a line after which a file or a pipe is given the name of a phase again that it has had before."""

T = TypeVar("T")
Watcher = Callable[[str, int, int | None], None]
"""Told what is being done, and how much of how much, where that is known."""

_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


def phase(what: str) -> None:
    """Say what begins now; how long it is, nobody knows."""
    tell(what, 0, None)


def tell(what: str, done: int, total: int | None) -> None:
    """Say that `done` of `total` parts of what is being done are."""
    if (watcher := _watcher.get()) is not None:
        watcher(what, done, total)


def watched(what: str, parts: Iterable[T], total: int, size: Callable[[T], int] = lambda _: 1) -> Iterator[T]:
    """The `parts`, one after the other; before each, how many of `total` are done is told. `size`: those in a part.

    >>> [part for part in watched("letters", "ab", 2)]
    ['a', 'b']
    """
    done = 0
    for part in parts:
        tell(what, done, total)
        yield part
        done += size(part)


def watching(verbose: bool) -> AbstractContextManager[object]:
    """Show what goes on, and how far it is, where `verbose`; else nothing that is not shown anyway."""
    return Waiting(Console(markup=False)) if verbose else nullcontext()


class Waiting:
    """As a context it shows on a terminal, below the last line, what goes on, since when, and how far it is.

    Where `console` is no terminal, each phase is named as it begins, on standard error: once, and again after a
    `SILENCE`, but for those that begin `EARLY`. A quiet console keeps that quiet too.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = SpinnerColumn(), TextColumn("{task.description}"), _Bar(bar_width=BAR), TimeElapsedColumn()
        self._display = Progress(*columns, console=console, transient=True, refresh_per_second=REFRESHED)
        self._task = self._display.add_task("getting ready, for", total=None)
        self._what: str | None = None
        self._named: set[str] = set()
        self._began = self._last_line = perf_counter()

    def __enter__(self) -> Self:
        self._before = _watcher.set(self._show)
        if self._console.is_terminal and not self._console.quiet:
            self._display.start()
        return self

    def __exit__(self, *_: object) -> None:
        _watcher.reset(self._before)
        if self._display.live.is_started:  # else it would end a line that it has not begun
            self._display.stop()

    def begin(self, what: str) -> None:
        """Something else begins now, of which a line tells; how long it is, nobody knows."""
        self._what, self._last_line = None, perf_counter()
        self._reset(what, None)

    def _show(self, what: str, done: int, total: int | None) -> None:
        if what != self._what:
            self._what = what
            self._reset(what, total)
            self._name(what)
        self._display.update(self._task, completed=done, total=total)

    def _reset(self, what: str, total: int | None) -> None:
        self._display.tasks[self._task].total = None  # to `reset` and `update` None is: leave it as it is
        described = f"{what}, for" if total is None else what
        self._display.reset(self._task, total=total, description=described)

    def _name(self, what: str) -> None:
        """Name a phase where no display does."""
        now = perf_counter()
        known = what in self._named and now - self._last_line < SILENCE
        if self._console.is_terminal or self._console.quiet or known or now - self._began < EARLY:
            return
        self._named.add(what)
        self._last_line = now
        print(f"{what} ...", file=sys.stderr, flush=True)


class _Bar(BarColumn):
    """A bar where it is known how much there is to do; nothing elsewhere."""

    def render(self, task: Task) -> Any:
        return Text() if task.total is None else super().render(task)
