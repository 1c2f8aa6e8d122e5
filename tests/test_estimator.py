"""convcvx.estimator: scikit-learn's own checks, and agreement with `convcvx.solve` and the exported network."""

from __future__ import annotations

import doctest
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, KFold, LeaveOneOut
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import convcvx
from convcvx import estimator as module
from convcvx.certificate import certify_parameters
from convcvx.errors import ConvergenceWarning, GridWarning, InputError
from convcvx.estimator import ConvexCNNClassifier, ConvexCNNClassifierCV, ConvexCNNRegressor, ConvexCNNRegressorCV
from convcvx.losses.table import LOSSES
from convcvx.patches import PatchSpec
from convcvx.training.plan import build_problem, find_beta_max

EASY = {"beta_ratio": 0.1, "random_state": 0}
QUICK = {"beta_ratio": 0.1, "tol": 0.1}
TO_TOL = {"check_sample_weight_equivalence_on_dense_data": "equal to tol, not to 1e-7: see test_weights_of_images.py"}


# scikit-learn fits noise with 20 samples in many dimensions: a search with another seed may well find a better
# filter, and the warning that says so is right.
@pytest.mark.filterwarnings("ignore::convcvx.errors.ConvergenceWarning")
@parametrize_with_checks([ConvexCNNClassifier(**QUICK)])
def test_scikit_learn_checks(estimator, check):
    if reason := TO_TOL.get(check.func.__name__):
        pytest.xfail(reason)  # without the minutes that it takes to fail
    check(estimator)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::convcvx.errors.ConvergenceWarning")
@parametrize_with_checks([ConvexCNNRegressor(**QUICK, hidden_bias=True)])
def test_scikit_learn_checks_of_real_targets(estimator, check):
    if reason := TO_TOL.get(check.func.__name__):
        pytest.xfail(reason)
    check(estimator)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::convcvx.errors.ConvergenceWarning")
