"""Branch and bound over the sphere of filters: a rigorous upper bound on max g, for any rank, pooling and outputs.

    g(u) = ‖G(u)‖,   G(u) = Σ_k (x_k·u)_+ s_k   over charged rows,   ‖u‖ = 1

**Cones.** The sphere S^{d-1} is covered by the 2^d orthants, each a simplicial cone {Σ λ_i w_i : λ >= 0} with d
unit vertices; a cone is divided by halving its longest edge. A cone and its antipode are one item of work:
G(-u) = G(u) - Σ_k s_k (x_k·u), so they differ by one matrix.

**Enclosure of G.** Let z_i = x·w_i. A row with all z_i >= 0 is linear on the cone and collapses into one matrix,
with all z_i <= 0 it vanishes. For every other row and u = Σ λ_i w_i, convexity of (·)_+ gives

    θ (x·u)  <=  (x·u)_+  <=  Σ λ_i (z_i)_+,      θ = 1 if Σ z_i > 0 else 0,

tangent and chord, both linear in λ. So (x·u)_+ s = Σ λ_i (m_i + τ r_i) s for some |τ| <= 1, with m_i the mean of the
two at w_i and r_i half their distance. Summed over rows, G(u) = Σ λ_i (a_i + e_i), where a_i collects the linear part
and the m_i, and e_i is an unknown vector with |<q, e_i>| <= h_i(q) = Σ_k r_ki |<q, s_k>| for every q. Over the rows of
pooling cell p it is no longer than Σ r_ki ‖s_k‖; cells are orthogonal, so ‖e_i‖ <= η_i = (Σ_p (Σ_{k in p} r_ki ‖s_k‖)²)^½.

**Bundles.** Rows (x_k, s_k) close to their weighted mean x̄ act as one row (x̄, S = Σ s_k), since

    Σ (x_k·u)_+ s_k = (x̄·u)_+ S + ½ D u + ½ Σ (|x_k·u| - |x̄·u|) s_k,      D = Σ s_k (x_k - x̄)ᵀ,

where the last sum is at most R/2 long on unit u: R = Σ ‖s_k‖ ‖x_k - x̄‖, or by Cauchy-Schwarz
(λ_max(Σ s sᵀ/‖s‖) λ_max(Σ ‖s‖ (x-x̄)(x-x̄)ᵀ))^½, whichever is less. Charges cancel inside a bundle, so S is short:
this, with far fewer rows, is what makes thousands of images affordable. A bundle is divided when R/Σ‖s_k‖, the
mean distance of its rows, is no longer small beside the cone. R/2 is added to h_i and η_i.

**Bound.** Let q be a unit vector, here Σ a_i normalised. Along q the sign of <q, s_k> says which half of the enclosure
matters: a convex piece lies below its chord, a concave one below its tangent. So
|<q, G(u)>| <= Σ λ_i α_i with α_i = <q, a_i> + h_i(q) (or h_i(q) - <q, a_i> if larger), and beside q, with
b_i = a_i - <q, a_i> q, ‖G(u) - <q, G(u)> q‖ <= ‖Σ λ_i b_i‖ + Σ λ_i η_i. Squared and added,

    g(u)² <= λᵀ Q λ,   Q_ij = α_i α_j + <b_i, b_j> + ‖b_i‖ η_j + η_i ‖b_j‖ + η_i η_j,

while ‖u‖² = λᵀ Γ λ with Γ_ij = w_i·w_j. Q <= γ² Γ entry by entry therefore proves g <= γ on the cone, with
γ² = max Q_ij / Γ_ij. No assumption is made on Σ λ_i, which exceeds 1 inside a cone; and vertices need not be unit.
Where some Γ_ij = 0, as in an orthant, λᵀQλ <= max Q (Σ λ_i)² <= d max Q, since Γ >= 0 there. The excess of γ over
max g on a cone of diameter δ is O(δ²), h(q) being first order in the error and all else second.

**Rounding.** Every α_i and η_i is raised by an allowance. Each computed vertex quantity is a sum of at most
N products with total modulus at most Σ‖s_k‖ (rows are unit, heights at most 1), so its error is at most
(N + O(d)) ε Σ‖s_k‖ in whatever order it is added; products with q add P·c·ε. Heights that are wrong by d·ε can misjudge a sign: the row's
contribution is then wrong by no more than d·ε ‖s_k‖. A computed midpoint misses its edge by a few ε, which
opens gaps between cones: u in a gap is within O(d^1.5 ε) per halving of a point that is covered, and g is
Lipschitz with constant Σ‖s_k‖. An edge below 1e-7 is not halved, which leaves at most 12 d² halvings. `_allowance` is above the sum of these. The few operations on
the d×d forms have a relative error below 1e-12, by which the bound is raised.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from convcvx.errors import InputError, check_count, check_positive
from convcvx.oracles._cones import OUT_OF_ROOM, search
from convcvx.oracles._row_tree import RowTree
from convcvx.oracles.base import ChargedRows, OracleResult
from convcvx.problem import Problem

FINENESS = {2: 0.06, 3: 0.05}
"""Mean distance of a bundle's rows over the diameter of a cone, by d: measured; it moves time, not the bound."""
BUDGET = 10_000
"""Entries a thread looks at, about 1 ms, before it takes the block with the largest bound again; later 1/256 of all
entries so far, which keeps the blocks few."""
CHUNK = 1 << 15
"""Rows of one product in the local search."""
DISTINCT = 0.999
"""Filters with a larger cosine count as one."""


