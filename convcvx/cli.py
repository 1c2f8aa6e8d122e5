"""The command line: `convcvx train` and `convcvx certify`.

With --json, standard output carries one JSON object and nothing else; human text goes to standard error. Exit
status 0: done; 2: bad input; 3: stopped short of --tol.
"""

from __future__ import annotations

import json
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from convcvx.config import PRESETS, TrainConfig
from convcvx.errors import ConvcvxError, InputError
from convcvx.job import certify_job, train_job, with_run_settings
from convcvx.progress import Progress
from convcvx.runs import Run

app = typer.Typer(
    name="convcvx",
    help="Train convolutional layers to the global optimum, with a certificate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, alone, on standard output.")]
DATA, MODEL, SOLVE, OUTPUT = "Data", "Model", "Solver", "Output"


@app.callback()
def _main() -> None:
    """Two-layer convolutional ReLU networks with weight decay are convex programs in disguise: convcvx solves them.

    Start with: convcvx train --preset demo --out checkpoints/demo
    """


@app.command()
def train(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Option(
            help="digits, mnist, fashion-mnist, cifar10, cifar100, FILE.npz (Keras keys), or a FOLDER of train/ and "
            "test/ with a folder a class.",
            rich_help_panel=DATA,
        ),
    ] = "digits",
    data_dir: Annotated[
        str | None, typer.Option(help="Where data sets lie or are downloaded to.", rich_help_panel=DATA)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Use the first N training images only.", rich_help_panel=DATA)
    ] = None,
    validation: Annotated[
        float, typer.Option(help="Share of training images held out and scored.", rich_help_panel=DATA)
    ] = 0.0,
    kernel_size: Annotated[str, typer.Option(help="3, or 3x5 (rows x columns).", rich_help_panel=MODEL)] = "3",
    stride: Annotated[str, typer.Option(help="As in Conv2d.", rich_help_panel=MODEL)] = "1",
    padding: Annotated[str, typer.Option(help="As in Conv2d, with zeros.", rich_help_panel=MODEL)] = "0",
    pool: Annotated[
        str,
        typer.Option(
            help="global; a grid: 4 or 4x2 (AdaptiveAvgPool2d); window:SIZE,STRIDE (AvgPool2d); none.",
            rich_help_panel=MODEL,
        ),
    ] = "global",
    hidden_bias: Annotated[
        bool, typer.Option(help="A regularised bias in each filter.", rich_help_panel=MODEL)
    ] = False,
    intercept: Annotated[bool, typer.Option(help="An unpenalised bias in the output.", rich_help_panel=MODEL)] = True,
    rank: Annotated[
        int | None,
        typer.Option(
            help="Restrict filters to the first R principal directions of the patches.", rich_help_panel=MODEL
        ),
    ] = None,
    whiten: Annotated[
        float | None, typer.Option(help="ZCA-whiten the patches, with this epsilon.", rich_help_panel=MODEL)
    ] = None,
    contrast: Annotated[
        float | None,
        typer.Option(help="Normalise each patch to mean 0, variance 1, with this epsilon.", rich_help_panel=MODEL),
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option(help="Weight decay: torch's weight_decay under a mean-reduced loss.", rich_help_panel=MODEL),
    ] = None,
    beta_ratio: Annotated[
        float | None,
        typer.Option(
            help="Weight decay as a share of beta_max, from which on no filter helps. [default: 0.001 without --beta]",
            rich_help_panel=MODEL,
        ),
    ] = None,
    loss: Annotated[str, typer.Option(help="squared or cross-entropy.", rich_help_panel=MODEL)] = "squared",
    solver: Annotated[str, typer.Option(help="auto or sliding-fw.", rich_help_panel=SOLVE)] = "auto",
    oracle: Annotated[
        str,
        typer.Option(
            help="auto; exact (a proof: patches of low rank or few); branch-and-bound (a proof, rank 3 and up); "
            "local (scales, proves nothing).",
            rich_help_panel=SOLVE,
        ),
    ] = "auto",
    tol: Annotated[
        float, typer.Option(help="Relative gap (primal - dual) / primal to reach.", rich_help_panel=SOLVE)
    ] = 1e-4,
    max_filters: Annotated[
        int | None, typer.Option(help="Budget of filters; none by default.", rich_help_panel=SOLVE)
    ] = None,
    max_rounds: Annotated[int, typer.Option(help="Budget of rounds.", rich_help_panel=SOLVE)] = 100,
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds after which no new round starts.", rich_help_panel=SOLVE)
    ] = None,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal results.", rich_help_panel=SOLVE)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=SOLVE)] = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Run folder. [default: checkpoints/DATA-SEED]", rich_help_panel=OUTPUT)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last round of --out.", rich_help_panel=OUTPUT)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --out.", rich_help_panel=OUTPUT)
    ] = False,
    preset: Annotated[
        str | None,
        typer.Option(help=f"Options that go together: {', '.join(PRESETS)}.", rich_help_panel=OUTPUT),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A TOML file of options (kernel_size = 5 ...); flags win.", rich_help_panel=OUTPUT),
    ] = None,
    json_output: Json = False,
) -> None:
    """Train a two-layer convolutional ReLU network to the optimum of its objective.

        min  (1/n) Σ loss(f(x_i), y_i) + (beta/2) Σ (‖u_j‖² + ‖V_j‖²)

    over filters u_j and output weights V_j of any number of neurons. Leaves a run folder with an ordinary torch
    network (model.safetensors) and its certificate.

    Examples:

      convcvx train --preset demo --out checkpoints/demo

      convcvx train --data mnist --limit 10000 --kernel-size 5 --pool 4 --beta-ratio 0.0003 --max-filters 200
    """
    console = Console(stderr=json_output)
    with _Guard(json_output):
        given = _given(context, preset, config)
        run, settings = _open_run(out, given, resume, overwrite)
        console.print(f"training on {settings.data} into {run.folder}", highlight=False)
        progress = Progress(console, settings.tol, settings.time_limit)
        metrics = train_job(settings, run, progress)
        _print_summary(console, metrics)
        _finish(metrics, json_output)