@parametrize_with_checks([ConvexCNNClassifier(**QUICK, loss="cross-entropy")], expected_failed_checks=lambda _: TO_TOL)
def test_scikit_learn_checks_with_the_cross_entropy(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    X, y = load_digits(return_X_y=True)
    return X[:150] / 16, y[:150]


@pytest.fixture(scope="module")
def zero_to_three(digits) -> tuple[np.ndarray, np.ndarray]:
    X, y = digits
    return X[y < 4], y[y < 4]


@pytest.fixture(scope="module")
def plane() -> tuple[np.ndarray, np.ndarray]:
    """Points of the plane: patches of rank 2, whose certificates are proofs."""
    X = np.random.default_rng(0).normal(size=(40, 2))
    return X, np.stack([np.abs(X[:, 0]), X[:, 0] - np.maximum(X[:, 1], 0)], axis=1)


IMAGES = {"image_shape": (1, 8, 8), "pool": 2}
MODELS = [
    {"kernel_size": 3},
    {"kernel_size": (2, 3), "stride": (2, 1), "padding": 1, "pool": "window:2,2", "hidden_bias": True},
    {"rank": 2, "whiten": 0.1, "pool": "global", "intercept": False, "oracle": "local"},
    pytest.param(
        {"contrast": 0.1, "pool": "none", "loss": "cross-entropy", "kernel_size": 4, "stride": 2},
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("options", MODELS, ids=lambda options: "-".join(options))
def test_image_outputs_are_those_of_the_exported_network(digits, options):
    X, y = digits
    model = ConvexCNNClassifier(**{**EASY, **IMAGES, "tol": 0.05, **options}).fit(X, y)
    network = model.to_network()
    with torch.no_grad():
        outputs = network(torch.from_numpy(X.reshape(-1, 1, 8, 8)).float()).numpy()
    np.testing.assert_allclose(model.decision_function(X), outputs, atol=1e-5)
    assert len(network[0].weight) == len(model.filters_) > 0
    assert model.certificate_.rel_gap <= 0.05


def test_plain_data_agree_with_solve(plane):
    X, Y = plane
    model = ConvexCNNRegressor(beta_ratio=0.05, tol=1e-5).fit(X, Y)
    assert model.beta_ == pytest.approx(0.05 * convcvx.beta_max(X, Y))
    solution = convcvx.solve(X, Y, model.beta_, tol=1e-5)
    assert model.certificate_.scope == "global"
    assert model.certificate_.primal == pytest.approx(solution.certificate.primal, rel=1e-4)
    predicted = np.maximum(X @ model.filters_.T, 0) @ model.weights_[:, 0] + model.intercept_
    np.testing.assert_allclose(model.predict(X), predicted, atol=1e-12)
    with torch.no_grad():
        outputs = model.to_network()(torch.from_numpy(X[:, :, None, None]).float()).numpy()
    np.testing.assert_allclose(model.predict(X), outputs, atol=1e-5)


# The certificate's search may find a little more than the solver's.
@pytest.mark.filterwarnings("ignore::convcvx.errors.ConvergenceWarning")
def test_the_certificate_is_that_of_the_problem(digits):
    X, y = digits
    model = ConvexCNNClassifier(**EASY, **IMAGES, kernel_size=2, tol=0.05).fit(X, y)
    images = torch.from_numpy(X.reshape(-1, 1, 8, 8))
    problem = build_problem(images, y, model.beta_, spec=PatchSpec(2), pooling=2)
    again = certify_parameters(problem, model.solution_.filters, model.solution_.weights, tol=1e-2)
    assert again.primal == pytest.approx(model.certificate_.primal, rel=1e-9)
    assert model.beta_ == pytest.approx(0.1 * find_beta_max(problem), rel=1e-2)
    worse = certify_parameters(problem, model.solution_.filters, 1.5 * model.solution_.weights, tol=1e-2)
    assert worse.primal > 1.01 * model.certificate_.primal


def test_hidden_bias_bends_where_the_data_do():
    x = np.linspace(0, 4, 33)[:, None]
    y = np.abs(x[:, 0] - 1.5)
    without = ConvexCNNRegressor(beta_ratio=1e-3).fit(x, y)
    biased = ConvexCNNRegressor(beta_ratio=1e-3, hidden_bias=True).fit(x, y)
    assert without.score(x, y) < 0.6
    assert biased.score(x, y) > 0.99
    assert biased.certificate_.scope == "global"
    assert biased.filters_.shape[1] == 2


def test_beta_wins_over_beta_ratio_and_above_beta_max_no_filter_is_left(plane):
    X, Y = plane
    model = ConvexCNNRegressor(beta=1.001 * convcvx.beta_max(X, Y), beta_ratio=1e-9).fit(X, Y)
    assert len(model.filters_) == 0
    np.testing.assert_allclose(model.predict(X[:3]), np.tile(Y.mean(axis=0), (3, 1)))
    assert model.to_network()(torch.zeros(1, 2, 1, 1)).shape == (1, 2)


def test_constant_targets_need_no_filter(plane):
    X, _ = plane
    model = ConvexCNNRegressor().fit(X, np.full(len(X), 1 / 3))
    np.testing.assert_allclose(model.predict(X), 1 / 3)
    assert (len(model.filters_), model.beta_) == (0, 0.01)


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_two_classes(plane, loss):
    X, Y = plane
    y = np.where(Y[:, 1] > 0, "up", "down")
    model = ConvexCNNClassifier(loss=loss, random_state=0).fit(X, y)
    decision = model.decision_function(X)
    assert model.classes_.tolist() == ["down", "up"]
    assert decision.shape == (40,)
    assert (model.predict(X) == np.where(decision > 0, "up", "down")).all()
    assert model.score(X, y) > 0.9
    assert hasattr(model, "predict_proba") == (loss == "cross-entropy")
    if loss == "cross-entropy":
        np.testing.assert_allclose(model.predict_proba(X)[:, 1], 1 / (1 + np.exp(-decision)))


def test_pipeline_grid_search_clone_and_pickle(zero_to_three):
    X, y = zero_to_three
    pipeline = make_pipeline(StandardScaler(), ConvexCNNClassifier(**EASY, tol=0.1))
    grid = {"convexcnnclassifier__beta_ratio": [0.9, 0.1]}
    search = GridSearchCV(pipeline, grid, cv=2).fit(X, y)
    assert search.best_params_ == {"convexcnnclassifier__beta_ratio": 0.1}
    assert search.best_score_ > 0.75
    fresh = clone(search.best_estimator_)
    assert not hasattr(fresh[-1], "solution_")
    np.testing.assert_array_equal(fresh.fit(X, y).predict(X), search.predict(X))  # same seed, same network
    restored = pickle.loads(pickle.dumps(search.best_estimator_))
    np.testing.assert_array_equal(restored.decision_function(X), search.decision_function(X))
    assert restored[-1].certificate_ == search.best_estimator_[-1].certificate_


def test_short_of_tol_warns(plane):
    X, Y = plane
    with pytest.warns(ConvergenceWarning, match="max_rounds") as caught:
        ConvexCNNRegressor(beta_ratio=1e-4, tol=1e-9, max_rounds=1).fit(X, Y)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 3}, "kernel_size needs images; pass image_shape"),
        ({"stride": 2, "pool": "none"}, "stride and pool need images"),
        ({"image_shape": (1, 8)}, r"image_shape must be \(channels, height, width\).*got \(1, 8\)"),
        ({"image_shape": 64}, "image_shape must be .*got 64"),
        ({"image_shape": (8, 8, 1)}, r"seems to be \(height, width, channels\): pass \(1, 8, 8\)"),
        ({"image_shape": (1, 8, 7)}, "needs X with 56 columns; got 64"),
        ({"image_shape": (1, 8, 8), "kernel_size": 9}, "kernel_size 9x9 is larger"),
        ({"beta": 0.0}, "beta must be a positive float; got 0.0"),
        ({"beta_ratio": -1}, "beta_ratio must be a positive float; got -1"),
        ({"tol": 0}, "tol must be a positive float; got 0"),
        ({"loss": "hinge"}, f"loss must be one of {', '.join(LOSSES)}; got 'hinge'"),
        ({"oracle": "delphi"}, "oracle must be one of"),
        ({"solver": "sgd"}, "solver must be one of"),
    ],
)
def test_parameters_out_of_range(digits, options, message):
    X, y = digits
    with pytest.raises(InputError, match=message):
        ConvexCNNClassifier(**options).fit(X[:20], y[:20])


