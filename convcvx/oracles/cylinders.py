"""Branch and bound where the energy of the patches is: cones in the first directions, quadratics in all others.

    g(u) = ‖G(u)‖,   G(u) = Σ_k (x_k·u)_+ s_k   over charged rows,   ‖u‖ = 1

Let x = (a, b) and u = (y, z) be parted into the first r principal directions of the rows and the m = d - r others. The
search divides the pairs (y, ‖z‖), a half sphere in r + 1 dimensions whatever d is; the direction of z is never divided.

**Cylinders.** A cylinder has r + 1 corners (y_i, s_i), s_i >= 0: it is all u = (Σ λ_i y_i, Σ λ_i s_i ζ) for λ >= 0 and
unit ζ. There x·u = Σ λ_i h_i with h_i = a·y_i + s_i b·ζ, which lies within a·y_i ± s_i ‖b‖. A row with all these >= 0
is linear on the cylinder, with all <= 0 it vanishes.

**Quadratics.** For every other row let [l, h] hold all h_i, A >= D > 0 the longer and the shorter of -l and h, and
R >= max |h_i - h_j|. For any B and C, with K midway between the extremes of |t| - B t - C t² on [l, h] and E half their
distance, |t| is within E of K + B t + C t². As t = Σ λ_i h_i for Σ λ_i = 1 and a variance is a quarter of the squared
range at most, Σ λ_i h_i² - R²/4 <= t² <= Σ λ_i h_i². Hence with σ = Σ λ_i

    (x·u)_+ = Σ λ_i (κ + α h_i + γ h_i²) + τ ε σ,     |τ| <= 1,   α = ½ (1 + B),   γ = ½ C,
                                                      κ = ½ K - C R²/16,    ε = ½ E + C R²/16.

Best for R = 0 is, if the longer side is the left one, C = 1/A, B = 0 and E = A/8 for A <= 2D, else C = 8D/(A + 2D)²,
B = C A - 1 and E = C A²/8: the error has four equal extremes. Where R > 1/C a flatter one, C = 1/R, loses less.

**Bound.** Summed over rows, G(u) = Σ λ_i (G_i(ζ) + tail), where G_i(ζ) = g_i + L_i ζ + Q_i v(ζ) comes from three sums
over the rows in question, Σ s κ, Σ s α xᵀ and Σ s γ x xᵀ, and v(ζ) = svec(ζζᵀ - I/m)/(1 - 1/m)^½ is unit as ζ is. The
corners alone matter. `_corner_bounds.longest` bounds ‖G_i(ζ) + tail‖ by B_i for all ζ and τ, as `polynomial` does on
the whole sphere, and `above` the largest Σ λ_i B_i over λ >= 0 with ‖u‖² = ‖Σ λ_i (y_i, s_i)‖² = 1.

A cylinder and its antipode are one item of work: G(-u) = G(u) - Σ_k s_k (x_k·u). However small its cylinders, the
bound has the tail that is left at corners: it does not come down to max g, but near it where b is short.

**Rounding.** Corners begin as unit vectors and are halved without being made unit: their entries are multiples of
2^-`HALVINGS`, exact, and there are no gaps. Rows are turned once: off by (d + 1) √d ε ‖x‖, and v' = T v and x·v by
‖TTᵀ - I‖ of their lengths; `principal` adds that to the slack. Intervals are widened by (4d + 16) ε ‖x‖ for what the
heights are off, so that no sign is misjudged, and ε by 64 ε A. A sum over N rows is off by (N + 8) ε of its modulus:
that is Σ‖x‖‖s‖ at most for the linear part, to which each row is added once on the way to a cylinder, and is added up
for the moments; putting them together at the corners adds 2d² roundings. Rows whose charges have one direction, which
in global pooling all rows of an image have, are added up before they are multiplied with it: s = size · direction but
for what `principal` adds to the slack.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from convcvx.budget import Deadline, OutOfTime, clock
from convcvx.oracles._cylinder_search import CylinderSearch
from convcvx.oracles.base import PROVING_SECONDS, Oracle, OracleResult, Wanted
from convcvx.oracles.branch_and_bound import FIRST_LOOK
from convcvx.oracles.charged_rows import ChargedRows
from convcvx.oracles.needs import Need
from convcvx.oracles.polynomial import WIDEST, PolynomialOracle
from convcvx.problem import Problem
from convcvx.rounding import UNIT, largest
from convcvx.terms.scope import Scope
from convcvx.terms.stop import Stop

DIVIDED = 3
"""Principal directions that are divided: more leave a shorter tail, and cost exponentially more."""
ALIKE = 2.0**-40
"""Distance of directions of charges up to which they are taken to be one; what that moves is in the slack."""
AT_ONCE = 0.1
"""Seconds that may be taken beyond a deadline: a bound is then the sum of all rows at least."""
ENTRIES = 1 << 19
"""Numbers P·c·(1 + d + d(d+1)/2) in the moments of a cylinder, at most."""


@dataclass(frozen=True)
class CylinderOracle(Oracle):
    """Prove an upper bound on max g over filters of any rank; the cost grows exponentially with `directions` only.

    Parameters
    ----------
    directions : int
        r.
    rel_tol : float
        The search stops at a bound <= (1 + rel_tol) times the best g found, or <= the `target` of the call.
    time_limit : float, optional
        Seconds after which the best bound proved so far is returned; as at the deadline of the problem.
    max_cylinders : int, optional
        Likewise, in cylinders.
    search : Oracle
        Finds the filters that a call returns.
    """

    directions: int = DIVIDED
    rel_tol: float = 1e-2
    time_limit: float | None = PROVING_SECONDS
    max_cylinders: int | None = None
    search: Oracle = field(default_factory=lambda: FIRST_LOOK)
    name = "cylinders"

    def answer(self, problem: Problem, dual_point: Tensor, wanted: Wanted) -> OracleResult:
        """As `Oracle` says; `stats` holds cylinders, directions, seconds and why the search stopped, and
        what polynomials say where their bound is the one that counts.

        That its own limit ended it, `Stop.SECONDS`, is how most searches end: at another dual point more may be proved.
        """
        began = clock()
        limited = problem.until(problem.deadline.sooner(Deadline.after(self.time_limit)))
        whole = PolynomialOracle()(limited, dual_point)
        try:
            building, rows = clock(), ChargedRows.build(limited, dual_point)
            if clock() - building > max(problem.deadline.left, AT_ONCE):  # the next step takes as long
                raise OutOfTime
            charged = principal(rows)
        except OutOfTime:
            late = OracleResult.unfinished(problem, Scope.GLOBAL, clock() - began, whole.upper_bound)
            return replace(late, stats=whole.stats | late.stats)
        found = self.search(problem.with_dtype(torch.float64), dual_point, wanted, target=0.0)
        enough = largest(wanted.target, *(float(value) * (1 + self.rel_tol) for value in found.values[:1]))
        search = CylinderSearch(charged, self.directions, charged.target(enough))
        stopped = search.run(limited.deadline, self.max_cylinders) if whole.upper_bound > enough else Stop.BOUND
        stopped = Stop.SECONDS if stopped is Stop.TIME_LIMIT and not problem.deadline.passed else stopped
        bound = charged.result(np.zeros((0, charged.rows.shape[1])), np.zeros(0), search.bound, {}).upper_bound
        stats = {"cylinders": search.seen, "directions": search.r, "stopped": stopped, "seconds": clock() - began}
        if whole.upper_bound <= bound:  # what polynomials prove is what counts, and is called so
            bound, stats = whole.upper_bound, whole.stats | stats
        return OracleResult(found.filters, found.values, bound, Scope.GLOBAL, stats)


def principal(charged: ChargedRows) -> ChargedRows:
    """The same in coordinates of which the first hold most of Σ ‖s‖ x xᵀ, with charges of equal direction in common.

    Each is of one cell, and rows are sorted by them.
    """
    rows, d = charged.rows, charged.rows.shape[1]
    lengths = np.linalg.norm(charged.charges, axis=1)
    _, vectors = np.linalg.eigh((rows * lengths[:, None]).T @ rows)
    turn = vectors.T[::-1].copy()
    skew = float(np.linalg.norm(turn @ turn.T - np.eye(d))) + 4 * d * d * UNIT
    directions = charged.charges / np.where(lengths > 0, lengths, 1.0)[:, None]
    alike = np.column_stack([charged.cells, np.rint(directions / ALIKE)])
    _, first, sources = np.unique(alike, axis=0, return_index=True, return_inverse=True)
    sources = sources.reshape(-1)
    order = np.argsort(sources, kind="stable")
    apart = np.linalg.norm(charged.charges - lengths[:, None] * directions[first][sources], axis=1)
    moved = float(np.linalg.norm(rows, axis=1) @ apart) * (1 + 1e-9) + 8 * UNIT * charged.total
    return replace(
        charged,
        rows=rows[order] @ turn.T,
        cells=charged.cells[order],
        charges=directions[first],
        sources=sources[order],
        sizes=lengths[order],
        frame=torch.from_numpy(turn) @ charged.frame,
        slack=charged.slack + 4 * skew * charged.total + moved,
        division=None,
    )


def _too_wide(problem: Problem) -> str | None:
    width, d = problem.responses.n_cells * problem.n_outputs, problem.responses.dim
    fits = width <= WIDEST and width * (1 + d + d * (d + 1) // 2) <= ENTRIES
    return None if fits else f"{width} of them at rank {d}"


FEW_CELLS_AND_OUTPUTS = Need(
    f"{WIDEST} pooling cells times outputs at most, fewer where the rank is high",
    _too_wide,
    "use a coarser grid, or oracle='remainder'",
)
