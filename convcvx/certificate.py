"""The certificate: how far a network is from the optimum over all networks of any width.

Everything is recomputed from weights and data alone, in float64; only a heuristic certificate beyond `LARGE` takes its
responses in the problem's own arithmetic. No solver is imported and none is believed.
Any Conv2d → ReLU → average or maximum pooling → Linear qualifies, whoever trained it. ReLU and pooling are positively
homogeneous, so each neuron is first balanced (‖u_j‖ = ‖V_j‖, which never raises the objective), and the intercept
re-optimised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convcvx.budget import NEVER
from convcvx.display.words import bounds, claims, rows
from convcvx.errors import InputError
from convcvx.machine.threads import sparing_threads
from convcvx.optimum import optimum_of
from convcvx.oracles import get_oracle
from convcvx.oracles.base import Oracle
from convcvx.oracles.lengths import NAME as LENGTHS
from convcvx.oracles.local import LocalOracle
from convcvx.oracles.scope import Scope
from convcvx.oracles.searched import Search
from convcvx.problem import Problem, relative_gap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGE = 1e11
"""Products n·K·h·m of a pass over all images from which on certifying in float64 would take minutes."""
LIGHT_STARTS = 64
"""Filters of the network, those with the largest weights, that a light search is given."""
HOPELESS = 0.5
"""Estimated gap from which on the search at the end of a training is left: it finds larger g only, and a larger gap."""
CONFIRMING = 12
"""Batches of climbs behind a gap that a solver believes: two persistent searches."""
FLOAT32_ROUNDING = 1e-4
"""Taken off the lower bound, as a share of the objective, when the responses are float32."""


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
    filter_rank, filter_size : int or None
        r and h: filters lie in r principal directions of the patches, of h, and networks with others are not spoken of.
        None in files of earlier versions.
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
    oracle : str
    search : dict
        The oracle's own statistics: starts and basins, or cells.
    train_accuracy : float or None
        Share of the images whose largest output is at the largest target, each counting for what it does in the
        objective; of no meaning for real targets.
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "scope", Scope(self.scope))
        if self.scope.for_all:
            for name, value in (("proved", self.dual), ("proved_gap", self.rel_gap), ("proved_by", self.oracle)):
                object.__setattr__(self, name, value)

    @property
    def meaning(self) -> str:
        """The scope in words, and the filters meant; of a local search also what it saw; what cut the search short."""
        said = self.scope.meaning
        if self.scope is Scope.FAMILY and self.family_size:
            named = self.family or "filters"
            said = said.replace("the filters of a family", f"the {self.family_size:,} {named} of the family")
        if self.filter_rank != self.filter_size:
            said += f"; among networks whose filters are of rank {self.filter_rank} of {self.filter_size}"
        stopped = self.search.get("stopped") == "time_limit"
        if stopped and self.g_max == math.inf:
            return "no bound but zero, which no loss is below: the time limit left no time for a search"
        cut = "; the time limit cut it short" if stopped else ""
        if stopped and self.oracle == LENGTHS:
            cut = "; from the lengths of the patches alone, as the time limit left no time for a search"
        if self.search.get("stopped") == "hopeless":
            cut = "; the search ended early: it shows a gap that is large and would only grow"
        if not {"starts", "basins", "unseen_mass"} <= set(self.search):
            return said + cut
        return (
            f"{said} ({self.search['starts']} climbs ended in {self.search['basins']} distinct maxima; "
            f"another climb would find a new one with probability about {self.search['unseen_mass']:.2f}, Good-Turing)"
            f"{cut}"
        )

    def with_bound_of(self, other: Certificate) -> Certificate:
        """The same network against the better of two lower bounds on the same problem: a proof before an estimate.

        A sampled bound holds for the patterns of the network it was computed for, and never passes to another.

        Raises
        ------
        InputError
            When `other` certifies another problem.
        """
        for name in ("beta", "loss", "intercept", "n_images", "patch_rank", "filter_rank"):
            if getattr(self, name) != getattr(other, name):
                raise InputError(
                    f"the lower bound of another problem does not hold here: {name} is {getattr(self, name)!r}, not "
                    f"{getattr(other, name)!r}"
                )
        taken: dict[str, Any] = {}
        if other.scope.shared and other._standing > self._standing:
            taken = {name: getattr(other, name) for name in ("dual", "scope", "g_max", "oracle", "search")}
            taken["rel_gap"] = relative_gap(self.primal, other.dual)
        if other.proved is not None and not (self.proved is not None and self.proved >= other.proved):
            proved_gap = relative_gap(self.primal, other.proved)
            taken |= {"proved": other.proved, "proved_gap": proved_gap, "proved_by": other.proved_by}
        return replace(self, **taken) if taken else self

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
        return (
            f"objective {self.primal:.8g}, {bound} {self.dual:.8g}, relative gap {self.rel_gap:.2e}\n"
            f"scope {self.scope}: {self.meaning}" + (f"\n{self.beside}" if self.beside else "")
        )

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


def judged(
    problem: Problem,
    filters: Tensor,
    weights: Tensor,
    intercept: Tensor | None = None,
    outputs: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit filters, weights and predictions of a network at its best: neurons balanced, b re-optimised.

    `problem.primal` of the last two is the objective by which networks are compared. It is never above that of the
    network as it is, with its own `intercept` (c,), from which the best one is looked for. `outputs` (n, c) are its
    predictions without an intercept, where they are known.
    """
    norms = filters.norm(dim=1)
    weights = weights * norms[:, None, None]
    alive = weights.flatten(1).norm(dim=1) > 0
    filters, weights = filters[alive] / norms[alive, None], weights[alive]
    predictions = outputs
    if predictions is None:
        predictions = problem.responses.predict(filters, weights, torch.zeros(problem.n_outputs))
    if problem.intercept:
        own = None if intercept is None else intercept.double() - problem.offset
        predictions = predictions + problem.best_intercept(predictions, own)
    return filters, weights, predictions


