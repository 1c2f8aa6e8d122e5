"""`convcvx certify`."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convcvx.budget import Deadline
from convcvx.cli import flags as f
from convcvx.cli.ending import finish, guard, open_console
from convcvx.cli.output import explain_short, print_summary
from convcvx.errors import InputError, RunError
from convcvx.machine.watch import Waiting
from convcvx.storage.places import MODEL
from convcvx.training.options import FAMILY_ORACLE, TrainConfig
from convcvx.training.panels.model import EVERY
from convcvx.training.run import Run

if TYPE_CHECKING:
    from convcvx.certificate import Certificate
    from convcvx.patches import PatchEmbedding

Network = Annotated[
    Path,
    typer.Argument(
        help="A run folder, or a .safetensors or .pt file with the state dict of any Conv2d → ReLU → average or "
        "maximum pooling → Linear, or Linear → ReLU → Linear; stride, padding, dilation, pool and activation are for a "
        "file that does not say (pool is the square grid of averages that fits by default).",
        metavar="RUN|FILE",
    ),
]
Like = Annotated[Path | None, typer.Option(help="Take data, model and beta from this run: certify FILE as its rival.")]


@f.takes(
    *f.flags_of(
        TrainConfig,
        (
            *("data", "data_dir", "resize", "channels", "limit", "stride", "padding", "dilation"),
            *("pool", "activation", "beta", "loss"),
            *("oracle", "gates", "tol", "time_limit", "seed", "device"),
        ),
    )
)
def certify(
    context: typer.Context,
    network: Network,
    like: Like = None,
    *,
    json_output: f.Json = False,
    quiet: f.Quiet = False,
    **options: Any,
) -> None:
    """Say how far a network is from the optimum over all networks of any width, whoever trained it.

    Recomputed from the weights and the data, rounding allowed for; the dual point
    that a run left counts for what is proved of it anew. For a stage of a stack,
    from the features that the stages before it give. Of the network of a run the
    bound that is stored is shown beside; the run folder is not changed.

    Examples:

      convcvx certify checkpoints/demo

      convcvx certify checkpoints/demo --time-limit 60

      convcvx certify adam.safetensors --like checkpoints/free

      convcvx certify checkpoints/stack/stage-2
    """
    console = open_console(json_output, quiet)
    with guard(json_output):
        given = f.flags(context)
        for name in ("network", "like"):
            given.pop(name, None)
        run = _source_run(network, like)
        from convcvx.network.foreign import check_weights_file  # torch: --help does not wait for it
        from convcvx.stack.jobs import stage_data
        from convcvx.training.jobs import certify_job
        from convcvx.training.resolve import load_data, run_data, with_run_settings

        own = TrainConfig() if run is None else with_run_settings(run)
        if given.get("oracle", FAMILY_ORACLE) not in ("auto", FAMILY_ORACLE):  # which looks at all filters
            own = replace(own, filters=EVERY)
        settings = replace(replace(own, time_limit=None), **given)  # a run's limit was that of its training
        settings.check()
        deadline = Deadline.after(settings.time_limit)
        source = replace(settings, seed=own.seed)  # another seed is one for the search: the same images are held out
        path = Run.open(network).model_file if network.is_dir() else network
        check_weights_file(path)
        embedding = None if run is None else _stored_embedding(run)
        rival = None if like is None else Run.open(like)
        with Waiting(console):
            if run is None or "data" in given:
                images = load_data(source)
            else:
                images = run_data(run, source, check="limit" not in given)
            features = None if run is None else stage_data(run, images)
            state = None if run is None else run.load_state()
            metrics = certify_job(
                path,
                settings,
                embedding=embedding,
                given=set(given),
                like=rival,
                data=features or images,
                dual_point=None if state is None else state.dual_point,
                stored=_stored_certificate(run, path) if like is None else None,
                deadline=deadline,
            )
        print_summary(console, metrics)
        if metrics["assumed"]:
            print(f"convcvx: assumed, as the file does not show it: {metrics['assumed']}", file=sys.stderr)
        explain_short(console, metrics, "train further, search with another --oracle, or raise --tol")
        finish(metrics, json_output)


def _stored_certificate(run: Run | None, path: Path) -> Certificate | None:
    """The certificate that a finished run has of the network in `path`."""
    if run is None or path != run.folder / MODEL or not (run.folder / "certificate.json").exists():
        return None
    try:
        return run.certificate
    except (InputError, RunError):  # of another version, or damaged: what is computed now needs none of it
        return None


def _stored_embedding(run: Run) -> PatchEmbedding:
    if (embedding := run.load_embedding()) is None:
        raise RunError(f"{run.folder} has no embedding.safetensors: finish it with {run.go_on}")
    return embedding


def _source_run(network: Path, like: Path | None) -> Run | None:
    """The run whose data, model and beta are meant."""
    if like is not None:
        return Run.open(like)
    if os.path.isdir(network) or Run(network).displaced:
        return Run.open(network)
    in_run = network.name == MODEL and (network.parent / "config.json").exists()
    return Run.open(network.parent) if in_run else None
