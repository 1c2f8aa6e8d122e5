"""Problems that mislead a local search: the rigorous oracles find what it misses, and the certificate says so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.problems import problem_of

from convcvx.certificate import Certificate, certify_parameters
from convcvx.patches import PatchSpec
from convcvx.problem import Problem
from convcvx.training.functional import patches_to_images
from convcvx.training.plan import build_problem

WIDTH = 1e-4
"""Angle of the cone that holds the global filter: a share of 1e-8 of all directions."""


def hidden_filter(seed: int) -> tuple[Problem, torch.Tensor]:
    """A problem whose first neuron hides in a narrow cone, and that neuron (3,).

    At the network without filters g is |Σ y_k (x_k·u)_+| / n. Two heavy clusters of rows, each nearly orthogonal to
    `hidden` and charged as a second difference, cancel everywhere but on two thin bands, which cross at `hidden`: g
    is about 2 there and little more than 0.6 outside the bands.
    """
    frame = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))[0]
    hidden, first, second = frame
    sides = first, 0.8 * second + 0.6 * first
    rows = [0.6 * second + 0.1 * hidden] + [side - tilt * hidden for side in sides for tilt in (-WIDTH, 0.0, WIDTH)]
    charges = np.array([1.0] + 2 * [1 / WIDTH, -2 / WIDTH, 1 / WIDTH])
    targets = len(rows) * charges[:, None]
    return problem_of(np.array(rows), torch.as_tensor(targets), intercept=False), torch.as_tensor(hidden.copy())


def certify_empty(problem: Problem, oracle: str) -> Certificate:
    """The certificate of the network without filters, with the oracle's defaults."""
    return certify_parameters(problem, torch.zeros(0, 3), torch.zeros(0, 1, 1), oracle=oracle, tol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_a_narrow_cone_hides_the_global_filter_from_local_search(seed: int) -> None:
    problem, hidden = hidden_filter(seed)
    dual_point = problem.dual_point(problem.constant_predictions())
    at_hidden = float(problem.responses.correlate(hidden[None], dual_point).norm())
    assert at_hidden > 1.9

    local = certify_empty(problem, "local")
    assert local.g_max < 0.9 * at_hidden  # missed
    assert local.scope == "heuristic"
    assert "not a proof" in local.meaning
    assert "(heuristic)" in str(local)

    rigorous = [certify_empty(problem, oracle) for oracle in ("exact", "branch-and-bound")]
    for certificate in rigorous:
        assert certificate.scope == "global"
        assert certificate.g_max >= at_hidden
        assert certificate.dual < local.dual  # the estimate was no lower bound
    assert rigorous[0].g_max <= rigorous[1].g_max <= rigorous[0].g_max * (1 + 1e-3)


def test_where_nothing_is_hidden_the_three_agree() -> None:
    """The control: on random rows the local search does find the global filter."""
    random = np.random.default_rng(0)
    images = patches_to_images(random.standard_normal((20, 3)))
    problem = build_problem(
        images, torch.as_tensor(random.standard_normal((20, 1))), 0.01, spec=PatchSpec((1, 1)), intercept=False
    )
    exact = certify_empty(problem, "exact")
    for oracle in ("local", "branch-and-bound"):
        assert certify_empty(problem, oracle).g_max == pytest.approx(exact.g_max, rel=2e-3)