class BranchAndBoundOracle:
    """Prove an upper bound on max g over all filters; the cost grows exponentially with the rank only.

    Parameters
    ----------
    rel_tol : float
        The search stops at a bound <= (1 + rel_tol) times the best g found, or <= the `target` of the call.
    time_limit : float, optional
        Seconds after which the best bound proved so far is returned, and used.
    max_cones : int, optional
        Likewise, in cones.

    Examples
    --------
    >>> result = BranchAndBoundOracle(rel_tol=0.01)(problem, problem.dual_point(predictions))  # doctest: +SKIP
    >>> result.values[0] <= result.upper_bound  # doctest: +SKIP
    True
    """

    name = "branch-and-bound"

    def __init__(self, rel_tol: float = 1e-2, time_limit: float | None = None, max_cones: int | None = None) -> None:
        self.rel_tol = check_positive("rel_tol", rel_tol)
        self.time_limit = None if time_limit is None else check_positive("time_limit", time_limit, zero=True)
        self.max_cones = None if max_cones is None else check_count("max_cones", max_cones, minimum=0)

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
        """As `Oracle` says; `stats` holds cones, seconds, rank, rel_gap_of_bound and why the search stopped."""
        began = time.perf_counter()
        charged = ChargedRows.build(problem, dual_point)
        points = None if starts is None else (starts.double().cpu() @ charged.frame.T).numpy()
        return self.maximise(charged, points, n_filters=n_filters, seed=seed, target=target, began=began)

    def maximise(
        self,
        charged: ChargedRows,
        starts: np.ndarray | None = None,
        *,
        n_filters: int = 1,
        seed: int = 0,
        target: float = 0.0,
        began: float | None = None,
    ) -> OracleResult:
        """The same for rows already charged, and `starts` (q, d) in their coordinates.

        `began`, by `time.perf_counter`, is when the time limit starts to run.
        """
        check_count("n_filters", n_filters)
        began = time.perf_counter() if began is None else began
        n, d = charged.rows.shape
        bound, cones, entries, stopped = 0.0, 0, 0, "bound"
        points, values = np.zeros((0, d)), np.zeros(0)
        if n and not np.isfinite(charged.charges).all():
            raise InputError("dual_point must be finite; found NaN or infinity")
        if n:
            climber = _Climber(charged, n_filters + 3)
            first = np.random.default_rng(seed).standard_normal((4 * d, d))
            climber.climb(first if starts is None else np.concatenate([first, starts]), 0)
            climber.climb(climber.points[:4], 6)
            deadline = None if self.time_limit is None else began + self.time_limit
            goal = _Goal(self.rel_tol, target - charged.slack, deadline, self.max_cones)
            bound, cones, entries, stopped = _Search(charged, climber, goal).run()
            climber.climb(climber.points[:n_filters], 5)
            points = climber.points[:n_filters]
            values = charged.g(points)
            order = np.argsort(-values, kind="stable")
            points, values = points[order], values[order]
        best = float(values.max(initial=0.0))
        upper = (max(bound, best) + charged.slack) * (1 + 1e-15)
        stats = {
            "cones": cones,
            "entries": entries,
            "rank": d,
            "rel_gap_of_bound": upper / best - 1 if best > 0 else 0.0,
            "stopped": stopped,
            "seconds": time.perf_counter() - began,
        }
        return OracleResult(charged.lift(points), torch.as_tensor(values), upper, "global", stats)


