"""Multi-start local search for filters with a large g: fast, scales to any data, proves nothing.

Starts are the filters at hand, patches of the data and random directions. They climb along the sphere: for a fixed
direction V = G(u)/g(u) uphill is the gradient of <V, G(u)>, which is Mᵀ M u within a cell of the arrangement (a step of
length one, without preconditioner, is that of the power iteration). V is one step old, so that a step costs one pass.
How curved g is follows the second moment S of the patches: steps are preconditioned by S^(-1/2), and have momentum. A
filter that fell goes back and takes a shorter step. Starts are whitened by S^(-1/2) as well: near the optimum plain
patches lead to the maxima of bright, smooth filters only, which are known by then. Nor does g at a start say where its
climb will end, so that none is preferred. On many images the way up is climbed on a sample of them; what counts is
where it ends on all. Among few rows climbs go by convex steps instead (`_convex_steps`), which kinks do not stop.
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
from convcvx.oracles._convex_steps import climb
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
IDLE = 3
"""Steps in which no filter rose after which none climbs on."""
ENOUGH = 1.5
"""Climbs end early when one is so many times above the target, except in a thorough search."""
LEAST = 4
"""Steps of a climb before it ends early. One that goes on over all images ends at once where it is hopeless."""
LENGTH = 0.25
"""Length of a climb's first step, on the unit sphere."""
LONGER = 1.5
"""Factor of the length after a step that rose."""
SHORTER = 0.25
"""Factor of the length after a step that fell, which is taken back."""
MOMENTUM = 0.9
"""Share of the last rise that is added to the next step: ridges are gone along, not across."""
Found = tuple[Tensor, Tensor]
"""Filters (q, r) and their g (q,)."""


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
        climbed: list[Found] = []
        measured: list[Found] = []
        stats: dict[str, Any] = {}
        try:
            for ends, tops in self._batches(problem, dual_point, wanted, random):
                climbed.append(ends)
                measured.append(tops)
        except OutOfTime:
            stats["stopped"] = Stop.TIME_LIMIT
        if not measured:
            return OracleResult.unfinished(problem, Scope.HEURISTIC, perf_counter() - began)
        seen, heights = (torch.cat(parts) for parts in zip(*climbed, strict=True))
        stats["starts"] = len(seen)
        if self.thorough:
            stats |= _basins(problem, seen, heights)
        filters, values = (torch.cat(parts) for parts in zip(*measured, strict=True))
        best = Metric.of(problem.responses).distinct(filters, values, wanted.n_filters, cosine=DISTINCT)
        stats["seconds"] = perf_counter() - began
        if float(values.max()) > self.hopeless:
            stats.setdefault("stopped", Stop.HOPELESS)
        return OracleResult(filters[best], values[best], float("inf"), Scope.HEURISTIC, stats)

    def _batches(
        self, problem: Problem, dual_point: Tensor, wanted: Wanted, random: torch.Generator
    ) -> Iterator[tuple[Found, Found]]:
        """Yield where climbs ended, on the images that they climbed on, and filters whose g on all images is known."""
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
        # Rounds of a training have lines of their own; the long search of a certificate has none.
        batches = range(n_batches)
        for batch in watched("local search of the certificate", batches, n_batches) if self.thorough else batches:
            if few is None:
                drawn = [self._starts(problem, n_climbers, metric, random) for _ in range(together)]
            else:
                drawn = [self._starts(problem, together * n_climbers, metric, random)]
            candidates = torch.cat(drawn)
            if batch == 0 and starts is not None and len(starts):
                known = torch.from_numpy(unit(starts.double().numpy()))
                heights = sample.responses.correlate(known, sampled_dual).flatten(1).norm(dim=1)
                candidates = torch.cat([known[metric.distinct(known, heights, n_climbers, cosine=0.9)], candidates])
            steps = self.n_steps, LEAST
            filters, values, towards = self._climb(sample, sampled_dual, metric, candidates, None, target, *steps)
            ends, rest = (filters, values), filters[:0]
            if sample is not problem:
                most = max(self.n_climbers, self.n_polished, wanted.n_filters)
                order = metric.distinct(filters, values, most, DISTINCT)
                best, rest = order[: self.n_polished], filters[order[self.n_polished :]]
                steps = (self.n_steps, 1) if self.thorough else (POLISH, LEAST)
                at = filters[best], towards[best]
                filters, values, _ = self._climb(problem, dual_point, metric, *at, target, *steps)
            yield ends, (filters, values)
            if len(rest) and not float(values.max()) > self.hopeless:
                heights = problem.responses.correlate(rest, dual_point).flatten(1).norm(dim=1)
                yield (rest[:0], heights[:0]), (rest, heights)
                values = torch.cat([values, heights])
            if float(values.max()) > (self.hopeless if self.thorough else target):
                return

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

    def _climb(
        self,
        problem: Problem,
        dual_point: Tensor,
        metric: Metric,
        filters: Tensor,
        towards: Tensor | None,
        target: float,
        n_steps: int,
        least: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Filters (q, r), their g (q,) and G / g (q, P, c) at the end of climbs, of `least` to `n_steps` steps, that
        set out towards `towards`, or G by default."""
        if (few := FewRows.of(problem.responses)) is not None:
            return _climb_by_convex_steps(few, dual_point, filters)
        if towards is None:
            towards = problem.responses.correlate(filters, dual_point)
        # In numpy: on small arrays a call of it costs a fraction of one of torch.
        best, best_values = filters.numpy(), np.zeros(len(filters))
        trial, directions = best, unit(towards.numpy())
        gradients = np.zeros_like(best)
        lengths = np.full((len(best), 1), LENGTH)
        idle = 0
        for step in range(n_steps):
            try:
                ascent = problem.responses.ascent(torch.from_numpy(trial), dual_point, torch.from_numpy(directions))
            except OutOfTime:
                if step == 0:
                    raise
                break
            correlations, slope = (part.numpy() for part in ascent)
            values = norms(correlations)
            better = (values >= best_values)[:, None]
            rose = (values > best_values * (1 + 1e-4)).any() or values.max() > best_values.max() * (1 + 1e-7)
            moved = np.where(better, trial - best, 0.0)
            best, best_values = np.where(better, trial, best), np.maximum(values, best_values)
            gradients = np.where(better, slope, gradients)
            lengths = np.where(better, LONGER, SHORTER) * lengths
            directions = np.where(better[:, :, None], unit(correlations), directions)
            trial = unit(best + lengths * metric.uphill(best, gradients) + MOMENTUM * moved)
            # Far from the optimum the filters found so far will do; near it a climb goes to its end.
            limit = self.hopeless if self.thorough else ENOUGH * target
            enough = step + 1 >= least and best_values.max() > limit
            idle = 0 if rose else idle + 1
            if enough or idle == IDLE:
                break
        return torch.from_numpy(best), torch.from_numpy(best_values), torch.from_numpy(directions)


def _basins(problem: Problem, ends: Tensor, heights: Tensor) -> dict[str, Any]:
    """How many maxima climbs have seen that ended at `ends` (q, r), where g is `heights`, and how much is unseen."""
    basins = Metric.of(problem.responses).distinct(ends, heights, len(ends), cosine=DISTINCT)
    hits = (problem.responses.alike(ends[basins] @ ends.T) > DISTINCT).sum(dim=1)
    # Good (1953): the mass of local maxima not seen is about the share of those seen once.
    return {"basins": len(basins), "unseen_mass": float((hits == 1).sum()) / max(1, len(ends))}


def _climb_by_convex_steps(few: FewRows, dual_point: Tensor, filters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `LocalOracle._climb`, among few rows: each climb goes to its maximum, kinks or not."""
    rows = few.flat
    responses = filters.numpy() @ rows.T
    mixtures, values = np.empty_like(responses), np.empty(len(filters))
    weights = np.zeros((len(filters), len(few.pool), dual_point.shape[1]))
    climb(few.gram, few.pool, dual_point.numpy(), responses, mixtures, values, weights)
    ends = mixtures @ rows
    moved = norms(ends) > 0
    ends = np.where(moved[:, None], unit(ends), filters.numpy())
    return torch.from_numpy(ends), torch.from_numpy(values), torch.from_numpy(weights)


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
