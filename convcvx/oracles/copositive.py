"""The copositive oracle: an upper bound on max g by relaxing cone-constrained PCA, cell by cell of the arrangement.

On a cell {u : F u ≥ 0} g is a quadratic form, g(u) = ‖M u‖ with M = Σ_{active k} s_k x_kᵀ. For any symmetric N ≥ 0,
entry by entry, uᵀFᵀNFu ≥ 0 there, hence for unit u

    g(u)² ≤ uᵀ (MᵀM + FᵀNF) u ≤ λ_max(MᵀM + FᵀNF).

The least such bound is the dual of max tr(MᵀM U) over tr U = 1, U ⪰ 0, F U Fᵀ ≥ 0: the relaxation of U ∈
conv{uuᵀ : F u ≥ 0}, at the dual point at hand, of the copositive program of Sahiner et al. 2021. It is
exact for cells with as many facets as dimensions, at most four (Maxfield and Minc 1962: copositive = positive
semidefinite + non-negative up to order 4), so always in rank ≤ 2, and often beyond. N comes from an interior-point
solver; whatever it says, the bound is computed from N and holds.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from torch import Tensor

from convcvx.arrangements.cells import Cell, cell_batches, count_bound, facets, unpack_patterns
from convcvx.budget import NEVER, Deadline
from convcvx.errors import InputError, check_count
from convcvx.oracles._blocks import Incumbents
from convcvx.oracles._row_tree import RowTree
from convcvx.oracles.base import Oracle, OracleResult, Wanted
from convcvx.oracles.charged_rows import ChargedRows
from convcvx.problem import Problem
from convcvx.rounding import UNIT, largest
from convcvx.terms.stop import Stop

MAX_CELLS = 200_000
"""Cells that are listed: some minutes."""


class CopositiveOracle(Oracle):
    """Prove an upper bound on max g by semidefinite relaxation; for small problems, where cells can be listed.

    Notes
    -----
    *Rounding.* With ε = 2⁻⁵³ and S = Σ‖x_k‖‖s_k‖, M is accurate to (N + 4)εS, which the bound is raised by. Forming
    and solving the eigenvalue problem loses less than 8(m² + Pc + d)ε(‖M‖² + Σ N_ij ‖f_i‖‖f_j‖), raised likewise.
    Slivers that the enumeration does not tell apart are within δ, its `overshoot`, of a cell: δ·S is added, and there
    uᵀFᵀNFu ≥ -δ Σ N_ij ‖f_i‖‖f_j‖.
    """

    name = "copositive"

    def answer(self, problem: Problem, dual_point: Tensor, wanted: Wanted) -> OracleResult:
        """As `Oracle` says; `stats` holds cells, relaxed (cells whose relaxation was solved), looseness, seconds.

        `looseness` is bound / best g found - 1: zero to rounding where the relaxation is tight.
        """
        began = time.perf_counter()
        charged, starts = ChargedRows.build(problem, dual_point), wanted.starts
        return self.maximise(
            charged,
            np.zeros((0, len(charged.frame))) if starts is None else (starts.double() @ charged.frame.T).numpy(),
            n_filters=wanted.n_filters,
            seed=wanted.seed,
            target=wanted.target,
            began=began,
            deadline=problem.deadline,
        )

    def maximise(
        self,
        charged: ChargedRows,
        starts: np.ndarray,
        *,
        n_filters: int = 1,
        seed: int = 0,
        target: float = 0.0,
        began: float = 0.0,
        deadline: Deadline = NEVER,
    ) -> OracleResult:
        """The same for rows already charged, and `starts` (q, d) in their coordinates.

        Of cells not listed by the `deadline` only Σ‖x_k‖‖s_k‖ is known, of those not relaxed ‖M‖.

        Raises
        ------
        InputError
            If there are too many cells to list.
        """
        check_count("n_filters", n_filters)
        charged = charged.scaled()
        count, rank = charged.rows.shape
        bound, visited, relaxed = 0.0, 0, 0
        points = np.zeros((0, rank))
        if count and rank:
            if count_bound(count, rank) > MAX_CELLS:
                raise InputError(
                    f"oracle='copositive' would list {float(count_bound(count, rank)):.0e} cells for {count} patches "
                    f"of rank {rank}; use oracle='branch-and-bound', a lower rank or fewer images"
                )
            incumbents = Incumbents(charged, RowTree.build(charged), n_filters + 3)
            random = np.random.default_rng(seed).standard_normal((8 * rank, rank))
            incumbents.climb(np.concatenate([random, starts]), 30)
            search = _Search(charged, incumbents, target)
            search.list_cells(deadline)
            search.relax_cells(deadline)
            bound, visited, relaxed = search.bound(), search.visited, search.relaxed
            incumbents.climb(incumbents.points[:n_filters], 30)
            points = incumbents.points[:n_filters]
        values = charged.g(points)
        stats = {
            "cells": visited,
            "relaxed": relaxed,
            "rank": rank,
            "looseness": charged.looseness(bound, values),
            "seconds": time.perf_counter() - began,
        } | ({"stopped": Stop.TIME_LIMIT} if deadline.passed else {})
        return charged.result(points, values, bound, stats)


@dataclass(frozen=True)
class _Suspect:
    """A cell whose unconstrained bound, the top singular value of M (P·c, d), is above what is known."""

    bound: float
    matrix: np.ndarray
    cell: Cell


class _Search:
    """All cells, first by their top singular values, then those that stand out by their relaxations."""

    def __init__(self, charged: ChargedRows, incumbents: Incumbents, target: float) -> None:
        self.rows, self.incumbents, self.target = charged.rows, incumbents, charged.target(target)
        slots = np.zeros((len(charged.rows), charged.n_cells, charged.charges.shape[1]))
        slots[np.arange(len(slots)), charged.cells] = charged.charges
        self._products = (slots.reshape(len(slots), -1, 1) * charged.rows[:, None, :]).reshape(len(slots), -1)
        self._shape = slots[0].size, charged.rows.shape[1]
        self.total = float((np.linalg.norm(charged.rows, axis=1) * np.linalg.norm(charged.charges, axis=1)).sum())
        self.proved = 0.0  # the largest bound of the cells that are done
        self.overshoot, self.visited, self.relaxed = 0.0, 0, 0
        self.suspects: list[_Suspect] = []

    def bound(self) -> float:
        """What g is nowhere above."""
        noise = (len(self.rows) + 4) * UNIT + self.overshoot
        return largest(self.proved, self.known) + noise * self.total

    @property
    def known(self) -> float:
        """Cells below this need no closer look: g attains it, or it is all that is asked."""
        return max(float(self.incumbents.values.max(initial=0.0)), self.target)

    def list_cells(self, deadline: Deadline) -> None:
        """Keep the cells whose top singular value is above what is known."""
        for batch in cell_batches(self.rows, 1024):
            if deadline.passed:
                self.proved = self.total * 1.001  # of all that is left, rounded up
                return
            active = unpack_patterns(batch.packed, len(self.rows))
            self.visited += len(active)
            self.overshoot = max(self.overshoot, batch.overshoot)
            matrices = (active.astype(np.float64) @ self._products).reshape(-1, *self._shape)
            _, sizes, right = np.linalg.svd(matrices, full_matrices=False)
            self.incumbents.climb(np.concatenate([right[:, 0], -right[:, 0]]), 0)
            bounds = sizes[:, 0] * (1 + 8 * sum(self._shape) * UNIT)
            suspects = ~(bounds <= self.known)
            self.proved = largest(self.proved, *bounds[~suspects])
            self.suspects += [
                _Suspect(bounds[i], matrices[i], Cell(active[i], batch.interiors[i])) for i in np.flatnonzero(suspects)
            ]

    def relax_cells(self, deadline: Deadline) -> None:
        """Relax the kept cells, those with the largest bound first."""
        self.incumbents.climb(self.incumbents.points[:4], 30)
        late = False
        for suspect in sorted(self.suspects, key=lambda s: -s.bound):
            bound = suspect.bound
            late = late or deadline.passed
            if not bound <= self.known and not late:
                self.relaxed += 1
                refined, direction = relax(suspect.matrix, facets(self.rows, suspect.cell), self.overshoot)
                self.incumbents.climb(np.stack([direction, -direction]), 5)
                bound = min(bound, refined)
            self.proved = largest(self.proved, bound)


def relax(matrix: np.ndarray, normals: np.ndarray, overshoot: float = 0.0) -> tuple[float, np.ndarray]:
    """A bound on ‖M u‖ over unit u with F u ≥ 0, for M = `matrix` (q, d) and F = `normals` (m, d), rounding included.

    It holds as well for u that fail f·u ≥ 0 by no more than `overshoot`·‖f‖.

    Also the top eigenvector (d,) of the relaxation's U, the maximiser itself where U has rank one.

    >>> round(relax(np.array([[1.0, -1.0]]), np.eye(2))[0], 6), round(relax(np.array([[1.0, 1.0]]), np.eye(2))[0], 6)
    (1.0, 1.414214)
    """
    import clarabel  # here: whoever certifies by other means loads no solver

    d, m = matrix.shape[1], len(normals)
    form = matrix.T @ matrix
    first, second = np.triu_indices(m)
    axes, flat = rounded(normals)
    scale = np.linalg.norm(matrix @ axes, 2) ** 2
    if scale == 0:
        return float(np.linalg.norm(matrix)), axes[0]
    products, flat_products = _products(normals, first, second), _products(flat, first, second)
    # min t  subject to  t I - form - Σ ν products ⪰ 0,  ν ≥ 0, in the cone's own axes; for Clarabel A x + slack = b.
    columns = np.stack([-_pack(axes.T @ axes), *map(_pack, flat_products)], axis=1)
    signs = np.hstack([np.zeros((len(first), 1)), -np.eye(len(first))])
    settings = clarabel.DefaultSettings()
    settings.verbose, settings.max_threads = False, 1
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-11
    answer = clarabel.DefaultSolver(
        sparse.csc_matrix((len(first) + 1, len(first) + 1)),
        np.eye(len(first) + 1)[0],
        sparse.csc_matrix(np.vstack([columns, signs])),
        np.concatenate([-_pack(axes.T @ form @ axes / scale), np.zeros(len(first))]),
        [clarabel.PSDTriangleConeT(d), clarabel.NonnegativeConeT(len(first))],
        settings,
    ).solve()
    lengths = np.linalg.norm(normals @ axes, axis=1)
    multipliers = np.maximum(answer.x[1:], 0) * scale / (lengths[first] * lengths[second])
    multipliers[~np.isfinite(multipliers)] = 0.0  # any N >= 0 will do
    raised = form + np.tensordot(multipliers, products, axes=1)
    lengths = np.linalg.norm(normals, axis=1)
    size = np.square(matrix).sum() + multipliers @ (lengths[first] * lengths[second])
    if not (np.isfinite(raised).all() and np.isfinite(size)):
        raised, size = form, np.square(matrix).sum()
    error = (8 * (m**2 + sum(matrix.shape)) * UNIT + overshoot) * size
    packed = np.array(answer.z[: d * (d + 1) // 2])
    moment = axes @ _unpack(np.where(np.isfinite(packed), packed, 0.0), d) @ axes.T
    return float(np.sqrt(max(np.linalg.eigvalsh(raised)[-1] + error, 0.0))), np.linalg.eigh(moment)[1][:, -1]


def rounded(normals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Axes S (d, d) in which the cone F u ≥ 0 is no longer thin, and the unit normals (m, d) there, multiples of F S.

    S = σ_min (FᵀF)^(-1/2), no longer than the identity. Interior-point solvers need it: the opposite facets of a thin
    cone are almost antiparallel, and their multipliers would be huge.
    """
    _, sizes, right = np.linalg.svd(normals, full_matrices=False)
    shortest = max(sizes[-1], 1e-7 * sizes[0])
    axes = (right.T * (shortest / np.maximum(sizes, shortest))) @ right
    flat = normals @ axes
    return axes, flat / np.linalg.norm(flat, axis=1, keepdims=True)


def _products(normals: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(q, d, d) symmetric parts of f_i f_jᵀ for pairs of rows."""
    products = normals[first, :, None] * normals[second, None, :]
    return 0.5 * (products + products.transpose(0, 2, 1))


def _pack(symmetric: np.ndarray) -> np.ndarray:
    """Upper triangle by columns, off the diagonal times √2: how Clarabel keeps a symmetric matrix."""
    column, row = np.tril_indices(len(symmetric))
    return symmetric[row, column] * np.where(row == column, 1.0, np.sqrt(2))


def _unpack(packed: np.ndarray, d: int) -> np.ndarray:
    """The inverse of `_pack`."""
    column, row = np.tril_indices(d)
    symmetric = np.zeros((d, d))
    symmetric[row, column] = symmetric[column, row] = packed * np.where(row == column, 1.0, np.sqrt(0.5))
    return symmetric
