"""What a certificate says: values, their scope, and the words for both."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeGuard

from convcvx.activations import QUADRATIC
from convcvx.certificate.data import Space, same_space
from convcvx.display.words import bounds, claims, restriction, rows, told
from convcvx.errors import InputError
from convcvx.oracles.contradiction import contradiction
from convcvx.oracles.lengths import NAME as LENGTHS
from convcvx.problem import relative_gap
from convcvx.terms.scope import Scope
from convcvx.terms.stop import Stop

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLOAT32_ROUNDING = 1e-4
"""Share of the objective that is taken off the lower bound when the responses are float32, and that a proof made beside
another network may be above the objective of one, for the rounding of both."""

LATER = ("pooling", "patches", "data")
"""What files of earlier versions do not say of a problem."""
SAME = ("beta", "loss", "activation", "intercept", "n_images", "patch_rank", "filter_rank", "subspaces", *LATER)
"""What certificates of one problem agree in."""
TOLD = tuple(stop for stop in Stop if stop.told)
"""Ends of a search that a certificate tells of; a file of another version may have one that none of them is."""


@dataclass(frozen=True)
class Certificate:
    """Primal and dual value of a network, and what the difference means.

    Attributes
    ----------
    primal : float
        Σ_i s_i ℓ(f_i, y_i) + β Σ_j ‖V_j‖_F at unit filters; s_i = 1/n without weights of the images.
    dual : float
        Lower bound on the optimum over networks of any width, within `scope`.
    rel_gap : float
        (primal - dual) / primal.
    scope : Scope
        Or its text: what was searched.
    beta : float
    g_max : float
        What the dual point was scaled by, against β: a true upper bound on max g, over all filters if `scope` is
        global, over those of the sampled patterns if it is sampled; the largest g found if it is heuristic.
    loss : str
    intercept : bool
    n_images, n_filters, patch_rank : int
    pooling : str or None
        As `pool=` reads it. None in files of earlier versions.
    patches : str or None
        Which patches filters see, in words. None in files of earlier versions.
    data : str or None
        A fingerprint of the data, as `convcvx.certificate.data` has it. None in files of earlier versions.
    space : tuple of float, optional
        By what the space of the filters is known again, unless filters are free. None in files of earlier versions.
    filter_rank, filter_size : int or None
        r and h: filters lie in r principal directions of the patches, of h, and networks with others are not spoken of.
        None in files of earlier versions.
    subspaces : int
        With more than one, each filter lies in one of so many subspaces of r / subspaces of these directions.
    family, family_size, family_gap : str, int, float or None
        A family of filters in words, how many these are, and how much lower than `primal`, as a share of it, the
        objective of a network over them may be at most: a proof whatever the scope is, and the gap itself if that is
        family. With flips it is of the images and their mirror images. None where no family was looked at.
    optimum : dict or None
        What it tells, as `convcvx.optimum` has it: `slope`, Σ_j ‖V_j‖, the derivative of the optimal value by β, and
        bounds `slope_low`, `slope_high` on it, `proved` or not; `active` directions found where g reaches β, and
        how many are `active_used` by the network, None where the gap is above 1 %. None in files of earlier versions.
    proved : float or None
        Lower bound on the objective of every network that is proved, whatever `scope` says of `dual`: beside an
        estimate the best that a few passes prove, weak perhaps; `dual` where that is a proof for all networks. None
        where none is known: in files of earlier versions.
    proved_gap : float or None
        (primal - proved) / primal.
    proved_by : str or None
        Which bound that was, in words.
    activation : str
        Of the networks that are spoken of; files of earlier versions, which do not say, mean relu.
    oracle : str
    search : dict
        The oracle's own statistics: starts and basins, or cells.
    train_accuracy : float or None
        Share of the images whose largest output is at the largest target, each counting for what it does in the
        objective: by the network's own intercept where a network was certified; of no meaning for real targets.
    """

    primal: float
    dual: float
    rel_gap: float
    scope: Scope
    beta: float
    g_max: float
    loss: str
    intercept: bool
    n_images: int
    n_filters: int
    patch_rank: int
    oracle: str
    search: dict[str, Any] = field(default_factory=dict)
    train_accuracy: float | None = None
    filter_rank: int | None = None
    filter_size: int | None = None
    family: str | None = None
    family_size: int | None = None
    family_gap: float | None = None
    optimum: dict[str, Any] | None = None
    proved: float | None = None
    proved_gap: float | None = None
    proved_by: str | None = None
    activation: str = "relu"
    pooling: str | None = None
    patches: str | None = None
    data: str | None = None
    space: Space | None = None
    subspaces: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "space", None if self.space is None else tuple(self.space))  # of a file it is a list
        object.__setattr__(self, "scope", Scope(self.scope))
        object.__setattr__(self, "g_max", math.inf if self.g_max is None else self.g_max)  # JSON has no infinity
        if self.scope.for_all:
            by = self.proved_by or self.oracle
            for name, value in (("proved", self.dual), ("proved_gap", self.rel_gap), ("proved_by", by)):
                object.__setattr__(self, name, value)

    @property
    def meaning(self) -> str:
        """The scope in words, and the filters meant; of a local search also what it saw; what cut the search short."""
        said = self.scope.meaning
        if self.scope is Scope.FAMILY and self.family_size:
            named = self.family or "filters"
            said = said.replace("the filters of a family", f"the {self.family_size:,} {named} of the family")
        if self.activation != "relu":
            said += f"; among networks with activation {self.activation}"
        if self.activation == str(QUADRATIC):
            said += ", whose penalty is beta * sum(norm(kernel)^2 * norm(weights))"
        if restricted := restriction(asdict(self)):
            said += f"; among networks whose filters are {restricted}"
        if self._cut_short and self.g_max == math.inf:
            return "no bound but zero, which no loss is below: the time limit left no time for a search"
        ended = self.search.get("stopped")
        cut = f"; {Stop(ended).told}" if ended in TOLD else ""
        if self._cut_short and self.oracle == LENGTHS:
            cut = "; from the lengths of the patches alone, as the time limit left no time for a search"
        if not {"starts", "basins", "unseen_mass"} <= set(self.search):
            return said + cut
        starts, ends, unseen = (self.search[name] for name in ("starts", "basins", "unseen_mass"))
        return (
            f"{said} ({starts} climbs, each from another filter, ended at {ends} different ones; one more would end at "
            f"a new one with a chance of about {unseen:.0%}){cut}"
        )

    @property
    def of_all_networks(self) -> Certificate:
        """The same network against what is proved of every network: weak, perhaps, where that is not `dual`."""
        if self.scope.for_all:
            return self
        dual, gap = (0.0, 1.0) if self.proved is None else (self.proved, relative_gap(self.primal, self.proved))
        prover = self.proved_by or self.oracle
        return replace(self, dual=dual, rel_gap=gap, scope=Scope.GLOBAL, g_max=math.inf, oracle=prover, search={})

    def check_same_problem(self, other: Certificate) -> None:
        """Raise `InputError` when `other` certifies another problem, as far as certificates tell."""
        for name in SAME:
            mine, others = getattr(self, name), getattr(other, name)
            unsaid = name in LATER and None in (mine, others)
            if mine != others and not unsaid:
                raise InputError(
                    f"the lower bound of another problem does not hold here: {name} is {mine!r}, not {others!r}"
                )
        if not same_space(self.space, other.space):
            raise InputError("the lower bound of another problem does not hold here: its filters lie in another space")

    def with_bound_of(self, other: Certificate) -> Certificate:
        """The same network against the better of two lower bounds on the same problem: a proof before an estimate.

        A bound over sampled patterns or over a family holds for the filters that it was computed for, and never passes
        to another; what is proved for every network holds for these as well. An estimate that lies above this network's
        objective is refuted by it, and not taken.

        Raises
        ------
        InputError
            When `other` certifies another problem, as far as certificates tell.
        RunError
            When what one of them proves for every network is above the objective of the other.
        """
        self.check_same_problem(other)
        for bound, primal in ((other.proved, self.primal), (self.proved, other.primal)):
            if bound is not None and bound > primal * (1 + FLOAT32_ROUNDING):
                raise contradiction(bound, primal)
        best = self
        stronger = other._standing > self._standing or self._refuted_by(other)
        if other.scope.shared and stronger and other.dual >= 0 and not other._refuted_by(self):  # NaN is no bound
            taken = {name: getattr(other, name) for name in ("dual", "scope", "g_max", "oracle", "search")}
            if other.scope.for_all:
                taken["proved_by"] = other.proved_by
            taken["dual"] = min(other.dual, self.primal)
            best = replace(self, **taken, rel_gap=relative_gap(self.primal, other.dual))
        prover = other if _better(other.proved, self.proved) else self
        if not _better(prover.proved, best.proved):
            return best
        proved = min(prover.proved, self.primal)
        gap = relative_gap(self.primal, proved)
        shown: dict[str, Any] = {"proved": proved, "proved_gap": gap, "proved_by": prover.proved_by}
        if best.scope.proved and _better(prover.proved, best.dual):  # it holds for the filters of that scope as well
            shown |= {"dual": proved, "rel_gap": gap, "oracle": prover.proved_by or prover.oracle}
            if best.scope is Scope.FAMILY:
                shown["family_gap"] = gap
        return replace(best, **shown)

    def _refuted_by(self, other: Certificate) -> bool:
        """Whether the estimate lies above the objective of another network."""
        return self.scope is Scope.HEURISTIC and self.dual > other.primal * (1 + FLOAT32_ROUNDING)

    def reaches(self, tol: float) -> bool:
        """Whether the gap is within `tol`: what a search that was cut short has not found is no sign of an optimum."""
        guessed = not self.scope.proved and self._cut_short
        proved = self.proved_gap is not None and self.proved_gap <= tol
        return proved or (self.rel_gap <= tol and not guessed)

    @property
    def _cut_short(self) -> bool:
        """Whether a time limit ended the search."""
        return self.search.get("stopped") == Stop.TIME_LIMIT

    @property
    def _standing(self) -> tuple[bool, bool, float]:
        """By which lower bounds are compared: proofs for all networks, then for some, then estimates."""
        return self.scope.for_all, self.scope.proved, self.dual

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"meaning": self.meaning}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Certificate:
        return cls(**{k: v for k, v in values.items() if k != "meaning"})

    def __str__(self) -> str:
        bound = "lower bound" if self.scope.for_all else f"lower bound ({self.scope})"
        lines = [
            f"objective {self.primal:.8g}, {bound} {self.dual:.8g}, relative gap {self.rel_gap:.2e}",
            f"scope {self.scope}: {self.meaning}",
            self.beside,
        ]
        if self.scope is not Scope.FAMILY:
            lines.insert(len(lines) if self.scope.for_all else 0, told(asdict(self)).get("family", ""))
        return "\n".join(filter(None, lines))

    def _repr_html_(self) -> str:
        from convcvx.display.html import notebook  # Jinja: on use

        values = asdict(self)
        shown = ("primal", "dual", "rel_gap", "beta", "loss", "n_filters")
        return notebook(
            title="Certificate",
            claims=claims(values),
            rows=rows({name: values[name] for name in shown}),
            note=f"Scope {self.scope}: {self.meaning}.",
        )

    def plot(self) -> Figure:
        """The objective and the lower bounds on one line, those proved for every network solid: a matplotlib figure."""
        from convcvx.display.figures import bounds_figure  # matplotlib: on use

        return bounds_figure(bounds(asdict(self)), self.primal)

    @property
    def beside(self) -> str:
        """What is proved for all networks where `dual` is not, in a line; empty where that is known already."""
        if self.scope.for_all or self.proved is None or self.proved_gap is None:
            return ""
        return (
            f"proved for every network, by {self.proved_by}: lower bound {self.proved:.8g}, "
            f"relative gap {self.proved_gap:.2e}"
        )


def _better(bound: float | None, known: float | None) -> TypeGuard[float]:
    """Whether a lower bound says more than the one known, if any; what is no number says nothing."""
    return bound is not None and not math.isnan(bound) and (known is None or not known >= bound)
