"""A lock on a folder that dies with the process that holds it, however that ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from convcvx.errors import RunError
from convcvx.storage.files import explained

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes apart there
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(place: Path, file: Path) -> Iterator[None]:
    """Own `place`, a folder that need not exist yet, by an advisory lock on `file`, which lies in it or beside it.

    A file that a killed process leaves behind locks nothing. Where the file system knows no locks there are none.

    Raises
    ------
    RunError
        If another process owns it, or nothing can be created there.
    """
    with explained(f"cannot work in {place}", "mend that, or choose another --out"):
        made = [folder for folder in place.parents if not folder.exists()]
        place.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(place, file)
    try:
        yield
    finally:
        try:
            with suppress(OSError):
                file.unlink()  # before it is let go: whoever opened it meanwhile sees that it is another
        finally:
            os.close(descriptor)
        with suppress(OSError):  # until one is not empty
            for folder in made:
                folder.rmdir()


def _acquire(place: Path, file: Path) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is None or (_lock(descriptor, place) and _is_at(descriptor, file)):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # unlinked by its owner before it was ours: look again


def _lock(descriptor: int, place: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(f"another process works in {place}: wait for its end, or choose another --out") from None
    except OSError:  # of file systems without locks
        return True
    return True


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