@app.command()
def certify(
    context: typer.Context,
    network: Annotated[
        Path,
        typer.Argument(
            help="A run folder, or a .safetensors file of any Conv2d → ReLU → average pooling → Linear.",
            metavar="RUN|FILE",
        ),
    ],
    like: Annotated[
        Path | None, typer.Option(help="Take data, model and beta from this run: certify FILE as its rival.")
    ] = None,
    data: Annotated[str, typer.Option(help="As in train.", rich_help_panel=DATA)] = "digits",
    data_dir: Annotated[str | None, typer.Option(help="As in train.", rich_help_panel=DATA)] = None,
    limit: Annotated[int | None, typer.Option(help="As in train.", rich_help_panel=DATA)] = None,
    stride: Annotated[str, typer.Option(help="For a FILE that does not say.", rich_help_panel=MODEL)] = "1",
    padding: Annotated[str, typer.Option(help="For a FILE that does not say.", rich_help_panel=MODEL)] = "0",
    pool: Annotated[
        str,
        typer.Option(help="For a FILE that does not say. [default: the square grid that fits]", rich_help_panel=MODEL),
    ] = "global",
    beta: Annotated[
        float | None,
        typer.Option(help="Weight decay of the objective. [default: the run's]", rich_help_panel=MODEL),
    ] = None,
    loss: Annotated[str, typer.Option(help="squared or cross-entropy.", rich_help_panel=MODEL)] = "squared",
    oracle: Annotated[str, typer.Option(help="As in train.", rich_help_panel=SOLVE)] = "auto",
    tol: Annotated[float, typer.Option(help="Gap at which exit status 0 is given.", rich_help_panel=SOLVE)] = 1e-4,
    seed: Annotated[int, typer.Option(help="Seed of the search.", rich_help_panel=SOLVE)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=SOLVE)] = "auto",
    json_output: Json = False,
) -> None:
    """Say how far a network is from the optimum over all networks of any width, whoever trained it.

    Recomputed in float64 from the weights and the data alone.

    Examples:

      convcvx certify checkpoints/demo

      convcvx certify adam.safetensors --like checkpoints/demo
    """
    console = Console(stderr=json_output)
    with _Guard(json_output):
        given = _given(context, None, None)
        for name in ("network", "like"):
            given.pop(name, None)
        source = like or (network if network.is_dir() else None)
        run = None if source is None else Run.open(source)
        if run is None and network.name == "model.safetensors" and (network.parent / "config.json").exists():
            run = Run.open(network.parent)
        settings = TrainConfig() if run is None else with_run_settings(run)
        settings = replace(settings, **given)
        path = Run.open(network).model_file if network.is_dir() else network
        embedding = run.load_embedding() if run is not None else None
        metrics = certify_job(path, settings, embedding=embedding, given=set(given))
        _print_summary(console, metrics)
        _finish(metrics, json_output)


