"""Solutions along a path of weight decays, and what a notebook shows of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

from convcvx.display.words import counted, label, number, text
from convcvx.errors import InputError
from convcvx.solution import Solution

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = ("beta", "objective", "lower_bound", "rel_gap", "scope", "n_filters")
"""What is kept of a step."""


class SolutionPath(Iterator[Solution]):
    """An iterator over solutions that are trained when they are asked for; it keeps their numbers, not them.

    Attributes
    ----------
    steps : list of dict
        Of each solution so far: beta, objective, lower_bound, rel_gap, scope, n_filters.
    """

    def __init__(self, solutions: Iterator[Solution]) -> None:
        self._solutions = solutions
        self.steps: list[dict[str, Any]] = []

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Solution:
        solution = next(self._solutions)
        certificate = solution.certificate
        assert certificate is not None  # that of `solve`
        found = certificate.beta, certificate.primal, certificate.dual, certificate.rel_gap, certificate.scope
        self.steps.append(dict(zip(SHOWN, (*found, solution.n_filters), strict=True)))
        return solution

    def __repr__(self) -> str:
        shown = [", ".join(f"{name} {number(step[name])}" for name in SHOWN) for step in self.steps]
        return "\n".join([f"path, {counted(len(self.steps), 'solution')} so far", *shown])

    def plot(self) -> Figure:
        """Objective, lower bound and number of filters of the solutions so far, against β: a matplotlib figure.

        Raises
        ------
        InputError
            Where none was asked for yet.
        """
        from convcvx.display.figures import path_figure  # matplotlib: on use

        if not self.steps:
            raise InputError("the path has no solution yet: take them first, as by solutions = list(path)")
        return path_figure(self.steps)

    def _repr_html_(self) -> str:
        from convcvx.display.html import notebook  # Jinja: on use

        return notebook(
            title=f"Path: {len(self.steps)} solutions so far",
            columns=list(map(label, SHOWN)),
            table=[[text(name, step[name]) for name in SHOWN] for step in self.steps],
        )
