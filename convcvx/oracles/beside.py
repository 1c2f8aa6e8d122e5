"""What is proved beside an estimate: a lower bound for every network, from a few passes, at any rank.

The bound on max g is that of polynomials in the filter; the dual points are those at hand and, where it is affordable,
one that is chosen for the bound. The best of the lower bounds counts. A weak one is a proof as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from convcvx.oracles.base import OracleResult
from convcvx.oracles.lifted import widths
from convcvx.oracles.polynomial import PolynomialOracle, affordable_degree
from convcvx.oracles.relaxed import relaxed_point
from convcvx.problem import Problem

FEATURE_BYTES = 1 << 30
"""Bytes of features that choosing a dual point may keep; beyond it the points at hand have to do."""
CELLS_AND_OUTPUTS = 256
"""P·c up to which a dual point is chosen: each of its rounds decomposes matrices of this size."""
SHARE = 0.15
"""Features n·P·w that choosing a dual point may have for each patch entry n·K·h and batch of climbs of a training: its
rounds then cost about a twentieth of the training's searches."""


@dataclass(frozen=True)
class Proof:
    """A lower bound on the objective of every network.

    Attributes
    ----------
    value : float
    found : OracleResult
        The bound on max g it follows from.
    by : str
        In words: which bound, at which dual point.
    """

    value: float
    found: OracleResult
    by: str


def proof_beside(problem: Problem, points: Sequence[Tensor], batches: float | None = None) -> Proof:
    """The best lower bound that polynomials prove by the deadline of `problem`: zero where there was no time.

    Parameters
    ----------
    points : sequence of Tensor (n, c)
        Dual points at hand, one at least.
    batches : float, optional
        Batches of climbs over all images that the training before it went through: choosing a dual point costs less.
        None for no such limit.
    """
    oracle = PolynomialOracle()
    proofs = [_proof(problem, point, oracle, "") for point in points]
    best = max(proofs, key=lambda proof: proof.value)
    if best.found.cut_short or not _affordable(problem, batches):
        return best
    chosen = _chosen(problem, points[proofs.index(best)])
    return max(best, _proof(problem, chosen, oracle, ", at a dual point chosen for it"), key=lambda proof: proof.value)


def _proof(problem: Problem, point: Tensor, oracle: PolynomialOracle, where: str) -> Proof:
    found = oracle(problem, point)
    by = f"polynomials of degree {found.stats['degree']}{where}" if "degree" in found.stats else "nothing but its sign"
    return Proof(problem.dual(point, found.g_max), found, by)


def _chosen(problem: Problem, start: Tensor) -> Tensor:
    return relaxed_point(problem.until(problem.deadline.share(0.8)), start)


def _affordable(problem: Problem, batches: float | None) -> bool:
    responses = problem.responses
    entries = responses.n_cells * sum(widths(responses.dim, 2))
    limit = float("inf") if batches is None else SHARE * batches * responses.n_positions * responses.dim
    return (
        affordable_degree(problem) == 2
        and responses.n_cells * problem.n_outputs <= CELLS_AND_OUTPUTS
        and 8 * responses.n * entries <= FEATURE_BYTES
        and entries <= limit
    )
