"""Multi-start local search for filters with a large g: fast, scales to any data, proves nothing.

Starts are the filters at hand, patches of the data and random directions. They climb along the sphere, by gradients
(`_climbs`). How curved g is follows the second moment S of the patches: steps are preconditioned by S^(-1/2), and
starts are whitened by it: near the optimum plain patches lead to the maxima of bright, smooth filters only, which are
known by then. Nor does g at a start say where its climb will end, so that none is preferred. On many images the way up
is climbed on a sample of them; what counts is where it ends on all. Among few rows climbs go by convex steps instead
(`_convex_steps`), which kinks do not stop.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convcvx.budget import OutOfTime
from convcvx.machine.watch import watched
from convcvx.oracles import _convex_steps
from convcvx.oracles._climbs import Ends, climb
from convcvx.oracles.base import Oracle, OracleResult, Wanted
from convcvx.oracles.metric import Metric, norms, unit
from convcvx.problem import Problem
from convcvx.responses.few import FewRows
from convcvx.terms.scope import Scope
from convcvx.terms.stop import Stop

DISTINCT = 0.999
"""Cosine above which two filters count as the same local maximum."""

SAMPLE_FACTOR = 16
"""A search climbs on one image in so many: where a maximum is a sample tells for a fraction of the cost."""
SAMPLE_SIZE = 2000
"""Images of such a sample at least; a search climbs on all images unless these are four times as many."""
CALIBRATED = 2000
"""Responses m·P by which a sample is calibrated at most: their Gram matrix is to stay small beside a climb."""
RIDGE = 1e-5
"""Ridge of that regression, as a share of the mean square of the responses: some of them are all but alike."""
MORE = 4
"""Times as many filters climb on a sample as would on all images: they cost a fraction there."""
POLISH = 3
"""Passes over all images for which they go on; to the end in a thorough search."""
PERSISTENT = 3
"""Times as many batches in a persistent search that climbs on all images: what fewer find depends on the seed."""
ENOUGH = 1.5
"""Climbs end early when one is so many times above the target, except in a thorough search."""
LEAST = 4
"""Steps of a climb before it ends early. One that goes on over all images ends at once where it is hopeless."""


@dataclass(frozen=True)
class LocalOracle(Oracle):
    """Batched local search.

    Parameters
    ----------
    n_climbers : int
        Random starts of a batch, and as many at most of the filters at hand; four times as many on a sample.
    n_steps : int
        Passes they climb for.
    n_batches : int
        Batches to go through before no violation is believed.
    n_polished : int
        The best of those on a sample, which go on over all images.
    thorough : bool
        Be persistent, go on when a batch has found a violation, and count the maxima seen: for certificates.
    persistent : bool
        Go through more batches before no violation is believed.
    max_batches : int, optional
        Go through no more than these, thorough or not.
    hopeless : float
        Stop once a g above this is found, thorough or not: what else there is to find changes nothing any more.
    """

    name = "local"
    scope = Scope.HEURISTIC
    n_climbers: int = 32
    n_steps: int = 24
    n_batches: int = 2
    n_polished: int = 8
    thorough: bool = False
    persistent: bool = False
    max_batches: int | None = None
    hopeless: float = math.inf

    def answer(self, problem: Problem, dual_point: Tensor, wanted: Wanted) -> OracleResult:
        """As `Oracle` says; stops early once a filter above the target is found. Proves nothing."""
        began = perf_counter()
        random = torch.Generator().manual_seed(wanted.seed)
        climbed: list[Ends] = []
        measured: list[tuple[Tensor, Tensor]] = []
        stats: dict[str, Any] = {}
        try:
            for ends, tops in self._batches(problem, dual_point, wanted, random):
                climbed.append(ends)
                measured.append(tops)
        except OutOfTime:
            stats["stopped"] = Stop.TIME_LIMIT
        if not measured:
            return OracleResult.unfinished(problem, Scope.HEURISTIC, perf_counter() - began)
        stats["starts"] = sum(len(ends) for ends in climbed)
        if self.thorough:
            stats |= _basins(problem, sum(climbed[1:], climbed[0]))
        filters, values = (torch.cat(parts) for parts in zip(*measured, strict=True))
        best = Metric.of(problem.responses).distinct(filters, values, wanted.n_filters, cosine=DISTINCT)
        stats["seconds"] = perf_counter() - began
        if float(values.max()) > self.hopeless:
            stats.setdefault("stopped", Stop.HOPELESS)
        return OracleResult(filters[best], values[best], float("inf"), Scope.HEURISTIC, stats)

    def _batches(
        self, problem: Problem, dual_point: Tensor, wanted: Wanted, random: torch.Generator
    ) -> Iterator[tuple[Ends, tuple[Tensor, Tensor]]]:
        """Yield where climbs ended, on the images climbed on, and filters (q, r) with their g (q,) on all images."""
        starts, target = wanted.starts, wanted.target
        sample, sampled_dual = self._sample(problem, dual_point, starts, random)
        metric = Metric.of(problem.responses)
        # On a sample climbs are cheap; what they lead to is measured on all images.
        n_climbers = self.n_climbers if sample is problem else MORE * self.n_climbers
        persistent = (self.persistent or self.thorough) and sample is problem
        few = FewRows.of(problem.responses)
        n_batches = self.n_batches * (PERSISTENT if persistent else 1)
        n_batches = n_batches if self.max_batches is None else min(n_batches, self.max_batches)
        # On a small problem a step of a few climbers costs as much as one of many: many batches climb at once.
        together, n_batches = (n_batches, 1) if persistent and problem.is_small else (1, n_batches)
        # Far from the optimum the filters found so far will do; near it a climb goes to its end.
        enough = self.hopeless if self.thorough else ENOUGH * target
        # Rounds of a training have lines of their own; the long search of a certificate has none.
        batches = range(n_batches)
        known: Ends | None = None
        for batch in watched("local search of the certificate", batches, n_batches) if self.thorough else batches:
            if few is None:
                drawn = [self._starts(problem, n_climbers, metric, random) for _ in range(together)]
            else:
                drawn = [self._starts(problem, together * n_climbers, metric, random)]
            candidates = torch.cat(drawn)
            if batch == 0 and starts is not None and len(starts):
                own = torch.from_numpy(unit(starts.double().numpy()))
                heights = sample.responses.correlate(own, sampled_dual).flatten(1).norm(dim=1)
                candidates = torch.cat([own[metric.distinct(own, heights, n_climbers, cosine=0.9)], candidates])
            if few is None:
                towards = sample.responses.correlate(candidates, sampled_dual)
                ends = climb(sample, sampled_dual, candidates, towards, enough, LEAST, self.n_steps, known)
            else:
                ends = _climb_by_convex_steps(few, dual_point, candidates)
            filters, values = ends.filters, ends.values
            if sample is not problem:
                new = ends.besides(known, metric, DISTINCT)[: max(self.n_climbers, self.n_polished, wanted.n_filters)]
                filters, values = self._on_all_images(problem, dual_point, new, enough)
            yield ends, (filters, values)
            if (values > (self.hopeless if self.thorough else target)).any():
                return
            known = ends if known is None else known + ends

    def _on_all_images(self, problem: Problem, dual_point: Tensor, ends: Ends, enough: float) -> tuple[Tensor, Tensor]:
        """(q, r) and (q,): what ends of climbs on a sample come to, best first, and their g; the best go on there."""
        best, rest = ends[: self.n_polished], ends[self.n_polished :]
        if len(best):
            steps = (1, self.n_steps) if self.thorough else (LEAST, POLISH)
            best = climb(problem, dual_point, best.filters, best.towards, enough, *steps)
        if not len(rest) or (best.values > self.hopeless).any():
            return best.filters, best.values
        heights = problem.responses.correlate(rest.filters, dual_point).flatten(1).norm(dim=1)
        return torch.cat([best.filters, rest.filters]), torch.cat([best.values, heights])

    def _starts(self, problem: Problem, size: int, metric: Metric, random: torch.Generator) -> Tensor:
        """(q, r) unit starts: half patches of random images, of either sign, half Gaussian directions, whitened."""
        responses, half = problem.responses, size // 2
        basis = responses.embedding.basis
        images = torch.randint(responses.n, (min(half, responses.n),), generator=random)
        few = FewRows.of(responses)
        rows = None if few is None else torch.from_numpy(few.rows)[images]
        norms = responses.patch_norms(images, basis) if rows is None else rows.norm(dim=2)
        alive = (norms > 1e-3 * norms.max()).nonzero()
        patches = basis.new_zeros(0, len(basis))
        if len(alive):
            image, position = alive[torch.randint(len(alive), (half,), generator=random)].T
            if rows is None:
                patches = responses.patches(images[image], position[:, None])[:, 0].double().cpu() @ basis.T
            else:
                patches = rows[image, position]
        signs = torch.randint(2, (len(patches), 1), generator=random) * 2 - 1
        gaussian = torch.randn(size - half, responses.dim, generator=random, dtype=torch.float64)
        return metric.starts(patches * signs, gaussian)

    def _sample(
        self, problem: Problem, dual_point: Tensor, starts: Tensor | None, random: torch.Generator
    ) -> tuple[Problem, Tensor]:
        """What to climb on, and the dual point there, scaled so that g is estimated without bias."""
        size = min(max(problem.n // SAMPLE_FACTOR, SAMPLE_SIZE), problem.largest_sample)
        if problem.n < 4 * size:
            return problem, dual_point
        images = torch.randperm(problem.n, generator=random)[:size].sort().values
        sample, sampled = problem.sample(images), dual_point[images] * (problem.n / size)
        if starts is not None and len(starts):
            known = starts[: max(1, CALIBRATED // problem.responses.n_cells)]
            sampled = calibrate(sample, sampled, problem, dual_point, known)
        return sample, sampled


def _basins(problem: Problem, ends: Ends) -> dict[str, Any]:
    """How many maxima climbs have seen that ended there, and how much is unseen."""
    basins = Metric.of(problem.responses).distinct(ends.filters, ends.values, len(ends), cosine=DISTINCT)
    hits = (problem.responses.alike(ends.filters[basins] @ ends.filters.T) > DISTINCT).sum(dim=1)
    # Good (1953): the mass of local maxima not seen is about the share of those seen once.
    return {"basins": len(basins), "unseen_mass": float((hits == 1).sum()) / max(1, len(ends))}


def _climb_by_convex_steps(few: FewRows, dual_point: Tensor, filters: Tensor) -> Ends:
    """As `_climbs.climb`, among few rows: each climb goes to its maximum, kinks or not."""
    rows = few.flat
    responses = filters.numpy() @ rows.T
    mixtures, values = np.empty_like(responses), np.empty(len(filters))
    weights = np.zeros((len(filters), len(few.pool), dual_point.shape[1]))
    _convex_steps.climb(few.gram, few.pool, dual_point.numpy(), responses, mixtures, values, weights)
    ends = mixtures @ rows
    moved = norms(ends) > 0
    ends = np.where(moved[:, None], unit(ends), filters.numpy())
    return Ends(torch.from_numpy(ends), torch.from_numpy(values), torch.from_numpy(weights))


def calibrate(sample: Problem, sampled: Tensor, problem: Problem, dual_point: Tensor, filters: Tensor) -> Tensor:
    """The dual point `sampled`, changed least so that `filters` have the G on the sample that they have on all images.

    Near the optimum what sampling adds to G is larger than G. It is much the same for all filters, whose responses are
    nearly combinations of each other: with these it goes (a control variate).
    """
    gram, moments = sample.responses.gram(filters, sampled)
    exact = torch.cat([problem.responses.correlate(filters, dual_point).flatten(0, 1), dual_point.sum(dim=0)[None]])
    gram.diagonal().add_(RIDGE * float(gram.diagonal().mean()))
    change = torch.linalg.solve(gram, moments - exact / sample.n)
    return sampled - sample.responses.predict(filters, change[:-1].unflatten(0, (len(filters), -1)), change[-1])
