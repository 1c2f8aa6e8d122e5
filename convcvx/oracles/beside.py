"""What is proved beside an estimate: a lower bound for every network, from a few passes, at any rank.

The bound on max g is that of polynomials in the filter, or where there is no time for these that of the lengths of the
patches; the dual points are those at hand and, where it is affordable, one that is chosen for the bound. The best of
the lower bounds counts. A weak one is a proof as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from convcvx.oracles.base import Oracle, OracleResult
from convcvx.oracles.lengths import NAME as LENGTHS
from convcvx.oracles.lengths import bound_by_lengths
from convcvx.oracles.lifted import widths
from convcvx.oracles.polynomial import WIDEST, PolynomialOracle, affordable_degree
from convcvx.oracles.relaxed import relaxed_point
from convcvx.oracles.scope import Scope
from convcvx.problem import Problem

FEATURE_BYTES = 1 << 30
"""Bytes of features that choosing a dual point may keep; beyond it the points at hand have to do."""
SPEED = 2e9
"""Products a second that all of this is reckoned at: about what a core does."""
ROUND_PRODUCTS = 1500
"""Products for each feature n·P·w and output in which a dual point is chosen."""
SHARE = 0.05
"""Share of the seconds of a training that the proof beside its estimate may take."""
CHOOSING = 0.8
"""Share of the time left in which a dual point is chosen: the rest is for its proof."""
CALL = 0.5
"""Share of the time left that one proof may take: others are to follow."""
LOOK = 1 / 16
"""Share of the time left that a brief search may take, or the choice of a dual point for it: eight of these leave more
than half of it."""
SHARES = (0.25, 0.5, 0.75, 1.0)
"""Parts of the way to the chosen dual point at which searches look briefly: the best lies between, the further from its
end the longer the search."""
CHOSEN = ", at a dual point chosen for it"
"""What is said of such a proof."""
TOO_LONG = ": another pass over all patches would take long beside the training"
"""What is said where no pass is made for it."""
OUT_OF_TIME = ": the time limit left none for a pass over all patches"
"""What is said where such a pass was cut short."""
BETWEEN = 16
"""Parts of the way from one dual point to another at which it is asked whether more could be proved there."""
LEAST = 2.0
"""Seconds that it may take in any case: so that what is proved of small problems does not depend on the clock."""


@dataclass(frozen=True)
class Proof:
    """A lower bound on the objective of every network.

    Attributes
    ----------
    value : float
    found : OracleResult
        The bound on max g it follows from.
    point : Tensor (n, c)
        The dual point that this is a bound at.
    by : str
        In words: which bound, at which dual point.
    oracle : str
        The name of that bound.
    """

    value: float
    found: OracleResult
    point: Tensor
    by: str
    oracle: str


def best_proof(problem: Problem, points: Sequence[Tensor], oracle: Oracle) -> Proof:
    """The best lower bound that `oracle` proves, at dual points at hand or chosen for the bound of polynomials.

    Between the two g is no larger than their bounds say: where that promises most, the oracle proves it anew. One that
    can be brief looks at several points between them instead, and proves at length where it proves most by that.
    """
    if (brief := oracle.brief) is not oracle:
        return _proof_at_length(problem, points, oracle, brief)
    proofs = [_proof(problem, point, oracle, "") for point in points]
    best = max(proofs, key=lambda proof: proof.value)
    if best.found.cut_short or not _chooses(problem, math.inf):
        return best
    start = points[proofs.index(best)]
    chosen = relaxed_point(problem.until(problem.deadline.share(CHOOSING)), start)
    other = _proof(problem, chosen, oracle, CHOSEN)

    def promised(share: float) -> float:
        bound = (1 - share) * best.found.g_max + share * other.found.g_max
        return problem.dual(problem.in_domain((1 - share) * start + share * chosen), bound)

    if isinstance(oracle, PolynomialOracle):  # for whose bound the point was chosen
        return max(best, other, key=lambda proof: proof.value)
    share = max((step / BETWEEN for step in range(1, BETWEEN)), key=promised)
    third = _proof(problem, problem.in_domain((1 - share) * start + share * chosen), oracle, CHOSEN)
    return max(best, other, third, key=lambda proof: proof.value)


def _proof_at_length(problem: Problem, points: Sequence[Tensor], oracle: Oracle, brief: Oracle) -> Proof:
    looks = [_proof(problem, point, brief, "", LOOK) for point in points]
    best = max(looks, key=lambda proof: proof.value)
    where = ""
    if _chooses(problem, math.inf):
        start = best.point
        chosen = relaxed_point(problem.until(problem.deadline.share(LOOK)), start)
        between = [problem.in_domain((1 - share) * start + share * chosen) for share in SHARES]
        others = [_proof(problem, point, brief, CHOSEN, LOOK) for point in between]
        best = max(best, *others, key=lambda proof: proof.value)
        where = "" if best.point is start else CHOSEN
    return max(best, _proof(problem, best.point, oracle, where), key=lambda proof: proof.value)


def proof_beside(problem: Problem, points: Sequence[Tensor], training_seconds: float | None = None) -> Proof:
    """The best lower bound that polynomials prove by the deadline of `problem`, or lengths where there was no time.

    Parameters
    ----------
    points : sequence of Tensor (n, c)
        Dual points at hand, one at least.
    training_seconds : float, optional
        How long the training took before it: the proof is reckoned to cost a `SHARE` of that at most. None for no
        such limit.
    """
    left = math.inf if training_seconds is None else max(LEAST, SHARE * training_seconds)
    degree = affordable_degree(problem)
    while degree and pass_seconds(problem, degree) * len(points) > left:
        degree -= 1
    if not degree:
        found = OracleResult.unfinished(problem, Scope.GLOBAL, 0.0)
        proofs = [_by_lengths(problem, point, found, TOO_LONG) for point in points]
        return max(proofs, key=lambda proof: proof.value)
    oracle = PolynomialOracle(degree=degree)
    if degree == 2 and _chooses(problem, left - pass_seconds(problem, degree) * len(points)):
        return best_proof(problem, points, oracle)
    return max((_proof(problem, point, oracle, "") for point in points), key=lambda proof: proof.value)


def pass_seconds(problem: Problem, degree: int) -> float:
    """Of one pass over all patches, about."""
    responses = problem.responses
    rows, (d, h) = float(responses.n) * responses.n_positions, responses.embedding.basis.shape
    return rows * d * (h + d * (degree == 2)) / SPEED


def _proof(problem: Problem, point: Tensor, oracle: Oracle, where: str, call: float = CALL) -> Proof:
    found = oracle(problem.until(problem.deadline.share(call)), point)
    if not math.isfinite(found.upper_bound):
        return _by_lengths(problem, point, found, OUT_OF_TIME if found.cut_short else "")
    by = f"polynomials of degree {found.stats['degree']}" if "degree" in found.stats else oracle.name
    return Proof(problem.dual(point, found.g_max), found, point, by + where, oracle.name)


def _by_lengths(problem: Problem, point: Tensor, found: OracleResult, why: str) -> Proof:
    """What is proved where a search, which `found` nothing, proves nothing."""
    found = replace(found, upper_bound=bound_by_lengths(problem, point))
    by = "the lengths of the patches alone" if math.isfinite(found.upper_bound) else "nothing but its sign"
    return Proof(problem.dual(point, found.g_max), found, point, by + why, LENGTHS)


def _chooses(problem: Problem, left: float) -> bool:
    """Whether choosing a dual point fits in memory and, with two more passes, in so many seconds."""
    responses, c = problem.responses, problem.n_outputs
    entries = float(responses.n) * responses.n_cells * sum(widths(responses.dim, 2))
    seconds = ROUND_PRODUCTS * entries * c / SPEED + 2 * pass_seconds(problem, 2)
    return responses.n_cells * c <= WIDEST and 8 * entries <= FEATURE_BYTES and seconds <= left
