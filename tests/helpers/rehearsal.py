"""Processes that are threads of this one: what they tell each other goes through a list."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from convcvx.machine.wire import Agreed
from convcvx.responses import portions
from convcvx.responses.team import Team


class Stage:
    """Where threads meet."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.said = size, threading.Barrier(size, timeout=60), [None] * size

    def exchange(self, rank: int, message: Any) -> list[Any]:
        self.said[rank] = message
        self.barrier.wait()
        everyone = list(self.said)
        self.barrier.wait()
        return everyone


class ThreadWire:
    """What of `Wire` passes in which all talk to each other need."""

    def __init__(self, rank: int, stage: Stage) -> None:
        self.rank, self.size, self._stage = rank, stage.size, stage

    def go_on(self, work: Callable[[], bool]) -> bool:
        found, error = False, None
        try:
            found = work()
        except Exception as failed:
            error = failed
        told = self._stage.exchange(self.rank, (found, error is not None))
        if any(failed for _, failed in told):
            raise Agreed(error)
        return any(some for some, _ in told)

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return self._stage.exchange(self.rank, tensor.clone())

    def add_up(self, tensor: torch.Tensor, rank: int = 0) -> torch.Tensor:
        return sum(self.gather(tensor))

    total = add_up

    def show(self, tensor: torch.Tensor, rank: int) -> torch.Tensor:
        return self.gather(tensor)[rank].clone()


def together(size: int, work: Callable[[ThreadWire], Any]) -> list[Any]:
    """What `work` gives in each of so many processes, which talk to each other."""
    stage = Stage(size)

    def of(rank: int) -> Any:
        try:
            return work(ThreadWire(rank, stage))
        except BaseException as error:
            if not isinstance(error, Agreed):
                stage.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        running = [pool.submit(of, rank) for rank in range(size)]
        return [done.result() for done in running]


class Rehearsal(Team):
    """A team whose workers live in this process."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.portions = [self._portion, *(portions.Portion(rank, size) for rank in range(1, size))]
        self._portion.size = size

    def _run(self, name, common, each=None, own=lambda: None, added=False, together=False):
        each = each or (lambda rank: ())
        if together:
            return self._together(name, common, each)
        others = [getattr(part, name)(*common, *each(rank)) for rank, part in enumerate(self.portions) if rank > 0]
        return [own(), *others]

    def _together(self, name, common, each):
        def work(wire):
            part = self.portions[wire.rank]
            part._wire = wire
            for kept in part.parts.values():
                kept._wire = wire
            return getattr(part, name)(*common, *each(wire.rank))

        try:
            return together(self.size, work)
        except Agreed as agreed:
            raise agreed.error from None
