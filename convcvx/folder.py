"""A folder that a command works in: each file written whole or not at all, nothing lost by bad input."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import save
from torch import Tensor

from convcvx.errors import InputError, RunError
from convcvx.reading import json_text, read_json, read_tensors

CHECKPOINTS = ("state.safetensors", "descent.safetensors")
"""Files from which --resume goes on."""
PACKAGES = ("convcvx", "torch", "numpy", "numba", "scipy", "scikit-learn")


class Folder:
    """A folder of files, each written whole or not at all; one with `OPTIONS` in it has begun.

    Parameters
    ----------
    folder : path
        Need not exist yet.
    """

    KIND, OPTIONS = "run", "config.json"
    METRICS: ClassVar[Any] = {}
    """Form of metrics.json, as `reading` has it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @classmethod
    def new(cls, folder: str | Path, *, overwrite: bool = False) -> Self:
        """What is to begin in `folder`; raise `RunError` where one exists, unless `overwrite`. Writes nothing."""
        run = cls(folder)
        if run.folder.exists() and (not run.folder.is_dir() or any(run.folder.iterdir())):
            if not run.begun:
                raise RunError(
                    f"{folder} is not empty and no {run.KIND} folder (it has no {run.OPTIONS}); choose another --out, "
                    "or remove it"
                )
            if not overwrite:
                raise RunError(
                    f"{folder} exists and is not empty; choose another --out, or pass --resume or --overwrite"
                )
        return run

    @contextmanager
    def started(self, config: Any, *, resume: bool) -> Iterator[None]:
        """Work in the folder, anew or as `resume` goes on; bad input that shows before the first checkpoint undoes it.

        A run that `new` was allowed to overwrite is kept aside until the new one has its result.
        """
        if resume:
            self.save_config(config)
            yield
            return
        self._begin(config)
        try:
            yield
        except InputError:
            self._undo()
            raise

    def _begin(self, config: Any) -> None:
        place = self.folder.resolve()
        try:
            if self.begun and self._replaced.exists():
                shutil.rmtree(place)  # it replaced another and got no result itself
            elif self.begun:
                place.rename(self._replaced)
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot create {self.folder}: {error.strerror}; choose another --out") from None
        self.save_config(config)
        self._write_json("environment.json", environment())

    def _undo(self) -> None:
        place = self.folder.resolve()
        if any(any(place.rglob(checkpoint)) for checkpoint in CHECKPOINTS):
            return
        shutil.rmtree(place)
        if self._replaced.exists():
            self._replaced.rename(place)

    @property
    def _replaced(self) -> Path:
        place = self.folder.resolve()
        return place.with_name(f".{place.name}.replaced")

    def _settle(self) -> None:
        """Let go of the run that this one replaces."""
        if self._replaced.exists():
            shutil.rmtree(self._replaced)

    def save_config(self, config: Any) -> None:
        self._write_json(self.OPTIONS, config.to_dict())

    @property
    def begun(self) -> bool:
        return (self.folder / self.OPTIONS).is_file()

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """An existing one; raise `RunError` if `folder` is none."""
        run = cls(folder)
        if not run.begun:
            raise RunError(f"{folder} is no {run.KIND} folder: it has no {run.OPTIONS}")
        return run

    def save_report(self, html: str) -> Path:
        self._write("report.html", html.encode(errors="backslashreplace"))  # a name may be no text
        return self.folder / "report.html"

    @property
    def metrics(self) -> dict[str, Any]:
        """What the command that made it printed as JSON."""
        if not (self.folder / "metrics.json").exists():
            raise RunError(f"{self.folder} has no metrics.json yet: finish it with --resume")
        return self._read_json("metrics.json", self.METRICS)

    def _write(self, name: str, content: bytes) -> None:
        """Write beside the file and rename: a reader, or a crash, sees the old file or the new one."""
        temporary = self.folder / f".{name}.tmp"
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / name)
        except OSError as error:
            raise RunError(f"cannot write {self.folder / name}: {error.strerror}") from None

    def _write_json(self, name: str, value: Any) -> None:
        self._write(name, (json_text(value, indent=2) + "\n").encode())

    def _read_json(self, name: str, form: Any) -> Any:
        return read_json(self.folder / name, form)

    def _write_tensors(self, name: str, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        self._write(name, save(contiguous, {"convcvx": json.dumps(description)}))

    def _read_tensors(self, name: str, shapes: dict[str, str], form: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return read_tensors(self.folder / name, shapes, form)


def environment() -> dict[str, Any]:
    """Versions and machine, for whoever reads the run later."""

    def version_of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "versions": {package: version_of(package) for package in PACKAGES},
    }
