"""A trained two-layer network in the convex model's own variables, how the solver got there, and why it stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import torch
from torch import Tensor

from convcvx.activations import RELU, Activation, unit_neurons
from convcvx.display.words import claims, counted, rows
from convcvx.errors import InputError
from convcvx.terms.scope import Scope
from convcvx.terms.status import Status

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from convcvx.certificate import Certificate
    from convcvx.patches import PatchEmbedding
    from convcvx.pooling import Pooling


class Round(TypedDict):
    """What the history keeps of a round; JSON as it is."""

    round: int
    """Rounds behind the network that the oracle was asked about."""
    objective: float
    lower_bound: float
    """The best one proved by then if the scope is global, else what this round's search shows; never above the
    objective."""
    rel_gap: float
    g_max: float
    """What the dual point was scaled by."""
    scope: Scope
    """Or, from a file, its text."""
    n_filters: int
    seconds: float
    """Since the training began, those of earlier sessions included."""
    proved_g: NotRequired[float]
    """Of a bound proved of all filters: what g was proved to be at most, at the dual point of the solution."""
    images: NotRequired[int]
    """Size of the sample, before the solver has come to all images."""
    relaxation: NotRequired[float]
    """Of solver copositive: the value of the program that its backend reported."""
    gated_primal: NotRequired[float]
    """Of solver gated, here and below: what became of the gated program, in its first round."""
    gated_dual: NotRequired[float]
    gated_iterations: NotRequired[int]
    closed_form: NotRequired[dict[str, Any]]
    """Of solver closed-form: the conditions."""
    dictionary_gap: NotRequired[float]
    """Of a start from a dictionary: how far its weights are from optimal ones."""


@dataclass(frozen=True)
class Solution:
    """f(x) = Σ_j Σ_p φ_p(x; u_j) V_j[p,:] + b.

    Attributes
    ----------
    filters : Tensor (m, r) float64
        u_j, of unit norm.
    weights : Tensor (m, P, c) float64
        V_j.
    intercept : Tensor (c,) float64
        b; zero without an intercept.
    status : Status
        Or, from a file, its text: "converged", or what stopped the solver short of `tol`.
    history : list of Round
        One record a round.
    rounds : int
        Rounds behind this solution, those of earlier sessions included.
    certificate : Certificate or None
    embedding, pooling, activation : PatchEmbedding, Pooling, Activation
        What the filters act on, and what is made of their responses.
    dual_point : Tensor (n, c) float64 or None
        Z of the best lower bound that a rigorous oracle proved on the way; from it a certificate proves it anew.
    """

    filters: Tensor
    weights: Tensor
    intercept: Tensor
    status: Status = Status.RUNNING
    history: list[Round] = field(default_factory=list)
    rounds: int = 0
    certificate: Certificate | None = None
    embedding: PatchEmbedding | None = None
    pooling: Pooling | None = None
    dual_point: Tensor | None = None
    activation: Activation = RELU

    def __post_init__(self) -> None:
        object.__setattr__(self, "status", Status(self.status))

    @classmethod
    def empty(cls, dim: int, n_cells: int, n_outputs: int) -> Solution:
        """The network without filters."""
        double = torch.float64
        return cls(
            torch.zeros(0, dim, dtype=double),
            torch.zeros(0, n_cells, n_outputs, dtype=double),
            torch.zeros(n_outputs, dtype=double),
        )

    @property
    def n_filters(self) -> int:
        return len(self.filters)

    def __str__(self) -> str:
        first = f"{counted(self.n_filters, 'filter')}, status {self.status}"
        if self.certificate is not None:
            return f"{first}\n{self.certificate}"
        if not self.history:
            return first
        last = self.history[-1]
        bound = f"lower bound ({last['scope']}) {last['lower_bound']:.8g}, relative gap {last['rel_gap']:.2e}"
        return f"{first}\nround {last['round']}: objective {last['objective']:.8g}, {bound}"

    __repr__ = __str__  # a prompt would show every tensor

    def _repr_html_(self) -> str:
        from convcvx.display.html import notebook  # Jinja: on use

        said = {} if self.certificate is None else {"claims": claims(asdict(self.certificate))}
        numbers: dict[str, Any] = {"n_filters": self.n_filters, "rounds": self.rounds}
        numbers |= {name: self.history[-1][name] for name in ("objective", "seconds")} if self.history else {}
        return notebook(title=f"Solution: {self.status.meaning}", rows=rows(numbers), **said)

    def plot(self) -> Figure:
        """Objective and relative gap of every round against seconds: a matplotlib figure.

        Raises
        ------
        InputError
            For a solution without a history.
        """
        from convcvx.display.figures import convergence_figure  # matplotlib: on use

        if not self.history:
            raise InputError("the solution has no history to plot: it was not trained; plot one that solve or fit gave")
        last = self.history[-1]
        bound, scope = last["lower_bound"], last["scope"]
        if self.certificate is not None:
            bound, scope = self.certificate.dual, self.certificate.scope
        return convergence_figure(self.history, bound, scope)

    def to_frame(self) -> DataFrame:
        """The history as a pandas data frame: a row a round, columns as in `Round`.

        Raises
        ------
        InputError
            Without pandas: `pip install 'convcvx[pandas]'`.
        """
        try:
            from pandas import DataFrame
        except ImportError:
            raise InputError("a data frame needs pandas: pip install 'convcvx[pandas]'") from None
        return DataFrame([{**record, "scope": str(record["scope"])} for record in self.history])

    def shifted(self, offset: Tensor | float) -> Solution:
        """The same solution with `offset` (c,) added to its outputs; see `Problem.offset`."""
        return replace(self, intercept=self.intercept + offset)

    def with_parameters(self, filters: Tensor, weights: Tensor, intercept: Tensor) -> Solution:
        """The same solution with other parameters, filters of any norm: see `unit_neurons`."""
        filters, weights = unit_neurons(filters, weights)
        return replace(self, filters=filters, weights=weights, intercept=intercept)


Callback = Callable[[Solution], object]
"""Called with the solution after every round; the training ends where it returns True."""