@dataclass(frozen=True)
class _Goal:
    rel_tol: float
    target: float
    deadline: float | None
    max_cones: int | None

    def threshold(self, best: float) -> float:
        """Cones with a bound up to this need no further division."""
        return max(self.target, best * (1 + self.rel_tol))

    def stopped(self, cones: int) -> str | None:
        if self.deadline is not None and time.perf_counter() >= self.deadline:
            return "time_limit"
        return "max_cones" if self.max_cones is not None and cones >= self.max_cones else None


class _Climber:
    """Local maxima of g, by u <- M(u)ᵀ G(u) / ‖·‖ with G = M(u) u: the incumbents."""

    def __init__(self, charged: ChargedRows, keep: int) -> None:
        order = np.argsort(charged.cells, kind="stable")
        self.rows, self.charges, cells = charged.rows[order], charged.charges[order], charged.cells[order]
        self.shape, self.keep = (charged.n_cells, charged.charges.shape[1]), keep
        edges = np.union1d(np.flatnonzero(np.diff(cells, prepend=-1)), np.arange(0, len(cells), CHUNK))
        self.parts = [
            (int(cells[low]), slice(low, high)) for low, high in itertools.pairwise([*edges.tolist(), len(cells)])
        ]
        self.points, self.values = np.empty((0, charged.rows.shape[1])), np.empty(0)

    def climb(self, points: np.ndarray, steps: int) -> None:
        """Take (q, d) points uphill, keeping the best ones met."""
        points = _normalised(points)
        for _ in range(steps):
            if not len(points):
                return
            correlations = self.correlate(points)
            self.add(points, np.linalg.norm(correlations, axis=(1, 2)))
            points = _normalised(self._gradient(points, correlations))
        self.add(points, np.linalg.norm(self.correlate(points), axis=(1, 2)))

    def add(self, points: np.ndarray, values: np.ndarray) -> None:
        """Keep the best points that are no closer than a few degrees to a better one."""
        points, values = np.concatenate([self.points, points]), np.concatenate([self.values, values])
        chosen: list[int] = []
        for k in np.argsort(-values, kind="stable"):
            if len(chosen) < self.keep and all(points[k] @ points[j] < DISTINCT for j in chosen):
                chosen.append(int(k))
        self.points, self.values = points[chosen], values[chosen]

    def correlate(self, points: np.ndarray) -> np.ndarray:
        """(q, P, c): G."""
        total = np.zeros((len(points), *self.shape))
        for cell, part in self.parts:
            total[:, cell] += np.maximum(points @ self.rows[part].T, 0) @ self.charges[part]
        return total

    def _gradient(self, points: np.ndarray, correlations: np.ndarray) -> np.ndarray:
        """(q, d): Σ_k [x_k·u > 0] <G(u), s_k> x_k."""
        gradient = np.zeros_like(points)
        for cell, part in self.parts:
            slopes = correlations[:, cell] @ self.charges[part].T
            gradient += (slopes * (points @ self.rows[part].T > 0)) @ self.rows[part]
        return gradient


