"""Weights of images and of classes in everything that trains on images: each is what repetition would be."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.commands import NO_SEARCH, invoke, refused
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score

import convcvx
from convcvx.data.datasets import load
from convcvx.data.weights import class_weight_text, read_weights, with_class_weight
from convcvx.errors import DataError, InputError
from convcvx.estimator import ConvexCNNClassifier, ConvexCNNClassifierCV, ConvexCNNRegressor
from convcvx.patches import PatchEmbedding, PatchSpec
from convcvx.responses.team import Team
from convcvx.training.options import TrainConfig

WEIGHTS = np.random.default_rng(0).integers(0, 4, 120)
"""How often each image is repeated."""
ROWS = np.repeat(np.arange(120), WEIGHTS)
LAYER = {"kernel_size": 3, "rank": 2, "pool": 2, "beta": 0.01, "tol": 1e-7}
"""A problem with one solution but for its last digits."""


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Few images of three classes of unlike size, which start with the same ones."""
    set_ = load_digits()
    return (set_.images[:120] / 16).astype(np.float32), np.where(set_.target[:120] < 6, 0, set_.target[:120] % 3)


@pytest.mark.filterwarnings("ignore::convcvx.errors.ConvergenceWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 2},
        pytest.param({"rank": 2, "class_weight": "balanced"}, marks=pytest.mark.slow),
        {"rank": 2, "class_weight": {0: 2, "1": 0.5}},
        {"rank": 2, "hidden_bias": False, "whiten": 0.1},
        pytest.param({"rank": 2, "loss": "cross-entropy"}, marks=pytest.mark.slow),
        pytest.param({"rank": 2, "shifts": 1}, marks=pytest.mark.slow),
    ],
)
def test_a_fit_with_weights_is_that_of_images_repeated(digits, options):
    images, labels = digits
    weighted = convcvx.fit(images, labels, sample_weight=WEIGHTS, **LAYER | options)
    repeated = convcvx.fit(images[ROWS], labels[ROWS], **LAYER | options)
    ours, theirs = weighted.certificate, repeated.certificate
    assert ours.scope == theirs.scope == "global"
    assert ours.primal == pytest.approx(theirs.primal, rel=1e-6)
    assert ours.dual == pytest.approx(theirs.dual, rel=1e-6)
    assert weighted.metrics["train_accuracy"] == pytest.approx(repeated.metrics["train_accuracy"], abs=0.02)
    # Negative control: without weights it is another problem.
    alike = convcvx.fit(images, labels, **LAYER | options)
    assert alike.certificate.primal != pytest.approx(ours.primal, rel=1e-4)


@pytest.mark.parametrize("options", [{"rank": 3}, {"whiten": 0.1, "rank": None}, {"hidden_bias": True, "rank": 4}])
def test_principal_directions_are_those_of_images_repeated(digits, options):
    images = torch.as_tensor(digits[0])[:, None]
    spec = PatchSpec((3, 3), **options)
    kept = torch.as_tensor(WEIGHTS > 0)
    weighted = PatchEmbedding.fit(images[kept], spec, weights=torch.as_tensor(WEIGHTS)[kept].double())
    repeated = PatchEmbedding.fit(images[ROWS], spec)
    assert weighted.same_space(repeated)
    assert not weighted.same_space(PatchEmbedding.fit(images[kept], spec))
    assert weighted.energy == pytest.approx(repeated.energy, rel=1e-9)


