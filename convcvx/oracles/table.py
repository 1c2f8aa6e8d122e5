"""The table of oracles: what `oracle=` and `--oracle` take, what each needs, and which one "auto" stands for.

A new oracle is a file with its class and an entry here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from convcvx.arrangements.cells import count_bound
from convcvx.errors import InputError, check_choice
from convcvx.oracles._patch_rows import MAX_BYTES
from convcvx.oracles.base import Oracle
from convcvx.oracles.branch_and_bound import LOW_RANK, BranchAndBoundOracle
from convcvx.oracles.copositive import CopositiveOracle
from convcvx.oracles.cylinders import FEW_CELLS_AND_OUTPUTS, CylinderOracle
from convcvx.oracles.enumerate import ExactOracle
from convcvx.oracles.local import LocalOracle
from convcvx.oracles.needs import (
    AVERAGES,
    AVERAGES_OR_PLANE,
    DEGREE_ONE,
    ONE_MATRIX,
    ROWS_IN_BUNDLES,
    ROWS_IN_MEMORY,
    Need,
    require,
)
from convcvx.oracles.polynomial import PolynomialOracle
from convcvx.oracles.remainder import PRINCIPAL_ROWS, RemainderOracle
from convcvx.oracles.sampled import SampledOracle
from convcvx.oracles.spectral import SpectralOracle
from convcvx.problem import Problem
from convcvx.terms.names import N_GATES

FEW_CELLS = 5_000
"""Cells up to which "auto" searches the whole arrangement: about a second a call."""
FEW_DIMENSIONS = 6
"""Rank of the patches up to which it does."""
CALL_SECONDS = 1800.0
"""Time limit of one call of branch and bound, gathering included; the best bound proved by then is used."""
CALL_SHARE = 0.25
"""Share of what is left of a training's own time that such a call takes: its bound comes step by step, and rounds are
to follow."""
FAR_TOL = 0.5
"""Relative error of a bound of branch and bound in training, as long as g is far above β: there is far to go."""
OWN_TOL = 0.25
"""Share of tol that branch and bound may be off by near the end: the rest is for the network."""
FINEST = 1e-8
"""Relative error that branch and bound is not asked to go below: float64 has room for no more in reasonable time."""


@dataclass(frozen=True)
class Effort:
    """What an oracle is made for.

    Attributes
    ----------
    tol : float
        Relative gap to be reached with it.
    thorough : bool
        Whether it is for a certificate; else a search may be rougher far from the optimum.
    gates : int
        Activation patterns to sample, where that matters.
    """

    tol: float = 1e-4
    thorough: bool = False
    gates: int = N_GATES


def _nowhere(problem: Problem) -> str | None:
    return None


@dataclass(frozen=True)
class Entry:
    """An oracle of the table.

    Attributes
    ----------
    make : callable
        The oracle, for an effort.
    needs : tuple of Need
        What a problem must be like.
    suits : callable
        Why "auto" picks it for a problem that meets its needs; None where it does not.
    """

    make: Callable[[Effort], Oracle]
    needs: tuple[Need, ...] = ()
    suits: Callable[[Problem], str | None] = _nowhere


def _spectral_suits(problem: Problem) -> str:
    if problem.responses.activation.degree == 1:
        return "without activation the largest singular value of a matrix is the maximum over all filters"
    return "of squares the largest eigenvalue of one matrix is the maximum over all filters"


def _exact_suits(problem: Problem) -> str | None:
    rank = problem.responses.embedding.patch_rank
    if rank <= 2:
        return f"patches of rank {rank} are swept completely"
    if AVERAGES.lacking(problem) is not None:
        return None
    rows = problem.n * problem.responses.n_positions
    most = count_bound(rows, rank) if rank <= FEW_DIMENSIONS else math.inf
    if most <= FEW_CELLS:
        return f"{rows:,} patches of rank {rank} have at most {most:,} activation patterns, searched completely"
    return None


def _branch_and_bound(effort: Effort) -> Oracle:
    far_tol, share = (0.0, 1.0) if effort.thorough else (FAR_TOL, CALL_SHARE)
    return BranchAndBoundOracle(max(OWN_TOL * effort.tol, FINEST), CALL_SECONDS, far_tol=far_tol, share=share)


def _branch_and_bound_suits(problem: Problem) -> str | None:
    rank = problem.responses.embedding.patch_rank  # two where there are too many patches for a sweep
    return f"patches of rank {rank} can be bounded in seconds" if rank in (2, 3) else None


def _family(effort: Effort) -> Oracle:
    """Refused by its name alone: `FamilyOracle` is made for the filters that a training names."""
    raise InputError("oracle family needs a family of filters to search; pass --filters ternary")


def _polynomial(effort: Effort) -> Oracle:
    return PolynomialOracle(None if effort.thorough else LocalOracle())


def _cylinders(effort: Effort) -> Oracle:
    """In training a search and polynomials: minutes a round would buy a bound that the certificate proves anew."""
    return CylinderOracle() if effort.thorough else _polynomial(effort)


def _local_suits(problem: Problem) -> str:
    rank = problem.responses.embedding.patch_rank
    if problem.responses.activation.degree > 1:
        return "of squares with several outputs or cells the maximum is no eigenvalue"
    if (instead := AVERAGES.lacking(problem)) is not None:
        return f"{instead} of patches of rank {rank}: a maximum is searched completely up to rank 2 alone"
    if rank <= FEW_DIMENSIONS and ROWS_IN_BUNDLES.lacking(problem) is not None:
        return f"a proof would gather more than {MAX_BYTES >> 30} GiB of patches"
    return f"patches of rank {rank}: the cost of a proof grows exponentially in the rank"


ORACLES: dict[str, Entry] = {
    "spectral": Entry(lambda effort: SpectralOracle(), (ONE_MATRIX, AVERAGES), _spectral_suits),
    "exact": Entry(lambda effort: ExactOracle(), (DEGREE_ONE, AVERAGES_OR_PLANE, ROWS_IN_MEMORY), _exact_suits),
    "branch-and-bound": Entry(
        _branch_and_bound, (DEGREE_ONE, AVERAGES, ROWS_IN_BUNDLES, LOW_RANK), _branch_and_bound_suits
    ),
    "copositive": Entry(lambda effort: CopositiveOracle(), (DEGREE_ONE, AVERAGES, ROWS_IN_MEMORY)),
    "family": Entry(_family),
    "polynomial": Entry(_polynomial),
    "remainder": Entry(lambda effort: RemainderOracle(), (DEGREE_ONE, AVERAGES, PRINCIPAL_ROWS)),
    "cylinders": Entry(_cylinders, (DEGREE_ONE, AVERAGES, ROWS_IN_MEMORY, FEW_CELLS_AND_OUTPUTS)),
    "sampled": Entry(lambda effort: SampledOracle(effort.gates), (DEGREE_ONE, AVERAGES)),
    "local": Entry(lambda effort: LocalOracle(thorough=effort.thorough), suits=_local_suits),
}
"""By name; "auto" takes the first that suits, and the last suits everywhere."""


def pick_oracle(name: str, problem: Problem) -> tuple[str, str]:
    """The oracle that `name` stands for on `problem`, and why: `auto` proves where a proof is affordable.

    Raises
    ------
    InputError
        For a name that is none, or a problem that lacks what the oracle needs.
    """
    check_choice("oracle", name, ("auto", *ORACLES))
    problem = _of_one_subspace(problem)
    if name != "auto":
        require(f"oracle {name}", ORACLES[name].needs, problem)
        return name, "as asked"

    @cache
    def met(need: Need) -> bool:
        return need.lacking(problem) is None

    for candidate, entry in ORACLES.items():
        # Reasons first: to count the rows that an oracle needs takes a look at all of them.
        if (why := entry.suits(problem)) is not None and all(map(met, entry.needs)):
            return candidate, why
    raise AssertionError("the last oracle suits everywhere")


def meets(name: str, problem: Problem) -> bool:
    """Whether the problem has what the oracle called `name` needs."""
    return all(need.lacking(_of_one_subspace(problem)) is None for need in ORACLES[name].needs)


def _of_one_subspace(problem: Problem) -> Problem:
    """Of several subspaces oracles are asked on one after the other: what they need is reckoned of one."""
    return replace(problem, responses=problem.responses.subspaces[0])


def get_oracle(
    name: str,
    problem: Problem,
    *,
    tol: float = 1e-4,
    thorough: bool = False,
    gates: int = N_GATES,
) -> Oracle:
    """The oracle called `name`, "auto" perhaps, for a relative gap of `tol`; options as in `Effort`.

    Raises
    ------
    InputError
        As `pick_oracle` does.
    """
    return ORACLES[pick_oracle(name, problem)[0]].make(Effort(tol, thorough, gates))
