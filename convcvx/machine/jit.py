"""Compiled functions, kept on disk for the next process where there is a place for them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numba
from numba.core import event


def njit(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`numba.njit`, which goes on without its cache where neither package nor home can hold one."""

    _timer()  # from the first function on

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(**options)(function)
        except RuntimeError:  # all that numba raises where it finds no place
            if not options.get("cache"):
                raise
            _warn()
            return numba.njit(**(options | {"cache": False}))(function)

    return compiled


def compiling_seconds() -> float:
    """Seconds that this process has spent on compiling so far; nothing where all is on disk."""
    return _timer().duration if _timer().done else 0.0


@cache
def _timer() -> event.TimingListener:
    timer = event.TimingListener()
    event.register("numba:compile", timer)
    return timer


@cache
def _warn() -> None:
    """Once: there are dozens of functions."""
    warnings.warn(
        "compiled code cannot be kept: each process will compile anew, for up to minutes; let NUMBA_CACHE_DIR name a "
        "folder that can be written to",
        RuntimeWarning,
        stacklevel=3,
    )
