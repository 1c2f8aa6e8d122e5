"""`convcvx stack`: its options, which are refused before torch is imported where they are bad."""

from __future__ import annotations

from typing import Any

import typer

from convcvx.cli import flags as f
from convcvx.cli.ending import guard
from convcvx.stack.options import STAGE_OPTIONS, VALIDATION, StackShape, as_kept_by_stage, settings_of
from convcvx.training.options import TrainConfig


@f.takes(
    *f.flags_of(StackShape),
    *f.flags_of(TrainConfig, STAGE_OPTIONS, by_stage=True, validation=VALIDATION),
    *f.ASKED,
)
def stack(context: typer.Context, **options: Any) -> None:
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
    asked = f.Asked.of(options)
    with guard(asked.json_output):
        given = f.given_options(context, asked, as_kept_by_stage)
        asked.check()
        if not asked.resume:  # what a resumed one leaves out may be what the others need
            settings_of(given)
        from convcvx.cli.stacking import run_stacking  # torch: a refusal does not wait for it

        run_stacking(given, asked)
