"""`convcvx stack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from convcvx.cli import options as o
from convcvx.cli.output import cost, finish, guard, open_console
from convcvx.errors import InputError
from convcvx.responses.team import Team
from convcvx.stack.jobs import StackRun, stack_job
from convcvx.stack.options import StackConfig
from convcvx.training.options import TrainConfig
from convcvx.training.progress import Progress

STAGES = "Stages (one value, or one a stage by commas)"
VALIDATION = 0.1


def _varied(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=STAGES)


Stages = Annotated[int, _varied("Stages at most; they end when the validation score no longer rises.")]
KernelSize = Annotated[str, _varied("As in train.")]
Stride = Annotated[str, _varied("As in train.")]
Padding = Annotated[str, _varied("As in train.")]
Pool = Annotated[str, _varied("As in train.")]
Rank = Annotated[str | None, _varied("As in train; none for all directions.")]
Whiten = Annotated[str, _varied("yes or no; as in train.")]
WhitenEpsilon = Annotated[str, _varied("As in train.")]
Contrast = Annotated[str, _varied("yes or no; as in train.")]
ContrastEpsilon = Annotated[str, _varied("As in train.")]
BetaRatio = Annotated[str | None, _varied("As in train.")]
MaxFilters = Annotated[str | None, _varied("As in train.")]
Dictionary = Annotated[str | None, _varied("As in train; none for a stage without.")]
Threshold = Annotated[str, _varied("As in train.")]
Slide = Annotated[str, _varied("As in train.")]
Crops = Annotated[str, _varied("As in train; pixels of what the stage sees.")]
Flips = Annotated[
    str, _varied("yes or no; as in train. A later stage with flips needs mirror pairs of filters in the one before.")
]
Channels = Annotated[
    str, _varied("Principal channels of a stage's maps that the next one sees; a value a link, one fewer than stages.")
]
Downsample = Annotated[str, _varied("Window by which a stage's maps are averaged down; a value a link.")]
Heads = Annotated[
    str,
    typer.Option(
        help="Whose scores count: last, the last stage's; mean, those of all stages, averaged; joint, one head over "
        "the features of all stages, fitted anew with each.",
        rich_help_panel=o.MODEL,
    ),
]


def stack(
    context: typer.Context,
    stages: Stages = 2,
    kernel_size: KernelSize = TrainConfig.kernel_size,
    stride: Stride = TrainConfig.stride,
    padding: Padding = TrainConfig.padding,
    pool: Pool = TrainConfig.pool,
    rank: Rank = None,
    whiten: Whiten = "no",
    whiten_epsilon: WhitenEpsilon = str(TrainConfig.whiten_epsilon),
    contrast: Contrast = "no",
    contrast_epsilon: ContrastEpsilon = str(TrainConfig.contrast_epsilon),
    beta_ratio: BetaRatio = None,
    max_filters: MaxFilters = None,
    dictionary: Dictionary = None,
    threshold: Threshold = str(TrainConfig.threshold),
    slide: Slide = str(TrainConfig.slide),
    crops: Crops = str(TrainConfig.crops),
    flips: Flips = "no",
    channels: Channels = "32",
    downsample: Downsample = "2",
    heads: Heads = StackConfig.heads,
    data: o.Data = TrainConfig.data,
    data_dir: o.DataDir = TrainConfig.data_dir,
    limit: o.Limit = TrainConfig.limit,
    validation: o.Validation = VALIDATION,
    hidden_bias: o.HiddenBias = TrainConfig.hidden_bias,
    intercept: o.Intercept = TrainConfig.intercept,
    loss: o.Loss = TrainConfig.loss,
    dictionary_source: o.DictionarySource = TrainConfig.dictionary_source,
    shifts: o.Shifts = TrainConfig.shifts,
    tune: o.Tune = TrainConfig.tune,
    solver: o.Solver = TrainConfig.solver,
    oracle: o.Oracle = TrainConfig.oracle,
    gates: o.Gates = TrainConfig.gates,
    tol: o.Tol = TrainConfig.tol,
    max_rounds: o.MaxRounds = TrainConfig.max_rounds,
    time_limit: o.TimeLimit = TrainConfig.time_limit,
    seed: o.Seed = TrainConfig.seed,
    device: o.Device = TrainConfig.device,
    out: o.Out = None,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    preset: o.Preset = None,
    config: o.Config = None,
    json_output: o.Json = False,
) -> None:
    """Train layer after layer, each to the optimum of its objective on the frozen features of those before.

    Every stage leaves a run folder with its certificate, which speaks of that stage on its features alone. A stage
    that does not raise the validation score is dropped. model.safetensors is the whole stack as one torch module.

    Example:

      convcvx stack --stages 2 --data digits --padding 1 --pool 4 --beta-ratio 0.01 --tol 0.03 --out checkpoints/stack
    """
    console = open_console(json_output)
    with guard(json_output):
        if (size := Team.of_torchrun().size) > 1:
            raise InputError(f"a stack is trained by one process; got {size}: start it without torchrun")
        given = o.given_options(context, preset, config)
        run = StackRun(o.out_folder(out, resume, overwrite, lambda: _named(_settings(given))))
        with run.held():
            goes_on = run.enter(resume=resume, overwrite=overwrite)
            settings = run.config.continued(given) if goes_on else _settings(given)
            progress = Progress(console, settings.stages[0].tol, settings.stages[0].time_limit)
            if resume and not goes_on:
                progress.begin(f"nothing has begun in {out}: it begins now, by these options")
            result = stack_job(settings, run, progress, resume=goes_on)
        _print_table(console, result)
        finish(result, json_output)


def _settings(given: dict[str, Any]) -> StackConfig:
    own = ("stages", "channels", "downsample", "heads")
    options = {"validation": VALIDATION} | {name: value for name, value in given.items() if name not in own}
    return StackConfig.of(given.get("stages", 2), options, **{name: given[name] for name in own[1:] if name in given})


def _named(config: StackConfig) -> str:
    return f"{Path(config.stages[0].data).stem}-stack"


def _print_table(console: Console, result: dict[str, Any]) -> None:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.2%}"

    table = Table(box=None, header_style="bold")
    for column in ("stage", "objective", "gap", "filters", "validation", "test", "seconds", ""):
        table.add_column(column, justify="right")
    for record in result["stages"]:
        table.add_row(
            str(record["stage"]),
            f"{record['primal']:.6g}",
            f"{record['rel_gap']:.1e}",
            str(record["n_filters"]),
            percent(record["validation_accuracy"]),
            percent(record["test_accuracy"]),
            f"{record['seconds']:.1f}",
            "" if record["kept"] else "dropped",
        )
    console.print(table)
    for record in result["stages"]:
        if "joint_objective" in record:
            console.print(
                f"joint heads of stages 1 to {record['stage']}: {record['score']:.2%} validation, objective "
                f"{record['joint_objective']:.6g}, optimal over these filters to {record['joint_rel_gap']:.1e}",
            )
    console.print(
        f"whole model: {percent(result['test_accuracy'])} test, {percent(result['train_accuracy'])} train, "
        f"{result['n_stages']} stages, {cost(result)}\n"
        "each gap is that of its stage on the features it was given:",
    )
    for scope, meaning in {record["scope"]: record["meaning"] for record in result["stages"]}.items():
        console.print(f"{scope}: {meaning}")
