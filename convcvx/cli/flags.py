"""Flags, made from the records that declare options, and the few that only a command line has."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from functools import partial
from hashlib import blake2b
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.markup import escape

from convcvx.errors import InputError, one_line, shown
from convcvx.storage.reading import NAMES, check_file, user_path
from convcvx.terms.numbers import read_number, read_whole
from convcvx.training.option import NO_FLAG, STAGES, Declared, as_kept, check_options, options_of
from convcvx.training.options import TrainConfig
from convcvx.training.presets import PRESETS, preset_options

OUTPUT = "Output"


Out = Annotated[
    Path | None,
    typer.Option(
        help=escape(
            "Folder of the run. [default: checkpoints/DATA-seedSEED, such as mnist-seed0 for --data mnist --seed 0; "
            "of a stack checkpoints/DATA-stack]"
        ),
        rich_help_panel=OUTPUT,
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last round of --out.", rich_help_panel=OUTPUT)]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace the run in --out when the new one has its result; until then the new one lies in .RUN.new "
        "beside it, where --resume goes on.",
        rich_help_panel=OUTPUT,
    ),
]
Preset = Annotated[
    str | None, typer.Option(help=f"Options that go together: {', '.join(PRESETS)}.", rich_help_panel=OUTPUT)
]
Config = Annotated[
    Path | None, typer.Option(help="A TOML file of options (kernel_size = 5 ...); flags win.", rich_help_panel=OUTPUT)
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, alone, on standard output.", rich_help_panel=OUTPUT)
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="Print nothing but errors, why the exit status is 3, and what --json prints.",
        rich_help_panel=OUTPUT,
    ),
]

LONGEST_STEM = 56
"""Characters of the name of a data set in that of a folder: of up to four bytes each, beside a seed."""
DIGEST_BYTES = 4
"""Of the digest, in hexadecimal digits, by which names that are cut differ: few of them lie in one folder."""


@dataclass(frozen=True)
class Asked:
    """What commands that train are asked besides what to do: where to read and write, and how much to say."""

    out: Out = None
    resume: Resume = False
    overwrite: Overwrite = False
    preset: Preset = None
    config: Config = None
    json_output: Json = False
    quiet: Quiet = False

    @classmethod
    def of(cls, options: dict[str, Any]) -> Asked:
        """Those among the values of all flags of a command."""
        return cls(**{name: options[name] for name in APART})

    def check(self) -> None:
        """Raise `InputError` for what does not say where to write."""
        if self.resume and self.overwrite:
            raise InputError("give --resume or --overwrite, not both")
        if self.resume and self.out is None:
            raise InputError("--resume needs --out, the folder to go on with")

    def folder(self, name: Callable[[], str]) -> Path:
        """Where to write: `out`, or the folder called `name` among the checkpoints."""
        self.check()
        return Path("checkpoints") / name() if self.out is None else self.out


def data_name(config: Any) -> str:
    """What the folder of a training is called by its data.

    A name that file systems would not take is cut, with a digest of all of it at its end: two data sets whose names
    begin alike are not to meet in one folder.
    """
    name = Path(config.data).stem
    if len(name) <= LONGEST_STEM:
        return name
    digest = blake2b(os.fsencode(name), digest_size=DIGEST_BYTES).hexdigest()
    return f"{name[: LONGEST_STEM - len(digest) - 1]}-{digest}"


APART = tuple(field.name for field in fields(Asked))
"""Options that say where a command reads and writes, not what it does."""
ASKED = [
    Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=hint)
    for field, hint in zip(fields(Asked), get_type_hints(Asked, include_extras=True).values(), strict=True)
]
"""The same as flags, for `takes`."""


def flags_of(
    record: Any, only: Collection[str] | None = None, *, by_stage: bool = False, **defaults: Any
) -> list[Parameter]:
    """A flag for each option of `record`, or of those in `only`; `defaults` are those of this command.

    With `by_stage` what may differ from stage to stage takes one value a stage.
    """
    declared = [o for o in options_of(record).values() if o.option.panel != NO_FLAG]
    chosen = [o for o in declared if only is None or o.name in only]
    varied = [o for o in chosen if by_stage and o.option.per_stage is not None]
    return [_stage_flag(o) for o in varied] + [
        _flag(o, defaults.get(o.name, o.default)) for o in chosen if o not in varied
    ]


def _reader(read: Callable[[str], float], kind: type) -> Callable[[Any], float]:
    """`read` as typer wants it, which asks it for defaults too, and says on its own to which flag an error belongs."""

    def given(value: Any) -> Any:
        try:
            return read(value) if isinstance(value, str) else value
        except ValueError:
            raise typer.BadParameter(f"must be {NAMES[kind]}; got {shown(value)}") from None

    return given


_NUMBERS: dict[type, dict[str, Any]] = {
    int: {"parser": _reader(read_whole, int), "metavar": "INTEGER"},
    float: {"parser": _reader(read_number, float), "metavar": "FLOAT"},
}
"""How flags that are numbers are read, and what stands behind them in --help."""


def _flag(declared: Declared, default: Any) -> Parameter:
    kind: Any = declared.kind | None if declared.optional else declared.kind
    about = typer.Option(
        help=escape(declared.option.help), rich_help_panel=declared.option.panel, **_NUMBERS.get(declared.kind, {})
    )
    return Parameter(declared.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, about])


def _stage_flag(declared: Declared) -> Parameter:
    note = declared.option.per_stage
    text = "yes or no; as in train." if declared.kind is bool else "As in train."
    about = typer.Option(help=f"{text} {note}".strip(), rich_help_panel=STAGES)
    kind: Any = str | None if declared.optional else str
    default = None if declared.default is None else str(declared.default)
    if declared.kind is bool:
        default = "yes" if declared.default else "no"
    return Parameter(declared.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, about])


def takes(*flags: Parameter) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command these flags in the place of its `**options`, before those that it has by keyword only."""

    def given_to(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        own = [p.replace(annotation=hints[p.name]) for p in signature(command).parameters.values()]
        first = [p for p in own if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
        last = [p for p in own if p.kind is Parameter.KEYWORD_ONLY]
        all_flags = [*first, *flags, *last]
        command.__signature__ = Signature(all_flags)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in all_flags}
        return command

    return given_to


def check_early(given: dict[str, Any], resume: bool) -> None:
    """Raise `InputError` for options of a training that are bad by themselves; those that a resumed one leaves out may
    be what the others need.
    """
    config = TrainConfig.from_dict(given)
    if resume:
        check_options(config)
    else:
        config.check()


def given_options(
    context: typer.Context,
    asked: Asked,
    read: Callable[[dict[str, Any]], dict[str, Any]] = partial(as_kept, TrainConfig),
) -> dict[str, Any]:
    """The options asked for: those of the preset, overridden by the config file, overridden by flags.

    `read` makes of values of TOML what runs keep.
    """
    options = {} if asked.preset is None else dict(preset_options(asked.preset))
    if asked.config is not None:
        options |= read(_read_config(asked.config, [name for name in context.params if name not in APART]))
    return options | flags(context)


def flags(context: typer.Context) -> dict[str, Any]:
    """The options of the training that stand on the command line itself."""
    sources = {name: context.get_parameter_source(name) for name in context.params if name not in APART}
    return {name: context.params[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def _read_config(file: Path, known: list[str]) -> dict[str, Any]:
    try:
        check_file(file := user_path(file))
        values = tomllib.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # no TOML, or no text
        raise InputError(
            f"cannot read --config {shown(str(file))}: {one_line(error)}; it takes lines of TOML such as rank = 4"
        ) from None
    values = {name.replace("-", "_"): value for name, value in values.items()}
    for name in values:
        if name not in known:
            raise InputError(f"unknown option {shown(name)} in {file}; the options are {', '.join(sorted(known))}")
    return values