def _normalised(points: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(points, axis=1, keepdims=True)
    alive = norms[:, 0] > 0
    return points[alive] / norms[alive]


@dataclass(order=True)
class _Block:
    """A cone with the entries it has to look at; the one with the largest bound is searched first."""

    priority: float
    order: int
    vertices: np.ndarray = field(compare=False)
    linear: np.ndarray = field(compare=False)
    indices: np.ndarray = field(compare=False)
    signs: int = field(compare=False)


class _Search:
    """The blocks still open, and the threads that work on them, best bound first."""

    def __init__(self, charged: ChargedRows, climber: _Climber, goal: _Goal) -> None:
        self.tree = RowTree.build(charged)
        self.climber, self.goal = climber, goal
        d = charged.rows.shape[1]
        self.fold = self.tree.fold(charged.n_cells)
        self.fineness = FINENESS.get(d, 0.03)
        self.allowance = _allowance(self.tree.weight, len(charged.rows), self.fold.size, d)
        self.threshold = np.array([goal.threshold(float(climber.values[0]))])
        self.pruned, self.cones, self.entries, self.busy, self.made = 0.0, 0, 0, 0, 0
        self.stopped: str | None = None
        self.open: list[_Block] = []
        self.running: dict[int, float] = {}
        self.change = threading.Condition()
        for signs in itertools.product((1.0, -1.0), repeat=d - 1):
            self._push(np.diag((1.0, *signs)), np.zeros_like(self.fold), self.tree.roots, 3, np.inf)

    def run(self) -> tuple[float, int, int, str]:
        """The proved bound, the numbers of cones and entries looked at, and why the search stopped."""
        threads = numba.get_num_threads()
        with ThreadPoolExecutor(threads) as pool:
            for job in [pool.submit(self._work) for _ in range(threads)]:
                job.result()
        still_open = max((-block.priority for block in self.open), default=0.0)
        # nothing exceeds this, and it is finite even if no cone was looked at
        bound = min(max(self.pruned, still_open), self.tree.weight * (1 + 1e-12) + self.allowance)
        return bound, self.cones, self.entries, self.stopped or "bound"

    def _push(self, vertices: np.ndarray, linear: np.ndarray, indices: np.ndarray, signs: int, bound: float) -> None:
        self.made += 1
        heapq.heappush(self.open, _Block(-bound, self.made, vertices, linear, indices, signs))

    def _work(self) -> None:
        workspace = _Workspace(self.fold.shape)
        while True:
            with self.change:
                while not self.open and self.busy and not self.stopped:
                    self.change.wait()
                self.stopped = self.stopped or (self.goal.stopped(self.cones) if self.open else None)
                if self.stopped or not self.open:
                    self.change.notify_all()
                    return
                block = heapq.heappop(self.open)
                self.busy += 1
            try:
                self._search(block, workspace)
            finally:
                with self.change:
                    self.busy -= 1
                    self.change.notify_all()

    def _search(self, block: _Block, workspace: _Workspace) -> None:
        workspace.load(block)
        tree = self.tree.table, self.tree.moments, self.tree.children, self.tree.cells
        budget = max(BUDGET, self.entries // 256)
        if self.goal.max_cones is not None:
            budget = min(budget, 1000)
        while True:
            status, workspace.depth = search(
                tree, self.fold, self.fineness, self.allowance, self.threshold, budget, *workspace.state()
            )
            if status != OUT_OF_ROOM:
                break
            workspace.grow()
        with self.change:
            self.pruned = max(self.pruned, float(workspace.pruned[0]))
            self.cones += int(workspace.counts[0])
            self.entries += int(workspace.counts[1])
            for vertices, linear, indices, signs, bound in workspace.entries():
                self._push(vertices, linear, indices, signs, bound)
            value, vertex = workspace.incumbent()
            if value > self.climber.values[0] * (1 + 1e-9):
                self.climber.climb(vertex[None], 3)
                self.threshold[0] = max(self.threshold[0], self.goal.threshold(float(self.climber.values[0])))


class _Workspace:
    """The stack of one thread, as arrays for the compiled search."""

    def __init__(self, shape: tuple[int, ...], levels: int = 64, room: int = 1 << 16) -> None:
        d = shape[0]
        self.vertices, self.linear = np.empty((levels, d, d)), np.empty((levels, *shape))
        self.span, self.signs = np.empty((levels, 2), np.int64), np.empty(levels, np.int64)
        self.bound, self.indices = np.empty(levels), np.empty(room, np.int32)
        self.pruned, self.best, self.counts = np.zeros(1), np.zeros((2, 1 + d)), np.zeros(2, np.int64)
        self.depth = 0

    def load(self, block: _Block) -> None:
        n = len(block.indices)
        if n > len(self.indices):
            self.indices = np.empty(2 * n, np.int32)
        self.indices[:n] = block.indices
        self.vertices[0], self.linear[0], self.signs[0] = block.vertices, block.linear, block.signs
        self.span[0], self.bound[0], self.depth = (0, n), -block.priority, 1
        self.pruned[:], self.best[:], self.counts[:] = 0.0, 0.0, 0

    def state(self) -> tuple[Any, ...]:
        stack = self.vertices, self.linear, self.span, self.signs, self.bound
        return self.indices, stack, self.depth, self.pruned, self.best, self.counts

    def grow(self) -> None:
        self.indices = np.concatenate([self.indices, np.empty_like(self.indices)])

    def entries(self) -> Any:
        """What is left on the stack, to become blocks."""
        for k in range(self.depth):
            low, high = self.span[k]
            yield (
                self.vertices[k].copy(),
                self.linear[k].copy(),
                self.indices[low:high].copy(),
                int(self.signs[k]),
                float(self.bound[k]),
            )

    def incumbent(self) -> tuple[float, np.ndarray]:
        sign = int(self.best[1, 0] > self.best[0, 0])
        return float(self.best[sign, 0]), self.best[sign, 1:] * (-1.0 if sign else 1.0)


def _allowance(weight: float, n: int, size: int, d: int) -> float:
    """What rounding can hide at a vertex, for Σ‖s_k‖ = `weight`; the module's text says why."""
    return 2.0 * (n + size + 1000.0 * d**2.5) * float(np.finfo(float).eps) * weight
