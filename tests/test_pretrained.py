"""Networks that others take: folders with a model card, weights with their transforms, scikit-learn estimators."""

from __future__ import annotations

import json
import sys
from inspect import signature
from types import SimpleNamespace

import joblib
import numpy as np
import pytest
import torch
from helpers.commands import DIGITS, answer, cli
from PIL import Image
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.utils.validation import check_is_fitted

import convcvx
from convcvx import TwoLayerCNN, TwoLayerCNN_Weights, two_layer_cnn
from convcvx.data.form import ImageForm
from convcvx.data.images import to_floats
from convcvx.errors import InputError, RunError
from convcvx.network import ImageTransform
from convcvx.network.architecture import Architecture
from convcvx.network.frozen import FrozenClassifier, FrozenRegressor, frozen
from convcvx.stack.fit import StackFit
from convcvx.stack.network import Link, StackedCNN

X, Y = load_digits(return_X_y=True)
X = X[:200] / 16
Y = Y[:200]


# scikit-learn


def test_an_exported_estimator_predicts_what_the_network_does(tmp_path):
    import shutil

    shutil.copytree(DIGITS, tmp_path / "run")
    told = answer(cli("export --to sklearn --json", tmp_path / "run"))
    assert told["takes"] == "float32 (n, 1, 8, 8) in [0, 1]: grey, resized to 8x8 (bilinear, stretched)"
    model = joblib.load(told["file"])
    check_is_fitted(model)
    network = two_layer_cnn(DIGITS)
    with torch.no_grad():
        scores = network(torch.from_numpy(X).float().reshape(-1, 1, 8, 8))
    np.testing.assert_array_equal(model.predict(X), scores.argmax(dim=1))
    assert model.score(X, Y) > 0.97
    for images in (X.reshape(-1, 1, 8, 8), X.reshape(-1, 8, 8)):
        np.testing.assert_array_equal(model.scores(images), model.scores(X))
    np.testing.assert_array_equal(clone(model).predict(X), model.predict(X))
    with pytest.raises(InputError, match=r"rows of 64 features or images \(1, 8, 8\); got \(200, 63\)"):
        model.predict(X[:, 1:])
    with pytest.raises(InputError, match="not trained again"):
        model.fit(X, Y)
    with pytest.raises(AttributeError, match="trained with loss cross-entropy; this one has squared"):
        model.predict_proba(X)


def test_an_estimator_is_of_the_kind_of_its_targets():
    def network(outputs: int, **meta):
        made = TwoLayerCNN(Architecture((1, 8, 8), 4, outputs))
        made.meta = meta
        return made

    assert isinstance(frozen(network(1)), FrozenRegressor)
    assert frozen(network(1)).predict(X).shape == (200,)
    assert isinstance(labels := frozen(network(3, loss="bce", classes=[])), FrozenClassifier)
    assert set(np.unique(labels.predict(X))) <= {0, 1}
    assert labels.predict(X).shape == (200, 3)
    soft = frozen(network(3, loss="cross-entropy", classes=[]))  # of targets that were probabilities
    assert np.array_equal(soft.predict(X), soft.predict_proba(X).argmax(axis=1))
    for odd in (["007", "8"], ["--1", "2"], ["1", "2" * 30], ["1", "\u0662"]):
        assert frozen(network(2, classes=odd)).classes_.tolist() == odd
    assert frozen(network(2, classes=["-3", "11"])).classes_.tolist() == [-3, 11]
    pair = frozen(network(2, loss="cross-entropy", classes=["cat", "dog"]))
    assert pair.decision_function(X).shape == (200,)
    chosen = np.where(pair.decision_function(X) > 0, "dog", "cat")
    np.testing.assert_array_equal(pair.predict(X), chosen)
    np.testing.assert_allclose(pair.predict_proba(X).sum(axis=1), 1)


# Folders with a card


def test_a_saved_network_comes_back_with_a_card_that_says_what_is_known(tmp_path):
    fitted = convcvx.load(DIGITS)
    folder = fitted.save_pretrained(tmp_path / "net")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model.safetensors"]
    network, images = TwoLayerCNN.from_pretrained(folder), torch.rand(3, 1, 8, 8)
    assert torch.equal(network(images), fitted.network(images))
    card, metrics = (folder / "README.md").read_text(), fitted.metrics
    assert f"{metrics['dual']:.8g}" in card
    assert "Scope **heuristic**: an estimate, not a proof" in card  # never more than was proved
    assert "the estimated lower bound is" in card
    assert "Proved" not in card
    assert f"| test images | {metrics['test_accuracy']:.2%} |" in card
    front = card.split("---")[1]
    (model,) = json.loads(front.split("model-index: ")[1])
    assert model["results"][0]["metrics"][0]["value"] == metrics["test_accuracy"]
    proved = fitted.metrics | {"scope": "global", "meaning": "a proof: of networks like this one"}
    again = convcvx.load(DIGITS)
    object.__setattr__(again, "metrics", proved)
    card = (again.save_pretrained(tmp_path / "net") / "README.md").read_text()
    assert "Scope **global**: a proof: of networks like this one." in card