QUICK = {"beta_ratio": 0.3, "tol": 0.5, "oracle": "local", "random_state": 0}


def test_shapes_and_pools_may_be_arrays_and_pairs(digits):
    X, y = digits
    pair = ConvexCNNClassifier(image_shape=np.array([1, 8, 8]), pool=(2, 2), **QUICK).fit(X[:40], y[:40])
    same = ConvexCNNClassifier(image_shape=(1, 8, 8), pool="2x2", **QUICK).fit(X[:40], y[:40])
    np.testing.assert_array_equal(pair.decision_function(X), same.decision_function(X))
    assert pair.to_network().to_bytes() == same.to_network().to_bytes()
    assert clone(pair).get_params()["pool"] == (2, 2)


def test_a_pooling_matrix_makes_an_estimator_but_no_network(digits):
    X, y = digits
    model = ConvexCNNClassifier(**IMAGES | {"pool": np.ones((1, 36)) / 36}, **QUICK).fit(X[:40], y[:40])
    assert model.predict(X[:3]).shape == (3,)
    with pytest.raises(InputError, match="pool is a matrix, which torch has no layer for: fit with a grid"):
        model.to_network()


def test_probabilities_need_the_cross_entropy_and_say_so(digits):
    model = ConvexCNNClassifier()
    assert not hasattr(model, "predict_proba")
    with pytest.raises(AttributeError, match=r"needs loss=.cross-entropy.; this .* loss='squared'"):
        model.predict_proba(digits[0])
    with pytest.raises(AttributeError, match=r"needs loss=.cross-entropy.; this .* loss='squared'"):
        model.predict_log_proba(digits[0])
    assert hasattr(ConvexCNNClassifier(loss="cross-entropy"), "predict_proba")
    fitted = ConvexCNNClassifier(**IMAGES, loss="cross-entropy", **QUICK).fit(digits[0][:40], digits[1][:40])
    logarithms = fitted.predict_log_proba(digits[0][:5])
    np.testing.assert_allclose(np.exp(logarithms), fitted.predict_proba(digits[0][:5]))


