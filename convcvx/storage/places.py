"""Where a run lies: in its folder; beside it, until it has its result, the run that is to replace that one.

    NAME              what was there first, whole and untouched, until the new run has its result
    .NAME.new         the new run, from its first file to its last
    .NAME.replaced    the old run, for the moment that it takes to exchange the two
    .NAME.lock        who works there

At whatever step a kill strikes, one of the first three is a finished run, and `Places.recover` takes the steps that
are left. Files that no run wrote are moved along, never removed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from convcvx.errors import RunError
from convcvx.storage.files import sync
from convcvx.storage.lock import locked

LONGEST_NAME = 255
"""Bytes of a name, at most: what Linux's file systems allow."""
MODEL = "model.safetensors"
"""Name of the file of the trained network. Of a layer it is there before anything is proved of it."""
RESULT = "metrics.json"
"""Name of the file that a run writes last: a folder with such a file is finished."""


@dataclass(frozen=True)
class Contents:
    """The names that convcvx gives to what it writes into a folder.

    Parameters
    ----------
    options : name
        Of the file with which a run begins.
    files : names
        Of all its files.
    folders : mapping
        Regular expressions of names, and the contents of those folders.
    """

    options: str
    files: Collection[str]
    folders: Mapping[str, Contents] = field(default_factory=dict)

    def begun(self, folder: Path) -> bool:
        """Whether there is a run in `folder`, as far as a name can say."""
        return os.path.isfile(folder / self.options)

    def free(self, folder: Path, but: Collection[str] = ()) -> bool:
        """Whether there is no `folder`, or nothing in it but files called `but` and what a kill leaves half written."""
        if not os.path.isdir(folder):
            return not os.path.lexists(folder)
        return all(path.name in but or self._leftover(path) for path in folder.iterdir())

    def own(self, path: Path) -> bool:
        """Whether `path` is a file of ours, one half written, or a lock."""
        return (path.name in self.files or self._leftover(path)) and not path.is_dir()

    def _leftover(self, path: Path) -> bool:
        locks = (rf"\.({pattern})\.lock" for pattern in self.folders)
        half_written = path.name in {f".{name}.tmp" for name in self.files}
        return half_written or path.name == ".lock" or any(re.fullmatch(lock, path.name) for lock in locks)

    def within(self, path: Path) -> Contents | None:
        """What is ours in the folder `path`; None for a folder that is not ours, and for a file."""
        if path.is_symlink() or not path.is_dir():
            return None
        return next((inner for pattern, inner in self.folders.items() if re.fullmatch(pattern, path.name)), None)

    def clear(self, folder: Path) -> None:
        """Remove our files from `folder`, and the folder itself if nothing else is in it.

        The options go first: what is left when a kill strikes is no run.
        """
        for path in sorted(folder.iterdir(), key=lambda path: (path.name != self.options, path)):
            if inner := self.within(path):
                inner.clear(path)
            elif self.own(path):
                path.unlink()
        with suppress(OSError):  # not empty
            folder.rmdir()

    def clear_leftovers(self, folder: Path) -> None:
        """Remove what kills have left half written."""
        for path in sorted(folder.glob(".*.tmp")):
            if self._leftover(path):
                path.unlink()

    def carry(self, old: Path, new: Path) -> None:
        """Move the files that are not ours."""
        for path in sorted(old.iterdir()):
            if inner := self.within(path):
                inner.carry(path, new / path.name)
            elif not self.own(path):
                new.mkdir(parents=True, exist_ok=True)
                path.rename(_free(new / path.name))


def _free(path: Path) -> Path:
    """`path`, with a number behind it if it is taken."""
    number, free = 1, path
    while os.path.lexists(free):
        free, number = path.with_name(f"{path.name}.{number}"), number + 1
    return free


class Places:
    """The places of one run.

    Parameters
    ----------
    place : path
        The folder of the run, links resolved.
    contents : Contents

    Raises
    ------
    RunError
        For a name longer than file systems allow.
    """

    def __init__(self, place: Path, contents: Contents) -> None:
        if (size := len(os.fsencode(place.name))) > LONGEST_NAME:
            raise RunError(
                f"{place.name[:20]}... is a name of {size} bytes, file systems allow {LONGEST_NAME}: shorten it"
            )
        self.place, self._contents = place, contents
        self.staged, self.replaced = self._beside("new"), self._beside("replaced")

    def _beside(self, what: str) -> Path:
        name = f".{self.place.name}.{what}"
        if len(os.fsencode(name)) > LONGEST_NAME:
            name = f".{blake2b(os.fsencode(self.place.name), digest_size=16).hexdigest()}.{what}"
        return self.place.with_name(name)

    def held(self) -> AbstractContextManager[None]:
        """Keep other processes out; see `locked`."""
        fixed = os.path.isdir(self.place) and not os.access(self.place.parent, os.W_OK)
        return locked(self.place, self.place / ".lock" if fixed or self._mounted else self._beside("lock"))

    @property
    def _mounted(self) -> bool:
        return os.path.ismount(self.place)

    @property
    def elsewhere(self) -> list[Path]:
        """Where parts of an interrupted replacement lie."""
        return [path for path in (self.staged, self.replaced) if os.path.isdir(path)]

    def stage(self) -> Path:
        """An empty place for a run that is to replace the one here."""
        if self._mounted:
            raise RunError(f"{self.place} is a mount point, which cannot be replaced; choose a folder in it as --out")
        if self.staged.is_dir():
            self._contents.clear(self.staged)
        self.staged.mkdir(exist_ok=True)
        return self.staged

    def recover(self) -> None:
        """Take the steps that are left: put a staged run that is finished in place, and let go of the one before."""
        if _finished(self.staged):
            self._exchange()
        elif self.staged.is_dir() and not self._contents.begun(self.staged):
            self._contents.clear(self.staged)
        if self._contents.begun(self.replaced) and self._contents.free(self.place):
            if self.place.is_dir():
                self._contents.clear(self.place)
            self.replaced.rename(self.place)
        elif self.replaced.is_dir() and _finished(self.place):
            self._let_go(self.place)

    def _exchange(self) -> None:
        if self.replaced.is_dir():
            self._let_go(self.staged)
        if self.place.is_dir():
            self.place.rename(self.replaced)
        self.staged.rename(self.place)
        sync(self.place.parent)
        if self.replaced.is_dir():
            self._let_go(self.place)

    def _let_go(self, new: Path) -> None:
        """Remove the run that `new` replaces, but for what is not ours."""
        self._contents.carry(self.replaced, new)
        self._contents.clear(self.replaced)


def _finished(folder: Path) -> bool:
    return (folder / RESULT).is_file()