@sparing_threads
def certify_parameters(
    problem: Problem,
    filters: Tensor,
    weights: Tensor,
    intercept: Tensor | None = None,
    *,
    oracle: str | Oracle = "auto",
    tol: float = 1e-4,
    seed: int = 0,
    dual_point: Tensor | None = None,
    training: Sequence[Mapping[str, Any]] | None = None,
    rounds: Sequence[Mapping[str, Any]] = (),
    outputs: Tensor | None = None,
) -> Certificate:
    """Certify filters (m, r) of any norm with weights (m, P, c) on `problem`; b is re-optimised, from `intercept` (c,).

    `dual_point` (n, c) is a second chance for the lower bound, and `training` caps a local search, as in
    `certify_on`. `rounds` are records of a training, in this process, at this β, on these images or on samples of them,
    by a solver that asks an oracle: where time runs out, the best bound that a round proved on all images counts if it
    is better. `outputs` (n, c), predictions without an intercept in the problem's own arithmetic, save a pass where
    that arithmetic is good enough: beyond `LARGE`.

    Everything is computed in float64, but for a local search beyond `LARGE`: that is a light one, which starts from the
    filters with the largest weights, and responses are computed in the problem's own arithmetic, their sums in float64.
    A proof is always in float64, and rounding is on the safe side of it: docs/certificates.md. At the deadline of
    `problem` the search for filters ends, with what it has by then.

    Where the search proves nothing for all networks, or its time was over, polynomials prove what a few passes can, and
    where there was no time for these the lengths of the patches: a bound above zero in any case.
    """
    deadline, problem = problem.deadline, problem.until(NEVER)  # whose passes for the objective have to be made
    search = get_oracle(oracle, problem, tol=tol, thorough=True) if isinstance(oracle, str) else oracle
    products = problem.n * problem.responses.n_positions * problem.responses.embedding.basis.shape[1] * len(filters)
    large = products > LARGE and search.name == "local"
    given, problem = problem, problem if large else problem.with_dtype(torch.float64)
    filters, weights, predictions = judged(problem, filters, weights, intercept, outputs if large else None)
    primal = problem.primal(predictions, weights)
    residual = problem.dual_point(predictions)
    starts = filters
    if large:
        starts = filters[weights.flatten(1).norm(dim=1).argsort(descending=True)[:LIGHT_STARTS]]
        search = LocalOracle(n_climbers=8, n_steps=6, n_batches=1, thorough=True)
    if training is not None and isinstance(search, LocalOracle) and isinstance(oracle, str):
        hopeless = _height(problem, residual, (1 - HOPELESS) * primal)
        search = replace(search, max_batches=_fair_batches(training, problem.n, tol), hopeless=hopeless)
    points = [residual] + ([] if dual_point is None else [problem.in_domain(_checked(dual_point, problem))])
    seconds = None if training is None else _seconds(training)
    bounds = Search(search, tol, seed, deadline, seconds, rounds)(problem, given, starts, points, primal)
    shown = bounds.kept
    found = shown.found
    # The network's own objective is known to rounding only, which is part of the gap.
    off = FLOAT32_ROUNDING * primal if large else problem.primal_error(predictions, weights)
    dual = _between(shown.dual - (off if found.scope.proved or large else 0.0), primal)
    proved = _between(shown.proved - off, primal)
    rel_gap = relative_gap(primal, dual)
    return Certificate(
        primal=primal,
        dual=dual,
        rel_gap=rel_gap,
        scope=found.scope,
        beta=problem.beta,
        g_max=found.g_max,
        loss=problem.loss.name,
        intercept=problem.intercept,
        n_images=problem.n,
        n_filters=len(filters),
        patch_rank=problem.responses.embedding.patch_rank,
        oracle=shown.name,
        search=found.stats,
        train_accuracy=float(problem.mean((predictions.argmax(dim=1) == problem.targets.argmax(dim=1)).double())),
        filter_rank=problem.responses.embedding.dim,
        filter_size=problem.responses.embedding.size,
        family=found.stats.get("family"),
        family_size=found.stats.get("family_size"),
        family_gap=rel_gap if found.scope.proved and "family" in found.stats else None,
        optimum=optimum_of(problem, filters, weights, bounds.point, bounds.found, primal=primal + off, rel_gap=rel_gap),
        proved=proved,
        proved_gap=relative_gap(primal, proved),
        proved_by=shown.proved_by,
    )


