"""Rank r and a remainder: branch and bound over filters in the first r directions of the patches, a norm for the rest.

Let F (r, d) have the first r principal directions of the patch rows x for rows, a = F x, b = x - Fᵀa, and for a unit
filter u let y = F u and z = u - Fᵀy: x·u = a·y + b·z, ‖y‖² + ‖z‖² = 1. Since (p + q)_+ - (p)_+ = θ q for a θ in [0, 1],

    G(u) = Σ_k (a_k·y)_+ s_k + ½ Σ_k (b_k·z) s_k + ½ Σ_k σ_k (b_k·z) s_k,      |σ_k| <= 1.

The first sum is g_r ‖y‖ long at most, with g_r the maximum over unit filters of rank r, which branch and bound proves
an upper bound on. The second is a matrix A times z. The third has in cell p, for any ν_k > 0, a square of at most
λ_max(Σ_{k in p} s_k s_kᵀ/ν_k) zᵀ(Σ_{k in p} ν_k b_k b_kᵀ)z by Cauchy and Schwarz. With ν_k = ‖s_k‖/‖b_k‖ and E_p, N_p
for the two sums, g(u) <= g_r ‖y‖ + R ‖z‖ and so

    g(u)² <= g_r² + R²,      R = ½ ‖A‖ + ½ λ_max(Σ_p λ_max(E_p) N_p)^½.

**Another activation** has σ(p + q) - σ(p) = θ q for a θ between its slope and 1: the first ½ is then ½ (1 + slope), the
second ½ (1 - slope).

**Rounding.** Branch and bound is asked about the computed matrix F B, B the embedding: a problem of its own, with an
allowance of its own. What is left is b = B x - Fᵀ(F B)x, computed with the errors of both embeddings and of 2r + 4
operations. F is orthonormal to δ = ‖FFᵀ - I‖: ‖y‖² + ‖z‖² <= 1 + 2δ, and b·u is b·z but for (F b)·y: what is computed
of F b, and its rounding, is taken as it is. Sums over n images of K positions round as in `convcvx.oracles.polynomial`;
N_p is one of n K terms. None of this is multiplied by ‖z‖: it is added to the root of the two squares, not to R.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from convcvx.budget import NEVER
from convcvx.oracles._patch_rows import ROUND_UP, embedding_errors, lengths
from convcvx.oracles.base import PROVING_SECONDS, Oracle, OracleResult, Wanted
from convcvx.oracles.branch_and_bound import BranchAndBoundOracle
from convcvx.oracles.charged_rows import at_scale_one, raised
from convcvx.oracles.needs import ROWS_IN_MEMORY, Need
from convcvx.patches import Moments
from convcvx.problem import Problem
from convcvx.responses.passes import Responses
from convcvx.rounding import SAFE, UNIT, largest, top_eigenvalue
from convcvx.terms.scope import Scope

CHUNK_BYTES = 32 << 20
"""Bytes of rows in flight."""
SEARCHED = 4
"""Principal directions that are searched: more leave less for the remainder, and cost exponentially more."""


@dataclass(frozen=True)
class RemainderOracle(Oracle):
    """Prove an upper bound on max g over filters of any rank from a search over the first principal directions.

    Parameters
    ----------
    directions : int
        How many.
    search : BranchAndBoundOracle
        Over these.
    """

    directions: int = SEARCHED
    search: BranchAndBoundOracle = field(default_factory=lambda: BranchAndBoundOracle(1e-2, PROVING_SECONDS))
    name = "remainder"

    def answer(self, problem: Problem, dual_point: Tensor, wanted: Wanted) -> OracleResult:
        """As `Oracle` says; `stats` are those of the search, with its bound and the remainder; `starts` are not used.

        Filters are those of the search: their g is measured with all directions.
        """
        began = time.perf_counter()
        principal = principal_problem(problem, self.directions)
        rest, slack = remainder(problem, principal, dual_point)
        # The search may stop where g_r² + R² is below the square of the target, less slack.
        left = wanted.target - slack
        own = math.sqrt(left - rest) * math.sqrt(left + rest) if rest < left else 0.0
        found = self.search(principal, dual_point, wanted, starts=None, target=own)
        filters = torch.nn.functional.normalize(found.filters @ frame_of(problem, principal))
        measured = problem.until(NEVER).responses.correlate(filters, dual_point)  # what is proved by now has to stay
        frame = frame_of(problem, principal)
        skew = float((frame @ frame.T - torch.eye(len(frame), dtype=torch.float64)).norm()) + 2 * frame.numel() * UNIT
        values = measured.flatten(1).norm(dim=1)
        bound = largest((math.hypot(largest(found.upper_bound), largest(rest)) * (1 + skew) + slack) * SAFE)
        stats = found.stats | {"directions": len(frame), "searched_bound": found.upper_bound, "remainder": rest}
        return OracleResult(filters, values, bound, Scope.GLOBAL, stats | {"seconds": time.perf_counter() - began})


def principal_problem(problem: Problem, directions: int) -> Problem:
    """The same problem for filters in the first principal directions of its patches; kept with its responses."""
    kept = problem.responses.kept.setdefault("principal", {})
    if directions not in kept:
        responses = problem.responses.to(dtype=torch.float64)
        spec, embedding = responses.embedding.spec, responses.embedding
        frame = Moments.of(responses.images, spec).embedded(embedding.basis, spec).directions()[1][:directions]
        low = replace(embedding, basis=frame @ embedding.basis, patch_rank=len(frame))
        options = {name: value for name, value in responses.options.items() if name != "small"}
        kept[directions] = frame, Responses(responses.images, low, responses.pooling, **options)
    _, low_responses = kept[directions]
    return replace(problem, responses=low_responses.until(problem.deadline))


def frame_of(problem: Problem, principal: Problem) -> Tensor:
    """F (r, d)."""
    return next(
        frame for frame, low in problem.responses.kept["principal"].values() if len(frame) == principal.responses.dim
    )


def remainder(problem: Problem, principal: Problem, dual_point: Tensor) -> tuple[float, float]:
    """R for Z = `dual_point` (n, c); and, for rounding and the `dual_error` of the rest, what is to be added to g."""
    responses, low = problem.responses.to(dtype=torch.float64), principal.responses
    frame, basis, d = frame_of(problem, principal), responses.embedding.basis, responses.dim
    scaled, exponent = at_scale_one(dual_point.numpy())
    charges = torch.from_numpy(scaled)
    sizes = charges.norm(dim=1)
    wrong = torch.from_numpy(np.ldexp(problem.dual_error(dual_point).numpy(), -exponent))
    pool = responses.pooling.matrix(*responses.map_size)
    pool = torch.eye(responses.n_positions, dtype=torch.float64) if pool is None else pool
    reach = pool.sum(dim=0)
    n_cells, c = len(pool), charges.shape[1]
    linear, first = charges.new_zeros(c, n_cells * d), charges.new_zeros(n_cells, c, c)
    second, slack, mass = charges.new_zeros(n_cells, d, d), 0.0, 0.0
    activation = responses.activation
    share = (responses.n + responses.n_positions + 4 * d + 32) * UNIT * (1 + abs(activation.slope))
    longer = share + responses.n * responses.n_positions * UNIT
    size = max(1, CHUNK_BYTES // (8 * responses.n_positions * (basis.shape[1] + 4 * d)))
    for start in range(0, responses.n, size):
        where = slice(start, min(start + size, responses.n))
        raw = responses.rows(where).cpu()
        rows, inside = raw @ basis.T, raw @ low.embedding.basis.T
        rest = rows - inside @ frame
        norms = lengths(rest)
        off = embedding_errors(responses, where, raw) + embedding_errors(low, where, raw) * (1 + d * UNIT)
        off += (2 * len(frame) + 4) * UNIT * len(frame) ** 0.5 * (lengths(rows) + lengths(inside))
        off += lengths(rest @ frame.T) + (d + 4) * UNIT * len(frame) ** 0.5 * norms
        own = sizes[where]
        slack += float(((off @ reach) * own).sum()) * ROUND_UP
        slack += float((((norms + off) @ reach) * wrong[where]).sum()) * ROUND_UP
        mass += float(((norms @ reach) * own).sum()) * ROUND_UP
        linear += charges[where].T @ (activation.odd_part * (pool @ rest)).flatten(1)
        weighed = norms @ pool.T  # (b, P): Σ_k w ‖b‖
        ratios = torch.where(own > 0, 1 / own.clamp_min(1e-300), 0.0)[:, None] * weighed
        first += torch.einsum("bp,bc,be->pce", ratios, charges[where], charges[where])
        unit = rest / torch.where(norms > 0, norms, 1.0)[..., None]
        for cell, weights in enumerate(pool):
            positions = weights.nonzero()[:, 0]
            heavy = rest[:, positions] * (own[:, None] * weights[positions])[..., None]
            second[cell] += heavy.flatten(0, 1).T @ unit[:, positions].flatten(0, 1)
    matrix = rearrange(linear, "c (p d) -> (p c) d", p=n_cells)
    along = math.sqrt(top_eigenvalue(matrix.T @ matrix) + (len(matrix) + 4) * UNIT * float(matrix.square().sum()))
    # Sums of positive semidefinite terms: off by no more than their trace, rounded as often.
    tops = [top_eigenvalue(part) + share * float(part.diagonal().sum()) for part in first]
    moment = sum(
        (top * part for top, part in zip(tops, second, strict=True)), start=torch.zeros(d, d, dtype=torch.float64)
    )
    moment = 0.5 * (moment + moment.T)
    beside = top_eigenvalue(moment) + (longer + (n_cells + 4) * UNIT) * float(moment.diagonal().sum())
    rounding = (slack + share * mass) * (1 + 1e-9)
    rest_of_g = (along + activation.even_part * math.sqrt(beside)) * SAFE
    return raised(largest(rest_of_g), exponent), raised(largest(rounding), exponent)


def _too_many_rows(problem: Problem) -> str | None:
    return ROWS_IN_MEMORY.lacking(principal_problem(problem, SEARCHED))


PRINCIPAL_ROWS = Need(ROWS_IN_MEMORY.what, _too_many_rows, "use fewer images, a coarser stride, or oracle='polynomial'")
