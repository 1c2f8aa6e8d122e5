"""All patch rows with the dual point folded in, brought to scale one: what the rigorous oracles see of a problem."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convcvx.errors import InputError
from convcvx.oracles._division import Division
from convcvx.oracles._patch_rows import ROUND_UP, PatchRows, n_sides
from convcvx.oracles.base import OracleResult
from convcvx.oracles.needs import DEGREE_ONE, ROWS_IN_BUNDLES, ROWS_IN_MEMORY, require
from convcvx.problem import Problem
from convcvx.rounding import SMALLEST_NORMAL, TINY, UNIT, largest
from convcvx.terms.scope import Scope

OWN_BYTES = 1 << 30
"""Bytes up to which rows have charges of their own, equal rows being merged, where they may do without."""
CHUNK = 1 << 15
"""Rows of one product."""
NEAR_ONE = 32
"""Rows with a largest entry between 2^-32 and 2^32, unit ones among them, are left as they are, and so are charges."""


@dataclass(frozen=True)
class ChargedRows:
    """All patch rows with the dual point folded in, for the rigorous oracles.

        g(u) <= 2^exponent (‖Σ_k (x_k·u)_+ s_k‖ + slack)

    Attributes
    ----------
    rows : ndarray (N, d) float64
        Distinct non-zero patch rows in coordinates of the patch subspace, d = numerical rank of the patches;
        rows that are positive multiples of one another within a cell are merged into one.
    cells : ndarray (N,) int
        Pooling cell of each row.
    charges : ndarray (m, c) float64
        w_pk Z_i, over 2^exponent, of each row; with `sources`, Z_i of each image, mirrored ones included.
    n_cells : int
    frame : Tensor (d, r) float64
        Orthonormal rows: coordinates v stand for the filter `v @ frame`.
    slack : float
        What rows and charges do not say of g at most: directions outside the subspace and rounding, as (·)_+ is
        1-Lipschitz, and what the dual point itself may be off.
    division : Division, optional
        How rows in this order fall into bundles, if that is known already.
    exponent : int
    sources, sizes : ndarray (N,), optional
        The charge of row k is then sizes[k] charges[sources[k]]: many rows have no room for charges of their own.
    """

    rows: np.ndarray
    cells: np.ndarray
    charges: np.ndarray
    n_cells: int
    frame: Tensor
    slack: float
    division: Division | None = None
    exponent: int = 0
    sources: np.ndarray | None = None
    sizes: np.ndarray | None = None

    @classmethod
    def build(cls, problem: Problem, dual_point: Tensor, *, shared: bool = False) -> ChargedRows:
        """Gather the rows of `problem`, all in memory: for patches of low rank or small data.

        With `shared`, rows that take more than `OWN_BYTES` with charges of their own do without, by `sources`.

        Raises
        ------
        InputError
            When they would not fit in `MAX_BYTES`, or are not finite; of squares, which are no rectified rows.
        """
        require("an oracle of patch rows", (DEGREE_ONE,), problem)
        many = shared and PatchRows.size(problem.responses, problem.n_outputs) > OWN_BYTES
        if many or not shared:
            require("oracle", (ROWS_IN_BUNDLES if many else ROWS_IN_MEMORY,), problem)
        patches = PatchRows.of(problem.responses, merged=not many)
        scaled, exponent = at_scale_one(dual_point.numpy())
        errors = np.ldexp(problem.dual_error(dual_point).numpy(), -exponent)
        if n_sides(problem.responses) == 2:  # the charges of the mirrored images, which round once
            slope = problem.responses.activation.slope
            rounded = abs(slope) * errors + UNIT * np.linalg.norm(scaled, axis=1)
            scaled, errors = np.concatenate([scaled, -slope * scaled]), np.concatenate([errors, rounded])
        slack = patches.remainders @ np.linalg.norm(scaled, axis=1) + patches.reach @ errors
        # products and scaled charges that underflow, each by TINY at most
        slack += 2 * TINY * patches.incidence.nnz * scaled.shape[1] * scaled.any() * (1 + patches.reach.max())
        common = patches.n_cells, patches.frame, float(ROUND_UP * slack), patches.division, exponent
        if many:
            incidence = patches.incidence  # one entry a row
            rows = cls(patches.rows, patches.cells, scaled, *common, incidence.indices, incidence.data)
        else:
            rows = cls(patches.rows, patches.cells, patches.incidence @ scaled, *common)
        return rows.scaled()

    def charges_of(self, rows: slice | np.ndarray) -> np.ndarray:
        """(·, c): the charges of some rows."""
        if self.sources is None or self.sizes is None:
            return self.charges[rows]
        return self.sizes[rows, None] * self.charges[self.sources[rows]]

    def scaled(self) -> ChargedRows:
        """The same with charges, and rows that are far from unit length, brought to about 1 by powers of two.

        No product of them over- or underflows then but where it is of no account: beside the largest charge, which is
        2^-32 at least, what underflows is below 1e-100, far less than any oracle allows for rounding.

        Raises
        ------
        InputError
            For rows or charges with NaN or infinity.
        """
        shift, lengths = math.frexp(largest_entry(self.charges))[1], np.zeros(1, np.int64)
        if self.sizes is not None:  # whose rows are those of a division
            return self._with_scaled(self.sizes)
        if self.division is None:  # the rows of a division are unit
            largest_entry(self.rows)
            lengths = np.frexp(np.abs(self.rows).max(axis=1, initial=0.0))[1]
            lengths[np.abs(lengths) <= NEAR_ONE] = 0
        if lengths.any():
            loaded = self.charges.any(axis=1)
            sizes = np.frexp(np.abs(self.charges).max(axis=1, initial=0.0))[1] + lengths
            shift = int(sizes[loaded].max()) if loaded.any() else 0
        elif abs(shift) <= NEAR_ONE:
            return self
        return replace(
            self,
            rows=np.ldexp(self.rows, -lengths[:, None]) if lengths.any() else self.rows,
            charges=np.ldexp(self.charges, (lengths - shift)[:, None]),
            slack=float(np.ldexp(self.slack, -shift)) + TINY * self.charges.size,
            exponent=self.exponent + shift,
        )

    def _with_scaled(self, sizes: np.ndarray) -> ChargedRows:
        """`scaled` by the sizes alone, so that the largest product of a size and its charge is about 1."""
        largest_entry(sizes)
        heights = np.abs(self.charges).max(axis=1, initial=0.0)
        exponents = np.frexp(sizes)[1] + np.frexp(heights)[1][self.sources]
        loaded = (sizes > 0) & (heights > 0)[self.sources]
        shift = int(exponents[loaded].max()) if loaded.any() else 0
        if abs(shift) <= NEAR_ONE:
            return self
        slack = float(np.ldexp(self.slack, -shift)) + TINY * self.charges.shape[1] * len(self.rows)
        return replace(self, sizes=np.ldexp(sizes, -shift), slack=slack, exponent=self.exponent + shift)

    @property
    def total(self) -> float:
        """Σ‖x_k‖‖s_k‖, which the norm of the sum exceeds nowhere, rounded up."""
        lengths = np.linalg.norm(self.charges, axis=1)
        if self.sources is not None and self.sizes is not None:
            lengths = self.sizes * lengths[self.sources]
        return float((np.linalg.norm(self.rows, axis=1) * lengths).sum()) * 1.001

    def target(self, value: float) -> float:
        """What the norm of the sum has to stay below for g to stay below `value`."""
        with np.errstate(over="ignore", under="ignore"):
            return float(np.ldexp(value, -self.exponent)) - largest(self.slack)

    def looseness(self, bound: float, values: np.ndarray) -> float:
        """What `bound` with slack has above the best of `values`, as a share of it; 0 where nothing was found."""
        best = float(values.max(initial=0.0))
        return (largest(bound, best) + self.slack) / best - 1 if best > 0 else 0.0

    def result(self, points: np.ndarray, values: np.ndarray, bound: float, stats: dict[str, Any]) -> OracleResult:
        """The proof that the norm of the sum is `bound` at most, and the best points (q, d), where it is `values`.

        What is no number proves nothing: the upper bound is then infinite.
        """
        total = (largest(bound, *values) + largest(self.slack)) * (1 + 4 * UNIT)
        filters = self.lift(points)
        values = np.ldexp(values, self.exponent)
        return OracleResult(filters, torch.as_tensor(values), raised(total, self.exponent), Scope.GLOBAL, stats)

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
                self.charges_of(part),
                self.cells[part],
            )
            for cell in np.unique(cells):
                inside = cells == cell
                out[:, cell] += responses[:, inside] @ charges[inside] if not inside.all() else responses @ charges
        return out

    def g(self, coordinates: np.ndarray) -> np.ndarray:
        """‖Σ_k (x_k·v)_+ s_k‖ at (q, d) coordinates v: g without exponent and slack."""
        return np.sqrt((self.correlate(coordinates) ** 2).sum(axis=(1, 2)))


def at_scale_one(dual_point: np.ndarray) -> tuple[np.ndarray, int]:
    """`dual_point` over 2^k, its largest entry between 1/2 and 1, and k; `InputError` for NaN and infinity."""
    exponent = math.frexp(largest_entry(dual_point))[1]
    return np.ldexp(dual_point, -exponent), exponent


def largest_entry(array: np.ndarray) -> float:
    """The largest modulus in `array`; `InputError` for NaN and infinity, which no proof begins with."""
    top = max(float(array.max(initial=0.0)), -float(array.min(initial=0.0)))
    if not top < math.inf:
        raise InputError("images and dual_point must be finite; found NaN or infinity in patches or their charges")
    return top


def raised(bound: float, exponent: int) -> float:
    """2^exponent times `bound`, and no less: infinite where float64 ends, and not 0 unless `bound` is."""
    with np.errstate(over="ignore", under="ignore"):
        product = float(np.ldexp(bound, exponent))
    return math.nextafter(product, math.inf) if bound > 0 and product < SMALLEST_NORMAL else product
