"""Weights of images: a weight of two is the image twice, one of zero none, and all of them times a number the same."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.problems import random_parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import convcvx
from convcvx.baseline import Twin
from convcvx.budget import Budget
from convcvx.certificate import certify_parameters
from convcvx.errors import InputError
from convcvx.losses.shares import Shares
from convcvx.oracles import get_oracle
from convcvx.patches import PatchSpec
from convcvx.problem import Problem
from convcvx.responses.gated import GatedResponses
from convcvx.solvers.dictionary.path import fit_dictionary
from convcvx.solvers.slide.coordinates import balanced_gradients
from convcvx.training.functional import patches_to_images
from convcvx.training.plan import build_problem, find_beta_max, solve_problem

WEIGHTS = np.array([1, 2, 3, 1, 1, 4, 2, 1, 1, 3, 1, 2])
"""Whole numbers: how often each sample is repeated."""
losses = pytest.mark.parametrize("loss", ["squared", "cross-entropy"])


def data(n: int = 12, n_patches: int = 2, dim: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.standard_normal((n, n_patches, dim)), np.arange(n) % 3


def pair(loss: str = "squared", beta: float = 0.02, **options) -> tuple[Problem, Problem]:
    """The weighted problem, and the one with rows repeated."""
    x, y = data()
    common = {"loss": loss, "spec": PatchSpec((1, 1)), **options}
    weighted = build_problem(patches_to_images(x), y, beta, sample_weight=WEIGHTS, **common)
    repeated = build_problem(patches_to_images(x.repeat(WEIGHTS, axis=0)), y.repeat(WEIGHTS), beta, **common)
    return weighted, repeated


def repeat(rows: Tensor) -> Tensor:
    return rows.repeat_interleave(torch.from_numpy(WEIGHTS), dim=0)


@losses
@pytest.mark.parametrize("intercept", [True, False])
def test_every_part_of_a_weighted_problem_is_that_of_rows_repeated(loss, intercept):
    weighted, repeated = pair(loss, intercept=intercept, pooling=(2, 1))
    filters, weights, shift = random_parameters(weighted, 4)
    outputs = weighted.responses.predict(filters, weights, shift)
    close = {"rtol": 1e-12, "atol": 1e-13}
    assert weighted.primal(outputs, weights) == pytest.approx(repeated.primal(repeat(outputs), weights), rel=1e-13)
    torch.testing.assert_close(weighted.best_intercept(outputs), repeated.best_intercept(repeat(outputs)), **close)
    point, twice = weighted.dual_point(outputs), repeated.dual_point(repeat(outputs))
    torch.testing.assert_close(repeat(point / torch.from_numpy(WEIGHTS)[:, None]), twice, **close)
    for g_max in (0.0, 0.01, 0.1, 3.0):
        assert weighted.dual(point, g_max) == pytest.approx(repeated.dual(twice, g_max), rel=1e-12)
    for gram, other in zip(
        weighted.responses.gram(filters, weighted.targets, weighted.shares),
        repeated.responses.gram(filters, repeated.targets),
        strict=True,
    ):
        torch.testing.assert_close(gram, other, **close)
    value, slopes = balanced_gradients(weighted, (filters, weights, shift))
    expected, others = balanced_gradients(repeated, (filters, weights, shift))
    assert value == pytest.approx(expected, rel=1e-13)
    torch.testing.assert_close(slopes, others, **close)


def test_gated_features_have_the_gram_matrix_of_rows_repeated():
    weighted, repeated = pair()
    gates = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).double()
    mine, theirs = (
        GatedResponses(problem.responses, gates).gram(problem.targets, problem.shares)
        for problem in (weighted, repeated)
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


@losses
@pytest.mark.parametrize("oracle", ["exact", "branch-and-bound", "copositive"])
def test_a_network_has_the_certificate_that_it_has_on_rows_repeated(loss, oracle):
    weighted, repeated = pair(loss)
    solution = solve_problem(weighted, Budget(tol=1e-6), oracle="exact")
    parts = solution.filters, solution.weights, solution.intercept
    mine, theirs = (certify_parameters(problem, *parts, oracle=oracle, tol=1e-7) for problem in (weighted, repeated))
    assert mine.scope == theirs.scope == "global"
    assert mine.primal == pytest.approx(theirs.primal, rel=1e-12)
    assert mine.dual == pytest.approx(theirs.dual, rel=1e-6)
    assert mine.g_max == pytest.approx(theirs.g_max, rel=1e-6)
    assert mine.rel_gap <= 1e-5


@pytest.mark.parametrize(
    ("solver", "loss"),
    [
        ("sliding-fw", "squared"),
        ("sliding-fw", "cross-entropy"),
        pytest.param("copositive", "cross-entropy", marks=pytest.mark.slow),
        ("frank-wolfe", "cross-entropy"),
        ("gated", "squared"),
    ],
)
def test_every_solver_finds_the_optimum_of_rows_repeated(solver, loss):
    """Frank-Wolfe ends far from it after a few rounds, and the sampled programs by choice: these have to agree."""
    weighted, repeated = pair(loss, beta=0.05)
    exact = {"frank-wolfe": 2e-3, "gated": 2e-2}.get(solver, 1e-6)
    budget = Budget(tol=1e-7, max_rounds=60 if solver == "frank-wolfe" else 20)
    mine = solve_problem(weighted, budget, solver=solver, oracle="exact")
    best = solve_problem(repeated, Budget(tol=1e-8), oracle="exact").history[-1]["objective"]
    assert mine.history[-1]["objective"] == pytest.approx(best, rel=exact)
    assert mine.history[-1]["lower_bound"] <= best * (1 + 1e-9)
    if exact == 1e-6:
        theirs = solve_problem(repeated, budget, solver=solver, oracle="exact")
        outputs = [
            weighted.responses.predict(solution.filters, solution.weights, solution.intercept)
            for solution in (mine, theirs)
        ]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-2, atol=2e-3)


@pytest.mark.filterwarnings("ignore::convcvx.errors.ConvergenceWarning")
@pytest.mark.parametrize("intercept", [True, False])
def test_the_closed_form_is_that_of_rows_repeated_where_it_holds(intercept):
    """Orthogonal rows whose lengths make up for their weights: only then are all singular values equal."""
    weights = np.array([1, 4, 1, 4, 1, 1])
    x = np.diag(1 / np.sqrt(weights))
    y = np.arange(6) % 3
    given = {"solver": "closed-form", "intercept": intercept, "oracle": "local"}
    mine = convcvx.solve(x, y, 0.02, sample_weight=weights, **given)
    theirs = convcvx.solve(x.repeat(weights, axis=0), y.repeat(weights), 0.02, **given)
    for solution in (mine, theirs):
        assert solution.history[-1]["closed_form"]["isotropic"]
    assert mine.history[-1]["objective"] == pytest.approx(theirs.history[-1]["objective"], rel=1e-9)
    assert mine.history[-1]["lower_bound"] == pytest.approx(theirs.history[-1]["lower_bound"], rel=1e-6)


def test_a_dictionary_has_the_weights_that_it_has_on_rows_repeated():
    weighted, repeated = pair()
    filters = torch.nn.functional.normalize(random_parameters(weighted, 6)[0])
    mine, theirs = (fit_dictionary(problem, filters, beta=0.01, tol=1e-6) for problem in (weighted, repeated))
    assert mine.objective == pytest.approx(theirs.objective, rel=1e-9)
    assert mine.beta_max == pytest.approx(theirs.beta_max, rel=1e-12)
    torch.testing.assert_close(mine.weights, theirs.weights, rtol=1e-4, atol=1e-6)


def test_held_out_images_are_scored_by_their_weights():
    """One of the two held out counts for next to nothing: β is chosen by the other."""
    x, y = data(20)
    scores = []
    for weight in (1e-9, 1.0):
        problem = build_problem(
            patches_to_images(x), y, spec=PatchSpec((1, 1)), sample_weight=np.where(np.arange(20) == 0, weight, 1.0)
        )
        filters = torch.nn.functional.normalize(random_parameters(problem, 6)[0])
        scores.append(fit_dictionary(problem, filters, tune=0.1).path[0]["held_out_error"])
    assert scores[0] in (pytest.approx(0, abs=1e-8), pytest.approx(1, abs=1e-8))
    assert scores[1] in (0, 0.5, 1)


@pytest.mark.parametrize(
    ("loss", "factor"),
    [("squared", 3.7), ("squared", 1e-200), pytest.param("cross-entropy", 3.7, marks=pytest.mark.slow)],
)
def test_all_weights_times_a_number_are_the_same_weights(loss, factor):
    x, y = data()
    first, second = (
        convcvx.solve(x, y, 0.02, loss=loss, tol=1e-7, sample_weight=WEIGHTS * size).certificate
        for size in (1.0, factor)
    )
    assert second.primal == pytest.approx(first.primal, rel=1e-6)
    assert second.dual == pytest.approx(first.dual, rel=1e-6)
    assert convcvx.beta_max(x, y, loss=loss, sample_weight=WEIGHTS * factor) == pytest.approx(
        convcvx.beta_max(x, y, loss=loss, sample_weight=WEIGHTS), rel=1e-9
    )


@losses
def test_equal_weights_are_none_to_the_last_bit(loss):
    x, y = data()
    plain, equal = (convcvx.solve(x, y, 0.02, loss=loss, sample_weight=w) for w in (None, np.full(12, 0.3)))
    assert torch.equal(plain.filters, equal.filters)
    assert plain.certificate.dual == equal.certificate.dual


@losses
def test_a_weight_of_zero_leaves_the_image_out(loss):
    """Of the space of the filters too: the image left out would have raised its rank."""
    x, y = data(dim=3)
    x[1:, :, 2] = 0
    weights = np.ones(12)
    weights[0] = 0
    y[0] = 1
    mine, theirs = (
        convcvx.solve(x, y, 0.02, loss=loss, sample_weight=weights),
        convcvx.solve(x[1:], y[1:], 0.02, loss=loss),
    )
    assert mine.certificate.patch_rank == theirs.certificate.patch_rank == 2
    assert mine.certificate.n_images == 11
    assert mine.certificate.primal == theirs.certificate.primal
    assert mine.certificate.dual == theirs.certificate.dual
    assert torch.equal(mine.filters, theirs.filters)


def test_a_class_whose_images_are_all_left_out_keeps_its_output():
    x, y = data()
    solution = convcvx.solve(x, y, 0.05, sample_weight=(y != 2).astype(float))
    assert solution.weights.shape[2] == 3
    without = convcvx.solve(x[y != 2], y[y != 2], 0.05)
    assert solution.certificate.primal == pytest.approx(without.certificate.primal, rel=1e-4)


@losses
def test_certify_takes_weights(loss):
    x, y = data()
    images, targets = patches_to_images(x), torch.from_numpy(y)
    problem = build_problem(images, y, 0.02, loss=loss, spec=PatchSpec((1, 1)), sample_weight=WEIGHTS)
    solution = solve_problem(problem, Budget(tol=1e-6), oracle="exact")
    twin = Twin(problem, len(solution.filters), start=solution).network().double()
    certificate = convcvx.certify(twin, images, targets, 0.02, loss=loss, oracle="exact", sample_weight=WEIGHTS)
    assert certificate.scope == "global"
    assert certificate.primal == pytest.approx(solution.history[-1]["objective"], rel=1e-5)
    assert certificate.rel_gap < 1e-4
    assert convcvx.certify(twin, images, targets, 0.02, loss=loss, oracle="exact").rel_gap > 1e-3


def test_a_path_takes_weights():
    x, y = data()
    betas = [0.1, 0.03]
    path = [s.certificate.primal for s in convcvx.path(x, y, betas, sample_weight=WEIGHTS)]
    repeated = [s.certificate.primal for s in convcvx.path(x.repeat(WEIGHTS, axis=0), y.repeat(WEIGHTS), betas)]
    assert path == pytest.approx(repeated, rel=1e-4)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, -1.0, 1.0, 1.0], "sample_weight must be 0 or positive; got -1 for image 1: set it to 0"),
        ([1.0, 1.0, math.nan, 1.0], "sample_weight must be finite; got nan for image 2: set it to 0"),
        ([1.0, 1.0, math.inf, 1.0], "sample_weight must be finite; got inf for image 2"),
        ([0.0, 0.0, 0.0, 0.0], "sample_weight must be positive for some image; got zero weights alone: leave it out"),
        ([1.0, 1.0, 1.0], r"sample_weight must be one number an image, \(4,\); got shape \(3,\)"),
        ([[1.0], [1.0], [1.0], [1.0]], r"sample_weight must be one number an image, \(4,\); got shape \(4, 1\)"),
        ([1.0, 1e-40, 1.0, 1.0], "sample_weight must be 0 or at least 2.*; got 1e-40 for image 1: set it to 0"),
        (["a", "b", "c", "d"], "sample_weight must be whole or real numbers"),
    ],
)
def test_weights_that_are_none_are_refused(weights, message):
    x, y = data(4)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(2, 2, 1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(2, 3),
    )
    images = patches_to_images(x).float()
    calls = [
        lambda: convcvx.solve(x, y, 0.1, sample_weight=weights),
        lambda: convcvx.beta_max(x, y, sample_weight=weights),
        lambda: next(convcvx.path(x, y, [0.1], sample_weight=weights)),
        lambda: convcvx.certify(network, images, torch.from_numpy(y), 0.1, sample_weight=weights),
    ]
    for call in calls:
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([1, 2, 3, 4, 6]))
def test_slopes_of_batches_are_those_of_all_images_on_average(seed, size):
    """However unequal the weights are; a batch whose shares added up to one would overrate its faint images."""
    x, y = data(seed=seed)
    weights = 10 ** np.random.default_rng(seed).uniform(-4, 4, 12)
    problem = build_problem(patches_to_images(x), y, 0.02, spec=PatchSpec((1, 1)), sample_weight=weights)
    network = random_parameters(problem, 3, seed)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    value, slopes = balanced_gradients(problem, network)
    parts = [balanced_gradients(problem.batch(images), network) for images in order.split(size)]
    assert np.mean([part[0] for part in parts]) == pytest.approx(value, rel=1e-10)
    for k, slope in enumerate(slopes):
        torch.testing.assert_close(
            torch.stack([part[1][k] for part in parts]).mean(dim=0), slope, rtol=1e-9, atol=1e-11
        )
    sample = problem.sample(order[:5])
    assert float(sample.mean(torch.ones(5).double())) == pytest.approx(1, rel=1e-14)


def test_the_noise_of_a_sample_counts_weights():
    """As over the samples that might have been drawn: of means by weights their spread is the standard error."""
    random = torch.Generator().manual_seed(0)
    values, weights = torch.randn(4000, generator=random).double(), torch.rand(4000, generator=random).double() ** 4
    shares, means, errors = Shares.of(weights, 4000), [], []
    for _ in range(300):
        images = torch.randint(4000, (100,), generator=random)
        sample = shares.sample(images)
        means.append(float(sample.mean(values[images])))
        errors.append(sample.standard_error(values[images]))
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.15)


def test_a_sample_of_equal_shares_has_equal_shares():
    shares = Shares.equal(10)
    assert shares.sample(torch.tensor([1, 5, 7])).are_equal
    assert shares.estimate(torch.tensor([1, 5, 7])).are_equal
    assert not Shares.of(np.arange(1, 4), 3).are_equal


@losses
def test_oracles_see_weights_in_the_dual_point_alone(loss):
    """beta_max is g at the weighted constant: that of the rows repeated."""
    weighted, repeated = pair(loss)
    assert find_beta_max(weighted, "exact") == pytest.approx(find_beta_max(repeated, "exact"), rel=1e-9)
    point = weighted.dual_point(weighted.constant_predictions())
    found = get_oracle("local", weighted)(weighted, point, n_filters=1)
    assert found.g_max == pytest.approx(find_beta_max(repeated, "exact"), rel=2e-3)
