"""What `convcvx stack` does, once nothing is found bad in its options."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from convcvx.cli import flags as f
from convcvx.cli.ending import finish, open_console, percent
from convcvx.cli.opening import entered, say_first
from convcvx.cli.output import cost, explain_short
from convcvx.display.words import counted
from convcvx.machine.watch import Waiting
from convcvx.responses.team import Team
from convcvx.stack.jobs import stack_job
from convcvx.stack.options import (
    StackConfig,
    fitting_stack,
    settings_of,
    stack_left_open,
)
from convcvx.stack.run import StackRun
from convcvx.training.origin import Origin
from convcvx.training.progress import Progress
from convcvx.training.resolve import load_data


def run_stacking(given: dict[str, Any], asked: f.Asked) -> None:
    """Train a stack by the options that were `given`, tell how it goes, and end as commands do."""
    console = open_console(asked.json_output, asked.quiet)
    with Team.of_torchrun() as team:
        run = StackRun(asked.folder(lambda: _named(settings_of(given))))
        with entered(run, asked, team) as goes_on:
            fits = not goes_on and stack_left_open(given, asked.preset)
            settings = run.config.continued(given) if goes_on else settings_of(given)
            data = origin = chosen = None
            if fits:
                with Waiting(console):
                    data = load_data(settings.stages[0])
                chosen = fitting_stack(given, data[0])
                settings, origin = settings_of(chosen), Origin.of(settings.stages[0], data)
            with Progress(console, settings.stages[0].tol) as progress:
                say_first(progress, asked, goes_on, chosen)
                result = stack_job(settings, run, progress, team, resume=goes_on, data=data, origin=origin)
        _print_table(console, result)
        remedy = (
            "in a new stack raise --tol, or the budgets of the stages that fell short: finished ones are not reopened"
        )
        explain_short(console, result, remedy)
        finish(result, asked.json_output, team)


def _named(config: StackConfig) -> str:
    return f"{f.data_name(config.stages[0])}-stack"


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
            told = record["validation_accuracy"] is not None
            reached = f"{record['score']:.2%} validation" if told else f"validation loss {-record['score']:.5g}"
            console.print(
                f"joint heads of stages 1 to {record['stage']}: {reached}, objective "
                f"{record['joint_objective']:.6g}, optimal over these filters to {record['joint_rel_gap']:.1e}",
            )
    console.print(
        f"whole model: {percent(result['test_accuracy'])} test, {percent(result['train_accuracy'])} train, "
        f"{counted(result['n_stages'], 'stage')}, {cost(result)}\n"
        "each gap is that of its stage on the features it was given:",
    )
    for scope, meaning in {record["scope"]: record["meaning"] for record in result["stages"]}.items():
        console.print(f"{scope}: {meaning}")
