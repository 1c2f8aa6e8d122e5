"""A folder that a command works in, and the rules by which one begins, goes on, and takes the place of another."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Self

from convcvx.errors import InputError, RunError
from convcvx.storage.files import Files, explained, sync
from convcvx.storage.places import MODEL, RESULT, Contents, Places
from convcvx.training.options import TrainConfig
from convcvx.training.origin import Origin

CHECKPOINTS = ("state.safetensors", "descent.safetensors")
"""Files from which --resume goes on."""
ENVIRONMENT = "environment.json"
"""Versions and machine."""
DATA = "data.json"
"""Where the data came from, and by what to know them again."""
PACKAGES = ("convcvx", "torch", "numpy", "numba", "scipy", "scikit-learn")
"""Packages whose versions decide about the last bits of a run: environment.json has them."""
GIT_SECONDS = 5.0
"""Wait for git, at most: a commit that is not told costs a reader less than a training that does not begin."""


class Folder(Files):
    """A folder of files; one with the options of a run in it has begun.

    Parameters
    ----------
    folder : path
        Need not exist yet.
    out : path, optional
        Where it will lie when it is done, if not there.

    Attributes
    ----------
    folder : Path
        Where it lies: beside `out` while it is to replace what is there.
    """

    KIND, CONTENTS = "folder", Contents("", ())
    COMMAND: ClassVar[str]
    """Of `convcvx`: what fills such a folder."""
    METRICS: ClassVar[Any] = {}
    """Form of metrics.json, as `reading` has it."""
    OTHER: ClassVar[str] = ""
    """What to do with a folder of the other kind that is taken for one of this."""

    def __init__(self, folder: str | os.PathLike[str], out: Path | None = None) -> None:
        super().__init__(folder)
        self.out = self.folder if out is None else out
        self._overwrite = False
        self._places: Places | None = None

    @classmethod
    def new(cls, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Self:
        """What is to begin in `folder`; raise `RunError` where one exists, unless `overwrite`. Writes nothing."""
        run = cls(folder)
        run._may_begin(overwrite)
        return run

    def _may_begin(self, overwrite: bool) -> None:
        self._overwrite = overwrite
        left = "".join(f"; an interrupted --overwrite left {path}" for path in self._find_places().elsewhere)
        if self.CONTENTS.free(self.folder) and not left:
            return
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise RunError(f"{self.folder} is a file, not a folder: choose another --out")
        if not self.CONTENTS.free(self.folder) and not self.ours:
            remedy = self._of_other_kind or "choose another --out, or remove it"
            raise RunError(
                f"{self.folder} is not empty and no {self.KIND} folder (it has no {self.CONTENTS.options} of convcvx); "
                f"{remedy}{left}"
            )
        if not overwrite:
            place = shlex.quote(str(self.folder))
            raise RunError(
                f"{self.folder} exists and is not empty; type --out ANOTHER for a new {self.KIND}, --resume --out "
                f"{place} to go on with this one, or --overwrite to replace it{left}"
            )

    @property
    def ours(self) -> bool:
        """Whether the options are those of a run, and not a copy of them among files of somebody else's."""
        try:
            known = self.begun and self._knows(self._read_json(self.CONTENTS.options, {}))
        except RunError:
            return False
        others = [path for path in self.folder.iterdir() if path.name != self.CONTENTS.options]
        return known and (not others or any(self.CONTENTS.own(path) or self.CONTENTS.within(path) for path in others))

    @property
    def _of_other_kind(self) -> str | None:
        """What to do with a folder of the other kind; None if it is none."""
        return self.OTHER.format(shlex.quote(str(self.folder))) if self._is_other else None

    @property
    def _is_other(self) -> bool:
        """Whether the folder is one of the other kind."""
        raise NotImplementedError

    @staticmethod
    def _knows(options: Any) -> bool:
        """Whether `options`, read from a file, are those of such a folder."""
        raise NotImplementedError

    def _find_places(self) -> Places:
        try:
            return Places(self.folder.resolve(), self.CONTENTS)
        except (OSError, RuntimeError) as error:  # a loop of links
            raise RunError(f"cannot find {self.folder}: {error}; choose another --out") from None

    @property
    def go_on(self) -> str:
        """By which line the training in it goes on."""
        return f"convcvx {self.COMMAND} --resume --out {shlex.quote(str(self.out))}"

    @property
    def kept(self) -> str:
        """What an interrupt leaves of a training in it, in words, and what to do then."""
        if not self.begun:
            return "nothing was kept yet: give the command again"
        early = not self.finished and (self.folder / MODEL).exists()
        return (f"a network is in {self.folder / MODEL}; " if early else "") + f"to go on: {self.go_on}"

    @property
    def displaced(self) -> bool:
        """Whether an interrupted --overwrite has left parts of it elsewhere."""
        return bool(self._find_places().elsewhere)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Own the folder, with others kept out; a replacement that a kill left halfway is brought to its end first."""
        if self._places is not None:
            yield
            return
        given, self._places = self.folder, self._find_places()
        try:
            with self._places.held():
                self._recover()
                yield
        finally:
            self.folder, self._places = given, None

    def _recover(self) -> None:
        assert self._places is not None
        where = " and ".join(map(str, self._places.elsewhere))
        with explained(f"cannot put {where} in the place of {self.folder}", "mend that, and --resume does"):
            self._places.recover()

    def enter(self, *, resume: bool, overwrite: bool) -> bool:
        """Whether there is one to go on with as `resume` asks; raise `RunError` if there is not and none may begin.

        To be called while it is held. If an interrupted --overwrite has begun, that is what goes on. With both, as
        where torchrun starts lost processes anew, a finished one is what was to be replaced.
        """
        assert self._places is not None
        if resume and self.CONTENTS.begun(self._places.staged):
            self.folder = self._places.staged
        if resume and self.begun and not (overwrite and self.finished):
            return True
        self._may_begin(overwrite)
        return False

    @contextmanager
    def started(self, config: Any, origin: Origin | None = None, *, resume: bool) -> Iterator[None]:
        """Work in the folder, anew or as `resume` goes on; bad input that shows before the first checkpoint undoes it.

        To be called while it is held. `origin` is kept, to tell the data from others.
        """
        if not resume:
            self._begin()
        try:
            self._describe(config, origin)
            yield
        except InputError:
            if not resume and not any(any(self.folder.rglob(checkpoint)) for checkpoint in CHECKPOINTS):
                self.CONTENTS.clear(self.folder)
            raise

    def _begin(self) -> None:
        assert self._places is not None
        self._may_begin(self._overwrite)
        with explained(f"cannot begin in {self.folder}", "mend that, or choose another --out"):
            if not self.CONTENTS.free(self.folder) or self._places.elsewhere:
                self.folder = self._places.stage()
            self.folder.mkdir(parents=True, exist_ok=True)
            sync(self.folder.parent)

    def _describe(self, config: Any, origin: Origin | None) -> None:
        """Options, machine and data, as far as they are not known."""
        with explained(f"cannot clear {self.folder}"):
            self.CONTENTS.clear_leftovers(self.folder)
        begins = self.CONTENTS.free(self.folder, but=(self.CONTENTS.options, ENVIRONMENT))
        self.save_config(config)
        if not (self.folder / ENVIRONMENT).exists():
            self._write_json(ENVIRONMENT, environment())
        if begins and origin is not None:  # what runs of earlier versions were trained on is not known
            self._write_json(DATA, origin.to_dict())

    @property
    def place(self) -> str:
        """Where it lies, in words."""
        staged = self._places is not None and self.folder == self._places.staged
        return f"{self.folder}, to replace {self.out} when it has a result" if staged else str(self.folder)

    def settle(self) -> None:
        """Now that it has its result, let it take its place, and let go of the one that it replaces."""
        assert self._places is not None
        self._recover()
        if self.folder == self._places.staged:
            self.folder = self.out

    @property
    def origin(self) -> Origin | None:
        """Of the data that it was trained on; None for one of an earlier version."""
        file = self.folder / DATA
        return Origin.from_dict(self._read_json(DATA, {}), file) if file.exists() else None

    def located(self, config: TrainConfig) -> TrainConfig:
        """`config` with the data where they were found when it was trained, whatever the current folder is."""
        origin = self.origin
        return config if origin is None else origin.located(config)

    def check_data(self, origin: Origin) -> None:
        """Raise `DataError` unless these are the data that it was trained on, as far as it knows."""
        if (known := self.origin) is not None:
            known.check(origin, self.out)

    def save_config(self, config: Any) -> None:
        self._write_json(self.CONTENTS.options, config.to_dict())

    @property
    def begun(self) -> bool:
        return self.CONTENTS.begun(self.folder)

    @property
    def finished(self) -> bool:
        return os.path.isfile(self.folder / RESULT)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Self:
        """An existing one; raise `RunError` if `folder` is none."""
        run = cls(folder)
        if not run.begun:
            left = " and ".join(map(str, run._find_places().elsewhere))
            remedy = run._of_other_kind or "`convcvx runs` lists those that are there"
            if left:
                remedy = f"an interrupted --overwrite left {left}: --resume puts a run back in its place"
            raise RunError(f"{folder} is no {run.KIND} folder: it has no {run.CONTENTS.options}; {remedy}")
        return run

    def save_report(self, html: str) -> Path:
        self._write("report.html", html.encode(errors="backslashreplace"))  # a name may be no text
        return self.folder / "report.html"

    @property
    def metrics(self) -> dict[str, Any]:
        """What the command that made it printed as JSON."""
        if not self.finished:
            raise RunError(f"{self.folder} has no {RESULT} yet: finish it with {self.go_on}")
        return self._read_json(RESULT, self.METRICS)


def environment() -> dict[str, Any]:
    """Versions, machine and command, for whoever reads the run later."""
    import torch  # here: who only lists folders does not wait for it

    def version_of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "versions": {package: version_of(package) for package in PACKAGES},
    }


def _commit() -> str | None:
    """That of the source checkout which convcvx runs from; None for an installed one, or without git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=GIT_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