def test_a_stack_is_saved_alike(tmp_path):
    first = TwoLayerCNN(Architecture((1, 8, 8), 5, 3, pool="2"))
    second = TwoLayerCNN(Architecture((4, 3, 3), 5, 3))
    network = StackedCNN([first, second], [Link(5, 4, 2)]).eval()
    network.meta = {"data": "/home/someone/set", "classes": ["a", "b", "c"], "loss": "squared"}
    stage = convcvx.load(DIGITS).metrics | {"kept": True}
    metrics = {"stages": [stage, stage, stage | {"kept": False}], "seconds": 1.0, "status": "converged"}
    config = SimpleNamespace(stages=[convcvx.load(DIGITS).config])
    folder = StackFit(network, [], config, metrics).save_pretrained(tmp_path / "net")
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(StackedCNN.from_pretrained(folder)(images), network(images))
    card = (folder / "README.md").read_text()
    assert "Stage 2: the objective" in card
    assert "Stage 3" not in card
    assert "/home" not in card


def test_what_cannot_be_found_or_written_is_refused(tmp_path, monkeypatch):
    with pytest.raises(RunError, match="is no folder, and no repository OWNER/NAME"):
        TwoLayerCNN.from_pretrained("nowhere")
    with pytest.raises(RunError, match=r"cannot read weights from .*model.safetensors"):
        TwoLayerCNN.from_pretrained(tmp_path)
    fitted = convcvx.load(DIGITS)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        fitted.save_pretrained(tmp_path / "file" / "net")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (
        lambda: TwoLayerCNN.from_pretrained("owner/name"),
        lambda: fitted.save_pretrained(tmp_path / "net", push_to="owner/name"),
    ):
        with pytest.raises(InputError, match=r"needs huggingface_hub: pip install 'convcvx\[hub\]'"):
            call()
    assert not (tmp_path / "net").exists()


def test_a_repository_is_asked_for_the_weights_and_given_both_files(tmp_path, monkeypatch):
    asked = []

    def download(name, file, revision=None):
        asked.append((name, file, revision))
        return str(DIGITS / "model.safetensors")

    hub = SimpleNamespace(
        hf_hub_download=download,
        create_repo=lambda name, exist_ok: asked.append(name),
        upload_folder=lambda **given: asked.append(given["allow_patterns"]),
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert TwoLayerCNN.from_pretrained("owner/name", revision="v1").image_shape == (1, 8, 8)
    convcvx.load(DIGITS).save_pretrained(tmp_path / "net", push_to="owner/name")
    assert asked == [("owner/name", "model.safetensors", "v1"), "owner/name", ["model.safetensors", "README.md"]]
    hub.upload_folder = lambda **given: 1 / 0
    with pytest.raises(RunError, match="is written, but not uploaded to owner/name: division by zero"):
        convcvx.load(DIGITS).save_pretrained(tmp_path / "net", push_to="owner/name")


def test_what_a_repository_is_asked_is_what_huggingface_hub_takes():
    """The functions above stand in for it: their arguments are its own, in the lowest version and the newest."""
    hub = pytest.importorskip("huggingface_hub")
    for function, given, by_name in (
        (hub.hf_hub_download, ("owner/name", "model.safetensors"), {"revision": None}),
        (hub.create_repo, ("owner/name",), {"exist_ok": True}),
        (hub.upload_folder, (), {"repo_id": "owner/name", "folder_path": "net", "allow_patterns": ["README.md"]}),
    ):
        named = signature(function).parameters  # whatever is bound is named: a wrapper that takes all would bind it too
        assert signature(function).bind(*given, **by_name).arguments.keys() <= named.keys()
        assert by_name.keys() <= named.keys()


# Weights with their transforms


def test_weights_are_an_enum_with_meta_and_transforms():
    assert list(TwoLayerCNN_Weights) == [TwoLayerCNN_Weights.DIGITS]
    assert TwoLayerCNN_Weights["DEFAULT"] is TwoLayerCNN_Weights.DIGITS
    meta = TwoLayerCNN_Weights.DIGITS.meta
    assert meta["categories"] == [str(digit) for digit in range(10)]
    network = two_layer_cnn(TwoLayerCNN_Weights.DIGITS)
    assert meta["num_params"] == sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_transforms_make_of_any_image_what_a_data_set_makes_of_it(mode, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    picture = Image.fromarray(pixels)
    transforms = ImageTransform((channels, 8, 6))
    made = transforms(picture)
    assert torch.equal(made, to_floats(ImageForm((8, 6), channels).array(pixels[None]))[0])
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    assert torch.equal(transforms(tensor), made)
    assert torch.equal(transforms(tensor[None])[0], made)
    assert (transforms(tensor.float() / 255) - made).abs().max() < 1 / 255
    assert torch.equal(transforms(made), made)
    for bad in (torch.zeros(2, 9, 9), torch.zeros(9, 9), "image", torch.zeros(0, 1, 8, 8)):
        with pytest.raises(InputError):
            transforms(bad)


def test_a_picture_held_sideways_is_turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("L", (4, 8))
    picture.paste(255, (0, 0, 2, 8))  # the left half: the upper one, once turned
    picture.info["exif"] = exif.tobytes()
    made = ImageTransform((1, 4, 8))(picture)
    assert made[0].mean(dim=1).tolist() == [1, 1, 0, 0]
