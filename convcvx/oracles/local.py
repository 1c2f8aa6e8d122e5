"""Multi-start local search for filters with a large g: fast, scales to any data, proves nothing.

Starts are patches of the data, random directions and the filters at hand. All are scored in one pass; the best
climb by a generalised power iteration: for a fixed direction V = G(u)/g(u) the ascent step is the normalised
gradient of <V, G(u)>, which is Mᵀ M u within a cell of the arrangement. V is one step old, so that a step costs
one pass. A filter that fell goes back and takes a shorter step.
"""

from __future__ import annotations

from time import perf_counter

import torch
from torch import Tensor

from convcvx.oracles.base import OracleResult
from convcvx.problem import Problem

DISTINCT = 0.999
"""Cosine above which two filters count as the same local maximum."""


class LocalOracle:
    """Batched local search.

    Parameters
    ----------
    n_candidates : int
        Random starts that are scored.
    n_climbers : int
        Best distinct starts that climb.
    n_steps : int
        Passes they climb for.
    """

    name = "local"

    def __init__(self, n_candidates: int = 128, n_climbers: int = 32, n_steps: int = 12) -> None:
        self.n_candidates, self.n_climbers, self.n_steps = n_candidates, n_climbers, n_steps

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
        """See `Oracle`; the scope is `heuristic` and the upper bound infinite."""
        began = perf_counter()
        candidates = self._candidates(problem, starts, torch.Generator().manual_seed(seed))
        correlations = problem.responses.correlate(candidates, dual_point)
        values = correlations.flatten(1).norm(dim=1)
        chosen = distinct(candidates, values, self.n_climbers, cosine=0.9)
        filters, values = self._climb(problem, dual_point, candidates[chosen], correlations[chosen])
        basins = distinct(filters, values, len(filters), cosine=DISTINCT)
        hits = torch.as_tensor([(filters @ filters[b] > DISTINCT).sum() for b in basins])
        best = basins[:n_filters]
        stats = {
            "candidates": len(candidates),
            "starts": len(chosen),
            "basins": len(basins),
            # Good (1953): the mass of local maxima not seen is about the share of those seen once.
            "unseen_mass": float((hits == 1).sum()) / max(1, len(chosen)),
            "seconds": perf_counter() - began,
        }
        return OracleResult(filters[best], values[best], float("inf"), "heuristic", stats)

    def _candidates(self, problem: Problem, starts: Tensor | None, random: torch.Generator) -> Tensor:
        """(q, r) unit starts: half patches of random images, of either sign, half Gaussian directions."""
        responses, half = problem.responses, self.n_candidates // 2
        images = torch.randint(responses.n, (min(half, responses.n),), generator=random)
        rows = responses.rows(images.to(responses.device)).double().cpu() @ responses.embedding.basis.T
        rows = rows.flatten(0, 1)
        rows = rows[rows.norm(dim=1) > 1e-3 * rows.norm(dim=1).max()]
        patches = rows[torch.randint(max(len(rows), 1), (half,), generator=random)] if len(rows) else rows
        signs = torch.randint(2, (len(patches), 1), generator=random) * 2 - 1
        gaussian = torch.randn(self.n_candidates - half, responses.dim, generator=random, dtype=torch.float64)
        everything = [patches * signs, gaussian] + ([] if starts is None else [starts.double()])
        candidates = torch.cat(everything)
        return candidates / candidates.norm(dim=1, keepdim=True)

    def _climb(
        self, problem: Problem, dual_point: Tensor, filters: Tensor, correlations: Tensor
    ) -> tuple[Tensor, Tensor]:
        best, best_values = filters, correlations.flatten(1).norm(dim=1)
        trial, towards = filters, correlations / best_values.clamp_min(1e-300)[:, None, None]
        gradients = torch.zeros_like(filters)
        inertia = torch.zeros(len(filters), 1, dtype=torch.float64)  # 0: a full power step
        for _ in range(self.n_steps):
            correlations, slope = problem.responses.ascent(trial, dual_point, towards)
            values = correlations.flatten(1).norm(dim=1)
            better = (values >= best_values)[:, None]
            rose = values.max() > best_values.max() * (1 + 1e-7) or bool((values > best_values * (1 + 1e-4)).any())
            best, best_values = torch.where(better, trial, best), torch.maximum(values, best_values)
            gradients = torch.where(better, slope, gradients)
            inertia = torch.where(better, inertia * 0.5, 3 * inertia + 1)
            fresh = correlations / values.clamp_min(1e-300)[:, None, None]
            towards = torch.where(better[:, :, None], fresh, towards)
            step = gradients / gradients.norm(dim=1, keepdim=True).clamp_min(1e-300)
            trial = step + inertia * best
            trial = trial / trial.norm(dim=1, keepdim=True).clamp_min(1e-300)
            if _ > 1 and not rose:
                break
        return best, best_values


def distinct(filters: Tensor, values: Tensor, limit: int, cosine: float) -> Tensor:
    """Indices of up to `limit` filters, best first, no two of them closer than `cosine`."""
    chosen: list[int] = []
    for index in values.argsort(descending=True).tolist():
        if len(chosen) == limit:
            break
        if not chosen or float((filters[chosen] @ filters[index]).max()) < cosine:
            chosen.append(index)
    return torch.as_tensor(chosen, dtype=torch.long)
