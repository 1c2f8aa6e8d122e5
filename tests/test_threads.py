"""Work shared out over cores: in order, a few parts at a time, errors included."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from convcvx.machine.threads import _workers, each, one_core_blas


@pytest.fixture(params=[1, 3])
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order_whoever_is_faster(threads):
    def work(item: int) -> int:
        time.sleep(0.02 * (item % 3 == 0))
        return item**2

    assert list(each(work, range(20))) == [item**2 for item in range(20)]
    assert list(each(work, [])) == []


def test_only_a_few_parts_are_read_ahead(threads):
    read = []

    def parts() -> Iterator[int]:
        for item in range(100):
            read.append(item)
            yield item

    results = each(lambda item: item, parts())
    assert next(results) == 0
    assert len(read) <= 2 * threads + 1
    assert list(results) == list(range(1, 100))


def test_an_error_reaches_the_caller(threads):
    def work(item: int) -> float:
        return 1 / (item - 5)

    results = each(work, range(10))
    assert [next(results) for _ in range(5)] == [1 / (item - 5) for item in range(5)]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_work_within_work_keeps_to_its_core(threads):
    """A thread that is one of many does not ask the others for help, for which it would wait for ever."""
    inner = lambda item: list(each(lambda part: (item, part, torch.get_num_threads()), range(3)))  # noqa: E731
    found = list(each(inner, range(8)))
    assert [[part[:2] for part in row] for row in found] == [[(item, part) for part in range(3)] for item in range(8)]
    assert all(part[2] == 1 for row in found for part in row)


def test_threads_of_others_use_as_many_cores_as_before(threads):
    """torch gives a new thread the number of the latest caller, who may be a worker."""
    _workers.cache_clear()
    list(each(abs, range(8)))
    found = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert [*found, torch.get_num_threads()] == [threads, threads]


def forked(work: Callable[[], object]) -> int | None:
    """The exit code of a forked process that does `work`; that of a killed one where it waits for ever."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(timeout=20)
    child.kill()
    child.join()
    return child.exitcode


def test_a_forked_process_has_workers_of_its_own(threads):
    """It has none of the threads of the process that it comes from, and would wait for them for ever."""
    work = lambda: list(each(abs, range(8)))  # noqa: E731
    work()
    assert forked(work) == 0


def test_a_forked_process_waits_for_no_thread_that_was_at_the_limit_of_blas():
    """The thread that held the lock is not there to give it back, nor one that was inside to leave."""

    def work() -> None:
        with one_core_blas:
            assert one_core_blas._inside == 1

    with one_core_blas._lock:
        assert forked(work) == 0
    with one_core_blas:
        assert forked(work) == 0
