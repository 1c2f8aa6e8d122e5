"""The options of `convcvx compare`: how the twin of a run is trained. They need no torch, as those of a run."""

from __future__ import annotations

from dataclasses import dataclass

from convcvx.terms.names import OPTIMIZERS, TWIN_BATCH
from convcvx.training.option import check_options, option, same_as
from convcvx.training.options import OPTIONS
from convcvx.training.panels.data import MOVED
from convcvx.training.panels.search import MOST_FILTERS

TWIN = "Options"
"""Panel of `convcvx compare --help`."""


@dataclass(frozen=True)
class CompareConfig:
    """The options of `convcvx compare`; each says what it is."""

    optimizer: str = option("adam", TWIN, f"{' or '.join(OPTIMIZERS)}; SGD has momentum 0.9.", choices=OPTIMIZERS)
    epochs: int = option(
        10, TWIN, "Epochs of every training; the learning rate falls as a cosine.", low=1, high=1_000_000
    )
    seeds: int = option(3, TWIN, "Trainings at the best learning rate.", low=1, high=1000)
    batch: int = option(TWIN_BATCH, TWIN, "Images a step.", low=1, high=1_000_000)
    filters: int | None = option(None, TWIN, "Width of the twin. [default: that of the run]", low=1, high=MOST_FILTERS)
    finetune: bool = option(False, TWIN, "Also start the optimiser from the convex solution.")
    device: str = same_as(OPTIONS["device"])
    data_dir: str | None = option(None, TWIN, MOVED, command_only=True)

    def check(self) -> None:
        """Raises `InputError` for a value out of range."""
        check_options(self)
