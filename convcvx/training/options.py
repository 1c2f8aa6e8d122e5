"""Everything that defines a training run, as one flat record."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from convcvx.budget import Budget
from convcvx.errors import InputError
from convcvx.training import meanings
from convcvx.training.option import NO_FLAG, as_kept, check_names, check_options, option, options_of, parse_pair
from convcvx.training.panels.data import DataOptions
from convcvx.training.panels.model import EVERY, ModelOptions
from convcvx.training.panels.search import SearchOptions

if TYPE_CHECKING:
    from convcvx.data.form import ImageForm
    from convcvx.patches import PatchSpec

FAMILY_SOLVER = "column-generation"
"""The solver of filters of a family: in others they would slide out of it."""
FAMILY_ORACLE = "family"
"""The oracle that looks at these filters alone."""


@dataclass(frozen=True)
class TrainConfig(SearchOptions, ModelOptions, DataOptions):  # whose fields stand in the opposite order
    """The options of `convcvx train` and `convcvx.fit`; each says what it is."""

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
        """Raise `InputError` for options that are out of range, or of no use without others.

        What can be told without torch comes first: a bad option is then refused at once.
        """
        check_options(self)
        budget = self.budget  # which checks itself
        if self.beta is not None and self.beta_ratio is not None:
            raise InputError("give --beta or --beta-ratio, not both")
        if self.crops and not self.slide:
            raise InputError(f"crops {self.crops} move the images that filters slide on; pass --slide EPOCHS")
        self._check_family()
        if self.dictionary is None:
            self._check_without_dictionary()
        else:
            self._check_dictionary(self.dictionary, budget)
        meanings.pooling(self.pool)
        meanings.activation(self.activation)
        meanings.class_weight_text(self.class_weight)
        meanings.loss(self.loss)
        _ = self.image_form, self.patch_spec()  # which check themselves

    def _check_family(self) -> None:
        if self.subspaces > 1 and (self.dictionary is not None or self.filters != EVERY):
            given = f"--filters {self.filters}" if self.dictionary is None else f"--dictionary {self.dictionary}"
            raise InputError(
                f"filters of {given} lie in none of the subspaces, {self.subspaces}; leave --subspaces out"
            )
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
        if budget.room(0, n_filters) < n_filters:
            raise InputError(
                f"a dictionary of {n_filters} filters is more than max_filters {self.max_filters}; give fewer, or "
                "leave max_filters out"
            )
        from convcvx.solvers.dictionary.filters import check_dictionary  # torch: behind what needs none

        check_dictionary(
            n_filters,
            source=self.dictionary_source,
            threshold=self.threshold,
            flips=self.flips,
            hidden_bias=self.hidden_bias,
        )

    @property
    def image_form(self) -> ImageForm:
        """Raises `InputError` for what no image can be."""
        from convcvx.data.form import ImageForm  # here, as `PatchSpec` below: it needs torch

        return ImageForm(None if self.resize is None else parse_pair("resize", self.resize), self.channels)

    def patch_spec(self) -> PatchSpec:
        from convcvx.patches import PatchSpec

        return PatchSpec(
            parse_pair("kernel_size", self.kernel_size),
            parse_pair("stride", self.stride),
            parse_pair("padding", self.padding),
            self.hidden_bias,
            self.contrast_epsilon if self.contrast else None,
            self.whiten_epsilon if self.whiten else None,
            self.rank,
            self.paired,
            parse_pair("dilation", self.dilation),
            self.subspaces,
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
    same = OPTIONS[name].same(stored, asked) if name in OPTIONS else stored == asked
    if name not in BUDGETS and not same:
        raise InputError(
            f"{name} is {_given(stored)} in what is to be resumed but {_given(asked)} was asked for; it may change "
            f"only {', '.join(BUDGETS)}"
        )


def _given(value: Any) -> str:
    return "not given" if value is None else repr(value)
