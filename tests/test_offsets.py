"""Rows far from zero: the intercept and the filters' components along the mean make up for any offset."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

import convcvx
from convcvx.budget import Budget
from convcvx.certificate import certify_parameters
from convcvx.data.checks import distance_from_zero
from convcvx.data.images import StreamedImages
from convcvx.errors import DataWarning, InputError
from convcvx.oracles.metric import Metric
from convcvx.patches import Moments, PatchEmbedding, PatchSpec
from convcvx.patches.moments import is_identity
from convcvx.responses.passes import Responses
from convcvx.solvers.master import solve_master
from convcvx.training.functional import patches_to_images
from convcvx.training.plan import build_problem, solve_problem

TOL = 1e-3
FAR = (1e3, 1e5, 1e7)


def plane(n: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Rows of rank 2, where the oracle is exact, and classes that no line parts."""
    X = np.random.default_rng(0).normal(size=(n, 2))
    return X, (np.abs(X[:, 0]) > np.abs(X[:, 1])).astype(int)


def digits(n: int = 60) -> tuple[np.ndarray, np.ndarray]:
    X, y = load_digits(return_X_y=True)
    few = np.flatnonzero(y < 3)[:n]
    return X[few] / 16, y[few]


# What is measured of the patches


@settings(max_examples=60, deadline=None)
@given(
    offset=st.sampled_from([0.0, 1.0, *FAR, -1e5]),
    rank=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_moments_and_rank_are_those_of_the_rows_whatever_their_offset(offset, rank, seed):
    random = np.random.default_rng(seed)
    rows = random.standard_normal((40, rank)) @ random.standard_normal((rank, 5))
    images, spec = patches_to_images(rows + offset), PatchSpec(1)
    moments = Moments.of(images, spec)
    np.testing.assert_allclose(moments.mean, rows.mean(0) + offset, atol=1e-13 * (1 + abs(offset)))
    rounding = 1e-12 + 1e-14 * abs(offset)
    np.testing.assert_allclose(moments.covariance, np.cov(rows.T, bias=True), atol=20 * rounding)
    assert PatchEmbedding.fit(images, spec).patch_rank == np.linalg.matrix_rank(rows + offset, tol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 3.0, 1e4])
def test_few_rows_of_many_directions_have_the_moments_that_all_directions_show(offset):
    """Their Cholesky factor stands for an eigendecomposition of a hundred times the cost."""
    random = np.random.default_rng(0)
    few = Moments.of_rows(torch.from_numpy(random.standard_normal((12, 60)) + offset))
    dense = replace(few, dense=True)
    assert len(few.principal[1]) < 20 < len(dense.principal[1])
    torch.testing.assert_close(few.principal[0][:11], dense.principal[0][:11], rtol=1e-9, atol=0)
    assert few.rank == dense.rank == 12
    torch.testing.assert_close(few.span.T @ few.span, dense.span.T @ dense.span, rtol=0, atol=1e-7)
    torch.testing.assert_close(few.span @ few.span.T, torch.eye(12).double(), rtol=0, atol=1e-12)
    for most in (3, 40):
        one, other = few.directions(most), dense.directions(most)
        assert len(one[1]) >= most
        torch.testing.assert_close(one[0][:3], other[0][:3], rtol=1e-9, atol=0)
    power = few.preconditioner()
    torch.testing.assert_close(power, dense.preconditioner(), rtol=0, atol=1e-6 * float(power.abs().max()))
    identity = power @ few.damped() @ power
    torch.testing.assert_close(identity, torch.eye(60).double(), rtol=0, atol=1e-6)


