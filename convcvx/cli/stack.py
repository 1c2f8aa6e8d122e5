"""`convcvx stack`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from convcvx.cli import flags as f
from convcvx.cli.output import cost, explain_short, finish, guard, open_console, percent
from convcvx.display.words import counted
from convcvx.machine.watch import Waiting
from convcvx.responses.team import Team
from convcvx.stack.jobs import StackRun, stack_job
from convcvx.stack.options import (
    STAGE_OPTIONS,
    VALIDATION,
    StackConfig,
    StackShape,
    as_kept_by_stage,
    fitting_stack,
    settings_of,
)
from convcvx.training.options import TrainConfig
from convcvx.training.origin import Origin
from convcvx.training.presets import in_flags, leaves_open
from convcvx.training.progress import Progress
from convcvx.training.resolve import load_data


@f.takes(
    *f.flags_of(StackShape),
    *f.flags_of(TrainConfig, STAGE_OPTIONS, by_stage=True, validation=VALIDATION),
)
def stack(
    context: typer.Context,
    *,
    out: f.Out = None,
    resume: f.Resume = False,
    overwrite: f.Overwrite = False,
    preset: f.Preset = None,
    config: f.Config = None,
    json_output: f.Json = False,
    quiet: f.Quiet = False,
    **options: Any,
) -> None:
    """Train layer after layer, each to the optimum of its objective on the frozen features of those before.

    Every stage leaves a run folder with its certificate, which speaks of that
    stage on its features alone. A stage that does not raise the validation score
    is dropped: of equal stacks the smaller one is kept. model.safetensors is the
    whole stack as one torch module. Where no option says what network is wanted,
    those that fit the images are taken, and printed.

    Examples:

      convcvx stack --data mnist

      convcvx stack --stages 2 --padding 1 --pool 4 --beta-ratio 0.01 --tol 0.03
    """
    console = open_console(json_output, quiet)
    with guard(json_output), Team.of_torchrun() as team:
        given = f.given_options(context, preset, config, as_kept_by_stage)
        run = StackRun(f.out_folder(out, resume, overwrite, lambda: _named(settings_of(given))))
        with run.held():
            goes_on = run.enter(resume=resume or team.restarted, overwrite=overwrite)
            fits = not goes_on and leaves_open(given, preset)
            settings = run.config.continued(given) if goes_on else settings_of(given)
            data = origin = None
            if fits:
                with Waiting(console):
                    data = load_data(settings.stages[0])
                chosen = fitting_stack(given, data[0])
                settings, origin = settings_of(chosen), Origin.of(settings.stages[0], data)
            with Progress(console, settings.stages[0].tol, settings.stages[0].time_limit) as progress:
                if resume and not goes_on:
                    progress.begin(f"nothing has begun in {out}: it begins now, by these options")
                if fits:
                    progress.begin(f"options that fit the data: {in_flags(chosen)}")
                result = stack_job(settings, run, progress, team, resume=goes_on, data=data, origin=origin)
        _print_table(console, result)
        explain_short(console, result, "raise --tol, or the budgets of the stages that fell short")
        finish(result, json_output, team)


def _named(config: StackConfig) -> str:
    return f"{Path(config.stages[0].data).stem}-stack"


def _print_table(console: Console, result: dict[str, Any]) -> None:
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
        f"{counted(result['n_stages'], 'stage')}, {cost(result)}\n"
        "each gap is that of its stage on the features it was given:",
    )
    for scope, meaning in {record["scope"]: record["meaning"] for record in result["stages"]}.items():
        console.print(f"{scope}: {meaning}")
