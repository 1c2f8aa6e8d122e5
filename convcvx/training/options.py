"""Everything that defines a training run, as one flat record."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from convcvx.budget import Budget
from convcvx.data.form import ImageForm
from convcvx.data.weights import BALANCED, class_weight_text
from convcvx.errors import InputError, check_count, shown
from convcvx.losses.table import WORDS as LOSS_WORDS
from convcvx.losses.table import get_loss
from convcvx.oracles import FAMILIES, ORACLES
from convcvx.oracles.sampled import N_GATES
from convcvx.patches import PatchSpec
from convcvx.solvers import SOLVERS
from convcvx.solvers.dictionary.filters import SOURCES, check_dictionary
from convcvx.training.option import (
    DATA,
    MODEL,
    NO_FLAG,
    SOLVER,
    as_kept,
    check_names,
    check_options,
    option,
    options_of,
    pool_text,
    size_text,
)

DEFAULT_BETA_RATIO = 1e-3
"""Share of beta_max that a run without beta and beta_ratio trains at."""
LARGEST_SIDE = 4096
"""Pixels of a kernel, a stride, a padding or a move of an image: of an image whose patches fit in memory."""
EVERY = "all"
"""The word of `filters` for those of no family."""
MOST_FILTERS = 100_000
"""Filters and patterns that can be asked for at once: beyond, their weights alone fill a large machine's memory."""


FAMILY_SOLVER, FAMILY_ORACLE = "column-generation", "family"
"""How filters of a family are searched for: in others they would slide out of it."""
SIZE = "a whole number, or a pair of them, rows and columns"
"""What a kernel, a stride and a padding are."""


