"""Plots of a run and its report: one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import math
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from convcvx.network.two_layer import two_layer_cnn
from convcvx.optimum import told
from convcvx.stack.jobs import StackRun
from convcvx.training.run import Run

CONVEX_COLOUR = "#1b5e9b"
"""Of curves of the convex training: blue, as the page's own."""
TWIN_COLOUR = "#c2571a"
"""Of curves of the twin: orange, which eyes that see no red tell from blue."""
BOUND_COLOUR = "#555555"
"""Of the lower bound: grey, as it is no training."""
DOTS = 12
"""Dots of the gallery for an entry of a kernel, across and down."""
MARGIN = 2
"""Dots of white around each kernel of the gallery."""
SMALLEST_GAP = 1e-12
"""Relative gap that smaller ones are drawn as: a logarithmic axis has no zero."""
MOST_FILTERS = 100
"""Filters drawn in the gallery, those with the largest output weights: more would be too small to see."""

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { text-align: left; padding: 0.2rem 1rem 0.2rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
th { font-weight: 600; }
img { max-width: 100%; }
.scope { border-left: 4px solid #1b5e9b; padding-left: 1rem; }
"""
"""Of the page: readable on any screen, and in print."""


def write_report(run: Run) -> Path:
    """Write the report of a finished run to report.html in its folder."""
    metrics = run.metrics
    parts = [
        _result(metrics),
        _figure(convergence_figure(run.history, metrics["dual"], metrics["scope"]), "Objective against time"),
        _figure(filters_figure(two_layer_cnn(run.folder).state_dict()["0.weight"]), "Filters, by output weight"),
    ]
    for comparison in run.comparisons:
        parts.append(_comparison(run, comparison))
    parts += ["<h2>Options</h2>", _table(_shown(run.config.to_dict()))]
    return run.save_report(_page(run.folder.name, "\n".join(parts)))


def _page(title: str, body: str) -> str:
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<title>convcvx: {escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
</body>
</html>
"""


def _result(metrics: dict[str, Any]) -> str:
    numbers = {name: value for name, value in metrics.items() if name not in ("meaning", "out", "optimum")}
    lines = "".join(f"<br/>{name.capitalize()}: {escape(text)}." for name, text in told(metrics).items())
    return f"""<p class="scope">Objective <b>{metrics["primal"]:.6g}</b>, lower bound <b>{metrics["dual"]:.6g}</b>,
relative gap <b>{metrics["rel_gap"]:.2e}</b>.<br/>Scope <b>{escape(metrics["scope"])}</b>:
{escape(metrics["meaning"])}.{lines}</p>
<h2>Result</h2>
{_table(_shown(numbers))}"""


def _comparison(run: Run, comparison: dict[str, Any]) -> str:
    convex, twin, tune = comparison["convex"], comparison["twin"], comparison["finetune"]
    columns = {"convex": convex, twin["optimizer"]: twin} | ({"fine-tuned": tune} if tune else {})
    figure = comparison_figure(
        run.history, [part["history"] for part in twin["seeds"]], convex["dual"], convex["scope"], twin["optimizer"]
    )
    rows = ("objective", "rel_gap", "test_accuracy", "train_accuracy", "seconds", "core_seconds", "n_filters")
    table = _columns(columns, rows)
    return f"<h2>Beside {escape(twin['optimizer'])}</h2>{table}" + _figure(
        figure, "Objective against time, the twin's too"
    )


def write_stack_report(stack: StackRun) -> Path:
    """Write the report of a finished stack to report.html in its folder."""
    metrics = stack.metrics
    records = {f"stage {record['stage']}": record for record in metrics["stages"]}
    rows = (
        *("kept", "primal", "dual", "rel_gap", "scope", "n_filters"),
        *("train_accuracy", "validation_accuracy", "test_accuracy", "seconds"),
        *(("score", "joint_objective", "joint_rel_gap", "joint_beta") if metrics.get("heads") == "joint" else ()),
    )
    said = "".join(
        f"<br/>{name.capitalize()}, scope <b>{escape(record['scope'])}</b>: {escape(record['meaning'])}."
        for name, record in records.items()
    )
    whole = {name: value for name, value in metrics.items() if name not in ("stages", "out")}
    parts = [
        f'<p class="scope">Each gap is that of its stage on the features it was given.{said}</p>',
        _columns(records, rows),
        "<h2>Whole model</h2>",
        _table(_shown(whole)),
    ]
    for name, record in records.items():
        figure = convergence_figure(stack.stage(record["stage"]).history, record["dual"], record["scope"])
        parts.append(_figure(figure, f"{name.capitalize()}: objective against time"))
    return stack.save_report(_page(stack.folder.name, "\n".join(parts)))


def convergence_figure(history: list[dict[str, Any]], lower_bound: float, scope: str) -> Figure:
    """Objective against seconds, and the relative gap of every round."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    objective, gap = figure.subplots(1, 2)
    seconds = [record["seconds"] for record in history]
    objectives = [_number(record["objective"]) for record in history]
    gaps = [max(_number(record["rel_gap"]), SMALLEST_GAP) for record in history]
    objective.plot(seconds, objectives, "o-", color=CONVEX_COLOUR, ms=3, label="objective")
    _bound(objective, lower_bound, scope)
    gap.semilogy(seconds, gaps, "o-", color=CONVEX_COLOUR, ms=3)
    for axes, title in ((objective, "objective"), (gap, f"relative gap ({scope})")):
        axes.set(xlabel="seconds", title=title)
        axes.grid(alpha=0.3)
    objective.legend(frameon=False)
    return figure


def comparison_figure(
    history: list[dict[str, Any]],
    twins: list[list[dict[str, Any]]],
    lower_bound: float,
    scope: str,
    optimizer: str,
) -> Figure:
    """Objective above the lower bound against seconds: convex training beside every seed of the twin."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [record["seconds"] for record in history],
        [_number(record["objective"]) for record in history],
        "o-",
        color=CONVEX_COLOUR,
        ms=3,
        label="convex",
    )
    for k, twin in enumerate(twins):
        axes.plot(
            [record["seconds"] for record in twin],
            [_number(record["objective"]) for record in twin],
            color=TWIN_COLOUR,
            alpha=0.8,
            label=f"{optimizer}, {len(twins)} seeds" if k == 0 else None,
        )
    _bound(axes, lower_bound, scope)
    axes.set(xlabel="seconds", ylabel="objective", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    return figure


def filters_figure(kernels: Tensor) -> Figure:
    """Kernels (m, C, kh, kw) as pictures, each scaled by its own largest entry; three channels are drawn as RGB."""
    order = kernels.flatten(1).norm(dim=1).argsort(descending=True)[:MOST_FILTERS]
    kernels = kernels[order].detach()
    across = math.ceil(math.sqrt(2 * len(kernels)))
    down = math.ceil(len(kernels) / across)
    scaled = 0.5 + 0.5 * kernels / kernels.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
    scaled = scaled if scaled.shape[1] == 3 else scaled.mean(dim=1, keepdim=True)
    tiles = F.pad(repeat(scaled, "m c h w -> m c (h a) (w b)", a=DOTS, b=DOTS), 4 * (MARGIN,), value=1.0)
    blank = tiles.new_ones(down * across - len(tiles), *tiles.shape[1:])
    mosaic = rearrange(torch.cat([tiles, blank]), "(down across) c h w -> (down h) (across w) c", across=across)
    figure = Figure(figsize=(9, 9 * mosaic.shape[0] / mosaic.shape[1] + 0.1), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.imshow(mosaic.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    return figure


def _number(value: float | None) -> float:
    """NaN, which plots leave out, for the null that JSON has for infinity."""
    return math.nan if value is None else value


def _bound(axes: Axes, lower_bound: float, scope: str) -> None:
    label = "lower bound" if scope == "global" else f"lower bound ({scope})"
    axes.axhline(lower_bound, color=BOUND_COLOUR, ls="--", lw=1, label=label)


def png(figure: Figure, dpi: int = 110) -> bytes:
    """The figure as a PNG file."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def _figure(figure: Figure, title: str) -> str:
    data = base64.b64encode(png(figure)).decode()
    return f'<h3>{escape(title)}</h3><img alt="{escape(title)}" src="data:image/png;base64,{data}"/>'


def _table(values: dict[str, str]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in values.items())
    return f"<table>{rows}</table>"


def _columns(columns: dict[str, dict[str, Any]], rows: tuple[str, ...]) -> str:
    """A table with a column for each of `columns` and a line for each of `rows`."""
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *columns))
    lines = ""
    for row in rows:
        cells = "".join(f"<td>{escape(_text(column.get(row)))}</td>" for column in columns.values())
        lines += f"<tr><th>{row}</th>{cells}</tr>"
    return f"<table><tr>{head}</tr>{lines}</table>"


def _shown(values: dict[str, Any]) -> dict[str, str]:
    return {name: _text(value) for name, value in values.items() if value is not None}


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
