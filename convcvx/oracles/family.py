"""A declared finite family of filters: the maximum of g is a scan, and the bound a proof for networks over the family.

Whatever is known of all filters, a layer is often to have filters of a certain kind: quantised ones, or those of a
dictionary. Among networks with these the training problem is a group lasso, and the largest g over the family says how
far from its optimum a network can be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from convcvx.budget import OutOfTime
from convcvx.errors import InputError
from convcvx.machine.watch import watched
from convcvx.oracles._patch_rows import ROUND_UP
from convcvx.oracles.base import Oracle, OracleResult, Wanted
from convcvx.oracles.charged_rows import at_scale_one, raised
from convcvx.oracles.metric import Metric
from convcvx.problem import Problem
from convcvx.responses.passes import Responses
from convcvx.rounding import SAFE, SMALLEST_NORMAL, UNIT, largest
from convcvx.terms.scope import Scope
from convcvx.terms.stop import Stop

BLOCK = 1024
"""Filters scanned at once: their correlations take a few MB, and a pass over the images is worth its calls."""
MOST_COORDINATES = 10
"""Coordinates of ternary filters at most, rank 9 and a hidden bias: 59,048 filters. Each more takes three times as long
to scan."""
UNIT_LENGTH = 1e-9
"""How far from 1 the norm of a filter of a family may be: more is no rounding of the norm."""
DIVERSE = 0.9
"""Cosine up to which filters that are returned together differ: neighbours would share one weight."""
OTHERS = 16
"""Roundings of a g that do not depend on the problem: products, weights of pooling cells, lengths of filters."""


class Family(Protocol):
    """A finite set of unit filters of a space of patches.

    Attributes
    ----------
    name : str
        In words.
    symmetric : bool
        Whether -u belongs to it with u; `blocks` then has one of the two.
    """

    name: str
    symmetric: bool

    def size(self, dim: int) -> int:
        """How many filters it has among those of `dim` entries; raises `InputError` if it has none there."""
        ...

    def blocks(self, dim: int) -> Iterator[Tensor]:
        """Yield all of its filters, (b, dim) float64 at a time."""
        ...

    def contains(self, filters: Tensor) -> Tensor:
        """(q,) bool: whether it has unit filters (q, r), to rounding."""
        ...


class Ternary:
    """All filters with entries -1, 0 and 1 in the basis of the patches, brought to unit length: 3^r - 1 of them."""

    name = "ternary filters"
    symmetric = True

    def size(self, dim: int) -> int:
        if dim > MOST_COORDINATES:
            raise InputError(
                f"ternary filters may have {MOST_COORDINATES} coordinates at most, the hidden bias among them; got "
                f"{dim}: pass --rank {MOST_COORDINATES - 1}, or a smaller kernel"
            )
        return 3**dim - 1

    def blocks(self, dim: int) -> Iterator[Tensor]:
        # Counted in digits of base 3: the filter in the middle is 0, and the last ones are the first with other signs.
        places = 3 ** torch.arange(dim)
        for part in torch.arange(self.size(dim) // 2).split(BLOCK):
            yield normalize((part[:, None] // places % 3 - 1).double())

    def contains(self, filters: Tensor) -> Tensor:
        scaled = filters / filters.abs().amax(dim=1, keepdim=True)
        return ((scaled - scaled.round()).abs() <= UNIT_LENGTH).all(dim=1)


class Listed:
    """Filters one by one.

    Parameters
    ----------
    filters : Tensor (q, r)
        Of unit norm; what is there twice counts once.
    name : str

    Raises
    ------
    InputError
        For no filters, or such as are not finite or not of unit norm.
    """

    symmetric = False

    def __init__(self, filters: Tensor, name: str = "listed filters") -> None:
        if filters.ndim != 2 or not filters.numel():
            raise InputError(
                f"a family must be a (q, r) tensor of at least one filter; got shape {tuple(filters.shape)}"
            )
        filters = filters.double().cpu()
        if not bool(((filters.norm(dim=1) - 1).abs() <= UNIT_LENGTH).all()):  # nor is NaN of unit norm
            worst = float((filters.norm(dim=1) - 1).abs().max())
            raise InputError(f"filters of a family must have norm 1; one is off by {worst:.1e}: divide by their norms")
        self.name, self.filters = name, torch.unique(filters, dim=0)

    def size(self, dim: int) -> int:
        if self.filters.shape[1] != dim:
            raise InputError(f"the family has filters of {self.filters.shape[1]} entries; the problem's have {dim}")
        return len(self.filters)

    def blocks(self, dim: int) -> Iterator[Tensor]:
        self.size(dim)
        yield from normalize(self.filters).split(BLOCK)

    def contains(self, filters: Tensor) -> Tensor:
        return ((filters[:, None] - self.filters).abs() <= UNIT_LENGTH).all(dim=2).any(dim=1)


FAMILIES: dict[str, Family] = {"ternary": Ternary()}
"""What `filters=` and `--filters` take, besides the word for all filters."""


@dataclass(frozen=True)
class FamilyOracle(Oracle):
    """The maximum of g over a family, every filter of it evaluated in float64: a proof for networks over the family.

    Notes
    -----
    *Rounding.* With ε = 2⁻⁵³, raw patch rows x (h entries), the basis B (r, h) with columns b_j and
    a = Σ_j |x_j| ‖b_j‖, a unit filter u has |x·uB| <= a, and

    - the kernel uB and its product with x are off by (r + h + 2)ε a, the filter itself, whose length is one to
      rounding, by (r + 4)ε a; x by what `embedding_errors` says, where contrast is normalised;
    - σ is 1-Lipschitz, and rounds once where its slope is neither 0 nor ±1: ε a; a cell sums K weighed terms at most:
      (K + 3)ε Σ_k w_pk a_k;
      the maximum over a cell is exact, and off by no more than one of its terms;
    - the sum over n images, in whatever order, rounds (n + 1)ε Σ_i |Z_ic| |φ_ip|.

    So each entry of G is off by Tε Σ_i |Z_ic| Σ_k w_pk a_ik, T = 2r + h + K + n + 16, and its norm by
    Tε Σ_i ‖Z_i‖ Σ_pk w_pk a_ik; forming the norm rounds (P·c + 2)ε, relatively. As ‖φ(x_i; u)‖ <= Σ_pk w_pk a_ik, what
    Z may be off counts with that sum.

    *Squares*: the kernel of a unit filter is brought to its length in r + 4 roundings more, and x·uB, which is off by δ
    in all, makes (2a + δ)δ of its square. As Σ_j |b_rj||x_j| over all r is √r a at most, an embedded row is off by
    (h + 1)√r ε a. So T is 2(3r + h + K + n + 20), and what rows are off 2(h + 1)√r ε Σ_k w_pk a_k²; δ² is in `SAFE`.

    *Symmetry.* Of averages, σ(t) - σ(-t) = (1 + slope) t, so that G(u) - G(-u) is linear in u: half of a symmetric
    family is evaluated, and G(e_j), G(-e_j) for the r axes. With Σ|u_j| <= √r, G(-u) is off by (1 + 2√r) times as much,
    and 2(r + 2)ε more, as 1 + slope <= 2. Of maxima all of it is evaluated.
    """

    family: Family
    name = "family"
    scope = Scope.FAMILY

    def answer(self, problem: Problem, dual_point: Tensor, wanted: Wanted) -> OracleResult:
        """See `Oracle`; of what is wanted `n_filters` alone matters.

        Raises
        ------
        InputError
            For a family that has no filters of so many entries.
        """
        began = perf_counter()
        size = self.family.size(problem.responses.dim)
        problem = problem.with_dtype(torch.float64)
        scaled, exponent = at_scale_one(dual_point.numpy())
        scanned: list[tuple[Tensor, Tensor]] = []
        stats: dict[str, Any] = {"family": self.family.name, "family_size": size}
        bound = 0.0
        try:
            for filters, values in self._scan(problem, torch.from_numpy(scaled)):
                bound = largest(bound, float(values.max()))
                scanned.append(_promising(filters, values, wanted.n_filters))
            linear = self.family.symmetric and not problem.responses.pooling.maximum
            bound = bound_over_family(problem, raised(bound, exponent), dual_point, symmetric=linear)
        except OutOfTime:
            bound, stats["stopped"] = math.inf, Stop.TIME_LIMIT
        stats["seconds"] = perf_counter() - began
        if not scanned:
            return OracleResult.unfinished(problem, Scope.FAMILY, stats["seconds"])
        filters, values = (torch.cat(parts) for parts in zip(*scanned, strict=True))
        best = Metric.of(problem.responses).distinct(filters, values, wanted.n_filters, DIVERSE)
        values = torch.from_numpy(np.ldexp(values[best].numpy(), exponent))
        return OracleResult(filters[best], values, bound, Scope.FAMILY, stats)

    def _scan(self, problem: Problem, dual_point: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (filters (b, r), g of each) until all of the family are through."""
        responses, linear = problem.responses, None
        maximum = responses.pooling.maximum
        if self.family.symmetric and not maximum:
            axes = torch.eye(responses.dim, dtype=torch.float64)
            ahead, back = responses.correlate(torch.cat([axes, -axes]), dual_point).flatten(1).chunk(2)
            linear = ahead - back
        blocks, size = self.family.blocks(responses.dim), self.family.size(responses.dim)
        evaluated = size // 2 if self.family.symmetric else size
        for filters in watched("filters of the family", blocks, evaluated, size=len):
            correlations = responses.correlate(filters, dual_point).flatten(1)
            yield filters, correlations.norm(dim=1)
            if self.family.symmetric and maximum:  # G(u) - G(-u) is not linear
                yield -filters, responses.correlate(-filters, dual_point).flatten(1).norm(dim=1)
            if linear is not None:
                yield -filters, (correlations - filters @ linear).norm(dim=1)