def test_a_team_weighs_what_its_processes_have():
    images = torch.rand(5000, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    weights = torch.linspace(0.1, 3, 5000, dtype=torch.float64)
    team, spec = Team(), PatchSpec((2, 2), rank=2)
    team.share_out(images, lambda _: images, None)
    found = team.fit(images, spec, weights)
    assert found.same_space(PatchEmbedding.fit(images, spec, weights=weights))
    assert not found.same_space(team.fit(images, spec))


def test_files_have_weights(digits, tmp_path):
    images, labels = digits
    arrays = {"x_train": images, "y_train": labels, "x_test": images[:40], "y_test": labels[:40]}
    weights = {"w_train": WEIGHTS, "w_test": WEIGHTS[:40] + 1.0}
    np.savez(tmp_path / "plain.npz", **arrays)
    np.savez(tmp_path / "set.npz", **arrays, **weights)
    (tmp_path / "folder").mkdir()
    for name, array in (arrays | weights | {"w_train": WEIGHTS + 1}).items():
        np.save(tmp_path / "folder" / f"{name}.npy", array)
    train, test = load(tmp_path / "set.npz", limit=100)
    assert train.weights.tolist() == WEIGHTS[:100].tolist()
    assert test.weights.tolist() == (WEIGHTS[:40] + 1).tolist()
    assert load(tmp_path / "folder")[0].weights.tolist() == (WEIGHTS + 1).tolist()
    assert load(tmp_path / "plain.npz")[0].weights is None

    flags = ["--kernel-size", "3", "--rank", "2", "--pool", "2", "--beta", "0.01", "--tol", "1e-7", "--json"]
    found = {}
    for name in ("plain", "set"):
        out = tmp_path / f"run-{name}"
        found[name] = json.loads(invoke("train", "--data", tmp_path / f"{name}.npz", *flags, "--out", out).stdout)
    fit = convcvx.fit(images, labels, sample_weight=WEIGHTS, **LAYER)
    assert found["set"]["primal"] == fit.certificate.primal != found["plain"]["primal"]
    outputs = convcvx.load(tmp_path / "run-set").network(torch.as_tensor(images[:40])[:, None]).argmax(dim=1)
    score = accuracy_score(labels[:40], outputs, sample_weight=WEIGHTS[:40] + 1)
    assert found["set"]["test_accuracy"] == pytest.approx(score)
    again = json.loads(invoke("certify", tmp_path / "run-set", "--json", *NO_SEARCH).stdout)
    assert again["primal"] == pytest.approx(fit.certificate.primal, rel=1e-9)
    # The weights are part of what a run knows its data by.
    np.savez(tmp_path / "set.npz", **arrays, **weights | {"w_train": WEIGHTS[::-1].copy()})
    assert "is not what" in refused("certify", tmp_path / "run-set")


@pytest.mark.parametrize("bad", [[-1.0] * 120, [float("nan")] * 120, [0.0] * 120, [1.0] * 119, [["a"]] * 120])
def test_weights_in_files_that_are_none_are_refused(digits, tmp_path, bad):
    images, labels = digits
    arrays = {"x_train": images, "y_train": labels, "x_test": images[:40], "y_test": labels[:40]}
    np.savez(tmp_path / "bad.npz", **arrays, w_train=np.array(bad))
    with pytest.raises(DataError, match="w_train"):
        load(tmp_path / "bad.npz")


@pytest.mark.parametrize("bad", [["a"] * 3, [1j] * 3, {1, 2}, [-1.0] * 3])
def test_weights_of_a_source_are_a_fault_of_the_data_whatever_is_wrong_with_them(bad):
    with pytest.raises(DataError, match="w_train must be"):
        read_weights(bad, 3, "w_train", DataError)


def test_zero_weights_on_disk_are_refused(digits, tmp_path):
    images, labels = digits
    for name, array in {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}.items():
        np.save(tmp_path / f"{name}.npy", array)
    np.save(tmp_path / "w_train.npy", WEIGHTS)
    with pytest.raises(DataError, match="must have positive weights"):
        convcvx.fit(tmp_path, **LAYER)


def test_class_weights_are_as_they_say():
    targets = torch.tensor([0, 0, 0, 1, 2])
    balanced = with_class_weight(None, "balanced", targets, ("a", "b", "c"))
    sums = torch.zeros(3, dtype=torch.float64).index_add_(0, targets, balanced)
    assert sums.tolist() == pytest.approx([5 / 3] * 3)
    given = torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0], dtype=torch.float64)
    again = with_class_weight(given, "balanced", targets, ("a", "b", "c"))
    assert torch.zeros(3, dtype=torch.float64).index_add_(0, targets, again).tolist() == pytest.approx([5.5 / 3] * 3)
    named = with_class_weight(None, class_weight_text({"a": 2, "c": 0.1}), targets, ("a", "b", "c"))
    assert named.tolist() == [2, 2, 2, 1, 0.1]
    assert with_class_weight(given, None, targets, ("a", "b", "c")) is given
    # A class without images weighs nothing, and its absence nothing either.
    assert bool(with_class_weight(None, "balanced", targets, ("a", "b", "c", "d")).isfinite().all())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("even", "must be balanced, or a weight by class"),
        ("a=0", "must be"),
        ("a=-1", "must be"),
        ("a=nan", "must be"),
        ("z=2", "no class"),
        ({"a,b": 1}, "comma"),
        (3, "class_weight must be balanced"),
    ],
)
def test_class_weights_that_are_none_are_refused(digits, given, message):
    with pytest.raises(InputError, match=message):
        convcvx.fit(digits[0], np.array(["a", "b", "c"])[digits[1]], class_weight=given, **LAYER)


