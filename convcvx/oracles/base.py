"""What every oracle takes and gives: max g(u) over the unit ball, for the dual point at hand.

    g(u) = ‖Σ_i φ(x_i; u) Z_iᵀ‖_F = ‖Σ_k (x_k·u)_+ s_k‖,

the second form summing over all patch rows, with `s_k` the *charge* of a row: w_pk Z_i in the slot of cell p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from convcvx.oracles.scope import Scope
from convcvx.problem import Problem

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


class Oracle(Protocol):
    """Searches for filters with g(u) > β."""

    name: str

    def __call__(
        self,
        problem: Problem,
        dual_point: Tensor,
        *,
        starts: Tensor | None = None,
        n_filters: int = 1,
        seed: int = 0,
        target: float = 0.0,
    ) -> OracleResult:
        """Return up to `n_filters` distinct filters, best first.

        Once the deadline of `problem` has passed: those found by then, and the bound proved by then, though it be
        infinite; `stats` then says that it `stopped` by "time_limit".

        `starts` (q, r) are filters worth starting from (the current ones). A rigorous oracle may stop as soon as
        it has proved a bound <= `target`, a heuristic one as soon as it has found a filter above it.
        """
        ...
