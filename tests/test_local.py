"""The local search: what it reports is measured on all images, however it was found."""

from __future__ import annotations

import math
from copy import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.problems import digits_problem, flat_problem, g

from convcvx.budget import Budget
from convcvx.oracles import LocalOracle
from convcvx.oracles._climbs import climb
from convcvx.oracles.local import PERSISTENT, calibrate
from convcvx.oracles.metric import Metric
from convcvx.patches import PatchSpec
from convcvx.problem import Problem
from convcvx.responses.passes import Responses
from convcvx.solvers import sliding_frank_wolfe
from convcvx.solvers.dictionary.filters import dictionary


@pytest.fixture
def problem() -> Problem:
    return digits_problem(1200, 1e-3, spec=PatchSpec(3, stride=2), pooling=2)


@pytest.fixture
def dual_point(problem) -> torch.Tensor:
    return problem.dual_point(problem.constant_predictions())


def test_what_only_certificates_say_is_counted_for_them_alone():
    """Where climbs ended is compared with all others, which a round of a training has no use for."""
    problem = flat_problem(20, dim=4)
    counted = {"basins", "unseen_mass"}
    for thorough in (False, True):
        stats = LocalOracle(thorough=thorough)(problem, problem.targets, target=math.inf).stats
        assert counted <= stats.keys() if thorough else counted.isdisjoint(stats)


def climbed_on(monkeypatch, oracle: LocalOracle, problem: Problem, dual_point: torch.Tensor, **options) -> tuple:
    """The oracle's answer, and the numbers of images it climbed on."""
    sizes = set()

    def spy(part, *arguments):
        sizes.add(part.n)
        return climb(part, *arguments)

    monkeypatch.setattr("convcvx.oracles.local.climb", spy)
    return oracle(problem, dual_point, n_filters=8, **options), sizes


def test_values_are_of_all_images_though_the_climb_was_on_a_sample(problem, dual_point, monkeypatch):
    monkeypatch.setattr("convcvx.oracles.local.SAMPLE_SIZE", 50)
    found, sizes = climbed_on(monkeypatch, LocalOracle(), problem, dual_point, target=1e-3)
    assert sizes == {75, 1200}
    torch.testing.assert_close(found.values, g(problem, found.filters, dual_point), rtol=1e-9, atol=0)
    assert bool((found.values[:-1] >= found.values[1:]).all())
    # Every climb counts for what is said of the landscape, not only those that are measured on all images.
    assert found.stats["starts"] > LocalOracle().n_climbers
    # The sample loses little: all images, searched with full effort, give not much more.
    monkeypatch.undo()
    full, sizes = climbed_on(monkeypatch, LocalOracle(thorough=True), problem, dual_point, target=1e-3)
    assert sizes == {1200}
    assert found.g_max >= 0.98 * full.g_max


def test_a_climb_is_on_no_more_images_than_memory_allows(problem, dual_point, monkeypatch):
    monkeypatch.setattr("convcvx.oracles.local.SAMPLE_SIZE", 50)
    monkeypatch.setattr("convcvx.problem.SAMPLE_BYTES", 4 * problem.responses.images[0].numel() * 60)
    found, sizes = climbed_on(monkeypatch, LocalOracle(), problem, dual_point, target=1e-3)
    assert sizes == {60, 1200}
    torch.testing.assert_close(found.values, g(problem, found.filters, dual_point), rtol=1e-9, atol=0)


