"""Where the data of a run came from, and by what to know them again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convcvx.data.sources import is_path
from convcvx.errors import DataError, RunError
from convcvx.training.options import TrainConfig

if TYPE_CHECKING:
    from convcvx.data.datasets import Dataset

PARTS = ("train", "test", "validation")
"""The sets of a run, in their order."""
STREAMED_IMAGES = 512
"""Of images that stay on disk so many are looked at, evenly spread, the first and the last among them: to read them all
takes as long as a pass of the training."""


@dataclass(frozen=True)
class Origin:
    """What a run keeps of its data.

    Parameters
    ----------
    options, paths : dict
        `data` and `data_dir` as they were given, and the absolute paths of those that are one.
    sets : dict
        By the name of the set its shape, and a hash of its images, targets and classes; of `STREAMED_IMAGES` images
        for data that stay on disk.
    """

    options: dict[str, str | None]
    paths: dict[str, str]
    sets: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, config: TrainConfig, data: Sequence[Dataset | None]) -> Origin:
        """Of the sets `data`, which `config` names: training, test and, if there is one, validation set."""
        options = {"data": config.data, "data_dir": config.data_dir}
        return cls(
            options,
            {
                name: str(Path(given).expanduser().resolve())
                for name, given in options.items()
                if given is not None and (name != "data" or is_path(given))
            },
            {name: _fingerprint(part) for name, part in zip(PARTS, data, strict=True) if part is not None},
        )

    @classmethod
    def from_dict(cls, values: Any, file: Path) -> Origin:
        """Of what `to_dict` gave, read from `file`."""
        known = _is_record(values) and values.keys() == {field.name for field in fields(cls)}
        parts = list(values.values()) if known else [None]
        if not all(map(_is_record, parts)) or not all(map(_is_record, values["sets"].values())):
            raise RunError(f"{file} does not say what the run was trained on: remove it to go on without that check")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def located(self, config: TrainConfig) -> TrainConfig:
        """`config` with what it says of the data as absolute paths, as far as it says what was said then."""
        found: dict[str, Any] = {
            name: path
            for name, path in self.paths.items()
            if getattr(config, name) == self.options.get(name) and os.path.exists(path)
        }
        return replace(config, **found)

    @property
    def name(self) -> str | None:
        """Of the data, or where they lie."""
        return self.paths.get("data", self.options.get("data"))

    def check(self, now: Origin, run: Path | str) -> None:
        """Raise `DataError` unless the data that `now` describes are those that `run` was trained on."""
        for name, known in self.sets.items():
            if now.sets.get(name) != known:
                raise DataError(
                    f"{now.name} is not what {run} was trained on: its {name} set is {_said(now.sets.get(name))}, but "
                    f"was {_said(known)} in {self.name}; bring that back: `convcvx certify` alone takes other data, by "
                    "--data"
                )


def _is_record(value: Any) -> bool:
    return isinstance(value, dict)


def _fingerprint(dataset: Dataset) -> dict[str, Any]:
    from convcvx.data.fingerprint import fingerprint, spread  # torch: who only lists folders does not wait for it
    from convcvx.data.images import StreamedImages

    images = dataset.images
    looked_at = images[spread(len(images), STREAMED_IMAGES)] if isinstance(images, StreamedImages) else images
    weights = [] if dataset.weights is None else [dataset.weights]
    found = fingerprint([looked_at, dataset.targets, *weights], "\n".join(dataset.classes))
    return {"shape": list(images.shape), "streamed": looked_at is not images, "blake2b": found}


def _said(known: dict[str, Any] | None) -> str:
    if known is None:
        return "missing"
    return f"{'x'.join(map(str, known.get('shape', [])))}, blake2b {known.get('blake2b')}"
