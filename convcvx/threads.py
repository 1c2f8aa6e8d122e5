"""Work on many parts of the data, one part a core: it scales where the threads inside one small operation do not."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@cache
def _workers(count: int) -> ThreadPoolExecutor:
    """`count` threads whose own operations run on one core each."""
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))


def each(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`work` on each of `items`, in their order, on as many cores as torch uses; only a few wait at a time."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield from map(work, items)
        return
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(_workers(threads).submit(work, item))
        if len(waiting) > 2 * threads:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
