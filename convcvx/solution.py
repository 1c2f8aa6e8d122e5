"""A trained two-layer network in the convex model's own variables, and how the solver got there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from convcvx.certificate import Certificate
    from convcvx.patches import PatchEmbedding
    from convcvx.pooling import Pooling


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
    status : str
        "converged", or what stopped the solver short of `tol`: "max_filters", "max_rounds", "time_limit",
        "stalled" (rounds that no longer lower the objective), "relaxation_gap" (a relaxation that is not tight),
        "sampled" (the program over sampled patterns is solved, the network is not optimal), "conditions" (those of the
        closed form do not hold).
    history : list of dict
        One record a round: round, objective, lower_bound, rel_gap, g_max, scope, n_filters, seconds; for a solution of
        a sample, before the solver has come to all images, also their number, images. The bound is the best one proved
        by then if the scope is global, else what this round's search shows.
    rounds : int
        Rounds behind this solution, those of earlier sessions included.
    certificate : Certificate or None
    embedding, pooling : PatchEmbedding, Pooling
        What the filters act on.
    dual_point : Tensor (n, c) float64 or None
        Z of the best lower bound that a rigorous oracle proved on the way; from it a certificate proves it anew.
    """

    filters: Tensor
    weights: Tensor
    intercept: Tensor
    status: str = "running"
    history: list[dict[str, Any]] = field(default_factory=list)
    rounds: int = 0
    certificate: Certificate | None = None
    embedding: PatchEmbedding | None = None
    pooling: Pooling | None = None
    dual_point: Tensor | None = None

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

    def shifted(self, offset: Tensor | float) -> Solution:
        """The same solution with `offset` (c,) added to its outputs; see `Problem.offset`."""
        return replace(self, intercept=self.intercept + offset)

    def with_parameters(self, filters: Tensor, weights: Tensor, intercept: Tensor) -> Solution:
        """The same solution with other parameters: filters scaled to unit norm, neurons that are zero dropped.

        ReLU is positively homogeneous: the norm of a filter moves into its weights.
        """
        norms = filters.norm(dim=1)
        weights = weights * norms[:, None, None]
        alive = weights.flatten(1).norm(dim=1) > 0
        return replace(self, filters=(filters[alive] / norms[alive, None]), weights=weights[alive], intercept=intercept)


Callback = Callable[[Solution], None]
"""Called with the solution after every round."""
