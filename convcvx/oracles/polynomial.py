"""A proved bound on max g for any rank and any number of images, by one pass: polynomials of degree two in the filter.

With the features of `convcvx.oracles.lifted`, Σ_i φ(x_i; u) Z_iᵀ is a sum of blocks: matrices C_b, of P·c rows, times
vectors y_b of norm one at most,

    G(u) = Σ_b C_b y_b :    C = Σ_i Z_i ⊗ (a_ip, b_ip, q_ip) for y = 1, u, v(u),
                            and a column m_ip/16 e_p ⊗ Z_i for each image and cell, with |y| <= 1.

**Bound.** For any λ_b > 0, by Cauchy and Schwarz,

    ‖Σ_b C_b y_b‖² <= λ_max(E) Σ_b λ_b ‖y_b‖² <= λ_max(E) Σ_b λ_b,      E = Σ_b C_b C_bᵀ / λ_b   (P·c, P·c).

λ_b = ‖C_b‖ gives the sum of norms Σ ‖C_b‖, and the best λ the semidefinite relaxation max {‖Σ_b C_b Y_b‖_F :
‖Y_b‖_F <= 1} over matrices Y_b instead of vectors (for the tail, that of Grothendieck's inequality: within (π/2)^½ of
the largest tail there is). At its maximum Y_b = C_bᵀW / ‖C_bᵀW‖_F with W = Σ_b C_b Y_b, so λ_b = ‖C_bᵀW‖_F is looked
for by W <- E W, of which R = W Wᵀ alone is needed. Whatever λ that ends with, the bound is valid, and is evaluated from
it alone. Of squares, which have no tail, another bound is tried: `convcvx.oracles.forms`.

**Rounding.** The features are off as `lifted` says; multiplied with Z and summed over n images they round n + 1 times
more, each time by no more than their moduli, 3 m_ip ‖Z_i‖. For what Z itself may be off see `Problem.dual_error`.
E is a sum of products with moduli that add up to its trace: it is off by (n + w + 16) ε trace in norm at most. A bound
on the largest eigenvalue of the computed E is proved by a Cholesky factorisation: `convcvx.rounding.top_eigenvalue`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from convcvx.oracles.base import Oracle, OracleResult, Wanted
from convcvx.oracles.charged_rows import at_scale_one, raised
from convcvx.oracles.forms import put_together, rounded_by
from convcvx.oracles.lifted import lifted, widths
from convcvx.problem import Problem
from convcvx.rounding import SAFE, UNIT, largest, top_eigenvalue
from convcvx.terms.scope import Scope

STEPS = 30
"""Steps towards the best λ at most; each costs n·P·c² products, and leaves a valid bound."""
ENOUGH = 1e-4
"""Relative progress of the bound in a step, below which λ is good enough."""
FAINT = 1e-12
"""Share of the mean of R that is added to its diagonal: no λ is zero then."""
DENSE = 1024
"""P·c up to which E is formed; beyond it cells are bounded one by one, and norms of blocks added."""
WIDEST = 256
"""P·c up to which matrices of that order are decomposed again and again: at the corners of cylinders, and in the rounds
of choosing a dual point."""
PRODUCTS = 1e12
"""Products n·K·d² up to which the degree is two by default: about a minute on two cores. Beyond it it is one."""
ENTRIES = 1 << 27
"""Entries P·c·w of the blocks up to which it is two: a GiB."""


@dataclass(frozen=True)
class PolynomialOracle(Oracle):
    """Prove an upper bound on max g from polynomials in the filter: one pass, for any rank.

    Parameters
    ----------
    search : Oracle, optional
        Finds the filters that a call returns, for solvers; the proof needs none.
    degree : {1, 2}, optional
        Of the polynomials; 2 unless that would cost more than `PRODUCTS`.
    """

    search: Oracle | None = None
    degree: int | None = None
    name = "polynomial"

    def answer(self, problem: Problem, dual_point: Tensor, wanted: Wanted) -> OracleResult:
        """As `Oracle` says; `stats` holds the degree, the share of the tail in the bound, and seconds."""
        began = time.perf_counter()
        bound, stats = self.bound(problem, dual_point)
        filters = torch.zeros(0, problem.responses.dim, dtype=torch.float64)
        values = filters.sum(dim=1)
        if self.search is not None:
            found = self.search(problem, dual_point, wanted)
            filters, values = found.filters, found.values
        stats["seconds"] = time.perf_counter() - began
        return OracleResult(filters, values, bound, Scope.GLOBAL, stats)

    def bound(self, problem: Problem, dual_point: Tensor) -> tuple[float, dict[str, Any]]:
        """A proved bound on max g, and what it is made of."""
        responses = problem.responses
        degree = self.degree or affordable_degree(problem)
        scaled, exponent = at_scale_one(dual_point.numpy())
        charges = torch.from_numpy(scaled)
        sizes = charges.norm(dim=1)
        wrong = torch.from_numpy(np.ldexp(problem.dual_error(dual_point).numpy(), -exponent))
        width = sum(widths(responses.dim, degree))
        blocks = charges.new_zeros(charges.shape[1], responses.n_cells * width)
        tails, slack, mass = charges.new_empty(responses.n, responses.n_cells), 0.0, 0.0
        for part in lifted(responses, degree):
            blocks += charges[part.where].T @ part.features.flatten(1)
            tails[part.where] = part.tails
            slack += float(part.errors @ sizes[part.where] + part.reach @ wrong[part.where])
            mass += float(part.reach @ sizes[part.where])
        slack = (slack + 3 * (responses.n + 8) * UNIT * mass) * (1 + 1e-9)
        columns = rearrange(blocks, "c (p w) -> p c w", p=responses.n_cells)
        parts = list(columns.split(widths(responses.dim, degree), dim=2))
        bound = block_bound(parts, tails, charges)
        if responses.activation.degree == 2 and degree == 2:
            bound = min(bound, _unfolded(parts[0], parts[2]))
        stats = {"degree": degree, "rounding": slack / bound if bound > 0 else 0.0}
        return raised(largest(bound + slack) * SAFE, exponent), stats


def affordable_degree(problem: Problem) -> int:
    """2, or 1 where that would take minutes."""
    responses = problem.responses
    entries = responses.n_cells * problem.n_outputs * sum(widths(responses.dim, 2))
    products = float(responses.n) * responses.n_positions * responses.dim**2
    return 2 if products <= PRODUCTS and entries <= ENTRIES else 1


def block_bound(blocks: list[Tensor], tails: Tensor, charges: Tensor, steps: int = STEPS) -> float:
    """At least the largest ‖Σ_b C_b y_b + Σ_ip τ_ip tails_ip e_p ⊗ charges_i‖ over ‖y_b‖ <= 1, |τ_ip| <= 1.

    Parameters
    ----------
    blocks : list of Tensor (P, c, w_b)
    tails : Tensor (n, P)
        >= 0.
    charges : Tensor (n, c)
    """
    top = largest(*(float(block.abs().max()) for block in blocks), float(tails.max()) * float(charges.abs().max()))
    if not math.isfinite(top):
        return math.inf
    exponent = math.frexp(top)[1]  # squares of what is of size one neither over- nor underflow
    blocks, tails = [_times(block, -exponent) for block in blocks], _times(tails, -exponent)
    n_cells, n_outputs = tails.shape[1], charges.shape[1]
    if n_cells * n_outputs <= DENSE:
        bound = Multipliers.chosen(blocks, tails, charges, steps).bound(blocks, tails, charges)
    else:
        cells = (tails[:, [p]] for p in range(n_cells))
        bound = math.hypot(
            *(Multipliers.chosen([], cell, charges, steps // 4).bound([], cell, charges) for cell in cells)
        )
        bound = (bound + sum(_norm(block.flatten(0, 1)) for block in blocks)) * SAFE
    return raised(bound, exponent)


@dataclass(frozen=True)
class Multipliers:
    """λ of the blocks, and of the tails over their sizes: any positive numbers.

    Attributes
    ----------
    blocks : list of float
    tails : Tensor (n, P)
        λ_ip = tails_ip times this.
    """

    blocks: list[float]
    tails: Tensor

    @classmethod
    def of(cls, root: Tensor, blocks: list[Tensor], charges: Tensor, n_cells: int) -> Multipliers:
        """Those that belong to R = `root` (P·c, P·c)."""
        c = charges.shape[1]
        damped = root + FAINT * root.diagonal().mean() * torch.eye(len(root), dtype=root.dtype)
        flat = [block.flatten(0, 1) for block in blocks]
        own = [float((block * (damped @ block)).sum().clamp_min(0).sqrt()) for block in flat]
        tails = [
            ((charges @ damped[p * c : (p + 1) * c, p * c : (p + 1) * c]) * charges).sum(dim=1) for p in range(n_cells)
        ]
        return cls(own, torch.stack(tails, dim=1).clamp_min(0).sqrt())

    @classmethod
    def chosen(cls, blocks: list[Tensor], tails: Tensor, charges: Tensor, steps: int = STEPS) -> Multipliers:
        """Good ones; the better of those that are met on the way to the best."""
        size = tails.shape[1] * charges.shape[1]
        root, best, least = torch.eye(size, dtype=torch.float64), None, math.inf
        for _ in range(max(1, steps)):
            multipliers = cls.of(root, blocks, charges, tails.shape[1])
            matrix = multipliers.matrix(blocks, tails, charges)
            value = float(torch.linalg.eigvalsh(matrix)[-1].clamp_min(0)) * multipliers.total(tails)
            progress = least - value
            if best is None or value < least:
                best, least = multipliers, value
            if not progress > 2 * ENOUGH * value:
                break
            root = matrix @ root @ matrix
            root = 0.5 * (root + root.T) / root.diagonal().mean().clamp_min(1e-300)
        assert best is not None
        return best

    def total(self, tails: Tensor) -> float:
        """Σ λ."""
        return sum(self.blocks) + float((tails * self.tails).sum())

    def matrix(self, blocks: list[Tensor], tails: Tensor, charges: Tensor) -> Tensor:
        """E (P·c, P·c)."""
        n_cells, c = tails.shape[1], charges.shape[1]
        matrix = charges.new_zeros(n_cells * c, n_cells * c)
        for block, multiplier in zip(blocks, self.blocks, strict=True):
            if multiplier > 0:
                flat = block.flatten(0, 1)
                matrix += flat @ flat.T / multiplier
        for p in range(n_cells):
            weights = torch.where(self.tails[:, p] > 0, tails[:, p] / self.tails[:, p], 0.0)
            matrix[p * c : (p + 1) * c, p * c : (p + 1) * c] += (charges * weights[:, None]).T @ charges
        return matrix

    def bound(self, blocks: list[Tensor], tails: Tensor, charges: Tensor) -> float:
        """(λ_max(E) Σ λ)^½, rounding allowed for."""
        matrix = self.matrix(blocks, tails, charges)
        size = len(tails) + sum(block.shape[2] for block in blocks) + 16
        top = top_eigenvalue(matrix) + size * UNIT * float(matrix.diagonal().sum()) * (1 + 1e-9)
        total = self.total(tails) * (1 + (tails.numel() + 8) * UNIT)
        # A column whose λ underflowed is not in E: its length is added.
        lost = sum(_length(block) for block, multiplier in zip(blocks, self.blocks, strict=True) if not multiplier > 0)
        lost += float(((self.tails <= 0) * tails * charges.norm(dim=1, keepdim=True)).sum()) * (1 + 1e-9)
        return (math.sqrt(top * total) + lost) * SAFE


def _unfolded(constant: Tensor, quadratic: Tensor) -> float:
    """At least the length of (uᵀ A_pc u)_pc, for the forms A_pc of these blocks and any unit u; see `forms`."""
    matrices = put_together(constant, quadratic)
    return (_norm(matrices.flatten(0, 2)) + rounded_by(constant, quadratic)) * SAFE


def _times(data: Tensor, exponent: int) -> Tensor:
    """`data` times 2^exponent."""
    return torch.from_numpy(np.ldexp(data.numpy(), exponent))


def _length(block: Tensor) -> float:
    """At least the Frobenius norm."""
    return float(block.norm()) * (1 + (block.numel() + 4) * UNIT)


def _norm(matrix: Tensor) -> float:
    """At least the largest singular value."""
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    if len(matrix) > DENSE:
        return _length(matrix)
    gram = matrix @ matrix.T
    off = (matrix.shape[1] + 4) * UNIT * float(gram.diagonal().sum())
    return math.sqrt(top_eigenvalue(gram) + off) * SAFE
