"""What every oracle takes and gives: max g(u) over the unit ball, for the dual point at hand.

    g(u) = ‖Σ_i φ(x_i; u) Z_iᵀ‖_F = ‖Σ_k (x_k·u)_+ s_k‖,

the second form summing over all patch rows, with `s_k` the *charge* of a row: w_pk Z_i in the slot of cell p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from convcvx.oracles._patch_rows import PatchRows, check_size
from convcvx.oracles._row_tree import Division
from convcvx.problem import Problem

CHUNK = 1 << 15
"""Rows of one product."""


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
    scope : {"global", "sampled", "heuristic"}
        `global` if and only if `upper_bound` was proved for all filters; `sampled` if for those whose activation
        pattern is one of a sample; else nothing was proved.
    stats : dict
        What the oracle did: starts, basins, cells, seconds.
    """

    filters: Tensor
    values: Tensor
    upper_bound: float
    scope: str
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def g_max(self) -> float:
        """What the dual point is scaled by: the proved bound, or the best value found when there is none."""
        best = float(self.values.max()) if len(self.values) else math.inf  # a search that saw nothing bounds nothing
        return best if self.scope == "heuristic" else self.upper_bound

    @property
    def cut_short(self) -> bool:
        """Whether a deadline ended the search."""
        return self.stats.get("stopped") == "time_limit"

    @classmethod
    def unfinished(cls, problem: Problem, scope: str, seconds: float, bound: float = math.inf) -> OracleResult:
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


@dataclass(frozen=True)
class ChargedRows:
    """All patch rows with the dual point folded in, for the rigorous oracles: g(u) = ‖Σ_k (x_k·u)_+ s_k‖ + slack.

    Attributes
    ----------
    rows : ndarray (N, d) float64
        Distinct non-zero patch rows in coordinates of the patch subspace, d = numerical rank of the patches;
        rows that are positive multiples of one another within a cell are merged into one.
    cells : ndarray (N,) int
        Pooling cell of each row.
    charges : ndarray (N, c) float64
        w_pk Z_i.
    n_cells : int
    frame : Tensor (d, r) float64
        Orthonormal rows: coordinates v stand for the filter `v @ frame`.
    slack : float
        What directions outside the subspace can add to g at most: (·)_+ is 1-Lipschitz, so a row's
        remainder adds no more than its norm times its charge.
    division : Division, optional
        How rows in this order fall into bundles, if that is known already.
    """

    rows: np.ndarray
    cells: np.ndarray
    charges: np.ndarray
    n_cells: int
    frame: Tensor
    slack: float
    division: Division | None = None

    @classmethod
    def build(cls, problem: Problem, dual_point: Tensor) -> ChargedRows:
        """Gather the rows of `problem`, all in memory: for patches of low rank or small data.

        Raises
        ------
        InputError
            When they would not fit in `MAX_BYTES`.
        """
        check_size(problem.responses, problem.n_outputs)
        patches = PatchRows.of(problem.responses)
        charges = patches.incidence @ dual_point.numpy()
        slack = float(patches.remainders @ dual_point.norm(dim=1).numpy())
        return cls(patches.rows, patches.cells, charges, patches.n_cells, patches.frame, slack, patches.division)

    def lift(self, coordinates: np.ndarray) -> Tensor:
        """(q, d) coordinates to (q, r) filters."""
        return torch.as_tensor(coordinates, dtype=torch.float64) @ self.frame

    def correlate(self, coordinates: np.ndarray) -> np.ndarray:
        """(q, P, c) for (q, d) coordinates, summed directly in float64."""
        out = np.zeros((len(coordinates), self.n_cells, self.charges.shape[1]))
        for start in range(0, len(self.rows), CHUNK):
            part = slice(start, start + CHUNK)
            responses, charges, cells = (
                np.maximum(coordinates @ self.rows[part].T, 0),
                self.charges[part],
                self.cells[part],
            )
            for cell in np.unique(cells):
                inside = cells == cell
                out[:, cell] += responses[:, inside] @ charges[inside] if not inside.all() else responses @ charges
        return out

    def g(self, coordinates: np.ndarray) -> np.ndarray:
        """g at (q, d) coordinates, without slack."""
        return np.sqrt((self.correlate(coordinates) ** 2).sum(axis=(1, 2)))
