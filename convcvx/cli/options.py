"""The options that commands share, each written once; `TrainConfig` has their defaults."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from convcvx.errors import InputError, one_line, shown
from convcvx.oracles import ORACLES
from convcvx.solvers import SOLVERS
from convcvx.solvers.dictionary.filters import SOURCES
from convcvx.storage.reading import is_a
from convcvx.training.options import DEFAULT_BETA_RATIO, PRESETS

DATA, MODEL, SOLVE, OUTPUT = "Data", "Model", "Solver", "Output"


def _option(panel: str, text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel)


Data = Annotated[
    str,
    _option(
        DATA,
        "digits, mnist, fashion-mnist, cifar10, cifar100, FILE.npz (Keras keys), or a FOLDER: of train/ and test/ with "
        "a folder a class, or of x_train.npy, y_train.npy, x_test.npy, y_test.npy, which stay on disk.",
    ),
]
DataDir = Annotated[str | None, _option(DATA, "Where data sets lie or are downloaded to.")]
Limit = Annotated[int | None, _option(DATA, "Use the first N training images only.")]
Validation = Annotated[float, _option(DATA, "Share of training images held out and scored.")]

KernelSize = Annotated[str, _option(MODEL, "3, or 3x5 (rows x columns).")]
Stride = Annotated[str, _option(MODEL, "As in Conv2d.")]
Padding = Annotated[str, _option(MODEL, "As in Conv2d, with zeros.")]
Pool = Annotated[
    str, _option(MODEL, "global; a grid: 4 or 4x2 (AdaptiveAvgPool2d); window:SIZE,STRIDE (AvgPool2d); none.")
]
HiddenBias = Annotated[bool, _option(MODEL, "A regularised bias in each filter.")]
Intercept = Annotated[bool, _option(MODEL, "An unpenalised bias in the output.")]
Rank = Annotated[int | None, _option(MODEL, "Restrict filters to the first R principal directions of the patches.")]
Whiten = Annotated[bool, _option(MODEL, "ZCA-whiten the patches.")]
WhitenEpsilon = Annotated[float, _option(MODEL, "Added to the eigenvalues of the patches' covariance.")]
Contrast = Annotated[bool, _option(MODEL, "Normalise each patch to mean 0, variance 1.")]
ContrastEpsilon = Annotated[float, _option(MODEL, "Added to the variance; by default 10 on the scale of 0..255.")]
Beta = Annotated[float | None, _option(MODEL, "Weight decay: torch's weight_decay under a mean-reduced loss.")]
BetaRatio = Annotated[
    float | None,
    _option(
        MODEL,
        "Weight decay as a share of beta_max, from which on no filter helps (none of a dictionary, if there is one). "
        f"[default: {DEFAULT_BETA_RATIO:g} without --beta]",
    ),
]
Loss = Annotated[str, _option(MODEL, "squared or cross-entropy.")]

Solver = Annotated[
    str,
    _option(
        SOLVE,
        f"auto, {', '.join(SOLVERS)}. sliding-fw reaches the optimum at any size; the others are the paper's own: "
        "frank-wolfe slow, copositive for small problems, gated for sampled patterns, closed-form for spike-free data.",
    ),
]
Oracle = Annotated[
    str,
    _option(
        SOLVE,
        f"auto, {', '.join(ORACLES)}. exact is a proof for patches of low rank or few; branch-and-bound a proof for "
        "rank 3 and up; sampled a proof for sampled activation patterns only; local scales and proves nothing.",
    ),
]
Gates = Annotated[
    int,
    _option(SOLVE, "Activation patterns to sample, for solver gated and oracle sampled, besides the network's own."),
]
Tol = Annotated[float, _option(SOLVE, "Relative gap (primal - dual) / primal to reach; else exit status 3.")]
MaxFilters = Annotated[int | None, _option(SOLVE, "Budget of filters; none by default.")]
MaxRounds = Annotated[int, _option(SOLVE, "Budget of rounds.")]
TimeLimit = Annotated[
    float | None, _option(SOLVE, "Seconds for the whole call, its certificate included; of a stack, for each stage.")
]
Dictionary = Annotated[
    int | None, _option(SOLVE, "Start from the optimum over N filters taken from the patches before any training.")
]
DictionarySource = Annotated[str, _option(SOLVE, f"Which filters: {', '.join(SOURCES)}.")]
Threshold = Annotated[float, _option(SOLVE, "What a patch must exceed to excite a filter of the dictionary.")]
Flips = Annotated[bool, _option(DATA, "With a dictionary: train on the mirror images as well.")]
Shifts = Annotated[int, _option(DATA, "Train on the images moved by N pixels left, right, up and down as well.")]
Tune = Annotated[
    float,
    _option(SOLVE, "With a dictionary: choose beta on this share of the training images, then train on all of them."),
]
Slide = Annotated[
    float,
    _option(SOLVE, "With a dictionary: epochs of descent on its filters, before their weights are optimal again."),
]
Crops = Annotated[
    int, _option(SOLVE, "While filters slide, move each image by up to N pixels at random whenever it is seen.")
]
Seed = Annotated[int, _option(SOLVE, "Equal seeds give equal results.")]
Device = Annotated[str, _option(SOLVE, "auto, cpu or cuda.")]

Out = Annotated[Path | None, _option(OUTPUT, "Run folder. [default: checkpoints/DATA-SEED]")]
Resume = Annotated[bool, _option(OUTPUT, "Go on from the last round of --out.", "--resume")]
Overwrite = Annotated[
    bool,
    _option(
        OUTPUT,
        "Replace the run in --out when the new one has its result; until then that is in .NAME.new beside it, where "
        "--resume goes on.",
        "--overwrite",
    ),
]
Preset = Annotated[str | None, _option(OUTPUT, f"Options that go together: {', '.join(PRESETS)}.")]
Config = Annotated[Path | None, _option(OUTPUT, "A TOML file of options (kernel_size = 5 ...); flags win.")]
Json = Annotated[bool, _option(OUTPUT, "Print one JSON object, alone, on standard output.", "--json")]

APART = ("out", "resume", "overwrite", "preset", "config", "json_output")
"""Options that say where a command reads and writes, not what it does."""


def out_folder(out: Path | None, resume: bool, overwrite: bool, name: Callable[[], str]) -> Path:
    """Where a command writes: `out`, or the folder called `name` among the checkpoints."""
    if resume and overwrite:
        raise InputError("give --resume or --overwrite, not both")
    if resume and out is None:
        raise InputError("--resume needs --out, the folder to go on with")
    return Path("checkpoints") / name() if out is None else out


def given_options(context: typer.Context, preset: str | None = None, file: Path | None = None) -> dict[str, Any]:
    """The options asked for: those of the preset, overridden by the config file, overridden by flags."""
    options: dict[str, Any] = {}
    if preset is not None:
        if preset not in PRESETS:
            raise InputError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}")
        options |= PRESETS[preset]
    if file is not None:
        options |= _read_config(file, [name for name in context.params if name not in APART])
    return options | flags(context)


def flags(context: typer.Context) -> dict[str, Any]:
    """The options of the training that stand on the command line itself."""
    sources = {name: context.get_parameter_source(name) for name in context.params if name not in APART}
    return {name: context.params[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def _read_config(file: Path, known: list[str]) -> dict[str, Any]:
    try:
        if not file.is_file():  # what is no file may never end
            raise FileNotFoundError("there is no such file")
        values = tomllib.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # no TOML, or no text
        raise InputError(f"cannot read --config {shown(str(file))}: {one_line(error)}") from None
    values = {name.replace("-", "_"): value for name, value in values.items()}
    for name in values:
        if name not in known:
            raise InputError(f"unknown option {shown(name)} in {file}; the options are {', '.join(sorted(known))}")
    texts = ("kernel_size", "stride", "padding", "pool")
    return {name: shown(value) if name in texts and is_a(value, int) else value for name, value in values.items()}