@pytest.mark.slow
def test_a_calibrated_sample_hides_little_near_the_optimum(problem):
    """Of the filters it is calibrated by it gives G as all images do, of others nearly; without that it does not."""
    problem = problem.with_beta(1e-2)
    solution = sliding_frank_wolfe(problem, LocalOracle(), Budget(tol=1e-2, max_rounds=8))
    predictions = problem.responses.predict(solution.filters, solution.weights, solution.intercept)
    dual_point = problem.dual_point(predictions)
    images = torch.arange(0, problem.n, 4)
    sample, plain = problem.sample(images), dual_point[images] * 4
    calibrated = calibrate(sample, plain, problem, dual_point, solution.filters)
    known = [part.responses.correlate(solution.filters, z) for part, z in ((problem, dual_point), (sample, calibrated))]
    torch.testing.assert_close(*known, rtol=0, atol=1e-2 * float(known[0].abs().max()))
    others = torch.randn(50, problem.responses.dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    others = torch.nn.functional.normalize(others)
    exact = problem.responses.correlate(others, dual_point)
    errors = [float((sample.responses.correlate(others, z) - exact).norm()) for z in (calibrated, plain)]
    assert errors[0] < 0.5 * errors[1]
    assert errors[1] > 0.5 * float(exact.norm())


def test_climbs_reach_local_maxima(problem, dual_point):
    """Small steps in any direction from the best filter lead down; from a random one some lead up (control)."""
    random = torch.Generator().manual_seed(1)
    best = LocalOracle(n_steps=60, thorough=True)(problem, dual_point, target=math.inf).filters[0]
    steps = 1e-2 * torch.randn(50, len(best), generator=random, dtype=torch.float64)
    for start, stays in ((best, True), (torch.ones_like(best) / math.sqrt(len(best)), False)):
        near = torch.nn.functional.normalize(start + steps)
        rises = g(problem, near, dual_point) > g(problem, start[None], dual_point) * (1 + 1e-9)
        assert bool(rises.any()) != stays


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """Filters of each pass of climbs over the images."""
    sizes, ascent = [], Responses.ascent

    def spy(self, filters, *others):
        sizes.append(len(filters))
        return ascent(self, filters, *others)

    monkeypatch.setattr(Responses, "ascent", spy)
    return sizes


def test_climbs_to_the_same_maximum_go_on_as_one(problem, dual_point, passes, monkeypatch):
    """They end where each would alone, for fewer passes; so do those that come to the end of a climb before."""
    problem.responses.small = False  # on small ones kinks part maxima that are as close
    starts = LocalOracle()._starts(problem, 64, Metric.of(problem.responses), torch.Generator().manual_seed(2))
    where = problem, dual_point, starts, problem.responses.correlate(starts, dual_point), math.inf, 1, 40
    joined, cost = climb(*where), sum(passes)
    again, cost_again = climb(*where, joined), sum(passes) - cost
    monkeypatch.setattr("convcvx.oracles._climbs.JOINED", 2.0)
    alone, cost_alone = climb(*where), sum(passes) - cost - cost_again
    assert cost_again < cost < 0.8 * cost_alone
    for ends in (joined, again):
        torch.testing.assert_close(ends.values, g(problem, ends.filters, dual_point), rtol=1e-9, atol=0)
        assert float((ends.filters * alone.filters).sum(dim=1).quantile(0.05)) > 0.998
        assert bool((ends.values > 0.999 * alone.values).all())
    assert len(joined.filters.unique(dim=0)) < len(starts) == len(alone.filters.unique(dim=0))


def test_whitened_starts_find_more_than_plain_ones(monkeypatch):
    """Near the optimum plain patches and directions mostly lead to filters that are there."""
    problem = digits_problem(1200, 1e-3, spec=PatchSpec(4), pooling=2)
    solution = sliding_frank_wolfe(problem, LocalOracle(), Budget(tol=1e-3, max_rounds=4))
    predictions = problem.responses.predict(solution.filters, solution.weights, solution.intercept)
    dual_point = problem.dual_point(predictions)

    def violations() -> int:
        found = LocalOracle()(problem, dual_point, starts=solution.filters, target=math.inf, n_filters=200)
        return int((found.values > 1.001 * problem.beta).sum())

    whitened, starts = violations(), LocalOracle._starts

    def plain(self, part, size, metric, random):
        metric = copy(metric)
        metric._precondition = np.eye(part.responses.dim)
        return starts(self, part, size, metric, random)

    monkeypatch.setattr(LocalOracle, "_starts", plain)
    assert whitened > 1.2 * violations() > 0


@pytest.fixture
def rows_at_once(monkeypatch) -> list[int]:
    """Numbers of images all of whose patch rows were in memory at once."""
    lengths, rows = [], Responses.rows

    def spy(self, where):
        found = rows(self, where)
        lengths.append(len(found))
        return found

    monkeypatch.setattr(Responses, "rows", spy)
    return lengths


def test_starts_and_dictionaries_hold_the_patches_of_a_chunk_of_images_only(problem, rows_at_once):
    """Those of all the images that they are drawn from would be gigabytes where images are large."""
    drawn = []
    for chunk_bytes in (1, None):
        responses = Responses(
            problem.responses.images, problem.responses.embedding, problem.responses.pooling, chunk_bytes=chunk_bytes
        )
        part, metric = replace(problem, responses=responses), Metric.of(responses)
        starts = LocalOracle()._starts(part, 32, metric, torch.Generator().manual_seed(0))
        drawn.append(torch.cat([starts, dictionary(responses, 80)]))
        if chunk_bytes:
            assert set(rows_at_once) == {1}
    assert max(rows_at_once) == 16  # negative control
    torch.testing.assert_close(*drawn)


def test_a_thorough_search_on_all_images_goes_through_more_batches(problem, dual_point):
    """With nothing above its target a search that is not thorough goes through all its batches as well."""
    rough, thorough = (
        LocalOracle(thorough=thorough)(problem, dual_point, target=math.inf).stats["starts"]
        for thorough in (False, True)
    )
    assert thorough == PERSISTENT * rough > rough > 0
