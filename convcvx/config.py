"""Everything that defines a training run, as one flat record; presets are partial records."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from convcvx.budget import Budget
from convcvx.dictionary import check_dictionary
from convcvx.errors import InputError, check_count, check_positive
from convcvx.losses import get_loss
from convcvx.oracles.sampled import N_GATES
from convcvx.patches import PatchSpec

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


KINDS: dict[str, tuple[type, ...]] = {"str": (str,), "bool": (bool,), "int": (int,), "float": (int, float)}
NAMES = {"str": "a text", "bool": "true or false", "int": "a whole number", "float": "a number"}


@dataclass(frozen=True)
class TrainConfig:
    """The options of `convcvx train`; see `convcvx train --help` for each."""

    data: str = "digits"
    data_dir: str | None = None
    limit: int | None = None
    validation: float = 0.0
    kernel_size: str = "3"
    stride: str = "1"
    padding: str = "0"
    pool: str = "global"
    hidden_bias: bool = False
    intercept: bool = True
    rank: int | None = None
    whiten: bool = False
    whiten_epsilon: float = 0.1
    contrast: bool = False
    contrast_epsilon: float = 1.5e-4
    beta: float | None = None
    beta_ratio: float | None = None
    loss: str = "squared"
    solver: str = "auto"
    oracle: str = "auto"
    gates: int = N_GATES
    tol: float = 1e-4
    max_filters: int | None = None
    max_rounds: int = 100
    time_limit: float | None = None
    seed: int = 0
    device: str = "auto"
    dictionary: int | None = None
    dictionary_source: str = "patches"
    threshold: float = 0.0
    flips: bool = False
    shifts: int = 0
    tune: float = 0.0
    slide: float = 0.0
    crops: int = 0
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
                raise InputError(f"unknown option {key!r}; the options are {', '.join(sorted(known))}")
            kind = known[key].removesuffix(" | None")
            alike = isinstance(value, KINDS[kind]) and isinstance(value, bool) == (kind == "bool")
            if value is not None and not alike:  # runs of earlier versions have null for some that are off
                raise InputError(f"{key} must be {NAMES[kind]}; got {value!r}")
        return cls(**values)

    @property
    def budget(self) -> Budget:
        """Raises `InputError` for what no solver can keep."""
        return Budget(self.tol, self.max_filters, self.max_rounds, self.time_limit)

    def check(self) -> None:
        """Raise `InputError` for options that are out of range, or of no use without others."""
        budget = self.budget  # which checks itself, as the next two do
        self.patch_spec()
        get_loss(self.loss)
        check_count("gates", self.gates)
        if check_count("seed", self.seed, minimum=0) >= 2**32:
            raise InputError(f"seed must be below 2^32; got {self.seed}")
        if check_positive("tune", self.tune, zero=True) > 0.5:
            raise InputError(f"tune must be a share of the images up to 0.5; got {self.tune:g}")
        check_positive("slide", self.slide, zero=True)
        if check_count("crops", self.crops, minimum=0) and not self.slide:
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
    parts = str(text).lower().split("x")
    if len(parts) > 2 or not all(part.strip().isdigit() for part in parts):
        raise InputError(f"{name} must be a whole number such as 3, or rows x columns such as 3x5; got {text!r}")
    return int(parts[0]), int(parts[-1])