def test_the_first_axes_are_no_identity():
    """Of patches whose first principal directions are the first pixels: kernels have more entries than filters."""
    assert is_identity(torch.eye(3).double())
    assert not is_identity(torch.eye(2, 3).double())
    images = patches_to_images(np.array([[3.0, 0, 0], [-3, 0, 0], [0, 2, 0], [0, -2, 0], [0, 0, 1], [0, 0, -1]]))
    embedding = PatchEmbedding.fit(images, PatchSpec(1, rank=2))
    assert torch.allclose(embedding.basis.abs(), torch.eye(2, 3).double())
    filters = torch.eye(2).double()
    responses = Responses(images, replace(embedding, basis=torch.eye(2, 3).double()), dtype=torch.float64)
    found = responses.predict(filters, torch.ones(2, 1, 1).double(), torch.zeros(1).double())
    assert found.flatten().tolist() == [3, 0, 2, 0, 0, 0]


def test_an_identity_as_basis_leaves_the_moments_as_they_are():
    moments = Moments.of_rows(torch.randn(30, 5, generator=torch.Generator().manual_seed(0)).double())
    same = moments.embedded(torch.eye(5).double(), PatchSpec(1))
    assert torch.equal(same.covariance, moments.covariance)
    spec = PatchSpec(1, hidden_bias=True)
    longer = moments.embedded(torch.eye(6).double(), spec)
    basis = torch.eye(6).double()
    product = Moments(basis[:, :5] @ moments.mean + basis[:, -1], basis[:, :5] @ moments.covariance @ basis[:, :5].T)
    assert torch.equal(longer.covariance, product.covariance)
    assert torch.equal(longer.mean, product.mean)


def test_principal_directions_of_far_rows_are_their_mean_and_those_about_it():
    random = np.random.default_rng(0)
    rows = random.standard_normal((500, 6)) * np.array([5.0, 3.0, 1.0, 0.1, 0.1, 0.1])
    basis = PatchEmbedding.fit(patches_to_images(rows + 1e7), PatchSpec(1, rank=3)).basis.numpy()
    ones = np.ones(6) / 6**0.5
    about = rows - rows.mean(0)
    about -= np.outer(about @ ones, ones)
    expected = np.linalg.svd(about, full_matrices=False)[2][:2]
    assert abs(basis[0] @ ones) > 1 - 1e-9
    assert np.abs(np.linalg.svd(basis[1:] @ expected.T)[1] - 1).max() < 1e-6


# What the parts of a training make of them


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_a_master_is_as_exact_on_far_rows(loss):
    """Filters with the same bias, in deviations, as on the rows themselves, one of them linear on all."""
    X, y = digits()
    objectives = []
    for offset in FAR:
        problem = build_problem(patches_to_images(X + offset), torch.as_tensor(y), 1e-3, loss=loss, spec=PatchSpec(1))
        mean = problem.responses.patch_moments().mean
        filters = torch.randn(6, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        biases = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, 30.0], dtype=torch.float64)
        filters += ((biases - filters @ mean) / mean.square().sum())[:, None] * mean
        filters = torch.nn.functional.normalize(filters)
        result = solve_master(problem, filters, tol=1e-7)
        assert result.rel_gap <= 1e-7
        objectives.append(result.objective)
    assert max(objectives) < min(objectives) * (1 + 2e-2)  # along the mean a filter is as long as its bias asks for
    assert objectives[2] == pytest.approx(objectives[1], rel=1e-5)


@pytest.mark.parametrize("offset", FAR)
def test_filters_that_differ_in_their_bias_alone_are_distinct_on_far_rows(offset):
    images = patches_to_images(digits()[0] + offset)
    responses = Responses(images, PatchEmbedding.fit(images, PatchSpec(1)))
    metric, mean = Metric.of(responses), responses.patch_moments().mean
    across = torch.zeros(64, dtype=torch.float64)
    across[20], across[21] = 1.0, -1.0
    across -= (across @ mean) / mean.square().sum() * mean
    filters = torch.stack([across / across.norm() + bias / mean.square().sum() * mean for bias in (-1.0, 0.0, 1.0)])
    filters = torch.nn.functional.normalize(filters)
    assert float((filters @ filters.T).min()) > 0.999
    values = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    assert metric.distinct(filters, values, 3, 0.999).tolist() == [0, 1, 2]
    assert metric.distinct(filters[:1].repeat(3, 1), values, 3, 0.999).tolist() == [0]


