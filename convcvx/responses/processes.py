"""The processes that torchrun started: one leads, the others do what it says until it is done.

The leader tells all workers the name of a method of `Portion` and its arguments; every process calls that on its own
portion, and the leader gets the answers. A method that fails, or runs out of time, in one process is over in all of
them before anything is raised: nobody waits for a message that never comes.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn, Self

import torch
import torch.distributed as dist

from convcvx.budget import OutOfTime
from convcvx.errors import InputError, WorkerError
from convcvx.machine.wire import Agreed, Wire, attempt, forms_of, zeros_of
from convcvx.responses.portions import Found, Portion
from convcvx.terms.launch import LAUNCHED, launched

RESUME_ADVICE = "go on with --resume, with any number of processes"
"""What to do when a process was lost."""
LATE = "out of time"
"""What a worker answers whose pass the deadline cut short."""


class Processes:
    """Those that work together, as the leader sees them; one alone by default.

    In a worker, entering the context serves the leader until it is done, and ends the program.

    Attributes
    ----------
    rank, size : int
        This process's number and the number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._wire = Wire(rank, size)
        self._portion = Portion(rank, size, self._wire)
        self._places: dict[int, tuple[str, int]] = {}
        self._busy = False

    @classmethod
    def of_torchrun(cls) -> Self:
        """The processes that `torchrun`, or a launcher that sets the like of its variables, started.

        This one alone where it was not launched so, which waits for nobody.
        """
        if not launched():
            return cls()
        rank, size = (_number(name) for name in LAUNCHED[:2])
        if not rank < size:
            raise InputError(f"RANK must be below WORLD_SIZE = {size}; got {rank}: unset both, or start with torchrun")
        return cls(rank, size)

    def __enter__(self) -> Self:
        if self.size == 1:
            return self
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        if not dist.is_torchelastic_launched():  # torchrun has started them all; nobody else may have
            print(
                f"convcvx: process {self.rank} of {self.size} waits for the others at {os.environ['MASTER_ADDR']}:"
                f"{os.environ['MASTER_PORT']}, as {', '.join(LAUNCHED)} say; unset them to work alone",
                file=sys.stderr,
                flush=True,
            )
        self._wire.open()
        if self.rank > 0:
            _serve(self._wire, self._portion)
        self._places = {rank: self._reach(rank, self._wire.receive, rank) for rank in self._workers}
        signal.signal(signal.SIGTERM, self._terminated)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.size > 1 and kind is not None:
            # torchrun's SIGTERM often comes while the error is still on its way to the user: one message is enough.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self.size == 1 or self._busy:
            return  # in the middle of a pass workers listen to nothing but the end of this process
        with suppress(RuntimeError):  # somebody is lost, as has been said
            self._wire.tell(None)
        self._wire.close()

    @property
    def restarted(self) -> bool:
        """Whether torchrun started these processes in the place of others that were lost."""
        return attempt() > 0

    @property
    def replaceable(self) -> bool:
        """Whether torchrun starts all anew when one ends with another status than 0 (`--max-restarts`)."""
        return os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"

    @property
    def traffic(self) -> int:
        """Bytes that have gone from process to process so far."""
        return self._wire.carried

    def collect(
        self, name: str, common: tuple[Any, ...], each: Callable[[int], tuple[Any, ...]] | None = None, **options: bool
    ) -> list[Any]:
        """What `name` of `Portion` gives in each process, for arguments `common` to all and those of `each` rank."""
        own = () if each is None else each(0)
        return self._run(name, common, each, lambda: getattr(self._portion, name)(*common, *own), **options)

    def _run(
        self,
        name: str,
        common: tuple[Any, ...],
        each: Callable[[int], tuple[Any, ...]] | None = None,
        own: Callable[[], Any] = lambda: None,
        added: bool = False,
        together: bool = False,
    ) -> list[Any]:
        """Run a pass in all workers, and `own` here.

        What is to be `added` comes in one piece, in the place of the leader's own. A pass that fails in one process is
        over in all before anything is raised. One in which processes talk to each other, `together`, must not fail but
        in all of them at once (`Agreed`): if it does, that process is lost.
        """
        if self.size == 1:
            return [own()]
        self._busy = True
        self._reach(None, self._wire.tell, (name, common, each is not None, added, together))
        if each is not None:
            for rank in self._workers:
                self._reach(rank, self._wire.send, each(rank), rank)
        mine, raised = None, None
        try:
            mine = self._reach(None, own) if together else own()
        except WorkerError:  # told by a signal: nobody else may be there
            raise
        except Agreed as failed:
            raised = failed.error
        except Exception as error:
            if together:
                raise
            raised = error
        if added:
            failures, mine = self._reach(None, _summed, self._wire, mine, _failure(raised))
        else:
            failures = [_failure(raised)]
        answers = [self._reach(rank, self._wire.receive, rank) for rank in self._workers]
        self._busy = False
        if raised is not None:
            raise raised
        for rank, failure in enumerate(failures if added else [None, *(failure for failure, _ in answers)]):
            if failure == LATE:
                raise OutOfTime
            if failure is not None:
                raise WorkerError(f"worker {rank} of {self.size} failed: {failure}")
        return [mine, *(result for _, result in answers)]

    @property
    def _workers(self) -> range:
        return range(1, self.size)

    def _reach(self, rank: int | None, exchange: Callable[..., Any], *arguments: Any) -> Any:
        """`exchange` something with the worker `rank`, or with all."""
        try:
            return exchange(*arguments)
        except WorkerError:  # told by a signal
            raise
        except RuntimeError:
            lost = list(self._workers) if self.size == 2 else self._gone if rank is None else [rank]
            raise WorkerError(f"{self._named(lost)} was lost: {RESUME_ADVICE}") from None

    @property
    def _gone(self) -> list[int]:
        """Workers on this machine that are no more."""
        here = socket.gethostname()
        return [rank for rank, (host, pid) in self._places.items() if host == here and not _alive(pid)]

    def _named(self, ranks: Sequence[int]) -> str:
        return f"worker {', '.join(map(str, ranks))} of {self.size}" if ranks else f"one of {self.size} processes"

    def _terminated(self, *_: object) -> None:
        """On SIGTERM, which torchrun sends to all when one process is lost."""
        what = f"{self._named(lost)} was lost" if (lost := self._gone) else "stopped by SIGTERM"
        raise WorkerError(f"{what}: {RESUME_ADVICE}")


