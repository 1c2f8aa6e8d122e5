"""stub"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convcvx.budget import Deadline, OutOfTime, clock
from convcvx.machine.threads import each
from convcvx.oracles._corner_bounds import above, longest
from convcvx.oracles._quadratic_rows import settle
from convcvx.oracles.base import Oracle, OracleResult
from convcvx.oracles.charged_rows import ChargedRows, largest
from convcvx.oracles.local import LocalOracle
from convcvx.oracles.polynomial import PolynomialOracle
from convcvx.oracles.scope import Scope
from convcvx.problem import Problem
from convcvx.rounding import UNIT

DIRECTIONS = 4
SECONDS = 120.0
BATCH = 16
HALVINGS = 48
SHRUNK = 0.5
CURVATURE = 0.25


@dataclass(frozen=True)
class CylinderOracle:
    directions: int = DIRECTIONS
    rel_tol: float = 1e-2
    time_limit: float | None = SECONDS
    max_cylinders: int | None = None
    search: Oracle = field(default_factory=LocalOracle)
    name = "cylinders"

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
        began = clock()
        deadline = problem.deadline.sooner(Deadline.after(self.time_limit))
        try:
            found = self.search(problem, dual_point, starts=starts, n_filters=n_filters, seed=seed, target=0.0)
            whole = PolynomialOracle().bound(problem.until(deadline), dual_point)[0]
            charged = ChargedRows.build(problem.until(deadline), dual_point)
        except OutOfTime:
            return OracleResult.unfinished(problem, Scope.GLOBAL, clock() - began)
        enough = largest(target, float(found.values.max()) * (1 + self.rel_tol))
        search = CylinderSearch(principal(charged), self.directions, charged.target(enough))
        stopped = search.run(deadline, self.max_cylinders)
        bound = min(whole, charged.result(np.zeros((0, charged.rows.shape[1])), np.zeros(0), search.bound, {}).upper_bound)
        stats = {"cylinders": search.made, "stopped": stopped, "seconds": clock() - began}
        return OracleResult(found.filters, found.values, bound, Scope.GLOBAL, stats)


def principal(charged: ChargedRows) -> ChargedRows:
    sizes = np.linalg.norm(charged.charges, axis=1)
    _, vectors = np.linalg.eigh((charged.rows * sizes[:, None]).T @ charged.rows)
    turn = vectors.T[::-1].copy()
    d = len(turn)
    skew = float(np.linalg.norm(turn @ turn.T - np.eye(d))) + 4 * d * d * UNIT
    return replace(
        charged,
        rows=charged.rows @ turn.T,
        frame=torch.from_numpy(turn) @ charged.frame,
        slack=charged.slack + 4 * skew * charged.total,
        division=None,
    )


@dataclass(frozen=True)
class Held:
    indices: np.ndarray
    linear: np.ndarray


@dataclass(order=True)
class Cylinder:
    priority: float
    order: int
    corners: np.ndarray = field(compare=False)
    edge: tuple[int, int] = field(compare=False)
    halvings: int = field(compare=False)
    held: Held = field(compare=False)


class CylinderSearch:
    def __init__(self, charged: ChargedRows, directions: int, enough: float) -> None:
        self.charged = charged
        self.enough = enough
        n, d = charged.rows.shape
        self.r = min(directions, d - 1)
        self.lengths = np.linalg.norm(charged.rows, axis=1) * (1 + (d + 4) * UNIT)
        self.rests = np.linalg.norm(charged.rows[:, self.r :], axis=1) * (1 + (d + 4) * UNIT)
        self.sizes = np.linalg.norm(charged.charges, axis=1)
        self.weight = charged.total
        c = charged.charges.shape[1]
        self.fold = np.zeros((charged.n_cells, c, d))
        for p in range(charged.n_cells):
            inside = charged.cells == p
            self.fold[p] = charged.charges[inside].T @ charged.rows[inside]
        self.open: list[Cylinder] = []
        self.made = 0
        self.pruned = 0.0
        whole = Held(np.arange(n, dtype=np.int32), np.zeros_like(self.fold))
        corners = [np.diag((1.0, *signs, 1.0)) for signs in itertools.product((1.0, -1.0), repeat=max(self.r - 1, 0))]
        if self.r == 0:
            corners = [np.ones((1, 1))]
        self._look([(part, 0, whole, math.inf) for part in corners])

    @property
    def bound(self) -> float:
        return largest(self.pruned, -self.open[0].priority if self.open else 0.0)

    def run(self, deadline: Deadline, most: int | None) -> str:
        while self.open:
            if deadline.passed:
                return "time_limit"
            if most is not None and self.made >= most:
                return "max_cylinders"
            halves = []
            for _ in range(min(BATCH, len(self.open))):
                cylinder = heapq.heappop(self.open)
                one, two = cylinder.edge
                middle = 0.5 * (cylinder.corners[one] + cylinder.corners[two])
                for end in (one, two):
                    corners = cylinder.corners.copy()
                    corners[end] = middle
                    halves.append((corners, cylinder.halvings + 1, cylinder.held, -cylinder.priority))
            self._look(halves)
        return "bound"

    def _look(self, parts: Sequence[tuple[np.ndarray, int, Held, float]]) -> None:
        settled = list(each(self._settle, parts))
        bounds = self._bounds(np.stack([part[0] for part in parts]), settled)
        for (corners, halvings, held, parent), (kept, linear, *_, bends), own in zip(parts, settled, bounds, strict=True):
            bound = min(own, parent) if own == own else parent
            self.made += 1
            if bound <= self.enough or halvings >= HALVINGS:
                self.pruned = largest(self.pruned, bound)
                continue
            if len(kept) <= SHRUNK * len(held.indices):
                held = Held(kept, linear)
            edge = self._edge(corners, bends)
            heapq.heappush(self.open, Cylinder(-bound, self.made, corners, edge, halvings, held))

    def _settle(self, part):
        corners, _, held, _ = part
        charged = self.charged
        n_cells, c, d = self.fold.shape
        linear = held.linear.copy()
        moments = np.zeros((n_cells, c, 1 + d + d * (d + 1) // 2))
        tails, masses = np.zeros((n_cells, c, c)), np.zeros(n_cells)
        bends, kept = np.zeros(d * (d + 1) // 2), np.empty(len(held.indices), np.int32)
        count, modulus = settle(
            charged.rows, self.lengths, self.rests, charged.cells, charged.charges, self.sizes, corners,
            held.indices, linear, moments, tails, masses, bends, kept,
        )  # fmt: skip
        return kept[:count].copy(), linear, moments, tails, masses, modulus, bends

    def _bounds(self, corners: np.ndarray, settled) -> list[float]:
        linear, moments, tails, masses = (
            torch.from_numpy(np.stack([part[k] for part in settled])).flatten(1, 2) if k in (1, 2)
            else torch.from_numpy(np.stack([part[k] for part in settled])) for k in (1, 2, 3, 4)
        )
        counts = torch.tensor([float(len(part[0])) for part in settled]).double()
        moduli = torch.tensor([part[5] for part in settled]).double()
        tails = tails + tails.tril(-1).mT
        places = torch.from_numpy(corners)
        B, V, _ = places.shape
        d, r = linear.shape[2], self.r
        m = d - r
        y, s = places[:, :, :r], places[:, :, r]
        constant, first = moments[:, :, 0], moments[:, :, 1 : 1 + d]
        second = moments.new_zeros(*moments.shape[:2], d, d)
        upper = torch.triu_indices(d, d)
        second[:, :, upper[0], upper[1]] = moments[:, :, 1 + d :]
        second[:, :, upper[1], upper[0]] = moments[:, :, 1 + d :]
        odd = first + linear
        odd = torch.stack([odd, odd - torch.from_numpy(self.fold).flatten(0, 1)], dim=1)  # (B, 2, q, d)
        trace = second[:, :, r:, r:].diagonal(dim1=2, dim2=3).sum(dim=2) / m
        pure = second[:, :, r:, r:] - trace[..., None, None] * torch.eye(m, dtype=torch.float64)
        a, b = torch.triu_indices(m, m)
        scale = torch.where(a == b, 1.0, 2.0).double().sqrt() * math.sqrt(1 - 1 / m)
        quad = pure[:, :, a, b] * scale  # (B, q, w)
        even = constant[:, None] + torch.einsum("bqij,bvi,bvj->bvq", second[:, :, :r, :r], y, y) + s[..., None] ** 2 * trace[:, None]
        g = even[:, :, None] + torch.einsum("bsqi,bvi->bvsq", odd[..., :r], y)
        cross = 2 * torch.einsum("bqij,bvj->bvqi", second[:, :, r:, :r], y)
        L = s[:, :, None, None, None] * (odd[:, None, :, :, r:] + cross[:, :, None])
        Q = (s[:, :, None, None] ** 2 * quad[:, None])[:, :, None].expand(-1, -1, 2, -1, -1)
        def flat(t): return t.reshape(B * V * 2, *t.shape[3:])
        def spread(t): return t[:, None].expand(B, V * 2, *t.shape[1:]).reshape(B * V * 2, *t.shape[1:])
        values = longest(flat(g), flat(L), flat(Q), spread(tails), spread(masses), spread(counts))
        allowance = 2 * (len(self.charged.rows) + 2 * d * d + 64) * UNIT * (self.weight + moduli)
        values = values.view(B, V, 2) + allowance[:, None, None]
        own = torch.stack([above(places, values[..., 0]), above(places, values[..., 1])]).amax(dim=0)
        return own.tolist()

    def _edge(self, corners: np.ndarray, bends: np.ndarray) -> tuple[int, int]:
        r, d = self.r, self.fold.shape[2]
        matrix = np.zeros((d, d))
        matrix[np.triu_indices(d)] = bends
        matrix = matrix + np.triu(matrix, 1).T
        form = np.zeros((r + 1, r + 1))
        form[:r, :r] = matrix[:r, :r]
        form[r, r] = np.trace(matrix[r:, r:])
        most, edge = -1.0, (1, 0)
        for i in range(r + 1):
            for j in range(i):
                apart = corners[i] - corners[j]
                cost = apart @ form @ apart + CURVATURE * max(self.enough, 0.0) * (apart @ apart)
                if cost > most:
                    most, edge = cost, (i, j)
        return edge