def test_class_weights_need_classes(digits):
    with pytest.raises(InputError, match="needs classes"):
        convcvx.fit(digits[0], digits[1] / 2, class_weight="balanced", **LAYER)


def test_class_weights_are_one_option_everywhere(digits, tmp_path):
    images, labels = digits
    np.savez(tmp_path / "set.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    flags = ["--kernel-size", "3", "--rank", "2", "--pool", "2", "--beta", "0.01", "--tol", "1e-7", "--json"]
    for value in ("balanced", {0: 2.0, 2: 0.25}):
        text = ["--class-weight", class_weight_text(value)]
        out = tmp_path / f"run-{value == 'balanced'}"
        flag = json.loads(invoke("train", "--data", tmp_path / "set.npz", *flags, *text, "--out", out).stdout)
        fit = convcvx.fit(images, labels, class_weight=value, **LAYER)
        model = ConvexCNNClassifier(class_weight=value, random_state=0, **LAYER).fit(images, labels)
        assert flag["primal"] == fit.certificate.primal
        assert model.certificate_.primal == pytest.approx(fit.certificate.primal, rel=1e-6)
        again = json.loads(invoke("certify", out, "--json", *NO_SEARCH).stdout)
        assert again["primal"] == pytest.approx(fit.certificate.primal, rel=1e-9)
    assert convcvx.load(out).config.class_weight == "0=2,2=0.25"
    assert "class_weight" not in ConvexCNNRegressor().get_params()
    assert TrainConfig.class_weight is None


def test_estimators_take_weights(digits):
    images, labels = digits
    weighted = ConvexCNNClassifier(random_state=0, **LAYER).fit(images, labels, sample_weight=WEIGHTS)
    repeated = ConvexCNNClassifier(random_state=0, **LAYER).fit(images[ROWS], labels[ROWS])
    assert weighted.certificate_.primal == pytest.approx(repeated.certificate_.primal, rel=1e-6)
    np.testing.assert_allclose(weighted.decision_function(images), repeated.decision_function(images), atol=1e-2)
    with pytest.raises(InputError, match="sample_weight must be one number an image"):
        ConvexCNNClassifier(**LAYER).fit(images, labels, sample_weight=WEIGHTS[1:])


@pytest.mark.filterwarnings("ignore::convcvx.errors.GridWarning")  # of two one is always at an end
def test_cross_validation_trains_and_scores_with_weights(digits):
    images, labels = digits
    options = {name: value for name, value in LAYER.items() if name not in ("beta", "tol")}
    grid = {"betas": [0.1, 0.01], "cv": 2, "random_state": 0, "tol": 0.05, **options}
    ones = ConvexCNNClassifierCV(**grid).fit(images, labels, sample_weight=np.full(120, 2.0))
    none = ConvexCNNClassifierCV(**grid).fit(images, labels)
    some = ConvexCNNClassifierCV(**grid).fit(images, labels, sample_weight=1.0 + WEIGHTS)
    np.testing.assert_allclose(ones.scores_, none.scores_)
    assert not np.allclose(some.scores_, none.scores_)


@pytest.mark.filterwarnings("ignore::convcvx.errors.ConvergenceWarning")
def test_stacks_and_comparisons_take_weights(digits):
    images, labels = digits
    options = {"padding": 1, "pool": 2, "beta_ratio": 0.1, "tol": 0.2, "max_filters": 4, "channels": 4, "rank": 2}
    stacks = [convcvx.fit_stack(images, labels, sample_weight=w, **options) for w in (None, WEIGHTS + 1.0)]
    assert stacks[0].metrics["stages"][0]["primal"] != stacks[1].metrics["stages"][0]["primal"]
    layer = convcvx.fit(images, labels, sample_weight=WEIGHTS, **LAYER)
    found = convcvx.compare(layer, images, labels, sample_weight=WEIGHTS, epochs=1, seeds=1)
    assert found.metrics["twin"]["objective"] > layer.certificate.dual
    with pytest.raises(DataError, match="is not what"):
        convcvx.compare(layer, images, labels, epochs=1, seeds=1)
