"""Files written whole or not at all: a reader, or a crash, sees the old one or the new one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convcvx.errors import RunError
from convcvx.storage.reading import json_text, read_json, read_tensors, user_path

if TYPE_CHECKING:
    from torch import Tensor


class Files:
    """The files of a folder: bytes, JSON, and tensors that describe themselves. Errors are `RunError`s."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = user_path(folder)

    def _write(self, name: str, content: bytes) -> None:
        """Write beside the file and rename: a reader, or a crash, sees the old file or the new one."""
        temporary = self.folder / f".{name}.tmp"
        with explained(f"cannot write {self.folder / name}"):
            try:
                with temporary.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self.folder / name)
            except OSError:
                with suppress(OSError):
                    temporary.unlink()
                raise
            sync(self.folder)

    def _remove(self, *names: str) -> None:
        with explained(f"cannot remove files from {self.folder}"):
            for name in names:
                (self.folder / name).unlink(missing_ok=True)

    def _write_json(self, name: str, value: Any) -> None:
        self._write(name, (json_text(value, indent=2) + "\n").encode())

    def _read_json(self, name: str, form: Any) -> Any:
        return read_json(self.folder / name, form)

    def _write_tensors(self, name: str, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        from safetensors.torch import save  # torch: who only lists folders does not wait for it

        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        self._write(name, save(contiguous, {"convcvx": json.dumps(description)}))

    def _read_tensors(self, name: str, shapes: dict[str, str], form: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return read_tensors(self.folder / name, shapes, form)


@contextmanager
def explained(
    what: str, remedy: str = "mend that and go on with --resume, or give the command again"
) -> Iterator[None]:
    """Turn what the system refuses into a `RunError` that says what failed and what to do."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{what}: {error.strerror}; {remedy}") from None


def sync(folder: Path) -> None:
    """Have the names in `folder` on the disk itself, as far as the system can."""
    with suppress(OSError):  # Windows opens no folders, some file systems sync none
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