@dataclass(frozen=True)
class TrainConfig:
    """The options of `convcvx train` and `convcvx.fit`; each says what it is."""

    data: str = option(
        "digits",
        DATA,
        "digits, mnist, cifar10 or another set of torchvision, FILE.npz (Keras or MedMNIST keys), FILE.csv of paths "
        "and labels, FILE.parquet, or a FOLDER: of train/, test/ and perhaps val/ with a folder a class; of folders a "
        "class; or of x_train.npy, y_train.npy, x_test.npy, y_test.npy, which stay on disk. `convcvx data` lists them.",
        any_model=True,
        command_only=True,
    )
    data_dir: str | None = option(
        None,
        DATA,
        "Where data sets lie or are downloaded to.",
        may_change=True,
        any_model=True,
        command_only=True,
    )
    resize: str | None = option(
        None,
        DATA,
        "32, or 24x32 (rows x columns): what all images are resized to [default: as they are, all alike]",
        read=size_text,
        form=SIZE,
        any_model=True,
    )
    channels: int | None = option(
        None,
        DATA,
        "1 for grey images, 3 for colour [default: as they are, colour if one of them has it]",
        low=1,
        high=3,
        any_model=True,
    )
    limit: int | None = option(None, DATA, "Use the first N training images only.", low=1, any_model=True)
    validation: float = option(
        0.0,
        DATA,
        "Share of training images held out and scored, where the data have no validation set of their own.",
        low=0,
        high=1,
        any_model=True,
    )
    flips: bool = option(
        False,
        DATA,
        "With a dictionary: train on the mirror images as well.",
        per_stage="A later stage with flips needs mirror pairs of filters in the one before.",
    )
    shifts: int = option(
        0,
        DATA,
        "Train on the images moved by N pixels left, right, up and down as well.",
        low=0,
        high=LARGEST_SIDE,
        any_model=True,
    )

    kernel_size: str = option("3", MODEL, "3, or 3x5 (rows x columns).", per_stage="", read=size_text, form=SIZE)
    stride: str = option("1", MODEL, "As in Conv2d.", per_stage="", read=size_text, form=SIZE)
    padding: str = option("0", MODEL, "As in Conv2d, with zeros.", per_stage="", read=size_text, form=SIZE)
    pool: str = option(
        "global",
        MODEL,
        "global; a grid: 4 or 4x2 (AdaptiveAvgPool2d); window:SIZE,STRIDE (AvgPool2d); none. With max: in front, "
        "max:4, the maximum over each cell instead of the average (AdaptiveMaxPool2d, MaxPool2d).",
        per_stage="",
        read=pool_text,
        form="a grid such as 4 or (4, 2), or a text such as global, window:3,2, max:4 or none",
    )
    hidden_bias: bool = option(False, MODEL, "A regularised bias in each filter.")
    intercept: bool = option(True, MODEL, "An unpenalised bias in the output.", any_model=True)
    rank: int | None = option(
        None,
        MODEL,
        "Restrict filters to the first R principal directions of the patches.",
        low=1,
        per_stage="None for all directions.",
    )
    filters: str = option(
        EVERY,
        MODEL,
        f"{EVERY}, or those of a family only: ternary, with entries -1, 0, 1 in the basis that --rank and --whiten "
        "choose, of rank 9 at most. Certificates then speak of networks over the family, and are proofs.",
        choices=(EVERY, *FAMILIES),
        per_stage="",
    )
    whiten: bool = option(False, MODEL, "ZCA-whiten the patches.", per_stage="", strength="whiten_epsilon")
    whiten_epsilon: float = option(
        0.1, MODEL, "Added to the eigenvalues of the patches' covariance.", low=1e-12, high=1e12, per_stage=""
    )
    contrast: bool = option(
        False, MODEL, "Normalise each patch to mean 0, variance 1.", per_stage="", strength="contrast_epsilon"
    )
    contrast_epsilon: float = option(
        1.5e-4,
        MODEL,
        "Added to the variance; by default 10 on the scale of 0..255.",
        low=1e-12,
        high=1e12,
        per_stage="",
    )
    beta: float | None = option(
        None, MODEL, "Weight decay: torch's weight_decay under a mean-reduced loss.", low=1e-30, high=1e30
    )
    beta_ratio: float | None = option(
        None,
        MODEL,
        "Weight decay as a share of beta_max, from which on no filter helps (none of a dictionary, if there is one). "
        f"[default: {DEFAULT_BETA_RATIO:g} without --beta]",
        low=1e-12,
        high=1e12,
        per_stage="",
    )
    class_weight: str | None = option(
        None,
        MODEL,
        f"What classes count for: {BALANCED}, all alike, or a weight by class, such as 3=2,8=0.5 [default: as often as "
        "they come]",
        read=class_weight_text,
        form=f"{BALANCED}, or a weight by class, such as 3=2,8=0.5",
        any_model=True,
    )
    loss: str = option("squared", MODEL, f"{LOSS_WORDS}.", any_model=True)

    solver: str = option(
        "auto",
        SOLVER,
        f"auto, {', '.join(SOLVERS)}. sliding-fw reaches the optimum at any size; column-generation lets no "
        "filter slide, as --filters asks for; the others are the paper's own: frank-wolfe slow, copositive for small "
        "problems, gated for sampled patterns, closed-form for spike-free data.",
    )
    oracle: str = option(
        "auto",
        SOLVER,
        f"auto, {', '.join(ORACLES)}. exact is a proof for patches of low rank or few; branch-and-bound a proof for "
        "rank 3 and up; polynomial, remainder and cylinders proofs at any rank, good at large beta; family a proof for "
        "networks over --filters; sampled a proof for sampled patterns only; local scales and proves nothing.",
    )
    gates: int = option(
        N_GATES,
        SOLVER,
        "Activation patterns to sample, for solver gated and oracle sampled, besides the network's own.",
        low=1,
        high=MOST_FILTERS,
    )
    tol: float = option(
        Budget.tol,
        SOLVER,
        "Relative gap (primal - dual) / primal to reach; else exit status 3.",
        may_change=True,
    )
    max_filters: int | None = option(
        Budget.max_filters, SOLVER, "Budget of filters; none by default.", per_stage="", may_change=True
    )
    max_rounds: int = option(Budget.max_rounds, SOLVER, "Budget of rounds.", may_change=True)
    time_limit: float | None = option(
        Budget.time_limit,
        SOLVER,
        "Seconds for the whole call, its certificate included; of a stack, for each stage.",
        may_change=True,
        any_model=True,
    )
    seed: int = option(0, SOLVER, "Equal seeds give equal results.", low=0, high=2**32 - 1, any_model=True)
    device: str = option("auto", SOLVER, "auto, cpu or cuda.", may_change=True, any_model=True)
    dictionary: int | None = option(
        None,
        SOLVER,
        "Start from the optimum over N filters taken from the patches before any training.",
        low=1,
        high=MOST_FILTERS,
        per_stage="None for a stage without.",
    )
    dictionary_source: str = option("patches", SOLVER, f"Which filters: {', '.join(SOURCES)}.", choices=SOURCES)
    threshold: float = option(
        0.0, SOLVER, "What a patch must exceed to excite a filter of the dictionary.", low=0, high=1e6, per_stage=""
    )
    tune: float = option(
        0.0,
        SOLVER,
        "With a dictionary: choose beta on this share of the training images, then train on all of them.",
        low=0,
        high=0.5,
    )
    slide: float = option(
        0.0,
        SOLVER,
        "With a dictionary: epochs of descent on its filters, before their weights are optimal again.",
        low=0,
        high=1e6,
        per_stage="",
    )
    crops: int = option(
        0,
        SOLVER,
        "While filters slide, move each image by up to N pixels at random whenever it is seen.",
        low=0,
        high=LARGEST_SIDE,
        per_stage="Pixels of what the stage sees.",
    )

    paired: bool = option(
        False, NO_FLAG, "Set by a stack, for features whose channels come in mirror pairs; see `PatchSpec`."
    )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, values: dict[str, Any]) -> TrainConfig:
        """Of what Python or TOML says: whole numbers and pairs for sizes, a number for `whiten` and `contrast`."""
        return cls.from_dict(as_kept(cls, values))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Of what a run keeps.

        Raises
        ------
        InputError
            For a key that is no option, or a value that is not of its kind.
        """
        check_names(values, OPTIONS)
        for key, value in values.items():
            OPTIONS[key].check_kind(value)
        return cls(**{key: OPTIONS[key].default if value is None else value for key, value in values.items()})

    @property
    def chosen(self) -> dict[str, Any]:
        """What is not the default, but for what says nothing of the network."""
        return {
            name: getattr(self, name)
            for name, declared in OPTIONS.items()
            if getattr(self, name) != declared.default and not declared.option.any_model
        }

    @property
    def budget(self) -> Budget:
        """Raises `InputError` for what no solver can keep."""
        return Budget(self.tol, self.max_filters, self.max_rounds, self.time_limit)

    def check(self) -> None:
        """Raise `InputError` for options that are out of range, or of no use without others."""
        check_options(self)
        budget = self.budget  # which checks itself, as the next one does
        self.patch_spec()
        _ = self.image_form
        class_weight_text(self.class_weight)
        get_loss(self.loss)
        if self.beta is not None and self.beta_ratio is not None:
            raise InputError("give --beta or --beta-ratio, not both")
        if self.crops and not self.slide:
            raise InputError(f"crops {self.crops} move the images that filters slide on; pass --slide EPOCHS")
        self._check_family()
        if self.dictionary is None:
            self._check_without_dictionary()
        else:
            self._check_dictionary(self.dictionary, budget)

    def _check_family(self) -> None:
        if self.filters == EVERY:
            return
        if self.dictionary is not None:
            raise InputError(f"filters of a dictionary are none of {self.filters} ones; leave --dictionary out")
        for name, own in (("solver", FAMILY_SOLVER), ("oracle", FAMILY_ORACLE)):
            if (asked := getattr(self, name)) not in ("auto", own):
                raise InputError(f"--filters {self.filters} needs {name} {own}, or auto; got {asked}")

    @property
    def search(self) -> tuple[str, str]:
        """Solver and oracle that are asked for, "auto" perhaps: of a family there is one of each."""
        return (self.solver, self.oracle) if self.filters == EVERY else (FAMILY_SOLVER, FAMILY_ORACLE)

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

    @property
    def image_form(self) -> ImageForm:
        """Raises `InputError` for what no image can be."""
        return ImageForm(None if self.resize is None else parse_pair("resize", self.resize), self.channels)

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


OPTIONS = options_of(TrainConfig)
"""All of them, by name."""
BUDGETS = tuple(name for name, declared in OPTIONS.items() if declared.option.may_change)
"""What a resumed run may change."""


def is_config(values: Any) -> bool:
    """Whether `values`, read from a file, are the options of a run, of this version or an earlier one."""
    return isinstance(values, dict) and {"data", "kernel_size", "beta", "seed"} <= values.keys() <= OPTIONS.keys()


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
