"""What `convcvx train` does, once nothing is found bad in its options."""

from __future__ import annotations

from typing import Any

from convcvx.cli import flags as f
from convcvx.cli.ending import finish, open_console
from convcvx.cli.opening import entered, say_first
from convcvx.cli.output import as_flags, explain_short, print_summary
from convcvx.errors import RunError
from convcvx.machine.watch import Waiting
from convcvx.responses.team import Team
from convcvx.terms.status import Status
from convcvx.training.clock import Clock
from convcvx.training.fit import Fit
from convcvx.training.jobs import train_into
from convcvx.training.options import TrainConfig
from convcvx.training.origin import Origin
from convcvx.training.presets import fitting, leaves_open, next_steps
from convcvx.training.progress import Progress
from convcvx.training.resolve import load_data
from convcvx.training.run import Run


def run_training(given: dict[str, Any], asked: f.Asked) -> None:
    """Train by the options that were `given`, tell how it goes, and end as commands do."""
    console = open_console(asked.json_output, asked.quiet)
    with Team.of_torchrun() as team:
        clock = Clock.now()
        run = Run(asked.folder(lambda: _named(TrainConfig.from_dict(given))))
        if run.is_stage:
            raise RunError(f"{run.folder} is a stage of a stack, which makes its features: {run.go_on}")
        with entered(run, asked, team) as goes_on:
            fits = not goes_on and leaves_open(given, asked.preset)
            settings = run.continued(given) if goes_on else TrainConfig.from_dict(given)
            settings.check()
            data = None
            if fits:
                with Waiting(console):
                    data = load_data(settings)
                settings = TrainConfig.from_dict(fitting(given, data[0]))
            with Progress(console, settings.tol) as progress:
                say_first(progress, asked, goes_on, settings.chosen if fits else None)
                origin = None if data is None else Origin.of(settings, data)
                fit = train_into(run, settings, progress, team, resume=goes_on, data=data, origin=origin, clock=clock)
            metrics = fit.metrics
        print_summary(console, metrics)
        remedy = as_flags(Status(metrics["status"]).remedy)
        saved = "the network is saved and of use as it is" if metrics["n_filters"] else "the network has no filter yet"
        explain_short(console, metrics, remedy, f"{saved}; {go_on(fit)}")
        if fits:
            console.print(f"try next: {next_steps(settings)}")
        finish(metrics, asked.json_output, team)


def go_on(fit: Fit) -> str:
    """By which line a training that has stopped short goes on."""
    line = f"to go on: {Run(fit.metrics['out']).go_on}"
    if fit.metrics["status"] == Status.STALLED:
        return f"{line} --tol {1.1 * fit.metrics['rel_gap']:.1e}, say: more rounds alone change nothing"
    if fit.metrics["status"] != Status.GAP_ABOVE_TOL:
        return f"{line}, with another budget or --tol"
    # At the same tol no round would be added: to the training, whose search was shorter, it was reached.
    return f"{line}, with a --tol below {fit.history[-1]['rel_gap']:.1e}, the gap that the training saw"


def _named(config: TrainConfig) -> str:
    return f"{f.data_name(config)}-seed{config.seed}"