def _given(context: typer.Context, preset: str | None, file: Path | None) -> dict[str, Any]:
    """The options asked for: preset, then config file, then flags."""
    options: dict[str, Any] = {}
    if preset is not None:
        if preset not in PRESETS:
            raise InputError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}")
        options |= PRESETS[preset]
    if file is not None:
        options |= _read_config(file)
    apart = ("out", "resume", "overwrite", "preset", "config", "json_output")
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if name not in apart and source is not None and source.name == "COMMANDLINE":
            options[name] = value
    return options


def _read_config(file: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(file.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"cannot read --config {file}: {error}") from None
    values = {name.replace("-", "_"): value for name, value in values.items()}
    TrainConfig.from_dict(values)
    texts = ("kernel_size", "stride", "padding", "pool")
    return {name: str(value) if name in texts else value for name, value in values.items()}


def _open_run(out: Path | None, given: dict[str, Any], resume: bool, overwrite: bool) -> tuple[Run, TrainConfig]:
    if resume and overwrite:
        raise InputError("give --resume or --overwrite, not both")
    if out is None:
        if resume:
            raise InputError("--resume needs --out, the run to go on with")
        config = TrainConfig.from_dict(given)
        out = Path("checkpoints") / f"{Path(config.data).stem}-{config.seed}"
    if resume and (out / "config.json").exists():
        run = Run.open(out)
        return run, run.resume(given)
    config = TrainConfig.from_dict(given)
    config.patch_spec()
    return Run.create(out, config, overwrite=overwrite), config


def _print_summary(console: Console, metrics: dict[str, Any]) -> None:
    """What a reader wants to know, in a few lines."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.2%}"

    lines = [
        f"accuracy     {percent(metrics['test_accuracy'])} test, {percent(metrics['train_accuracy'])} train",
        f"objective    {metrics['primal']:.8g} at beta {metrics['beta']:.6g} ({metrics['loss']} loss)",
        f"lower bound  {metrics['dual']:.8g}",
        f"gap          {metrics['rel_gap']:.2e} relative",
        f"scope        {metrics['scope']}: {metrics['meaning']}",
        f"filters      {metrics['n_filters']}",
        f"status       {metrics['status']} after {metrics['seconds']:.1f} s, {metrics['peak_memory_mb']:.0f} MiB",
    ]
    console.print("\n".join(lines), highlight=False)


def _finish(metrics: dict[str, Any], json_output: bool) -> NoReturn:
    if json_output:
        sys.stdout.write(json.dumps(metrics) + "\n")
        sys.stdout.flush()
    raise typer.Exit(0 if metrics["status"] == "converged" else 3)


class _Guard:
    """Turn the errors that convcvx raises on purpose into one line on standard error and exit status 2."""

    def __init__(self, json_output: bool) -> None:
        self._json = json_output

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ConvcvxError):
            message = " ".join(str(error).split())
            print(f"convcvx: error: {message}", file=sys.stderr)
            if self._json:
                print(json.dumps({"error": message, "status": "bad_input"}))
            raise typer.Exit(2)
        if isinstance(error, KeyboardInterrupt):
            print("convcvx: interrupted; go on with --resume", file=sys.stderr)
            raise typer.Exit(130)


def main() -> None:
    """Entry point of the `convcvx` command."""
    app()


if __name__ == "__main__":
    main()
