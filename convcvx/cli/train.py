"""`convcvx train`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import typer

from convcvx.cli import flags as f
from convcvx.cli.output import as_flags, explain_short, finish, guard, open_console, print_summary
from convcvx.machine.watch import Waiting
from convcvx.responses.team import Team
from convcvx.solution import Status
from convcvx.training.clock import Clock
from convcvx.training.jobs import train_into
from convcvx.training.options import TrainConfig
from convcvx.training.origin import Origin
from convcvx.training.presets import fitting, in_flags, leaves_open, next_steps
from convcvx.training.progress import Progress
from convcvx.training.resolve import load_data
from convcvx.training.run import Run


@f.takes(*f.flags_of(TrainConfig))
def train(
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
    """Train a two-layer convolutional network to the optimum of its objective.

        min  (1/n) Σ loss(f(x_i), y_i) + (beta/2) Σ (‖u_j‖² + ‖V_j‖²)

    over filters u_j and output weights V_j of any number of neurons. Leaves a
    run folder with an ordinary torch network (model.safetensors) and its
    certificate. Where no option says what network is wanted, those that fit the
    images are taken, and printed.

    Examples:

      convcvx train --data mnist

      convcvx train --preset demo --out checkpoints/demo

      convcvx train --data mnist --kernel-size 5 --pool 4 --beta-ratio 0.0003

      torchrun --nproc-per-node 2 -m convcvx.cli train --preset demo
    """
    console = open_console(json_output, quiet)
    with guard(json_output), Team.of_torchrun() as team:
        clock = Clock.now()
        given = f.given_options(context, preset, config)
        run = Run(f.out_folder(out, resume, overwrite, lambda: _named(TrainConfig.from_dict(given))))
        with run.held():
            goes_on = run.enter(resume=resume or team.restarted, overwrite=overwrite)
            fits = not goes_on and leaves_open(given, preset)
            settings = run.continued(given) if goes_on else TrainConfig.from_dict(given)
            settings.check()
            data = None
            if fits:
                with Waiting(console):
                    data = load_data(settings)
                settings = TrainConfig.from_dict(fitting(given, data[0]))
            with Progress(console, settings.tol, settings.time_limit) as progress:
                if resume and not goes_on:
                    progress.begin(f"nothing has begun in {out}: it begins now, by these options")
                if fits:
                    progress.begin(
                        f"options that fit the data: {in_flags(settings.chosen)}\n"
                        "(--preset plain: the defaults instead of them)"
                    )
                origin = None if data is None else Origin.of(settings, data)
                fit = train_into(run, settings, progress, team, resume=goes_on, data=data, origin=origin, clock=clock)
            metrics = fit.metrics
        print_summary(console, metrics)
        remedy = as_flags(Status(metrics["status"]).remedy)
        go_on = f"to go on: convcvx train --resume --out {shlex.quote(metrics['out'])}, with another budget or --tol"
        saved = "the network is saved and of use as it is" if metrics["n_filters"] else "the network has no filter yet"
        explain_short(console, metrics, remedy, f"{saved}; {go_on}")
        if fits:
            console.print(f"try next: {next_steps(settings)}")
        finish(metrics, json_output, team)


def _named(config: TrainConfig) -> str:
    return f"{Path(config.data).stem}-seed{config.seed}"
