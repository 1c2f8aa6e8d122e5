"""The search over cones in blocks: best bound first, one block a thread at a time."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from convcvx.budget import Deadline
from convcvx.machine.threads import cores
from convcvx.oracles._cone_bounds import CHUNK
from convcvx.oracles._cones import OUT_OF_ROOM, search
from convcvx.oracles._row_tree import RowTree
from convcvx.oracles.charged_rows import ChargedRows
from convcvx.rounding import largest
from convcvx.terms.stop import Stop

LOCAL_ENTRIES = 1 << 16
"""Rows or bundles that the local search climbs on, about: more would take longer, and the points that the search
reaches are measured on all rows anyway."""
PRODUCT_ENTRIES = 1 << 13
"""Rows or bundles in one matrix product of the local search, whose operands then stay in the cache."""
DISTINCT = 0.999
"""Cosine from which on two filters count as one: an angle of 2.6 degrees."""
FINENESS = {2: 0.06, 3: 0.05}
"""Mean distance of a bundle's rows, over the diameter of a cone, up to which the cone takes the bundle as one row, by
the rank of the rows: the fastest of those tried; the bound is a bound for any."""
FINENESS_ELSEWHERE = 0.03
"""The fineness in other ranks."""
FAR_SHARE = 0.5
"""Share of the relative excess of g over the target that takes the place of the tolerance far from it."""
CLOSEST = 8.0
"""Allowances for rounding by which the bound on even the smallest cone exceeds g, at and beside the vertices together:
where the threshold is closer to g than that, no halving helps."""
SERIAL_ROWS = 20_000
"""Rows up to which one thread does the search, and so in the same order every time: seconds at most."""
TURN_ENTRIES = 10_000
"""Least number of entries that a thread looks at, in about 1 ms, before it takes the block with the largest bound."""
TURN_SHARE = 256
"""A turn grows to one part in so many of all entries looked at, which keeps the blocks few."""
TURN_ENTRIES_LIMITED = 1000
"""Most entries of a turn where the number of cones is limited, lest a turn go far beyond the limit."""


@dataclass(frozen=True)
class Goal:
    rel_tol: float
    far_tol: float
    target: float
    deadline: Deadline
    max_cones: int | None

    def threshold(self, best: float) -> float:
        """Cones with a bound up to this need no further division."""
        far = FAR_SHARE * (best / self.target - 1) if self.target > 0 else 0.0
        return max(best * (1 + max(self.rel_tol, min(self.far_tol, far))), self.target)

    def stopped(self, cones: int) -> Stop | None:
        if self.deadline.passed:
            return Stop.TIME_LIMIT
        return Stop.MAX_CONES if self.max_cones is not None and cones >= self.max_cones else None


class Incumbents:
    """Local maxima of g, by u <- M(u) G(u) / ‖·‖ with G = M(u)ᵀ u, M (d, P·c) the sum of the active rows' moments.

    Of many rows only bundles climb, active as a whole; the points they reach are then measured on all rows.
    """

    def __init__(self, charged: ChargedRows, tree: RowTree, keep: int) -> None:
        self.charged, self.keep = charged, keep
        entries = tree.cut(LOCAL_ENTRIES)
        self.measured = len(entries) < len(charged.rows)
        entries = entries[np.argsort(tree.cells[entries], kind="stable")]
        d = charged.rows.shape[1]
        self.directions, self.moments = tree.directions(entries), tree.moments_of(entries)
        cells = tree.cells[entries]
        edges = np.union1d(np.flatnonzero(np.diff(cells, prepend=-1)), np.arange(0, len(cells), PRODUCT_ENTRIES))
        self.parts = [
            (int(cells[low]), slice(low, high)) for low, high in itertools.pairwise([*edges.tolist(), len(cells)])
        ]
        self.points, self.values = np.empty((0, d)), np.empty(0)

    def climb(self, points: np.ndarray, steps: int) -> None:
        """Take (q, d) points uphill, keeping the best ones met."""
        points = _normalised(points)
        best, values = points.copy(), np.full(len(points), -1.0)
        for _ in range(steps + 1):
            correlations, slopes = self._ascent(points)
            better = correlations > values
            best[better], values[better] = points[better], correlations[better]
            points = slopes / np.maximum(np.linalg.norm(slopes, axis=1, keepdims=True), 1e-300)
        chosen = self._distinct(best, values)
        best, values = best[chosen], values[chosen]
        self._add(best, self.charged.g(best) if self.measured else values)

    def _add(self, points: np.ndarray, values: np.ndarray) -> None:
        points, values = np.concatenate([self.points, points]), np.concatenate([self.values, values])
        chosen = self._distinct(points, values)
        self.points, self.values = points[chosen], values[chosen]

    def _distinct(self, points: np.ndarray, values: np.ndarray) -> list[int]:
        """The best points that are no closer than a few degrees to a better one."""
        chosen: list[int] = []
        for k in np.argsort(-values, kind="stable"):
            if len(chosen) < self.keep and all(points[k] @ points[j] < DISTINCT for j in chosen):
                chosen.append(int(k))
        return chosen

    def _ascent(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """g (q,) and its gradient times g (q, d)."""
        q, (d, width) = len(points), self.moments.shape[1:]
        total = np.zeros((q, d, self.charged.n_cells, width))
        for cell, part in self.parts:
            active = (points @ self.directions[part].T > 0).astype(np.float64)
            total[:, :, cell] += (active @ self.moments[part].reshape(-1, d * width)).reshape(q, d, width)
        matrices = total.reshape(q, d, -1)
        correlations = np.einsum("qd,qdk->qk", points, matrices)
        return np.linalg.norm(correlations, axis=1), np.einsum("qdk,qk->qd", matrices, correlations)


def _normalised(points: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(points, axis=1, keepdims=True)
    alive = norms[:, 0] > 0
    return points[alive] / norms[alive]


@dataclass(order=True)
class Block:
    """A cone with the entries it has to look at; the one with the largest bound is searched first."""

    priority: float
    order: int
    vertices: np.ndarray = field(compare=False)
    linear: np.ndarray = field(compare=False)
    indices: np.ndarray = field(compare=False)
    signs: int = field(compare=False)
    halvings: int = field(compare=False)


class Search:
    """What the searches share: the tree, the allowance, the threshold that incumbents raise, and the tally."""

    def __init__(self, charged: ChargedRows, tree: RowTree, incumbents: Incumbents, goal: Goal) -> None:
        self.tree, self.n_rows = tree, len(charged.rows)
        self.incumbents, self.goal = incumbents, goal
        self.rank = charged.rows.shape[1]
        self.fold = self.tree.fold(charged.n_cells)
        self.fineness = FINENESS.get(self.rank, FINENESS_ELSEWHERE)
        # The rows of a division are unit, so that its weight is the total; rows from elsewhere may have any length.
        self.total = charged.total if charged.division is None else self.tree.weight * (1 + 1e-12)
        self.allowance = _allowance(self.total, len(charged.rows), self.fold.size, self.rank)
        self.threshold = np.array([self._enough(float(incumbents.values[0]))])
        self.pruned, self.cones, self.entries = 0.0, 0, 0
        self.stopped: Stop | None = None

    def _enough(self, best: float) -> float:
        """The bound up to which cones need no further division: beside the allowance no bound comes down any more."""
        return max(self.goal.threshold(best), best + CLOSEST * self.allowance)

    def raise_threshold(self, value: float, points: np.ndarray) -> None:
        """Climb from (q, d) points, the best of which has g >= `value`, if that is news."""
        if value > self.incumbents.values[0] * (1 + 1e-9):
            self.incumbents.climb(points, 3)
            self.threshold[0] = max(self.threshold[0], self._enough(float(self.incumbents.values[0])))

    def outcome(self, still_open: float) -> tuple[float, int, int, Stop]:
        """The proved bound, the numbers of cones and entries looked at, and why the search stopped."""
        # nothing exceeds this, and it is finite even if no cone was looked at
        bound = min(largest(self.pruned, still_open), self.total + self.allowance)
        return bound, self.cones, self.entries, self.stopped or Stop.BOUND


class BlockSearch(Search):
    """The blocks still open, and the threads that work on them, best bound first."""

    def __init__(self, charged: ChargedRows, tree: RowTree, incumbents: Incumbents, goal: Goal) -> None:
        super().__init__(charged, tree, incumbents, goal)
        self.busy, self.made = 0, 0
        self.open: list[Block] = []
        self.change = threading.Condition()
        for signs in itertools.product((1.0, -1.0), repeat=self.rank - 1):
            self._push(np.diag((1.0, *signs)), np.zeros_like(self.fold), self.tree.division.roots, 3, 0, np.inf)

    def run(self) -> tuple[float, int, int, Stop]:
        """Search; see `outcome`."""
        # Threads share incumbents as they find them, so that only one thread finds the same ones every time.
        threads = cores() if self.n_rows > SERIAL_ROWS else 1
        with ThreadPoolExecutor(threads) as pool:
            for job in [pool.submit(self._work) for _ in range(threads)]:
                job.result()
        return self.outcome(max((-block.priority for block in self.open), default=0.0))

    def _push(
        self, vertices: np.ndarray, linear: np.ndarray, indices: np.ndarray, signs: int, halvings: int, bound: float
    ) -> None:
        self.made += 1
        heapq.heappush(self.open, Block(-bound, self.made, vertices, linear, indices, signs, halvings))

    def _work(self) -> None:
        workspace = Workspace(self.fold.shape)
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

    def _search(self, block: Block, workspace: Workspace) -> None:
        workspace.load(block)
        budget = max(TURN_ENTRIES, self.entries // TURN_SHARE)
        if self.goal.max_cones is not None:
            budget = min(budget, TURN_ENTRIES_LIMITED)
        while True:
            status, workspace.depth = search(
                self.tree.arrays, self.fold, self.fineness, self.allowance, self.threshold, budget, *workspace.state()
            )
            if status != OUT_OF_ROOM:
                break
            workspace.grow()
        with self.change:
            self.pruned = largest(self.pruned, float(workspace.pruned[0]))
            self.cones += int(workspace.counts[0])
            self.entries += int(workspace.counts[1])
            for entry in workspace.entries():
                self._push(*entry)
            value, vertex = workspace.incumbent()
            self.raise_threshold(value, vertex[None])


class Workspace:
    """The stack of one thread, as arrays for the compiled search."""

    def __init__(self, shape: tuple[int, ...], levels: int = 64, room: int = 1 << 16) -> None:
        d = shape[0]
        self.vertices, self.linear = np.empty((levels, d, d)), np.empty((levels, *shape))
        self.span, self.signs = np.empty((levels, 3), np.int64), np.empty(levels, np.int64)
        self.bound, self.indices = np.empty(levels), np.empty(room, np.int32)
        self.pruned, self.best, self.counts = np.zeros(1), np.zeros((2, 1 + d)), np.zeros(2, np.int64)
        self.depth = 0
        self.scratch = self._scratch()

    def _scratch(self) -> tuple[np.ndarray, ...]:
        """As in `_cone_bounds.collapse`, with room for all entries that `indices` has."""
        d, _, width = self.linear.shape[1:]
        chunks = -(-len(self.indices) // CHUNK)
        taken = np.empty((chunks, d + width + 1, CHUNK), np.float32)
        return taken, np.empty((2, CHUNK), np.float32), np.empty((len(self.indices), 4), np.int32)

    def load(self, block: Block) -> None:
        n = len(block.indices)
        if n > len(self.indices):
            self.indices = np.empty(2 * n, np.int32)
            self.scratch = self._scratch()
        self.indices[:n] = block.indices
        self.vertices[0], self.linear[0], self.signs[0] = block.vertices, block.linear, block.signs
        self.span[0], self.bound[0], self.depth = (0, n, block.halvings), -block.priority, 1
        self.pruned[:], self.best[:], self.counts[:] = 0.0, 0.0, 0

    def state(self) -> tuple[Any, ...]:
        stack = self.vertices, self.linear, self.span, self.signs, self.bound
        return self.indices, self.scratch, stack, self.depth, self.pruned, self.best, self.counts

    def grow(self) -> None:
        self.indices = np.concatenate([self.indices, np.empty_like(self.indices)])
        self.scratch = self._scratch()

    def entries(self) -> Iterator[tuple[Any, ...]]:
        """What is left on the stack, to become blocks."""
        for k in range(self.depth):
            low, high, halvings = self.span[k].tolist()
            yield (
                self.vertices[k].copy(),
                self.linear[k].copy(),
                self.indices[low:high].copy(),
                int(self.signs[k]),
                halvings,
                float(self.bound[k]),
            )

    def incumbent(self) -> tuple[float, np.ndarray]:
        sign = int(self.best[1, 0] > self.best[0, 0])
        return float(self.best[sign, 0]), self.best[sign, 1:] * (-1.0 if sign else 1.0)


def _allowance(total: float, n: int, size: int, d: int) -> float:
    """What rounding can hide at a vertex, for Σ‖x_k‖‖s_k‖ = `total`; the text of `branch_and_bound` says why."""
    return 2.0 * (n + size + 1000.0 * d**2.5) * float(np.finfo(float).eps) * total
