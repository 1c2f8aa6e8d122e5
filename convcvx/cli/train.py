"""`convcvx train`."""

from __future__ import annotations

from pathlib import Path

import typer

from convcvx.cli import options as o
from convcvx.cli.output import finish, guard, open_console, print_summary
from convcvx.responses.team import Team
from convcvx.training.jobs import train_job
from convcvx.training.options import TrainConfig
from convcvx.training.progress import Progress
from convcvx.training.run import Run


def train(
    context: typer.Context,
    data: o.Data = TrainConfig.data,
    data_dir: o.DataDir = TrainConfig.data_dir,
    limit: o.Limit = TrainConfig.limit,
    validation: o.Validation = TrainConfig.validation,
    kernel_size: o.KernelSize = TrainConfig.kernel_size,
    stride: o.Stride = TrainConfig.stride,
    padding: o.Padding = TrainConfig.padding,
    pool: o.Pool = TrainConfig.pool,
    hidden_bias: o.HiddenBias = TrainConfig.hidden_bias,
    intercept: o.Intercept = TrainConfig.intercept,
    rank: o.Rank = TrainConfig.rank,
    whiten: o.Whiten = TrainConfig.whiten,
    whiten_epsilon: o.WhitenEpsilon = TrainConfig.whiten_epsilon,
    contrast: o.Contrast = TrainConfig.contrast,
    contrast_epsilon: o.ContrastEpsilon = TrainConfig.contrast_epsilon,
    beta: o.Beta = TrainConfig.beta,
    beta_ratio: o.BetaRatio = TrainConfig.beta_ratio,
    loss: o.Loss = TrainConfig.loss,
    solver: o.Solver = TrainConfig.solver,
    oracle: o.Oracle = TrainConfig.oracle,
    gates: o.Gates = TrainConfig.gates,
    tol: o.Tol = TrainConfig.tol,
    max_filters: o.MaxFilters = TrainConfig.max_filters,
    max_rounds: o.MaxRounds = TrainConfig.max_rounds,
    time_limit: o.TimeLimit = TrainConfig.time_limit,
    seed: o.Seed = TrainConfig.seed,
    device: o.Device = TrainConfig.device,
    dictionary: o.Dictionary = TrainConfig.dictionary,
    dictionary_source: o.DictionarySource = TrainConfig.dictionary_source,
    threshold: o.Threshold = TrainConfig.threshold,
    flips: o.Flips = TrainConfig.flips,
    shifts: o.Shifts = TrainConfig.shifts,
    tune: o.Tune = TrainConfig.tune,
    slide: o.Slide = TrainConfig.slide,
    crops: o.Crops = TrainConfig.crops,
    out: o.Out = None,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    preset: o.Preset = None,
    config: o.Config = None,
    json_output: o.Json = False,
) -> None:
    """Train a two-layer convolutional ReLU network to the optimum of its objective.

        min  (1/n) Σ loss(f(x_i), y_i) + (beta/2) Σ (‖u_j‖² + ‖V_j‖²)

    over filters u_j and output weights V_j of any number of neurons. Leaves a run folder with an ordinary torch
    network (model.safetensors) and its certificate.

    Examples:

      convcvx train --preset demo --out checkpoints/demo

      convcvx train --data mnist --limit 10000 --kernel-size 5 --pool 4 --beta-ratio 0.0003 --max-filters 200

      torchrun --nproc-per-node 2 -m convcvx.cli train --preset demo --out checkpoints/demo
    """
    console = open_console(json_output)
    with guard(json_output), Team.of_torchrun() as team:
        given = o.given_options(context, preset, config)
        run = Run(o.out_folder(out, resume, overwrite, lambda: _named(TrainConfig.from_dict(given))))
        with run.held():
            goes_on = run.enter(resume=resume, overwrite=overwrite)
            settings = run.continued(given) if goes_on else TrainConfig.from_dict(given)
            progress = Progress(console, settings.tol, settings.time_limit)
            if resume and not goes_on:
                progress.begin(f"nothing has begun in {out}: it begins now, by these options")
            metrics = train_job(settings, run, progress, team, resume=goes_on)
        print_summary(console, metrics)
        finish(metrics, json_output)


def _named(config: TrainConfig) -> str:
    return f"{Path(config.data).stem}-{config.seed}"
