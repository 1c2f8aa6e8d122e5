"""What every oracle takes and gives: max g(u) over the unit ball, for the dual point at hand.

    g(u) = ‖Σ_i φ(x_i; u) Z_iᵀ‖_F = ‖Σ_k (x_k·u)_+ s_k‖,

the second form summing over all patch rows, with `s_k` the *charge* of a row: w_pk Z_i in the slot of cell p.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from convcvx.errors import InputError
from convcvx.patches import RANK_TOLERANCE
from convcvx.problem import Problem

MAX_BYTES = 12 << 30
"""Patch rows and charges that a rigorous oracle may gather."""


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
        best = float(self.values.max()) if len(self.values) else 0.0
        return best if self.scope == "heuristic" else self.upper_bound


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
    cells : ndarray (N,) int64
        Pooling cell of each row.
    charges : ndarray (N, c) float64
        w_pk Z_i.
    n_cells : int
    frame : Tensor (d, r) float64
        Orthonormal rows: coordinates v stand for the filter `v @ frame`.
    slack : float
        What directions outside the subspace can add to g at most: (·)_+ is 1-Lipschitz, so a row's
        remainder adds no more than its norm times its charge.
    """

    rows: np.ndarray
    cells: np.ndarray
    charges: np.ndarray
    n_cells: int
    frame: Tensor
    slack: float

    @classmethod
    def build(cls, problem: Problem, dual_point: Tensor) -> ChargedRows:
        """Gather the rows of `problem`, all in memory: for patches of low rank or small data.

        Raises
        ------
        InputError
            When they would not fit in `MAX_BYTES`.
        """
        if (size := cls.size(problem)) > MAX_BYTES:
            raise InputError(
                f"oracle needs all patches at once, {size / 2**30:.0f} GiB of them; use fewer images, a coarser "
                "stride, or oracle='local'"
            )
        responses = problem.responses
        basis = responses.embedding.basis
        raw = torch.cat([responses.rows(slice(i, i + 1024)).double().cpu() for i in range(0, responses.n, 1024)])
        rows = (raw @ basis.T).flatten(0, 1)  # (n·K, r)
        frame = _frame(rows)
        coordinates = rows @ frame.T
        remainder = (rows - coordinates @ frame).norm(dim=1)

        pool = responses.pooling.matrix(*responses.map_size)
        pool = torch.eye(responses.n_positions, dtype=torch.float64) if pool is None else pool
        cells, positions = pool.nonzero(as_tuple=True)  # a position may lie in several cells
        weights = pool[cells, positions]
        image = torch.arange(responses.n)[:, None].expand(-1, len(cells)).flatten()
        row = (torch.arange(responses.n)[:, None] * responses.n_positions + positions).flatten()
        charges = dual_point[image] * weights.repeat(responses.n)[:, None]
        slack = float((remainder[row] * charges.norm(dim=1)).sum())
        merged = _merge(coordinates[row].numpy(), cells.repeat(responses.n).numpy(), charges.numpy())
        return cls(*merged, responses.n_cells, frame, slack)

    @staticmethod
    def size(problem: Problem) -> int:
        """Bytes that `build` takes, about."""
        responses = problem.responses
        pool = responses.pooling.matrix(*responses.map_size)
        entries = responses.n_positions if pool is None else int(pool.count_nonzero())
        return 24 * problem.n * entries * (responses.embedding.basis.shape[1] + problem.n_outputs)

    def lift(self, coordinates: np.ndarray) -> Tensor:
        """(q, d) coordinates to (q, r) filters."""
        return torch.as_tensor(coordinates, dtype=torch.float64) @ self.frame

    def correlate(self, coordinates: np.ndarray) -> np.ndarray:
        """(q, P, c) for (q, d) coordinates, summed directly in float64."""
        out = np.zeros((len(coordinates), self.n_cells, self.charges.shape[1]))
        for cell in range(self.n_cells):
            inside = self.cells == cell
            out[:, cell] = np.maximum(coordinates @ self.rows[inside].T, 0) @ self.charges[inside]
        return out

    def g(self, coordinates: np.ndarray) -> np.ndarray:
        """g at (q, d) coordinates, without slack."""
        return np.sqrt((self.correlate(coordinates) ** 2).sum(axis=(1, 2)))


def _frame(rows: Tensor) -> Tensor:
    """(d, r) orthonormal rows spanning the numerical row space."""
    eigenvalues, vectors = torch.linalg.eigh(rows.T @ rows)
    keep = eigenvalues > RANK_TOLERANCE * eigenvalues[-1].clamp_min(1e-300)
    return vectors[:, keep].T.flip(0).contiguous()


def _merge(rows: np.ndarray, cells: np.ndarray, charges: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Drop zero rows and add up the charges of equal rows of a cell; charges absorb the rows' norms."""
    norms = np.linalg.norm(rows, axis=1)
    alive = norms > 0
    rows, cells, charges = rows[alive] / norms[alive, None], cells[alive], charges[alive] * norms[alive, None]
    keys = np.concatenate([cells[:, None].astype(np.float64), rows], axis=1)
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    total = np.zeros((len(first), charges.shape[1]))
    np.add.at(total, inverse.ravel(), charges)
    return rows[first], cells[first], total
