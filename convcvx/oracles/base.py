"""What every oracle takes and gives: max g(u) over the unit ball, for the dual point at hand.

    g(u) = ‖Σ_i φ(x_i; u) Z_iᵀ‖_F = ‖Σ_k (x_k·u)_+ s_k‖,

the second form summing over all patch rows, with `s_k` the *charge* of a row: w_pk Z_i in the slot of cell p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import Tensor

from convcvx.budget import OutOfTime
from convcvx.oracles.scope import Scope
from convcvx.problem import Problem

PROVING_SECONDS = 120.0
"""Time limit of a search whose bound goes on getting better for hours; the best one proved by then is used."""
VALUES_OF_G = ("bound_without_cones", "searched_bound", "remainder")
"""Statistics of oracles that are in the unit of g, targets times images: the others are counts, shares and seconds."""


@dataclass(frozen=True)
class OracleResult:
    """Filters with a large g, and what is known about the maximum.

    Attributes
    ----------
    filters : Tensor (q, r) float64
        Unit norm, best first.
    values : Tensor (q,) float64
        g of each.
    upper_bound : float
        A true upper bound on max g over what `scope` says, rounding included; infinite if none was proved.
    scope : Scope
        Or its text: `global` if and only if `upper_bound` was proved for all filters; `sampled` if for those whose
        activation pattern is one of a sample; else nothing was proved.
    stats : dict
        What the oracle did: starts, basins, cells, seconds; what is a g is named in `VALUES_OF_G`.
    """

    filters: Tensor
    values: Tensor
    upper_bound: float
    scope: Scope
    stats: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scope", Scope(self.scope))

    @property
    def g_max(self) -> float:
        """What the dual point is scaled by: the proved bound, or the best value found when there is none."""
        best = float(self.values.max()) if len(self.values) else math.inf  # a search that saw nothing bounds nothing
        return self.upper_bound if self.scope.proved else best

    @property
    def cut_short(self) -> bool:
        """Whether a deadline ended the search."""
        return self.stats.get("stopped") == "time_limit"

    @classmethod
    def unfinished(cls, problem: Problem, scope: Scope, seconds: float, bound: float = math.inf) -> OracleResult:
        """What is left of a search that the deadline ended before it had found anything."""
        filters = torch.zeros(0, problem.responses.dim, dtype=torch.float64)
        return cls(filters, filters.sum(dim=1), bound, scope, {"stopped": "time_limit", "seconds": seconds})


@dataclass(frozen=True)
class Wanted:
    """What is wanted of an oracle beside the maximum at a dual point.

    Attributes
    ----------
    starts : Tensor (q, r), optional
        Filters worth starting from (the current ones).
    n_filters : int
        Distinct filters to return at most.
    seed : int
    target : float
        A rigorous oracle may stop as soon as it has proved a bound <= `target`, a heuristic one as soon as it has
        found a filter above it.
    """

    starts: Tensor | None = None
    n_filters: int = 1
    seed: int = 0
    target: float = 0.0


class Oracle:
    """Searches for filters with g(u) > β."""

    name: ClassVar[str]
    """What `oracle=` and `--oracle` take."""
    scope: ClassVar[Scope] = Scope.GLOBAL
    """The scope of an answer that time cut short before it had begun."""

    @property
    def scout(self) -> Oracle:
        """What is asked in its place where filters are wanted and no proof: on samples, and far from the optimum."""
        return self

    @property
    def brief(self) -> Oracle:
        """What is asked in its place at several dual points, to learn where it proves most; itself if it is no search
        that may be short."""
        return self

    def __call__(self, problem: Problem, dual_point: Tensor, wanted: Wanted = Wanted(), **changes: Any) -> OracleResult:
        """What `answer` gives for what is `wanted`, with some `changes`, such as `n_filters=4`.

        Once the deadline of `problem` has passed: the filters found by then, and the bound proved by then, though it be
        infinite; `stats` then says that it `stopped` by "time_limit".
        """
        began = perf_counter()
        try:
            return self.answer(problem, dual_point, replace(wanted, **changes))
        except OutOfTime:
            return OracleResult.unfinished(problem, self.scope, perf_counter() - began)

    def answer(self, problem: Problem, dual_point: Tensor, wanted: Wanted) -> OracleResult:
        """Up to `wanted.n_filters` distinct filters, best first, and what is proved of g(u) at Z = `dual_point` (n, c).

        Raises
        ------
        OutOfTime
            If nothing is known when the deadline of `problem` passes.
        """
        raise NotImplementedError