def _between(bound: float, primal: float) -> float:
    """The optimum is neither below zero nor above that of any network; what is no number bounds nothing."""
    return min(bound, primal) if bound > 0 else 0.0


def _seconds(training: Sequence[Mapping[str, Any]]) -> float:
    """How long a training took."""
    return float(training[-1]["seconds"]) if training else 0.0


def _fair_batches(training: Sequence[Mapping[str, Any]], n: int, tol: float) -> int:
    """Batches of climbs that cost a fifth of those that a training on `n` images went through, counted, not timed."""
    batches = sum(record.get("images", n) / n for record in training)
    if training and training[-1]["rel_gap"] <= tol:
        batches += CONFIRMING
    return max(1, math.ceil(batches / 5))


def _height(problem: Problem, dual_point: Tensor, value: float) -> float:
    """The g, nearly, from which on the dual value is below `value`; infinite beyond a hundred times β."""
    low, high = problem.beta, 100 * problem.beta
    if problem.dual(dual_point, high) >= value:
        return math.inf
    for _ in range(6):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if problem.dual(dual_point, middle) >= value else (low, middle)
    return high


def _checked(dual_point: Tensor, problem: Problem) -> Tensor:
    if dual_point.shape != problem.targets.shape or not bool(dual_point.isfinite().all()):
        raise InputError(
            f"dual_point must be finite and of shape {tuple(problem.targets.shape)}, one row an image; got "
            f"{tuple(dual_point.shape)}"
        )
    return dual_point.double()
