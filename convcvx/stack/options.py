"""Everything that defines a stack: the options of its stages, which may differ from stage to stage, and its links."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from convcvx.errors import InputError, check_choice, check_count, shown
from convcvx.terms.numbers import read_number, read_whole
from convcvx.training import meanings
from convcvx.training.option import LARGEST_SIDE, MODEL, STAGES, as_kept, option, options_of, size_text
from convcvx.training.options import BUDGETS, OPTIONS, TrainConfig, check_unchanged
from convcvx.training.panels.search import MOST_FILTERS
from convcvx.training.presets import leaves_open
from convcvx.training.recipes import stack_recipe

if TYPE_CHECKING:
    from convcvx.data.datasets import Dataset

HEADS = ("last", "mean", "joint")
"""What a stack predicts by: the last stage, the mean over all, or one fit over the filters of all."""
MOST_STAGES = 100
"""Stages of a stack: beyond, even to read their options takes its time."""


VALIDATION = 0.1
"""Share of the training images that decides whether a stage is kept."""


def _yes(text: str) -> bool:
    """Read yes or no."""
    return {"yes": True, "true": True, "no": False, "false": False}[text.lower()]


READERS: dict[type, Callable[[str], Any]] = {str: str, int: read_whole, float: read_number, bool: _yes}
VARIED = {name: READERS[declared.kind] for name, declared in OPTIONS.items() if declared.option.per_stage is not None}
"""Options of `TrainConfig` that may differ from stage to stage, and how to read one value."""


@dataclass(frozen=True)
class StackShape:
    """How many stages a stack has, and what stands between and after them."""

    stages: int = option(
        2, STAGES, "Stages at most; they end when the validation score no longer rises.", low=1, high=MOST_STAGES
    )
    channels: str = option(
        "32",
        STAGES,
        "Principal channels of a stage's maps that the next one sees; a value a link, one fewer than stages.",
    )
    downsample: str = option("2", STAGES, "Window by which a stage's maps are averaged down; a value a link.")
    heads: str = option(
        "last",
        MODEL,
        "Whose scores count: last, the last stage's; mean, those of all stages, averaged; joint, one head over the "
        "features of all stages, fitted anew with each.",
        choices=HEADS,
    )


BY_STAGE = (*VARIED, "channels", "downsample")
"""Options of a stack that may have a value a stage, or a link."""
STAGE_OPTIONS = tuple(name for name in OPTIONS if name not in ("beta", *options_of(StackShape)))
"""Options of `TrainConfig` that a stack takes: a number for beta means something else on every stage's features, and
its `channels` are those of the features."""


def settings_of(given: dict[str, Any]) -> StackConfig:
    """The options of a stack: those of `StackShape`, and of `TrainConfig`, some of which may have a value a stage."""
    shape = options_of(StackShape)
    options = {"validation": VALIDATION} | {name: value for name, value in given.items() if name not in shape}
    own = {name: given[name] for name in shape if name in given and name != "stages"}
    return StackConfig.of(given.get("stages", StackShape.stages), options, **own)


def stack_left_open(given: dict[str, Any], preset: str | None) -> bool:
    """As `leaves_open` says of one layer; the usual number of stages, which options that fit are for, asks for none."""
    usual = given.get("stages") == StackShape.stages
    return leaves_open(given.keys() - {"stages"} if usual else given, preset)


def fitting_stack(given: dict[str, Any], train: Dataset) -> dict[str, Any]:
    """`given`, which leaves the network open, with the options of two stages that fit these images."""
    channels, height, width = train.images.shape[1:]
    loss = given.get("loss", TrainConfig.loss)
    options, *links = stack_recipe((channels, height, width), len(train), loss, bool(train.n_classes))
    return options | dict(zip(("channels", "downsample", "heads"), links, strict=True)) | given


def stage_text(values: list[Any]) -> str:
    """A list of values, one a stage, as the command line writes it."""
    return ",".join("none" if value is None else str(size_text(value)) for value in values)


def as_kept_by_stage(given: dict[str, Any]) -> dict[str, Any]:
    """What Python or TOML gave, as runs keep it: a list, where there may be a value a stage, is one of these."""
    lists = {name: stage_text(given[name]) for name in BY_STAGE if isinstance(given.get(name), list)}
    return as_kept(TrainConfig, {name: value for name, value in given.items() if name not in lists}) | lists


@dataclass(frozen=True)
class StackConfig:
    """The options of `convcvx stack`.

    Attributes
    ----------
    stages : tuple of TrainConfig
    channels : tuple of int
        Principal channels of each stage's maps that the next one sees; as many as filters, if those are fewer.
    downsample : tuple of int
        Windows by which each stage's maps are averaged down.
    heads : str
        "last" uses the head of the last stage; "mean" averages those of all stages; "joint" fits all anew, together,
        after every stage: a stage then has to make them better, not to be better alone.
    """

    stages: tuple[TrainConfig, ...]
    channels: tuple[int, ...]
    downsample: tuple[int, ...]
    heads: str = StackShape.heads

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(
        cls,
        n_stages: int,
        options: dict[str, Any],
        channels: str = StackShape.channels,
        downsample: str = StackShape.downsample,
        heads: str = StackShape.heads,
    ) -> StackConfig:
        """Read options of which those in `VARIED` may have a value a stage, by commas; "none" is no value."""
        return cls._read(n_stages, options, channels, downsample, heads)._checked()

    @classmethod
    def _read(cls, n_stages: int, options: dict[str, Any], channels: Any, downsample: Any, heads: str) -> StackConfig:
        check_count("stages", n_stages, maximum=MOST_STAGES)
        check_choice("heads", heads, HEADS)
        varied = {name: _spread(name, options[name], n_stages, VARIED[name]) for name in VARIED if name in options}
        stages = [
            TrainConfig.from_dict(options | {name: values[s] for name, values in varied.items()})
            for s in range(n_stages)
        ]
        if any(stage.dictionary is not None for stage in stages):  # a stage without one has no β to tune
            stages = [replace(stage, tune=stage.tune if stage.dictionary else 0.0) for stage in stages]
        links = max(1, n_stages - 1)

        def of_links(name: str, given: Any, most: int) -> tuple[int, ...]:
            return tuple(check_count(name, k, maximum=most) for k in _spread(name, given, links, read_whole))

        return cls(
            tuple(stages),
            of_links("channels", channels, MOST_FILTERS),
            of_links("downsample", downsample, LARGEST_SIDE),
            heads,
        )

    def _checked(self) -> StackConfig:
        """These options with what follows from them, if they go together."""
        stages = list(self.stages)
        for s in range(1, len(stages)):
            if stages[s].flips:
                before = stages[s - 1]
                if not (before.flips and before.dictionary is not None and before.max_rounds == 0):
                    raise InputError(
                        f"flips of stage {s + 1} need filters in mirror pairs in the stage before: give that flips, a "
                        "dictionary and max_rounds 0"
                    )
                if (width := self.channels[s - 1]) % 2:
                    raise InputError(f"flips of stage {s + 1} need an even number of channels; got {width}")
                stages[s] = replace(stages[s], paired=True)
        if self.heads == "joint" and len({stage.flips for stage in stages}) > 1:
            raise InputError(
                "joint heads need flips of all stages or of none; got flips "
                f"{', '.join('yes' if stage.flips else 'no' for stage in stages)}"
            )
        for stage in stages:
            stage.check()
        return replace(self, stages=tuple(stages))

    def continued(self, given: dict[str, Any]) -> StackConfig:
        """These options with what was `given` explicitly, as for `of`; only budgets may differ."""
        own = {"channels": 1, "downsample": 1, "heads": self.heads}
        options = {name: value for name, value in given.items() if name not in own and name != "stages"}
        n_stages = given.get("stages", len(self.stages))
        asked = StackConfig._read(n_stages, options, **{name: given.get(name, own[name]) for name in own})
        for name in own:
            if name in given:
                check_unchanged(name, getattr(self, name), getattr(asked, name))
        check_unchanged("stages", len(self.stages), len(asked.stages))
        for ours, theirs in zip(self.stages, asked.stages, strict=True):
            for name in options:
                check_unchanged(name, getattr(ours, name), getattr(theirs, name))
        budgets = [name for name in options if name in BUDGETS]
        stages = [
            replace(ours, **{name: getattr(theirs, name) for name in budgets})
            for ours, theirs in zip(self.stages, asked.stages, strict=True)
        ]
        return replace(self, stages=tuple(stages))._checked()

    def check_shapes(self, image_shape: tuple[int, int, int]) -> None:
        """Raise `InputError` if a stage does not fit the features that the one before will leave it."""
        _, *size = image_shape
        for number, stage in enumerate(self.stages, start=1):
            try:
                maps = stage.patch_spec().output_size(*size)
                meanings.pooling(stage.pool).output_size(*maps)
            except InputError as error:
                raise InputError(f"stage {number}, on {size[0]}x{size[1]} features: {error}") from None
            if number < len(self.stages):
                if self.stages[number].flips and maps[1] % self.downsample[number - 1]:
                    raise InputError(
                        f"flips of stage {number + 1} need a downsample that divides the width of the maps before, "
                        f"{maps[1]}; got {self.downsample[number - 1]}"
                    )
                size = [length // self.downsample[number - 1] for length in maps]


def _spread(name: str, given: Any, count: int, read: Callable[[str], Any]) -> list[Any]:
    """`count` values from one value, or from `count` of them separated by commas."""
    texts = [text.strip() for text in (given if isinstance(given, str) else shown(given)).split(",")]
    texts = texts * count if len(texts) == 1 else texts
    if len(texts) != count:
        raise InputError(f"{name} must be one value, or {count} by commas; got {shown(given)}")
    try:
        return [None if text.lower() == "none" and read in (read_whole, read_number) else read(text) for text in texts]
    except (KeyError, ValueError):
        kind = "yes or no" if read is _yes else "numbers" if read is read_number else "whole numbers"
        raise InputError(f"{name} must be {kind}, one value or {count} by commas; got {shown(given)}") from None