def bound_over_family(problem: Problem, computed: float, dual_point: Tensor, *, symmetric: bool = False) -> float:
    """A true upper bound on g over a family, of which `computed` is the largest in float64; see `FamilyOracle`.

    `dual_point` is what `in_domain` made of it. Infinite for a g that is no number.
    """
    responses = problem.responses
    dim, size = responses.embedding.basis.shape
    terms = 2 * dim + size + responses.n_positions + responses.n + OTHERS
    if responses.activation.degree == 2:
        terms = 2 * (terms + dim + 4)
    share = terms * UNIT / (1 - terms * UNIT)
    if symmetric:
        share = (2 + 2 * math.sqrt(dim)) * share
    sizes, errors = reach(responses)
    moved = problem.dual_error(dual_point)
    allowance = float(dual_point.norm(dim=1) @ (share * sizes + errors) + moved @ (sizes + errors))
    entries = responses.n_cells * problem.n_outputs
    return largest(computed * (1 + (entries + 4) * UNIT) + allowance * SAFE * SAFE + SMALLEST_NORMAL, SMALLEST_NORMAL)


def reach(responses: Responses) -> tuple[Tensor, Tensor]:
    """(n,) Σ_pk w_pk a_ik of each image, at most, and the same sum of what `embedding_errors` finds row by row.

    Of squares the sum of a_ik², and what that changes by these errors.
    """
    basis = responses.embedding.basis
    sizes = responses.reach()
    if responses.activation.degree == 2:
        errors = 2 * (basis.shape[1] + 1) * len(basis) ** 0.5 * UNIT * sizes
    else:
        errors = responses.reach((basis.shape[1] + 1) * UNIT * basis.abs().sum(dim=0)) + responses.contrast_error()
    # sums of terms >= 0: a few roundings each
    grown = ROUND_UP + (sum(basis.shape) + responses.n_positions + OTHERS) * UNIT
    return sizes * grown, errors * grown + SMALLEST_NORMAL


def _promising(filters: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best of some filters, several times as many as are wanted: of neighbours one is taken."""
    best = values.topk(min(len(values), 8 * count)).indices
    return filters[best], values[best]
