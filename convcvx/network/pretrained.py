"""Networks in folders that others can take: the weights, which describe themselves, beside a model card.

The layout is Hugging Face's, so that such a folder can be a repository there; a folder needs nothing of it.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from convcvx.errors import InputError, RunError, one_line, shown
from convcvx.storage.files import Files
from convcvx.storage.places import MODEL
from convcvx.storage.reading import user_path

CARD = "README.md"
"""Its model card."""


class Pretrained(Files):
    """A folder of weights with a card."""

    def write(self, weights: bytes, card: str) -> None:
        """Both files, each whole or as it was.

        Raises
        ------
        RunError
            Where the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot write {self.folder}: {error.strerror or error}; name another folder") from None
        self._write(MODEL, weights)
        self._write(CARD, card.encode())


def save_pretrained(folder: str | os.PathLike[str], weights: bytes, card: str, push_to: str | None = None) -> Path:
    """Write a folder for `from_pretrained`, and upload it to the repository `push_to` of Hugging Face, if given.

    Raises
    ------
    InputError
        If `push_to` is given without the package huggingface_hub.
    RunError
        Where the folder cannot be written, or nothing uploaded.
    """
    hub = None if push_to is None else _hub(push_to)
    written = Pretrained(folder)
    written.write(weights, card)
    path = written.folder
    if hub is not None:
        try:
            hub.create_repo(push_to, exist_ok=True)
            hub.upload_folder(repo_id=push_to, folder_path=str(path), allow_patterns=[MODEL, CARD])
        except Exception as error:  # of the network, of that package
            raise RunError(f"{path} is written, but not uploaded to {push_to}: {one_line(error)}") from None
    return path


def find_pretrained(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The weights of a folder, a file or, where no such path exists, a repository OWNER/NAME of Hugging Face.

    Raises
    ------
    InputError
        For a repository without the package huggingface_hub.
    RunError
        For what is neither, or cannot be downloaded.
    """
    path = user_path(name)
    if path.exists():
        return path / MODEL if path.is_dir() else path
    if os.fspath(name).count("/") != 1:
        raise RunError(f"{shown(os.fspath(name))} is no folder, and no repository OWNER/NAME: name one of them")
    hub = _hub(os.fspath(name))
    try:
        return Path(hub.hf_hub_download(os.fspath(name), MODEL, revision=revision))
    except Exception as error:  # of the network, of that package
        raise RunError(f"cannot download {name}: {one_line(error)}; name a folder") from None


def _hub(repository: str) -> Any:
    """The package that speaks to Hugging Face."""
    try:
        return import_module("huggingface_hub")
    except ImportError:
        raise InputError(f"repository {shown(repository)} needs huggingface_hub: pip install 'convcvx[hub]'") from None
