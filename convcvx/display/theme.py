"""The look of every figure, and what it becomes: a PNG on white, or an SVG in the colours of the page around it."""

from __future__ import annotations

import re
from io import BytesIO, StringIO
from typing import Any

import matplotlib
from matplotlib.figure import Figure

CONVEX_COLOUR = "#1b5e9b"
"""Of curves of the convex training: blue, as the page's own."""
TWIN_COLOUR = "#b9501a"
"""Of curves of the twin: orange, which eyes that see no red tell from blue."""
BOUND_COLOUR = "#5c636b"
"""Of the lower bound: grey, as it is no training."""
INK_COLOUR = "#1c2024"
"""Of text."""
LINE_COLOUR = "#b4bac2"
"""Of axes and grids."""
IN_PAGE = {
    CONVEX_COLOUR: "var(--convex)",
    TWIN_COLOUR: "var(--twin)",
    BOUND_COLOUR: "var(--muted)",
    INK_COLOUR: "var(--ink)",
    LINE_COLOUR: "var(--line)",
}
"""What stands for these colours in an SVG: the page has other ones in the dark."""
LOOK: dict[Any, Any] = {
    "axes.edgecolor": LINE_COLOUR,
    "axes.labelcolor": INK_COLOUR,
    "axes.titlecolor": INK_COLOUR,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE_COLOUR,
    "grid.alpha": 0.45,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": INK_COLOUR,
    "text.color": INK_COLOUR,
    "xtick.color": LINE_COLOUR,
    "ytick.color": LINE_COLOUR,
    "xtick.labelcolor": INK_COLOUR,
    "ytick.labelcolor": INK_COLOUR,
    "font.size": 10,
}
"""Of matplotlib, while a figure is drawn."""
look: Any = matplotlib.rc_context(LOOK)
"""A decorator: the function draws in `LOOK`."""
DPI = 110
"""Dots an inch of a PNG: text of 10 points is as large as that of a page."""


PIXELS = 110
"""Of a page, for an inch of a figure, at most: wider, its text is larger than that around it."""


class Drawing(Figure):
    """A figure that a notebook shows, pyplot or not."""

    def _repr_png_(self) -> bytes:
        return png(self)


def png(figure: Figure, dpi: int = DPI) -> bytes:
    """The figure as a PNG file."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def svg(figure: Figure, name: str) -> str:
    """The figure as an element of a page, its text as text; `name`, of letters and digits, is its own in the page.

    The page has to say what the variables of `IN_PAGE` are.
    """
    buffer = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    head, _, body = text.partition(">")
    head = re.sub(r' (xmlns|xmlns:xlink|version|width|height)="[^"]*"', "", head)
    widest = round(PIXELS * figure.get_figwidth())
    text = f'{head} style="max-width: {widest}px">' + body.replace("xlink:href", "href")
    for colour, variable in IN_PAGE.items():
        text = text.replace(colour, variable)
    return _own_names(text, name)


def _own_names(text: str, name: str) -> str:
    """With ids that no other figure of the page has, and none that nothing refers to."""
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))

    def renamed(found: re.Match[str]) -> str:
        return f' id="{name}-{found[1]}"' if found[1] in used else ""

    text = re.sub(r' id="([^"]*)"', renamed, text)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
