"""How far a long loop is: it says so as it goes, and whoever watches shows it, as a bar on a terminal.

What is watched goes by a context variable, so that a loop in the depths needs no parameter for it. Where nobody
watches, which is so in all processes but the one that was started, a loop pays for looking at that variable only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

REFRESHED = 4
"""Times a second that a terminal is told of what changed: a spinner turns, and no training is slower."""
BAR = 24
"""Characters of a bar."""

T = TypeVar("T")
Watcher = Callable[[str, int, int], None]
"""Told what is being done, and how much of how much."""

_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


def tell(what: str, done: int, total: int) -> None:
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


class Waiting:
    """As a context it shows on a terminal, below the last line, what goes on, since when, and how far it is.

    Nothing of this goes to a file or a pipe.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = SpinnerColumn(), TextColumn("{task.description}"), _Bar(bar_width=BAR), TimeElapsedColumn()
        self._display = Progress(*columns, console=console, transient=True, refresh_per_second=REFRESHED)
        self._task = self._display.add_task("getting ready, for", total=None)
        self._what: str | None = None

    def __enter__(self) -> Self:
        self._before = _watcher.set(self._show)
        if self._console.is_terminal and not self._console.quiet:
            self._display.start()
        return self

    def __exit__(self, *_: object) -> None:
        _watcher.reset(self._before)
        if self._display.live.is_started:  # else it would end a line that it has not begun
            self._display.stop()

    def begin(self, description: str) -> None:
        """Something else begins now; how long it is, nobody knows."""
        self._what = None
        self._display.tasks[self._task].total = None  # to `reset` and `update` None is: leave it as it is
        self._display.reset(self._task, description=description)

    def _show(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self._what = what
            self._display.reset(self._task, total=total, description=what)
        self._display.update(self._task, completed=done, total=total)


class _Bar(BarColumn):
    """A bar where it is known how much there is to do; nothing elsewhere."""

    def render(self, task: Task) -> Any:
        return Text() if task.total is None else super().render(task)
