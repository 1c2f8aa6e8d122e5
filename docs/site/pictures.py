"""The pictures of the documentation: each function computes one and returns it as SVG for a page.

Lines and letters take the colour of the page's text, so that they are seen in light and dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from itertools import pairwise
from math import comb

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

import convcvx
from convcvx.data import spiral

INK = "#010203"
"""Stands for the colour of the page's text."""
CLASSES = ("#e4572e", "#2e86ab", "#7fb069")
"""Colours of the classes, seen on white and on black."""
BETA = 0.02
"""Weight decay of the spiral in the pictures: so much that the optimal network has few filters, told apart by eye."""
STYLE = {
    "svg.fonttype": "none",  # text as text: read aloud, searched, in the page's font
    "svg.hashsalt": "convcvx",  # the same file from the same picture
    "savefig.transparent": True,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


def as_svg(figure: Figure, alt: str) -> str:
    """The figure as an element of the page, described by `alt`."""
    text = StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    svg = text.getvalue()
    svg = (
        svg[svg.index("<svg") :].replace(INK, "currentColor").replace("<svg", f'<svg role="img" aria-label="{alt}"', 1)
    )
    return f'<figure style="max-width: 100%; overflow-x: auto">{svg}</figure>'


@matplotlib.rc_context(STYLE)
def along_path(solutions: Sequence[convcvx.Solution]) -> str:
    """Objective, bound and number of filters along a path of weight decays."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(5, 4.5), sharex=True)
    betas = [solution.certificate.beta for solution in solutions]
    above.plot(
        betas, [solution.certificate.primal for solution in solutions], "o-", color=CLASSES[1], label="objective"
    )
    above.plot(
        betas, [s.certificate.dual for s in solutions], "_", color=CLASSES[0], ms=14, label="lower bound (proved)"
    )
    above.set(ylabel="objective", xscale="log")
    above.legend()
    below.plot(betas, [solution.n_filters for solution in solutions], "o-", color=CLASSES[1])
    below.set(ylabel="filters", xlabel="weight decay")
    return as_svg(figure, "Objective, lower bound and number of filters against weight decay")


@matplotlib.rc_context(STYLE)
def arrangement() -> str:
    """The spiral, and the cones of filters that its points cut out: one line for each point."""
    x, y = spiral(60)
    solution = convcvx.solve(x, y, BETA, intercept=False)
    figure, (data, filters) = plt.subplots(1, 2, figsize=(8, 4))
    for label, colour in enumerate(CLASSES):
        data.scatter(*x[y == label].T, s=18, color=colour)
    chosen = x[::10]
    data.scatter(*chosen.T, s=80, facecolors="none", edgecolors=INK)
    data.set(title="60 points; six of them are ringed", aspect="equal")
    normal = chosen[:, ::-1] * (-1, 1) / np.linalg.norm(chosen, axis=1, keepdims=True)
    edges = np.sort(np.arctan2(*np.concatenate([normal, -normal]).T[::-1]))
    for i, (start, end) in enumerate(zip(edges, np.append(edges[1:], edges[0] + 2 * np.pi), strict=True)):
        turn = np.append(np.linspace(start, end, 20), start)
        corner = np.array([[0.0], [0.0]])
        wedge = np.concatenate([corner, [np.cos(turn[:-1]), np.sin(turn[:-1])]], axis=1)
        filters.fill(*wedge, color=CLASSES[i % 3], alpha=0.25, lw=0)
    for direction in normal:
        filters.plot(*np.outer(direction, (-1.1, 1.1)), color=INK, lw=0.8)
    for filter_ in np.asarray(solution.filters):
        filters.annotate("", filter_, (0, 0), arrowprops={"arrowstyle": "->", "color": INK, "lw": 1.6})
    filters.set(title="their 6 lines cut the filters into 12 cones", aspect="equal")
    filters.axis("off")
    return as_svg(figure, "Left: points of the spiral. Right: lines through zero cut the plane of filters into cones")


@matplotlib.rc_context(STYLE)
def dual() -> str:
    """g around the circle of filters, of the optimal network and of the one without filters."""
    x, y = spiral(60)
    best = convcvx.solve(x, y, BETA, intercept=False)
    none = convcvx.Solution.empty(2, 1, 3)
    angle = np.linspace(0, 360, 2881)
    around = np.stack([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
    figure, axis = plt.subplots(figsize=(7, 3.6))
    for solution, colour, label in ((none, CLASSES[0], "no filter yet"), (best, CLASSES[1], "the optimal network")):
        hidden = np.maximum(x @ np.asarray(solution.filters).T, 0)
        residual = np.eye(3)[y] - hidden @ np.asarray(solution.weights)[:, 0]
        g = np.linalg.norm(np.maximum(x @ around, 0).T @ residual / len(x), axis=1)
        axis.plot(angle, g / BETA, color=colour, label=label)
    at = np.degrees(np.arctan2(*np.asarray(best.filters).T[::-1])) % 360
    axis.plot(at, np.ones_like(at), "o", color=INK, ms=4, label="its filters")
    axis.axhline(1, color=INK, lw=0.8, ls="--")
    axis.set(xlabel="direction of the filter u, degrees", ylabel="g(u) / β", xticks=range(0, 361, 60))
    axis.legend()
    return as_svg(figure, "g over beta against the direction of the filter: at the optimum it never exceeds one")


@matplotlib.rc_context(STYLE)
def cells() -> str:
    """How many cones there are at most, by the number of patches and the rank of the filters."""
    figure, axis = plt.subplots(figsize=(5, 3.6))
    patches = np.unique(np.geomspace(10, 1e6, 60).astype(int))
    for rank, style in ((2, "-"), (3, "--"), (4, "-."), (9, ":")):
        most = [2 * sum(comb(int(n) - 1, k) for k in range(rank)) for n in patches]
        axis.loglog(patches, [float(m) for m in most], style, color=INK, label=f"rank {rank}")
    axis.set(xlabel="patches N", ylabel="activation patterns, at most", ylim=(10, 1e30))
    axis.legend()
    return as_svg(
        figure, "Activation patterns against the number of patches: straight lines whose slope is the rank less one"
    )


@matplotlib.rc_context(STYLE)
def decision_chart() -> str:
    """Which training to begin with."""
    figure, axis = plt.subplots(figsize=(5.4, 6.6))
    axis.set(xlim=(0, 10), ylim=(0, 12))
    axis.axis("off")
    questions = (
        ("What do you want?", None, None),
        ("accuracy on\nmany images?", "train --data …\n(no other option), or\n--preset mnist, cifar10", "yes"),
        ("a proof for\nmany images?", "--rank 2 --subspaces 4\n--beta-ratio 0.01", "yes"),
        ("a proof for rows of\n2 or 3 numbers?", "convcvx.solve:\noracle exact is chosen", "yes"),
        ("a small gap,\nproved or not?", "--pool 4 --beta-ratio 0.01\n--tol 0.05", "yes"),
        ("how far a network\nof yours is?", "convcvx certify FILE\n--data … --beta …", "yes"),
    )
    heights = np.linspace(11.3, 0.9, len(questions))
    box = {"boxstyle": "round,pad=0.4", "facecolor": "none"}
    for (question, answer, word), height in zip(questions, heights, strict=True):
        axis.text(2.4, height, question, ha="center", va="center", bbox=box | {"edgecolor": INK})
        if answer is not None:
            axis.text(7.6, height, answer, ha="center", va="center", bbox=box | {"edgecolor": CLASSES[1]})
            axis.annotate("", (5.3, height), (4.5, height), arrowprops={"arrowstyle": "->", "color": INK})
            axis.text(4.9, height + 0.2, word, ha="center", fontsize=8)
    for above, below in pairwise(heights):
        axis.annotate("", (2.4, below + 0.6), (2.4, above - 0.6), arrowprops={"arrowstyle": "->", "color": INK})
    return as_svg(figure, "A chart from what you want to the command to begin with; the table below says the same")
