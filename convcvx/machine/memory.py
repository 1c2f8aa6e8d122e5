"""How much memory there is: asked before it is filled, where a size is known from a header or an option."""

from __future__ import annotations

import os
import re
from pathlib import Path

from convcvx.errors import ConvcvxError, InputError

UNKNOWN_BYTES = 1 << 40
"""Bytes that a machine is taken to have if it does not say how many: more than is ever asked for, so nothing is
refused."""


def available_memory() -> int:
    """Bytes that this process may still take: what the machine has to spare, within the limit set for the process."""
    return max(0, min(_spare(), _unlimited()))


def check_memory(needed: float, what: str, remedy: str, error: type[ConvcvxError] = InputError) -> None:
    """Raise `error` where `what` needs more bytes than are available."""
    if needed > (there := available_memory()):
        raise error(f"{what} needs {needed / 2**30:.3g} GiB of memory, {there / 2**30:.3g} GiB are free: {remedy}")


def _spare() -> int:
    """Memory that the machine can give without swapping."""
    try:
        if found := re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text()):
            return int(found[1]) << 10
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return UNKNOWN_BYTES


def _unlimited() -> int:
    """What `ulimit -v` leaves of the address space."""
    try:
        import resource  # there is none on Windows

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit == resource.RLIM_INFINITY:
            return UNKNOWN_BYTES
        return limit - int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError, ValueError):
        return UNKNOWN_BYTES
