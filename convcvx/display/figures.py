"""The figures: objective and gap against time, the race with a twin, a path of weight decays, filters, confusions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from matplotlib.axes import Axes
from torch import Tensor

from convcvx.display.pictures import by_weight, kernel_shades
from convcvx.display.theme import BOUND_COLOUR, CONVEX_COLOUR, INK_COLOUR, TWIN_COLOUR, Drawing, look
from convcvx.display.words import OPTIMIZERS

Records = Sequence[Mapping[str, Any]]
"""A history, or a path: one record a round, or a β."""
WIDE = (9.0, 3.4)
"""Inches, across and down, of a figure as wide as a page."""
HALF = (4.6, 3.1)
"""The same of one half as wide, which a phone shows as well."""
DOTTED = 60
"""Records up to which each has a dot: beyond, the dots hide the line."""
SMALLEST_GAP = 1e-12
"""Relative gap that smaller ones are drawn as: a logarithmic axis has no zero."""
SPREAD = 10.0
"""From this ratio of the largest objective to the smallest on, an axis is logarithmic: within it, plain numbers read
better."""
FILTERS_DRAWN = 100
"""Filters drawn in the gallery, those with the largest weights: more would be too small to see."""
DOTS = 12
"""Dots of the gallery for an entry of a kernel, across and down."""
MARGIN = 2
"""Dots of white around each kernel of the gallery."""
NAMED_CLASSES = 40
"""Classes up to which a confusion matrix has their names."""
COUNTED_CLASSES = 12
"""Classes up to which a confusion matrix has its numbers."""


@look
def convergence_figure(history: Records, lower_bound: float, scope: str) -> Drawing:
    """Objective and relative gap of every round, against seconds, side by side."""
    figure = Drawing(figsize=WIDE, layout="constrained")
    objective, gap = figure.subplots(1, 2)
    _objective(objective, history, lower_bound, scope)
    _gap(gap, history, scope)
    return figure


@look
def objective_figure(history: Records, lower_bound: float, scope: str) -> Drawing:
    """Objective of every round against seconds, above the lower bound."""
    figure = Drawing(figsize=HALF, layout="constrained")
    _objective(figure.subplots(), history, lower_bound, scope)
    return figure


@look
def gap_figure(history: Records, scope: str) -> Drawing:
    """Relative gap of every round against seconds."""
    figure = Drawing(figsize=HALF, layout="constrained")
    _gap(figure.subplots(), history, scope)
    return figure


def _objective(axes: Axes, history: Records, lower_bound: float, scope: str) -> None:
    axes.plot(*_against(history, "objective"), _line(history), color=CONVEX_COLOUR, ms=3, label="objective")
    _bound(axes, lower_bound, scope)
    axes.set(xlabel="seconds", title="Objective")
    axes.legend()


def _gap(axes: Axes, history: Records, scope: str) -> None:
    seconds, gaps = _against(history, "rel_gap")
    axes.semilogy(seconds, [max(gap, SMALLEST_GAP) for gap in gaps], _line(history), color=CONVEX_COLOUR, ms=3)
    axes.set(xlabel="seconds", title=f"Relative gap ({_weakest(history, scope)})")


def _weakest(history: Records, scope: str) -> str:
    """What the gaps of all rounds are: proved, or the scope of one that is not; on a sample of images an estimate."""
    scopes = {"heuristic" if "images" in record else str(record.get("scope", scope)) for record in history}
    return min(scopes - {"global"}, default="proved" if scope == "global" else scope)


@look
def comparison_figure(
    history: Records, twins: Sequence[Records], lower_bound: float, scope: str, optimizer: str
) -> Drawing:
    """The race: objective against the logarithm of seconds, of convex training and every seed of its twin.

    A dot of a twin is the end of an epoch, a dot of the convex training that of a round.
    """
    figure = Drawing(figsize=(5.2, 3.8), layout="constrained")
    axes = figure.subplots()
    every = [record for part in (history, *twins) for record in part]
    # A logarithmic axis has no zero: what is at 0 s is drawn at half the first time there is.
    times = [record["seconds"] for record in every if record["seconds"] > 0] or [1.0]
    soonest = min(times) / 2

    def race(part: Records, line: str, **about: Any) -> None:
        seconds, objectives = _against(part, "objective")
        axes.plot([max(second, soonest) for second in seconds], objectives, line, **about)

    race(history, _line(history), color=CONVEX_COLOUR, ms=3.5, label="convex, a dot a round")
    for k, twin in enumerate(twins):
        name = f"{OPTIMIZERS.get(optimizer, optimizer)}, {len(twins)} {'seed' if len(twins) == 1 else 'seeds'}"
        label = f"{name}, a dot an epoch" if k == 0 else None
        race(twin, _line(twin).replace("o", "."), color=TWIN_COLOUR, alpha=0.8, label=label)
    _bound(axes, lower_bound, scope)
    values = [value for value in (lower_bound, *(_number(record["objective"]) for record in every)) if value > 0]
    wide = bool(values) and max(values) >= SPREAD * min(values)
    axes.set(xlabel="seconds", ylabel="objective", xscale="log", yscale="log" if wide else "linear")
    axes.set_xlim(10.0 ** math.floor(math.log10(soonest)), 10.0 ** math.ceil(math.log10(max(times) * 1.01)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    figure.legend(loc="outside upper left")
    return figure


@look
def path_figure(path: Records, chosen: float | None = None) -> Drawing:
    """Along weight decays: what each step says of its objective or of held-out images, and how many filters it has.

    Parameters
    ----------
    path : records
        With `beta` and `n_filters`, and `objective` with its `lower_bound`, or `held_out_error` with `held_out_loss`.
    chosen : float, optional
        The β to mark.
    """
    figure = Drawing(figsize=(5.2, 4.8), layout="constrained")
    values, filters = figure.subplots(2, 1, sharex=True)
    betas = [step["beta"] for step in path]
    held_out = "held_out_loss" in path[0] if path else False
    if held_out:
        wrong = any(step["held_out_error"] > 0 for step in path)  # targets that are no classes have no such share
        key, title = ("held_out_error", "Held-out error") if wrong else ("held_out_loss", "Held-out loss")
        values.plot(betas, [_number(step[key]) for step in path], "o-", color=CONVEX_COLOUR, ms=4)
    else:
        title = "Objective"
        values.plot(betas, [_number(step["objective"]) for step in path], "o-", color=CONVEX_COLOUR, ms=4, label=title)
        bounds = [_number(step["lower_bound"]) for step in path]
        values.plot(betas, bounds, "--", color=BOUND_COLOUR, lw=1.2, label="lower bound")
        values.legend()
    filters.plot(betas, [step["n_filters"] for step in path], "o-", color=CONVEX_COLOUR, ms=4)
    for axes, name in ((values, title), (filters, "Filters")):
        axes.set(xscale="log", title=name)
        if chosen is not None:
            axes.axvline(chosen, color=TWIN_COLOUR, lw=1.2, ls=":", label="chosen")
    filters.set_xlabel("weight decay β")
    if chosen is not None:
        filters.legend()
    return figure


@look
def bounds_figure(claims: Sequence[tuple[str, float, bool]], objective: float) -> Drawing:
    """The objective of a network, and lower bounds: name, value, and whether no network is below.

    A line leads from zero to its bound, dashed unless no network is on it: it is long where the bound says much.
    """
    figure = Drawing(figsize=(4.6, 0.9 + 0.35 * len(claims)), layout="constrained")
    axes = figure.subplots()
    for row, (_, value, proved) in enumerate(claims, start=1):
        axes.plot([0, value], [row, row], "-" if proved else "--", color=BOUND_COLOUR, lw=2)
        axes.plot([value], [row], "|", color=BOUND_COLOUR, ms=14, mew=2)
    axes.axvline(objective, color=CONVEX_COLOUR, lw=2)
    axes.set_yticks(range(len(claims) + 1), ["this network", *(name for name, _, _ in claims)])
    axes.plot([objective], [0], "o", color=CONVEX_COLOUR)
    axes.set(xlabel="objective", ylim=(len(claims) + 0.5, -0.5))
    axes.set_xlim(0, 1.04 * objective if objective > 0 else 1.0)
    return figure


@look
def filters_figure(kernels: Tensor) -> Drawing:
    """Kernels (m, C, kh, kw) as pictures, each scaled by its own largest entry; three channels are drawn as RGB."""
    shades = kernel_shades(kernels[by_weight(kernels)[:FILTERS_DRAWN]])
    across = max(1, math.ceil(math.sqrt(2 * len(shades))))
    down = math.ceil(len(shades) / across)
    tiles = F.pad(repeat(shades, "m c h w -> m c (h a) (w b)", a=DOTS, b=DOTS), 4 * (MARGIN,), value=1.0)
    blank = tiles.new_ones(down * across - len(tiles), *tiles.shape[1:])
    mosaic = rearrange(torch.cat([tiles, blank]), "(down across) c h w -> (down h) (across w) c", across=across)
    figure = Drawing(figsize=(9, 9 * mosaic.shape[0] / mosaic.shape[1] + 0.1), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.imshow(mosaic.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    return figure


@look
def confusion_figure(counts: Tensor, classes: Sequence[str]) -> Drawing:
    """Counts (c, c), a row for a true class, a column for what it was taken for; shades are shares of the row."""
    shares = counts.double() / counts.sum(dim=1, keepdim=True).clamp_min(1)
    c = len(counts)
    side = min(8.0, 2.2 + 0.36 * c)
    figure = Drawing(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.grid(visible=False)
    axes.set(xlabel="taken for", ylabel="true class")
    if c <= NAMED_CLASSES:
        names = [name if len(name) <= 16 else f"{name[:15]}…" for name in classes]
        axes.set_xticks(range(c), names, rotation=90)
        axes.set_yticks(range(c), names)
        for written in (*axes.get_xticklabels(), *axes.get_yticklabels()):
            written.set_parse_math(False)  # names of classes are no formulas
    if c <= COUNTED_CLASSES:
        for row, column in counts.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.5 else INK_COLOUR
            axes.text(column, row, str(int(counts[row, column])), ha="center", va="center", color=colour)
    return figure


def _against(history: Records, name: str) -> tuple[list[float], list[float]]:
    """The seconds of a history, and what it says under a name."""
    return [record["seconds"] for record in history], [_number(record[name]) for record in history]


def _line(history: Records) -> str:
    return "o-" if len(history) <= DOTTED else "-"


def _number(value: float | None) -> float:
    """NaN, which plots leave out, for the null that JSON has for infinity."""
    return math.nan if value is None else value


def _bound(axes: Axes, lower_bound: float, scope: str) -> None:
    label = "lower bound (proved)" if scope == "global" else f"lower bound ({scope})"
    axes.axhline(lower_bound, color=BOUND_COLOUR, ls="--", lw=1.2, label=label)