def test_large_problems_with_far_rows_are_solved_in_float64():
    far, near = (patches_to_images(digits()[0] + offset) for offset in (1e5, 0.0))
    dtypes = []
    for images in (far, near):
        embedding = PatchEmbedding.fit(images, PatchSpec(1))
        large = images[torch.arange(400_000) % len(images)]
        dtypes.append(Responses(large, embedding).dtype)
    assert dtypes == [torch.float64, torch.float32]


# The whole


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_the_proved_optimum_is_the_same_at_every_far_offset(loss):
    X, y = plane()
    certificates = [convcvx.solve(X + offset, y, 5e-3, loss=loss, tol=TOL).certificate for offset in FAR]
    assert all(c.scope == "global" and c.rel_gap <= TOL for c in certificates)
    for one in certificates:
        for other in certificates:
            assert one.dual <= other.primal * (1 + 2e-2)
    assert certificates[2].primal == pytest.approx(certificates[1].primal, rel=2 * TOL)


@pytest.fixture(scope="module")
def limit() -> float:
    """The objective of digits far from zero, where a bias costs nothing; near enough at a hundred."""
    X, y = digits()
    return convcvx.solve(X + 100, y, 0.05, tol=TOL).certificate.primal


def solved(certificate: convcvx.Certificate, limit: float) -> bool:
    return certificate.rel_gap <= TOL and certificate.primal <= 1.005 * limit


@pytest.mark.parametrize("offset", FAR)
def test_rows_of_any_offset_are_trained_to_the_tolerance(offset, limit):
    X, y = digits()
    assert solved(convcvx.solve(X + offset, y, 0.05, tol=TOL).certificate, limit)


@pytest.mark.filterwarnings("ignore::convcvx.errors.ConvergenceWarning")
def test_negative_control_without_coordinates_of_their_own_far_rows_are_not(limit, monkeypatch):
    monkeypatch.setattr(Moments, "far", False)
    X, y = digits()
    assert not solved(convcvx.solve(X + 1e7, y, 0.05, tol=TOL).certificate, limit)


