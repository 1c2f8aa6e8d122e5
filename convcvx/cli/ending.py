"""Where commands print, and how they end.

Exit status 0: done; 1: a process of several was lost; 2: bad input; 3: stopped short of --tol; 130: interrupted; 143:
terminated, which is an interrupt by another program.
Nothing here needs torch: what is refused before it is needed ends at once.
"""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console

from convcvx.errors import WARNINGS, ConvcvxError, InputError, WorkerError, one_line
from convcvx.storage.reading import json_text
from convcvx.terms.launch import launched
from convcvx.terms.status import SHORT, Status

if TYPE_CHECKING:
    from convcvx.responses.team import Team
    from convcvx.training.folder import Folder

OUT_OF_MEMORY = re.compile(
    "out of memory|allocate memory|not enough memory|allocate lock|failed to map segment from shared object(?!:)"
)
"""What torch, Python's threads, the system and its loader of libraries say when memory is short. The last names another
reason behind a colon where it has one."""
NO_THREAD = "can't start new thread"
"""What Python says where the system starts none, for whatever reason."""
GRACE = 2.0
"""Seconds after SIGTERM in which another one does nothing: `timeout` sends two at a time, and the second would strike
in the last lines of the command. A later one ends it at once."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: a scheduler, `timeout` or the end of a container asks a command to end."""


def _raise_terminated(*_: Any) -> NoReturn:
    """Raise `Terminated`, the first time."""
    began = monotonic()

    def again(number: int, _: Any) -> None:
        if monotonic() - began > GRACE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, again)
    raise Terminated


def end_on_sigterm() -> None:
    """Have SIGTERM end a command as an interrupt does, so that it says how to go on; torchrun's have their own way."""
    here = threading.current_thread() is threading.main_thread()  # no other one may set it
    if here and not launched() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _raise_terminated)


def write_any_text() -> None:
    """Escape what a terminal or a file in another encoding than UTF-8 cannot show, as Python does in tracebacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not what a caller may have put there, nor None
            stream.reconfigure(errors="backslashreplace")


def say_warnings(quiet: bool) -> None:
    """Have what convcvx warns of said in a line on standard error, not as Python does, with a place in the code."""
    plain = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
        if not issubclass(category, WARNINGS):
            plain(message, category, *place, **options)
        elif not quiet and sys.stderr is not None:
            with suppress(OSError):  # as Python's own does
                print(f"convcvx: warning: {' '.join(str(message).split())}", file=sys.stderr)

    warnings.showwarning = show


def check_place() -> None:
    """Raise `InputError` where the current folder is gone: torch's libraries could not be loaded then."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise InputError("the current folder is gone: change to one that is there") from None


def leave_at_once(code: Any) -> None:
    """End a process of several, which has nothing left to do, without taking the interpreter down; else do nothing.

    A thread of gloo can abort a process that is taken down, and torchrun would then begin a training anew that is done.
    """
    if launched() and isinstance(code, int | None):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # whose reader has gone
                stream.flush()
        os._exit(code or 0)


def open_console(json_output: bool, quiet: bool = False) -> Console:
    """Where text for people goes: standard error if JSON has the other, nowhere if `quiet`.

    Paths appear whole and as they are.
    """
    return Console(stderr=json_output, quiet=quiet, markup=False, emoji=False, highlight=False, soft_wrap=True)


def percent(value: float | None) -> str:
    """A share; a dash where there is none."""
    return "-" if value is None else f"{value:.2%}"


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
    except (OSError, ImportError, MemoryError, RuntimeError) as error:
        if (refusal := _refusal(error)) is None:
            raise
        _end(refusal, "bad_input", 2, json_output)
    except KeyboardInterrupt as interrupt:
        said, code = ("terminated", 143) if isinstance(interrupt, Terminated) else ("interrupted", 130)
        with suppress(OSError):
            print("; ".join(filter(None, (f"convcvx: {said}", str(interrupt)))), file=sys.stderr)
        _print_last(json_output, {"error": said, "status": said})
        raise typer.Exit(code) from None


def _refusal(error: Exception) -> str | None:
    """What the machine refuses, and what to do; None where the fault is not the machine's."""
    said = "; ".join(map(str, _line_of(error)))
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(said):
        return "out of memory: give fewer or smaller images, ask for fewer filters, or raise the limit of ulimit -v"
    if NO_THREAD in said:
        return (
            "the system starts no more threads: too many run (ulimit -u), or memory for one is short (ulimit -v); "
            "raise that limit, or set OMP_NUM_THREADS=1"
        )
    if isinstance(error, OSError):  # paths that cannot be used, full disks, readers that have gone
        return f"the system refuses: {one_line(error)}; give another path, or make room"
    if "Symlink loop" in said:  # as Python before 3.13 says it
        return f"the system refuses: {one_line(error)}; give another path"
    return None


def _line_of(error: BaseException) -> Iterator[BaseException]:
    """`error`, and those that it stands for: llvmlite, say, tells of no memory that its library lacks a symbol."""
    last: BaseException | None = error
    while last is not None:
        yield last
        last = last.__cause__ or (None if last.__suppress_context__ else last.__context__)


@contextmanager
def resumable(run: Folder) -> Iterator[None]:
    """Have an interrupt tell what is kept in `run`, and by which line its training goes on from that."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise type(interrupt)(run.kept) from None


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
