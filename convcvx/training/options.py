"""Everything that defines a training run, as one flat record; presets are partial records."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from convcvx.budget import Budget
from convcvx.errors import InputError, check_choice, check_count, check_positive, shown
from convcvx.losses.table import get_loss
from convcvx.oracles.sampled import N_GATES
from convcvx.patches import PatchSpec
from convcvx.solvers.dictionary.filters import SOURCES, check_dictionary
from convcvx.storage.reading import NAMES, is_a

BUDGETS = ("tol", "max_filters", "max_rounds", "time_limit", "device", "data_dir")
"""What a resumed run may change: where it stops and where things are, not what it trains."""

DEFAULT_BETA_RATIO = 1e-3
"""Share of beta_max that a run without beta and beta_ratio trains at."""

ACCURACY: dict[str, Any] = {
    "contrast": True,
    "whiten": True,
    "hidden_bias": True,
    "dictionary_source": "kmeans",
    "threshold": 0.25,
    "tune": 0.1,
    "max_rounds": 0,
    "tol": 1.0,  # any gap: what these presets are after is accuracy, and β is chosen for it
}
"""What the presets for whole data sets share."""

CIFAR10: dict[str, Any] = {
    "data": "cifar10",
    **ACCURACY,
    "kernel_size": "5",
    "pool": "3",
    "contrast_epsilon": 1e-2,
    "flips": True,
}

PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "data": "digits",
        "kernel_size": "3",
        "padding": "1",
        "pool": "4",
        "beta_ratio": 0.01,
        "tol": 3e-2,
    },
    "mnist": {
        "data": "mnist",
        **ACCURACY,
        "contrast": False,
        "threshold": 0.0,
        "whiten_epsilon": 0.3,
        "kernel_size": "14",
        "padding": "5",
        "pool": "4",
        "dictionary": 1000,
    },
    "cifar10-fast": {**CIFAR10, "dictionary": 1200},
    "cifar10": {**CIFAR10, "dictionary": 6000},
}
"""`--preset NAME`: a flag or a config file given beside it wins."""


KINDS: dict[str, type] = {"str": str, "bool": bool, "int": int, "float": float}
LARGEST_SIDE = 4096
"""Pixels of a kernel, a stride, a padding or a move of an image: of an image whose patches fit in memory."""
MOST_FILTERS = 100_000
"""Filters and patterns that can be asked for at once: beyond, their weights alone fill a large machine's memory."""


def ranged(default: Any, low: float, high: float = math.inf) -> Any:
    """A numeric option with the least and the largest value that it may have."""
    return field(default=default, metadata={"range": (low, high)})


def check_ranges(options: Any) -> None:
    """Raise `InputError` for an option of a dataclass out of its bounds."""
    for option in fields(options):
        value = getattr(options, option.name)
        if value is None or "range" not in option.metadata:
            continue
        low, high = option.metadata["range"]
        if str(option.type).startswith("int"):
            check_count(option.name, value, minimum=low, maximum=high)
        else:
            check_positive(option.name, value, zero=low == 0, maximum=high)
            if value < low:
                raise InputError(f"{option.name} must be at least {low:g}; got {shown(value)}")