@pytest.mark.parametrize("hidden_bias", [False, True])
def test_images_with_an_offset_are_trained_with_and_without_a_hidden_bias(hidden_bias):
    images = torch.rand(40, 1, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = (images[:, :, 1:, 1:] - images[:, :, :-1, :-1]).clamp_min(0).sum(dim=(1, 2, 3))[:, None]

    def certificate(offset: float) -> convcvx.Certificate:
        spec = PatchSpec(2, hidden_bias=hidden_bias)
        problem = build_problem(images + offset, targets, 1e-3, spec=spec, pooling=None)
        solution = solve_problem(problem, Budget(tol=TOL))
        return certify_parameters(problem, solution.filters, solution.weights, solution.intercept, tol=TOL)

    certificates = [certificate(offset) for offset in (1e3, 1e5)]
    assert all(c.rel_gap <= TOL for c in certificates)
    assert certificates[0].primal == pytest.approx(certificates[1].primal, rel=1e-2)


# Where no arithmetic tells them apart any more


@pytest.mark.parametrize(
    ("offset", "kind", "warned"),
    [
        (0.0, "f4", None),
        (1e3, "f4", None),
        (1e7, "f4", "float32 rounds"),
        (1e7, "f8", None),
        (1e12, "f8", "float64 rounds sums"),
    ],
)
@pytest.mark.parametrize("way", ["solve", "estimator", "images"])
def test_a_warning_says_that_rows_have_lost_their_digits(offset, kind, warned, way):
    """By whatever way they come; silently, they would give a network that is worth nothing."""
    X, y = plane()
    X = (X + offset).astype(kind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if way == "solve":
            convcvx.beta_max(X, y, oracle="local")
        elif way == "estimator":
            convcvx.ConvexCNNClassifier(beta_ratio=0.9, tol=0.5, oracle="local").fit(X, y)
        else:
            convcvx.ConvexCNNClassifier(beta_ratio=0.9, tol=0.5, oracle="local", kernel_size=1).fit(
                X[:, :, None, None], y
            )
    messages = [str(warning.message) for warning in caught if warning.category is DataWarning]
    assert len(messages) == (warned is not None)
    assert all(f"{warned} " in message and "subtract their mean" in message for message in messages)


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e155, 1e290])
def test_the_distance_from_zero_is_the_same_in_every_unit(scale):
    """Squares of such numbers overflow or are 0, which gave a warning of "nan times", or none where one was due."""
    X, y = plane()
    for offset in (0.0, 1e12):
        rows = torch.as_tensor(X + offset).view(len(X), -1, 1, 1)
        assert distance_from_zero(scale * rows) == pytest.approx(distance_from_zero(rows), rel=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        assert convcvx.beta_max(scale * X, y) == pytest.approx(scale * convcvx.beta_max(X, y), rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"contrast": True}, {"whiten": True}, {"hidden_bias": True}])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_images_that_no_float32_network_tells_apart_are_refused_before_they_are_trained_on(options, kind):
    images = torch.rand(40, 1, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.arange(40) % 2
    given = {"kernel_size": 3, "beta_ratio": 0.5, "tol": 0.5, "oracle": "local"} | options
    with pytest.raises(InputError, match=r"times their spread from zero.*rescale each"):
        convcvx.fit((images + 1e5).to(kind), targets, **given)
    assert convcvx.fit((images + 100).to(kind), targets, **given).certificate.rel_gap <= 0.5


def test_a_hidden_bias_or_all_pixels_alike_are_no_distance():
    """A constant that ends patches is exact, and of images that are alike nothing can be lost."""
    assert distance_from_zero(1e-6 * torch.rand(9, 1, 3, 3)) < 10
    for value in (0.1, 0.9, 1 / 3, 1e7 / 3):
        assert distance_from_zero(torch.full((99, 3, 7, 7), value, dtype=torch.float64)) == 0
    streamed = StreamedImages(np.random.default_rng(0).integers(0, 255, (9, 3, 3, 1)).astype(np.uint8))
    assert distance_from_zero(streamed) == pytest.approx(distance_from_zero(streamed[torch.arange(9)]), rel=1e-9)
    faint = 1e-6 * torch.rand(40, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    options = {"kernel_size": 3, "beta_ratio": 0.5, "tol": 0.5, "oracle": "local", "hidden_bias": True}
    assert convcvx.fit(faint, torch.arange(40) % 2, **options).metrics["beta_max"] > 0


@pytest.mark.parametrize("constant", [1.0, 1e4, 1e6])
def test_a_column_that_is_the_same_everywhere_is_no_distance(constant):
    """It is a bias, whatever its size: networks on such embeddings are as good, and their float32 as right."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((60, 4))
    targets = np.maximum(rows[:, 0], 0) - np.maximum(rows[:, 1] + 0.1, 0)
    rows = np.c_[rows, np.full(60, constant)]
    assert distance_from_zero(patches_to_images(rows)) < 10
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        options = {"beta_ratio": 0.05, "tol": 0.05, "oracle": "local"}
        assert convcvx.ConvexCNNRegressor(**options).fit(rows.astype("f4"), targets).score(rows, targets) > 0.95
        fit = convcvx.fit(rows[:, :, None, None], targets[:, None], kernel_size=1, **options)
    assert fit.certificate.rel_gap <= 0.05


def test_the_remedy_for_one_channel_that_is_far_from_zero_is_one():
    """All channels scaled alike would leave that one as far off as before."""
    images = torch.rand(40, 2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images[:, 1] += 1e6
    low, high = images.amin(dim=(0, 2, 3), keepdim=True), images.amax(dim=(0, 2, 3), keepdim=True)
    assert distance_from_zero(images) > 1e5
    assert distance_from_zero((images - images.min()) / (images.max() - images.min())) > 1e5
    assert distance_from_zero((images - low) / (high - low)) < 10
