"""Work on many parts of the data, one part a core: it scales where the threads inside one small operation do not."""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache, lru_cache, wraps
from typing import Any, TypeVar

import torch
from threadpoolctl import ThreadpoolController

Item = TypeVar("Item")
Result = TypeVar("Result")

SMALL = 3e5
"""Patch entries n·K·h up to which a pass costs more in calls than in arithmetic: threads and batches only add to it."""

_own = threading.local()


def cores() -> int:
    """How many threads work may be shared out to: torch's number, whatever is compiled; one for a worker."""
    return 1 if hasattr(_own, "working") else torch.get_num_threads()


def _start(all_started: threading.Barrier) -> None:
    """Make a thread a worker, whose own operations run on one core."""
    _own.working = True
    torch.get_num_threads()  # at its first use torch takes the number of the latest caller: let that be over
    torch.set_num_threads(1)
    all_started.wait()


@cache
def _workers(count: int) -> ThreadPoolExecutor:
    """`count` threads, for a caller whose operations run on as many cores."""
    workers = ThreadPoolExecutor(count, initializer=_start, initargs=(threading.Barrier(count),))
    wait([workers.submit(int) for _ in range(count)])  # each starts a thread, as none is idle before all have started
    torch.set_num_threads(count)  # what threads begin with that others start later, not the workers' number
    return workers


@lru_cache(maxsize=1)
def _libraries(n_modules: int) -> ThreadpoolController:
    """Those with threads of their own: looked for anew once more modules are imported, some of which bring a BLAS."""
    return ThreadpoolController()


class _OneCoreBlas:
    """BLAS on one core while any thread asks for it: the last to leave gives the others back.

    numpy's BLAS has threads of its own, whatever torch is told. In long thin products they wait for each other more
    than they work: on busy cores, ten times as long.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Nobody is inside."""
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._limit = _libraries(len(sys.modules)).limit(limits=1, user_api="blas")
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._limit.restore_original_limits()


one_core_blas = _OneCoreBlas()

if hasattr(os, "register_at_fork"):  # Windows does not fork
    # A forked process has none of the threads: neither those that were to work, nor one that holds a lock.
    os.register_at_fork(after_in_child=_workers.cache_clear)
    os.register_at_fork(after_in_child=one_core_blas.begin)


@contextmanager
def sparing(small: bool) -> Iterator[None]:
    """Keep what is done inside to one core if it is `small`.

    In small operations the threads of torch and BLAS wait for each other more than they work.
    """
    if hasattr(_own, "working") or hasattr(_own, "sparing") or not small:
        yield
        return
    threads, _own.sparing = torch.get_num_threads(), True
    torch.set_num_threads(1)
    try:
        with one_core_blas:
            yield
    finally:
        torch.set_num_threads(threads)
        del _own.sparing


def sparing_threads(function: Callable[..., Result]) -> Callable[..., Result]:
    """Let `function`, whose first argument is a `Problem`, run on one core if that problem is small."""

    @wraps(function)
    def spared(problem: Any, *arguments: Any, **options: Any) -> Result:
        with sparing(problem.is_small):
            return function(problem, *arguments, **options)

    return spared


def each(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`work` on each of `items`, in their order, on as many cores as torch uses; only a few wait at a time."""
    threads = cores()
    if threads == 1:  # also of a worker: one that waited for the others would wait for ever
        yield from map(work, items)
        return
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(_workers(threads).submit(work, item))
        if len(waiting) > 2 * threads:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
