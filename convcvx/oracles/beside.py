"""What is proved beside an estimate: a lower bound for every network, from a few passes, at any rank.

The bound on max g is that of polynomials in the filter, or where there is no time for these that of the lengths of the
patches; the dual points are those at hand and, where it is affordable, one that is chosen for the bound. The best of
the lower bounds counts. A weak one is a proof as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from convcvx.oracles.base import Oracle, OracleResult
from convcvx.oracles.lengths import NAME as LENGTHS
from convcvx.oracles.lengths import bound_by_lengths
from convcvx.oracles.lifted import widths
from convcvx.oracles.polynomial import WIDEST, PolynomialOracle, affordable_degree
from convcvx.oracles.relaxed import relaxed_point
from convcvx.problem import Problem
from convcvx.terms.scope import Scope

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
CHOOSING_FOR_SEARCH = 1 / 16
"""The same where a search is to prove more than polynomials do there: most of the time is for that."""
CALL = 0.5
"""Share of the time left that one proof may take where others are to follow."""
FIRST = 1 / 3
"""Share of the time left for the search that tells where a second one, in all that is left, promises most."""
LEFT = 0.55
"""Share of the bound of polynomials that a search is taken to leave before the first has told: seen 0.5 to 0.7."""
CHOSEN = ", at a dual point chosen for it"
"""What is said of such a proof."""
TOO_LONG = ": another pass over all patches would take long beside the training"
"""What is said where no pass is made for it."""
OUT_OF_TIME = ": the time limit left none for a pass over all patches"
"""What is said where such a pass was cut short, or would have been."""
BETWEEN = 16
"""Parts of the way from one dual point to another between which a search can choose."""
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


def best(proofs: Iterable[Proof]) -> Proof:
    """That of the largest lower bound; of equal ones the first."""
    return max(proofs, key=lambda proof: proof.value)


def best_proof(problem: Problem, points: Sequence[Tensor], oracle: Oracle, ends: Sequence[Proof] = ()) -> Proof:
    """The best lower bound that polynomials or `oracle` prove, at dual points at hand or chosen.

    Parameters
    ----------
    points : sequence of Tensor (n, c)
        Dual points at hand, one at least.
    ends : sequence of Proof, optional
        What `proofs_by_polynomials` has given for these; it is asked else.
    """
    if isinstance(oracle, PolynomialOracle):
        return best(proofs_by_polynomials(problem, points, replace(oracle, search=None)))
    ends = ends or proofs_by_polynomials(problem, points, PolynomialOracle(), CHOOSING_FOR_SEARCH)
    if len(ends) == 1:
        return best([*ends, *(_proof(problem, point, oracle, "") for point in points)])
    return best([*ends, *_proofs_between(problem, ends[0], ends[1], oracle)])


def proofs_by_polynomials(
    problem: Problem, points: Sequence[Tensor], oracle: PolynomialOracle, choosing: float = CHOOSING
) -> list[Proof]:
    """The best at a dual point at hand and, where it is affordable, one at a point chosen for it.

    That may take the share `choosing` of the time left.
    """
    start = best(_proof(problem, point, oracle, "", 1.0 if len(points) == 1 else CALL) for point in points)
    if start.found.cut_short or not _chooses(problem, math.inf):
        return [start]
    chosen = relaxed_point(problem.until(problem.deadline.share(choosing)), start.point)
    return [start, _proof(problem, chosen, oracle, CHOSEN)]


def _proofs_between(problem: Problem, start: Proof, end: Proof, oracle: Oracle) -> list[Proof]:
    """What a search proves between two dual points, the first at hand, the other chosen for polynomials.

    One that comes down to max g proves most at the residual of an optimal network, one that hardly comes down at the
    other end. How far it does is not known before: to about one share of the bound of polynomials wherever on the way,
    or, where it comes close to the largest g that is known, to about one share of what the bound is above that. By the
    better of the two a first search tells where a second one promises most.
    """

    def point(share: float) -> Tensor:
        return problem.in_domain((1 - share) * start.point + share * end.point)

    def bound(share: float) -> float:  # of polynomials: g is convex
        return (1 - share) * start.found.g_max + share * end.found.g_max

    def promising(left: Callable[[float], float]) -> float:
        shares = (step / BETWEEN for step in range(BETWEEN + 1))
        return max(shares, key=lambda share: problem.dual(point(share), left(share)))

    def proof(share: float, call: float) -> Proof:
        return _proof(problem, point(share), oracle, CHOSEN if share else "", call)

    share = promising(lambda share: LEFT * bound(share))
    first = proof(share, FIRST)
    if not 0 < bound(share) < math.inf:
        return [first]
    seen = [_largest(problem, first.found.filters, end.point) for end in (start, end)]

    def known(share: float) -> float:
        return (1 - share) * seen[0] + share * seen[1]

    left, room = first.found.g_max / bound(share), bound(share) - known(share)
    above = (first.found.g_max - known(share)) / room if room > 0 else 0.0

    def expected(share: float) -> float:
        return min(left * bound(share), known(share) + above * (bound(share) - known(share)))

    better = promising(expected)
    return [first] if better == share and not first.found.cut_short else [first, proof(better, 1.0)]


def _largest(problem: Problem, filters: Tensor, point: Tensor) -> float:
    """The largest g of these filters, 0 of none."""
    if not len(filters):
        return 0.0
    return float(problem.responses.correlate(filters, point).flatten(1).norm(dim=1).max())


def proofs_beside(problem: Problem, points: Sequence[Tensor], training_seconds: float | None = None) -> list[Proof]:
    """Lower bounds that polynomials prove by the deadline of `problem`, or lengths where there was no time.

    One at a dual point at hand and, perhaps, one at a point chosen for it.

    Parameters
    ----------
    points : sequence of Tensor (n, c)
        Dual points at hand, one at least.
    training_seconds : float, optional
        How long the training took before it: the proof is reckoned to cost a `SHARE` of that at most. None for no
        such limit.
    """
    left = math.inf if training_seconds is None else max(LEAST, SHARE * training_seconds)
    passes = pass_seconds(problem, 2) * len(points)
    if affordable_degree(problem) == 2 and _chooses(problem, left - passes):
        return proofs_by_polynomials(problem, points, PolynomialOracle())
    return quick_proofs(problem, points, left)


def quick_proofs(problem: Problem, points: Sequence[Tensor], seconds: float) -> list[Proof]:
    """Lower bounds at these dual points that polynomials prove in one pass each, or lengths if that takes longer."""
    degree = affordable_degree(problem)
    while degree and pass_seconds(problem, degree) * len(points) > seconds:
        degree -= 1
    if not degree:
        found = OracleResult.unfinished(problem, Scope.GLOBAL, 0.0)
        why = TOO_LONG if seconds < problem.deadline.left else OUT_OF_TIME
        return [best(_by_lengths(problem, point, found, why) for point in points)]
    oracle, call = PolynomialOracle(degree=degree), 1.0 if len(points) == 1 else CALL
    return [best(_proof(problem, point, oracle, "", call) for point in points)]


def pass_seconds(problem: Problem, degree: int) -> float:
    """Of one pass over all patches, about."""
    responses = problem.responses
    rows, (d, h) = float(responses.n) * responses.n_positions, responses.embedding.basis.shape
    return rows * d * (h + d * (degree == 2)) / SPEED


def _proof(problem: Problem, point: Tensor, oracle: Oracle, where: str, call: float = CALL) -> Proof:
    found = oracle(problem.until(problem.deadline.share(call)), point)
    if not math.isfinite(found.upper_bound):
        return _by_lengths(problem, point, found, OUT_OF_TIME if found.cut_short else "")
    by, name = oracle.name, oracle.name
    if "degree" in found.stats:  # also of a search that proved no more than they do
        by, name = f"polynomials of degree {found.stats['degree']}", PolynomialOracle.name
    return Proof(problem.dual(point, found.g_max), found, point, by + where, name)


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
