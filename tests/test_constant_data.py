"""Data on which no filter can help: constant images or targets. Every way of training ends at once, and proves it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.commands import answer, cli, said

import convcvx
from convcvx import ConvexCNNClassifier, ConvexCNNRegressor
from convcvx.training.plan import beta_at, build_problem, find_beta_max

RANDOM = np.random.default_rng(0)
X, Y = RANDOM.standard_normal((30, 2)), RANDOM.standard_normal(30)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("x", "y"), [(np.ones((30, 2)) / 3, Y), (X, np.full(30, 1 / 3)), (np.ones((30, 2)), Y > 0)])
@pytest.mark.parametrize("oracle", ["auto", "local"])
def test_what_rounding_makes_of_constants_is_no_beta_max(x, y, scale, oracle):
    assert convcvx.beta_max(scale * x, y, oracle=oracle) == 0.0


def test_negative_control_small_differences_are_no_rounding():
    assert convcvx.beta_max(1 + 1e-9 * X, Y) > 1e-11
    assert convcvx.beta_max(X, 1e6 + 1e-6 * Y) > 0
    assert convcvx.beta_max(np.ones((30, 2)), Y + 1, intercept=False) > 0.1


def test_images_in_float32_are_told_from_constant_ones():
    grey = torch.full((40, 1, 6, 6), 0.9)
    labels = torch.arange(40) % 2
    assert find_beta_max(build_problem(grey, labels)) == 0
    grey[::2] += 1e-4
    assert find_beta_max(build_problem(grey, labels)) > 1e-6


@pytest.mark.parametrize("way", ["contrast takes all of a patch of one pixel", "pixels are all but nothing"])
def test_patches_that_say_nothing_end_a_training_at_once(way):
    random, labels = np.random.default_rng(5).random((10, 4, 4)), np.arange(10) % 2
    contrast = way.startswith("contrast")
    found = convcvx.fit(
        random if contrast else np.full_like(random, 1e-310),
        labels,
        kernel_size=1,
        beta_ratio=0.1,
        contrast=1e-5 if contrast else None,
    )
    assert (found.metrics["beta_max"], found.metrics["status"], found.solution.n_filters) == (0.0, "converged", 0)
    assert found.certificate.dual == pytest.approx(0.25, rel=1e-9)


def test_what_rounding_makes_of_squares_is_told_from_what_pixels_do():
    labels = torch.arange(12) % 2
    bright = torch.full((12, 1, 4, 4), 1e6, dtype=torch.float64)
    assert find_beta_max(build_problem(bright, labels, activation="quadratic")) == 0
    faint = 1e-5 * torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    problem = build_problem(faint, labels, activation="quadratic", dtype=torch.float32)
    exact = find_beta_max(build_problem(faint, labels, activation="quadratic", dtype=torch.float64))
    assert find_beta_max(problem) == pytest.approx(exact, rel=1e-2)
    assert exact > 0


def test_solutions_estimators_and_paths_agree(recwarn):
    for x, y in ((np.ones((30, 2)), Y), (X, np.full(30, 0.25))):
        (solution,) = convcvx.path(x, y, ratio=1e-2)
        model = ConvexCNNRegressor(random_state=0).fit(x, y)
        assert solution.n_filters == len(model.filters_) == 0
        assert solution.certificate.beta == model.beta_ == beta_at(1e-2, 0.0) == 1e-2
        assert solution.certificate.rel_gap < 1e-4
        np.testing.assert_allclose(model.predict(x), y.mean())
    classifier = ConvexCNNClassifier(loss="cross-entropy", random_state=0).fit(np.ones((30, 2)), Y > 0)
    assert len(classifier.filters_) == 0
    assert classifier.certificate_.rel_gap < 1e-2
    assert not [warning for warning in recwarn if "gap" in str(warning.message)]


@pytest.mark.parametrize("constant", ["images", "targets"])
def test_training_from_a_file_ends_at_once(tmp_path, constant):
    x, y = RANDOM.integers(0, 256, (20, 5, 5), dtype=np.uint8), RANDOM.standard_normal(20)
    x, y = (np.full_like(x, 7), y) if constant == "images" else (x, np.full_like(y, 1e3))
    np.savez(tmp_path / "set.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    options = ["--data", tmp_path / "set.npz", "--preset", "plain", "--out", tmp_path / "run", "--json"]
    metrics = answer(cli("train", *options))
    assert (metrics["beta_max"], metrics["beta"], metrics["n_filters"]) == (0.0, 1e-3, 0)
    cli("train --resume", *options)
    cli("certify", tmp_path / "run")


def test_a_share_of_the_beta_max_of_constants_says_what_is_wrong(tmp_path):
    for x, y in ((np.ones((30, 2)), Y), (X, np.ones(30))):
        with pytest.raises(convcvx.errors.InputError, match=r"beta .* got 0.0: .* \(constant images or targets\)"):
            convcvx.solve(x, y, 0.1 * convcvx.beta_max(x, y))
    np.savez(tmp_path / "set.npz", x_train=np.full((20, 5, 5), 0.5), y_train=np.arange(20) % 2)
    shown = said(cli("train --preset plain --data", tmp_path / "set.npz", "--out", tmp_path / "run"))
    assert "0 (none tells anything of the targets, at any beta: images or targets are constant)" in shown


def test_ids_are_classes_in_their_order():
    ids = np.where(X[:, 0] > 0, 2020, 2019)
    for loss in ("squared", "cross-entropy"):
        solution = convcvx.solve(X, ids, 0.05, loss=loss, tol=1e-2)
        assert solution.weights.shape[2] == 2
        assert solution.certificate.primal == convcvx.solve(X, ids - 2019, 0.05, loss=loss, tol=1e-2).certificate.primal
    assert convcvx.solve(X, (ids - 2019)[:, None], 0.05, tol=1e-2).weights.shape[2] == 2
    network = convcvx.two_layer_cnn(image_shape=(2, 1, 1), n_filters=3, n_outputs=2, kernel_size=(1, 1))
    with pytest.raises(convcvx.errors.InputError, match="targets must be classes below 2; got 2020"):
        convcvx.certify(network, torch.zeros(30, 2, 1, 1), torch.from_numpy(ids), 0.05)