def test_digits_on_a_bright_ground_have_the_scores_of_the_exported_network(digits):
    """0.9 + 0.001 x: the float32 network once lost what little contrast there is."""
    X, y = digits
    faint = (0.9 + 0.001 * X).astype(np.float32)
    model = ConvexCNNClassifier(**IMAGES, contrast=1e-7, **QUICK | {"tol": 0.1}).fit(faint[:100], y[:100])
    with torch.no_grad():
        outputs = model.to_network()(torch.from_numpy(faint).view(-1, 1, 8, 8)).numpy()
    scores = model.decision_function(faint)
    assert len(model.filters_) > 0
    assert abs(outputs - scores).max() < 1e-5 * abs(scores).max()


def test_bad_targets(digits):
    X, y = digits
    for only, named in ((0, "0"), ("seven", "'seven'")):
        with pytest.raises(InputError, match=f"y has one class, {named};"):
            ConvexCNNClassifier().fit(X[:20], np.full(20, only))
    with pytest.raises(InputError, match="loss must be 'squared' or 'huber' for regression; got 'cross-entropy'"):
        ConvexCNNRegressor(loss="cross-entropy").fit(X[:20], y[:20])


@pytest.mark.parametrize("cls", [ConvexCNNClassifier, ConvexCNNRegressor, ConvexCNNClassifierCV, ConvexCNNRegressorCV])
def test_the_docstring_names_every_parameter_and_its_example_runs(cls):
    assert "{parameters}" not in cls.__doc__
    for name in cls._get_param_names():
        assert name in cls.__doc__
    examples = doctest.DocTestFinder(recurse=False).find(cls, globs=vars(module) | {cls.__name__: cls})
    runner = doctest.DocTestRunner()
    for example in examples:
        assert runner.run(example).failed == 0