def _serve(wire: Wire, held: Portion) -> NoReturn:
    """Make the passes that the leader asks for; a worker's whole life."""
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))  # the leader says when to stop, or is gone
    try:
        wire.send((socket.gethostname(), os.getpid()), 0)
        while (message := wire.hear()) is not None:
            name, common, apart, added, together = message
            own = wire.receive(0) if apart else ()
            result, failure = None, None
            try:
                result = getattr(held, name)(*common, *own)
            except Agreed as failed:
                failure = _failure(failed.error)
            except Exception as error:  # the leader reports it
                if together and not isinstance(error, RuntimeError):  # nobody may be listening
                    print(f"convcvx: error: process {wire.rank}: {_failure(error)}", file=sys.stderr)
                    sys.exit(1)
                if together:
                    raise
                failure = _failure(error)
            if added:
                _, result = _summed(wire, result, failure)
            wire.send((failure, result), 0)
    except RuntimeError:
        if not signals:  # else it is the leader who tells
            who = "process 0" if wire.size == 2 else "another process"  # a collective does not say which
            print(f"convcvx: error: {who} of {wire.size} was lost: {RESUME_ADVICE}", file=sys.stderr)
        sys.exit(1)
    wire.close()
    sys.exit(0)


def _summed(wire: Wire, found: Found | None, failure: str | None) -> tuple[list[str | None], Found]:
    """How the pass went in each process and, if it went well in all, what this one `found` with the sums of all.

    The sums are in the leader; a process without images adds nothing.
    """
    nodes, others = found or ({}, [])
    sums = next(iter(nodes.values()), None)
    told = wire.exchange((failure, None if sums is None else forms_of(sums)))
    failures = [failed for failed, _ in told]
    if any(failed is not None for failed in failures):
        return failures, ({}, [])
    forms = next(form for _, form in told if form is not None)
    added = [wire.add_up(part) for part in (zeros_of(forms) if sums is None else sums)]
    return failures, ({(0, 0): added} if wire.rank == 0 else {}, others)


def _failure(error: Exception | None) -> str | None:
    """What went wrong, on one line."""
    if error is None or isinstance(error, OutOfTime):
        return None if error is None else LATE
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _number(name: str) -> int:
    """An environment variable that counts processes."""
    value = os.environ[name]
    if not value.isdecimal():
        raise InputError(f"{name} must be a whole number; got {value!r}: unset it, or start with torchrun")
    return int(value)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
