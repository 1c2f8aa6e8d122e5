"""The oracle of a sampled program: a proved bound on g over the filters of sampled activation patterns, no others.

Where u has the activation pattern of gate s, g(u) = ‖G_sᵀ u‖ with G_s = Σ_i Φ^s(x_i) ⊗ Z_i (r, P·c). Hence

    max {g(u) : ‖u‖ <= 1, u has pattern s} <= σ_max(G_s),

which is the dual constraint of the gated program and holds for the ReLU program because it drops the cone. With one
cell and one output the maximum over the cone is a projection, ‖Π_K(±G_s)‖, and the bound is exact. The patterns of
the network's own filters are always among those searched: the network is a point of the program it is judged by,
and weak duality holds for it.
"""

from __future__ import annotations

from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from convcvx.budget import NEVER, OutOfTime
from convcvx.errors import check_count
from convcvx.oracles._patch_rows import embedding_errors, lengths
from convcvx.oracles.base import Oracle, OracleResult, Wanted
from convcvx.oracles.charged_rows import at_scale_one, raised
from convcvx.oracles.metric import Metric
from convcvx.oracles.needs import DEGREE_ONE, require
from convcvx.oracles.pattern_cones import PatternCones
from convcvx.problem import Problem
from convcvx.responses.gated import GatedResponses, sample_gates
from convcvx.rounding import UNIT, largest
from convcvx.terms.names import N_GATES
from convcvx.terms.scope import Scope
from convcvx.terms.stop import Stop

CLIMBS = 3
"""Alternations between filter and output direction where the maximum over a cone is not convex."""


class SampledOracle(Oracle):
    """Searches the activation patterns of sampled gates.

    Parameters
    ----------
    n_gates, seed : int
        Gaussian gates, drawn from the seed alone: whoever has data and seed has the program.
    gates : Tensor (q, r), optional
        Gates of one's own instead.
    """

    name = "sampled"
    scope = Scope.SAMPLED

    def __init__(self, n_gates: int = N_GATES, seed: int = 0, gates: Tensor | None = None) -> None:
        self.n_gates, self.seed, self._gates = check_count("gates", n_gates), seed, gates

    def gates(self, problem: Problem) -> Tensor:
        """(q, r) gates on `problem`."""
        return sample_gates(problem.responses, self.n_gates, self.seed) if self._gates is None else self._gates

    def answer(self, problem: Problem, dual_point: Tensor, wanted: Wanted) -> OracleResult:
        """As `Oracle` says; the seed plays no part, the program is fixed, but starts add their own patterns to it.

        Raises
        ------
        InputError
            For squares, which no gate makes linear.
        """
        require("oracle sampled", (DEGREE_ONE,), problem)
        began = perf_counter()
        problem, starts = problem.with_dtype(torch.float64), wanted.starts
        gates = self.gates(problem).double()
        sampled = len(gates)
        gates = gates if starts is None else torch.cat([gates, starts.double()])
        scaled, exponent = at_scale_one(dual_point.numpy())
        dual_error = torch.from_numpy(np.ldexp(problem.dual_error(dual_point).numpy(), -exponent))
        dual_point, target = torch.from_numpy(scaled), float(np.ldexp(wanted.target, -exponent))
        pulls = GatedResponses(problem.responses, gates).adjoint(dual_point).flatten(2)
        _, sizes, vectors = torch.linalg.svd(pulls, full_matrices=False)
        bounds = sizes[:, 0].clone()
        relaxed = float(bounds.max())
        open_ = (bounds > target).nonzero()[:, 0] if relaxed > target else bounds.argmax()[None]
        stopped: dict[str, Stop] = {}
        try:
            filters, values, tight = _search(problem, gates[open_], pulls[open_], vectors[open_])
        except OutOfTime:  # the bounds without cones stand
            filters, values, tight = gates[:0], bounds[:0], bounds[open_]
            stopped = {"stopped": Stop.TIME_LIMIT}
        if pulls.shape[2] == 1:
            bounds[open_] = torch.minimum(bounds[open_], tight)
        best = Metric.of(problem.responses).distinct(filters, values, wanted.n_filters, cosine=1 - 1e-9)
        stats = {
            "patterns": len(gates),
            "sampled_patterns": sampled,
            "seed": self.seed if self._gates is None else None,
            "bound_without_cones": float(np.ldexp(relaxed, exponent)),
            "seconds": perf_counter() - began,
        } | stopped
        bound = largest(float(bounds.max()) * (1 + 1e-12) + rounding(problem.until(NEVER), dual_point, dual_error))
        values = torch.from_numpy(np.ldexp(values[best].numpy(), exponent))
        return OracleResult(filters[best], values, raised(bound, exponent), Scope.SAMPLED, stats)


def _search(problem: Problem, gates: Tensor, pulls: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit filters of the cones, their g, and for a single output (q,) the proved maximum over each cone.

    From the two leading right singular vectors of G_s, of either sign: u = Π_K(G_s v), v = G_sᵀ u.
    """
    cones = PatternCones(problem.responses, gates)
    towards = torch.cat([vectors[:, :2], -vectors[:, :2]], dim=1)  # (q, m, P·c)
    tight = torch.zeros(len(gates), dtype=torch.float64)
    for climb in range(1 if pulls.shape[2] == 1 else CLIMBS):
        points = towards @ pulls.transpose(1, 2)
        inside, bounds = cones.project(points)
        tight = bounds.amax(dim=1) if climb == 0 else tight
        unit = inside / inside.norm(dim=2, keepdim=True).clamp_min(1e-300)
        towards = unit @ pulls
        values = towards.norm(dim=2)
        towards = towards / values[..., None].clamp_min(1e-300)
    reached = inside.norm(dim=2).flatten() > 0
    return unit.flatten(0, 1)[reached], values.flatten()[reached], tight


def rounding(problem: Problem, dual_point: Tensor, dual_error: Tensor) -> float:
    """What float64 can lose of ‖G_s‖: m roundings of a sum of m rows, each no larger than ‖x_k‖ w_pk ‖Z_i‖, the errors
    of the rows themselves, and what Z may be off by image, `dual_error` (n,)."""
    responses = problem.responses
    pool = responses.pooling.matrix(*responses.map_size)
    reach = torch.ones(responses.n_positions).double() if pool is None else pool.norm(dim=0)
    terms = responses.n + responses.n_positions + responses.embedding.basis.shape[1]
    share = terms * UNIT / (1 - terms * UNIT)
    total = 0.0
    for start in range(0, responses.n, 1024):
        where = slice(start, min(start + 1024, responses.n))
        raw = responses.rows(where).cpu()
        norms, errors = lengths(raw @ responses.embedding.basis.T), embedding_errors(responses, where, raw)
        total += float(((share * norms + errors) @ reach) @ dual_point[where].norm(dim=1))
        total += float(((norms + errors) @ reach) @ dual_error[where])
    return total * (1 + 1e-9)
