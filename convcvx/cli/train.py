"""`convcvx train`: its options, which are refused before torch is imported where they are bad."""

from __future__ import annotations

from typing import Any

import typer

from convcvx.cli import flags as f
from convcvx.cli.ending import guard
from convcvx.training.options import TrainConfig


@f.takes(*f.flags_of(TrainConfig), *f.ASKED)
def train(context: typer.Context, **options: Any) -> None:
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
    asked = f.Asked.of(options)
    with guard(asked.json_output):
        given = f.given_options(context, asked)
        f.check_early(given, asked.resume)
        asked.check()
        from convcvx.cli.training import run_training  # torch: a refusal does not wait for it

        run_training(given, asked)
