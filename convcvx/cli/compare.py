"""`convcvx compare`; what trains is imported when it is called, as it needs torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from convcvx.cli import flags as f
from convcvx.cli.ending import finish, guard, open_console, percent
from convcvx.display.words import convergence, counted
from convcvx.machine.watch import Waiting
from convcvx.training.run import Run
from convcvx.training.twin import CompareConfig

Folder = Annotated[Path, typer.Argument(help="A finished run folder.", metavar="RUN")]


@f.takes(*f.flags_of(CompareConfig))
def compare(run: Folder, *, json_output: f.Json = False, quiet: f.Quiet = False, **options: Any) -> None:
    """Train the twin of a run, the same network, with SGD or Adam, and say how far from the optimum it ends.

    Same data, architecture, width and objective. The learning rate is tuned on
    full trainings, a grid of ratio √10 around the best; the objective is
    recomputed in float64. Leaves compare-OPTIMIZER.json and .png in the run
    folder, and the twin's network, twin-OPTIMIZER.safetensors, which
    `convcvx certify FILE --like RUN` takes. On few images an epoch is few steps:
    the output says whether the twin had converged, and which --epochs to try.

    Example:

      convcvx compare checkpoints/mnist --optimizer sgd --epochs 8
    """
    console = open_console(json_output, quiet)
    with guard(json_output):
        config = CompareConfig(**options)
        config.check()
        source = Run.open(run)
        from convcvx.comparison import compare_job  # torch: a refusal does not wait for it

        with Waiting(console):
            result = compare_job(source, config)
        _print_table(console, result)
        finish(result, json_output)


def _print_table(console: Console, result: dict[str, Any]) -> None:
    convex, twin, tune = result["convex"], result["twin"], result["finetune"]
    table = Table(box=None, header_style="bold")
    for column in ("", "objective", "gap", "test accuracy", "seconds", "core-seconds", "filters in use"):
        table.add_column(column, justify="left" if column == "" else "right")
    rows = {"convex": convex, twin["optimizer"]: twin} | ({f"convex, then {twin['optimizer']}": tune} if tune else {})
    for name, part in rows.items():
        table.add_row(
            name,
            f"{part['objective']:.6g}",
            f"{part['rel_gap']:.2%}",
            percent(part["test_accuracy"]),
            f"{part['seconds']:.1f}",
            "-" if part["core_seconds"] is None else f"{part['core_seconds']:.1f}",
            str(part.get("filters_used", part["n_filters"])),
        )
    console.print(table)
    until_convex = result["seconds_until_twin_reaches_convex"]
    until_twin = result["seconds_until_convex_reaches_twin"]
    trained = f"{counted(twin['epochs'], 'epoch')}, {counted(twin['steps'], 'step')} of {twin['batch']} images,"
    lines = [
        f"gap: to the lower bound {convex['dual']:.6g}, scope {convex['scope']}: {convex['meaning']}",
        f"{twin['optimizer']}: best of {counted(len(twin['seeds']), 'seed')}, each with {trained} at learning rate "
        f"{twin['learning_rate']:.3g}, the best of {len(twin['learning_rates'])} tried as long",
        convergence(twin, twin["optimizer"]),
        f"{twin['optimizer']} {_reaches('the convex objective', until_convex)}; "
        f"convex training {_reaches('that of ' + twin['optimizer'], until_twin)}",
    ]
    if twin["rel_gap"] < 0:
        lines.append("a negative gap: the estimated lower bound was too high; certify the run again with another seed")
    console.print("\n".join(filter(None, lines)))


def _reaches(objective: str, seconds: float | None) -> str:
    return (
        f"does not reach {objective} as it was trained"
        if seconds is None
        else f"reaches {objective} after {seconds:.1f} s"
    )