def test_cross_validation_goes_along_one_path_a_fold(plane):
    X, Y = plane
    y = np.where(Y[:, 1] > 0, "up", "down")
    model = ConvexCNNClassifierCV(n_betas=4, ratio=0.01, cv=3, random_state=0).fit(X, y)
    assert model.scores_.shape == (3, 4)
    assert (np.diff(model.betas_) < 0).all()
    assert model.betas_[0] == pytest.approx(convcvx.beta_max(X, y == "up"), rel=1e-2)
    best = model.scores_.mean(axis=0).argmax()
    assert model.beta_ == model.betas_[best]
    alone = ConvexCNNClassifier(beta=model.beta_, tol=1e-4, random_state=0).fit(X, y)
    assert alone.certificate_.primal == pytest.approx(model.certificate_.primal, rel=2e-2)
    assert model.score(X, y) > 0.9
    with pytest.raises(InputError, match=r"betas must be a positive float; got -1\.0"):
        ConvexCNNClassifierCV(betas=[1.0, -1.0]).fit(X, y)
    for odd in ([], "0.1", [[0.1]]):
        with pytest.raises(InputError, match="betas must be a"):
            ConvexCNNClassifierCV(betas=odd).fit(X, y)


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({"betas": [0.05, 0.04, 0.02]}, r"the smallest of the 3 from 0\.05 to 0\.02: a smaller .* betas that go on"),
        ({"betas": [0.01, 1e-9, 1e-10]}, r"the largest of the 3 from 0\.01 to 1e-10: a larger .* betas that go on"),
        ({"n_betas": 3, "ratio": 0.5}, r"the smallest of the 3 .* pass a ratio below 0\.5"),
        ({"betas": [0.3, 0.01, 1e-9]}, None),
        ({"betas": [0.01]}, None),
        ({"betas": [90.0, 0.01]}, r"the smallest of the 2"),
        ({"betas": [90.0, 80.0]}, r"no beta of the 2 from 90 to 80 leaves a filter, .* pass smaller betas, or leave"),
        ({"betas": [90.0]}, r"no beta of the 1 from 90 to 90 leaves a filter"),
    ],
)
def test_a_beta_at_the_edge_of_its_grid_is_warned_of(grid, said):
    """Targets of which half is noise: the best β is in between."""
    X = np.linspace(-2, 2, 24)[:, None]
    y = abs(X[:, 0]) + 0.3 * np.random.default_rng(0).normal(size=24)
    folds = KFold(3, shuffle=True, random_state=0)
    model = ConvexCNNRegressorCV(**grid, hidden_bias=True, cv=folds, tol=0.05, random_state=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", GridWarning)
        model.fit(X, y)
    messages = [str(warning.message) for warning in caught if warning.category is GridWarning]
    assert len(messages) == (said is not None), model.scores_.mean(axis=0)
    assert said is None or re.search(said, messages[0])


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
def test_a_score_that_is_no_number_never_wins():
    X = np.linspace(-2, 2, 12)[:, None]
    y, options = abs(X[:, 0]), {"betas": [90.0, 0.1, 0.01], "cv": 3, "tol": 0.1, "random_state": 0}

    def scorer(model, X, y):
        return np.nan if model.beta_ == 90 else -np.inf if model.beta_ == 0.1 else 0.5

    with pytest.warns(GridWarning, match="smallest of the 3"):
        assert ConvexCNNRegressorCV(**options, scoring=scorer).fit(X, y).beta_ == 0.01
    for alone in ({"scoring": lambda *_: np.nan}, {"cv": LeaveOneOut(), "betas": [90.0]}):
        with pytest.raises(InputError, match="scoring gave no number on the folds: pass another scoring or larger"):
            ConvexCNNRegressorCV(**options | alone).fit(X, y)


def test_targets_that_no_filter_explains_are_told():
    model = ConvexCNNRegressorCV(ratio=0.5, hidden_bias=True, cv=3)
    with pytest.warns(GridWarning, match=r"leaves a filter, .* pass a ratio below 0\.5; .* no filter explains these"):
        model.fit(np.linspace(-2, 2, 12)[:, None], np.ones(12))


def test_images_are_taken_as_they_are(digits):
    X, y = digits
    rows = ConvexCNNClassifier(**EASY, **IMAGES, rank=2, tol=0.1).fit(X, y)
    images = ConvexCNNClassifier(**EASY, pool=2, rank=2, tol=0.1).fit(X.reshape(-1, 1, 8, 8), y)
    np.testing.assert_array_equal(rows.filters_, images.filters_)
    np.testing.assert_array_equal(rows.predict(X), images.predict(X.reshape(-1, 8, 8)))
    with pytest.raises(InputError, match=r"X must be images of shape \(1, 8, 8\), as in fit; got \(1, 4, 16\)"):
        images.predict(X.reshape(-1, 4, 16))


def test_features_are_what_the_head_sees_and_stack_in_pipelines(zero_to_three):
    X, y = zero_to_three
    model = ConvexCNNClassifier(**EASY, **IMAGES, tol=0.1).fit(X, y)
    features = model.transform(X)
    assert features.shape == (len(X), len(model.get_feature_names_out()))
    outputs = features @ model.weights_.reshape(features.shape[1], -1) + model.intercept_
    np.testing.assert_allclose(outputs, model.decision_function(X), atol=1e-9)
    stacked = make_pipeline(model, StandardScaler(), ConvexCNNClassifier(**EASY, tol=0.2)).fit(X, y)
    assert stacked.score(X, y) > 0.9


def test_a_warm_start_goes_on_and_options_of_dictionaries_are_taken(digits, capsys):
    X, y = digits
    model = ConvexCNNClassifier(**EASY, **IMAGES, rank=2, tol=0.1, warm_start=True, verbose=True).fit(X, y)
    assert model.solution_.history[0]["n_filters"] == 0
    model.set_params(tol=0.05, beta_ratio=0.08).fit(X, y)
    assert model.solution_.history[0]["n_filters"] > 0
    assert "lower bound" in capsys.readouterr().out
    options = {"dictionary": 20, "max_rounds": 0, "tol": 1.0, "whiten": 0.1, "hidden_bias": True}
    drawn = ConvexCNNClassifier(**EASY, **IMAGES, **options).fit(X, y)
    assert len(drawn.filters_) == 20
    assert drawn.score(X, y) > 0.8