@dataclass(frozen=True)
class TrainConfig:
    """The options of `convcvx train`; see `convcvx train --help` for each."""

    data: str = "digits"
    data_dir: str | None = None
    limit: int | None = ranged(None, 1)
    validation: float = ranged(0.0, 0, 1)
    kernel_size: str = "3"
    stride: str = "1"
    padding: str = "0"
    pool: str = "global"
    hidden_bias: bool = False
    intercept: bool = True
    rank: int | None = ranged(None, 1)
    whiten: bool = False
    whiten_epsilon: float = ranged(0.1, 1e-12, 1e12)
    contrast: bool = False
    contrast_epsilon: float = ranged(1.5e-4, 1e-12, 1e12)
    beta: float | None = ranged(None, 1e-30, 1e30)
    beta_ratio: float | None = ranged(None, 1e-12, 1e12)
    loss: str = "squared"
    solver: str = "auto"
    oracle: str = "auto"
    gates: int = ranged(N_GATES, 1, MOST_FILTERS)
    tol: float = 1e-4
    max_filters: int | None = None
    max_rounds: int = 100
    time_limit: float | None = None
    seed: int = ranged(0, 0, 2**32 - 1)
    device: str = "auto"
    dictionary: int | None = ranged(None, 1, MOST_FILTERS)
    dictionary_source: str = "patches"
    threshold: float = ranged(0.0, 0, 1e6)
    flips: bool = False
    shifts: int = ranged(0, 0, LARGEST_SIDE)
    tune: float = ranged(0.0, 0, 0.5)
    slide: float = ranged(0.0, 0, 1e6)
    crops: int = ranged(0, 0, LARGEST_SIDE)
    paired: bool = False
    """Set by `convcvx stack`, for features whose channels come in mirror pairs; see `PatchSpec`."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Raises `InputError` for a key that is no option, or a value that is not of its kind."""
        known = {f.name: str(f.type) for f in fields(cls)}
        for key, value in values.items():
            if key not in known:
                raise InputError(f"unknown option {shown(key)}; the options are {', '.join(sorted(known))}")
            kind = KINDS[known[key].removesuffix(" | None")]
            # Runs of earlier versions have null for some that are off.
            absent = value is None and not getattr(cls, key)
            if not (absent or is_a(value, kind)):
                raise InputError(f"{key} must be {NAMES[kind]}; got {shown(value)}")
        return cls(**{key: getattr(cls, key) if value is None else value for key, value in values.items()})

    @property
    def budget(self) -> Budget:
        """Raises `InputError` for what no solver can keep."""
        return Budget(self.tol, self.max_filters, self.max_rounds, self.time_limit)

    def check(self) -> None:
        """Raise `InputError` for options that are out of range, or of no use without others."""
        check_ranges(self)
        budget = self.budget  # which checks itself, as the next two do
        self.patch_spec()
        get_loss(self.loss)
        check_choice("dictionary_source", self.dictionary_source, SOURCES)
        if self.beta is not None and self.beta_ratio is not None:
            raise InputError("give --beta or --beta-ratio, not both")
        if self.crops and not self.slide:
            raise InputError(f"crops {self.crops} move the images that filters slide on; pass --slide EPOCHS")
        if self.dictionary is None:
            self._check_without_dictionary()
        else:
            self._check_dictionary(self.dictionary, budget)

    def _check_without_dictionary(self) -> None:
        for name, use in (
            ("slide", "needs the filters of a dictionary to set out from"),
            ("tune", "chooses the weight decay of a dictionary"),
            ("threshold", "is one of the filters of a dictionary"),
            ("flips", "train a dictionary on the mirror images as well"),
        ):
            if value := getattr(self, name):
                given = name if value is True else f"{name} {value:g}"
                raise InputError(f"{given} {use}; pass --dictionary N")

    def _check_dictionary(self, n_filters: int, budget: Budget) -> None:
        check_dictionary(
            n_filters,
            source=self.dictionary_source,
            threshold=self.threshold,
            flips=self.flips,
            hidden_bias=self.hidden_bias,
        )
        if self.loss != "squared":
            raise InputError(f"a dictionary needs the squared loss; got loss {self.loss!r}")
        if budget.room(0, n_filters) < n_filters:
            raise InputError(
                f"a dictionary of {n_filters} filters is more than max_filters {self.max_filters}; give fewer, or "
                "leave max_filters out"
            )

    def patch_spec(self) -> PatchSpec:
        return PatchSpec(
            parse_pair("kernel_size", self.kernel_size),
            parse_pair("stride", self.stride),
            parse_pair("padding", self.padding),
            self.hidden_bias,
            self.contrast_epsilon if self.contrast else None,
            self.whiten_epsilon if self.whiten else None,
            self.rank,
            self.paired,
        )


def is_config(values: Any) -> bool:
    """Whether `values`, read from a file, are the options of a run, of this version or an earlier one."""
    known = {f.name for f in fields(TrainConfig)}
    return isinstance(values, dict) and {"data", "kernel_size", "beta", "seed"} <= values.keys() <= known


def check_unchanged(name: str, stored: Any, asked: Any) -> None:
    """Raise `InputError` for an option that is not what it was, unless it may change on the way."""
    if name not in BUDGETS and stored != asked:
        raise InputError(
            f"{name} is {stored!r} in what is to be resumed but {asked!r} was asked for; it may change only "
            f"{', '.join(BUDGETS)}"
        )


def parse_pair(name: str, text: str) -> tuple[int, int]:
    """Read "3" or "3x5" as (rows, columns)."""
    found = re.fullmatch(r"\s*(\d{1,9})\s*(?:x\s*(\d{1,9})\s*)?", text.lower(), re.ASCII)
    if found is None:
        raise InputError(f"{name} must be a whole number such as 3, or rows x columns such as 3x5; got {shown(text)}")
    rows, columns = int(found[1]), int(found[2] or found[1])
    check_count(name, max(rows, columns), minimum=0, maximum=LARGEST_SIDE)
    return rows, columns
