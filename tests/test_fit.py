"""`convcvx.fit`, `fit_stack`, `compare`, `load`: the same as the commands, the estimators and `solve`."""

from __future__ import annotations

import doctest
import inspect
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import NO_SEARCH, answer, cli, refused
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

import convcvx
from convcvx import comparison
from convcvx.activations import Activation
from convcvx.data.datasets import load
from convcvx.errors import ConvergenceWarning, DataError, InputError, RunError
from convcvx.estimator import ConvexCNNClassifier
from convcvx.stack import fit as stack_module
from convcvx.training import entry
from convcvx.training.finish import _proving
from convcvx.training.option import parameters
from convcvx.training.options import OPTIONS, TrainConfig

FULL = {"kernel_size": 3, "stride": 2, "pool": 2, "beta_ratio": 0.05, "tol": 0.1, "seed": 3}
FLAGS = ["--stride", "2", "--pool", "2", "--beta-ratio", "0.05", "--tol", "0.1", "--seed", "3"]
QUICK = FULL | {"rank": 2}
"""A tenth of the work: proofs at rank 2 take milliseconds, climbs at full rank a second."""


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    train, _ = load("digits", limit=150)
    return train.images, train.targets


@pytest.fixture(scope="module")
def layer(digits) -> convcvx.Fit:
    return convcvx.fit(*digits, **QUICK)


class Pairs(Dataset):
    """A torch Dataset of any images and targets."""

    def __init__(self, images: Sequence[Any], targets: Sequence[Any]) -> None:
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        return self.images[i], self.targets[i]


def certified(fit: convcvx.Fit) -> convcvx.Certificate:
    """The certificate without the time that it took."""
    return replace(fit.certificate, search={k: v for k, v in fit.certificate.search.items() if k != "seconds"})


def test_fit_the_command_and_the_estimator_find_the_same_filters(digits, tmp_path):
    layer = convcvx.fit(*digits, **FULL)
    shown = answer(cli("train --data digits --limit 150 --json", *FLAGS, "--out", tmp_path / "run"))
    by_command = convcvx.load(tmp_path / "run")
    assert torch.equal(by_command.solution.filters, layer.solution.filters)
    assert torch.equal(by_command.solution.weights, layer.solution.weights)
    assert certified(by_command) == certified(layer)
    for name in ("primal", "dual", "rel_gap", "beta_max", "n_filters", "train_accuracy", "status", "rounds"):
        assert shown[name] == layer.metrics[name]

    model = ConvexCNNClassifier(**{k: v for k, v in FULL.items() if k != "seed"})
    model._config = lambda: TrainConfig.of(FULL)  # the same seed
    images = digits[0].numpy()
    model.fit(images, digits[1].numpy())
    np.testing.assert_array_equal(model.filters_, layer.solution.filters)
    np.testing.assert_array_equal(model.predict(images), layer.network(digits[0]).argmax(dim=1))


def test_fit_and_solve_find_the_same_filters(digits):
    """Images of one patch are rows."""
    images, targets = digits
    rows = images.flatten(1).double()
    beta = 0.1 * convcvx.beta_max(rows, targets)
    options = {"beta": beta, "tol": 0.05, "seed": 1}
    solution = convcvx.solve(rows, targets, **options)
    layer = convcvx.fit(rows[:, :, None, None], targets, kernel_size=1, **options)
    assert torch.equal(solution.filters, layer.solution.filters)
    assert torch.equal(solution.weights, layer.solution.weights)
    assert layer.certificate.primal == pytest.approx(solution.certificate.primal, rel=1e-6)  # of the float32 network


def test_images_come_in_every_form(digits, layer):
    images, targets = digits
    forms = {
        "array (n, H, W)": (images[:, 0].numpy(), targets.numpy()),
        "a pair": ((images, targets),),
        "texts for classes": (images, [f"digit {label}" for label in targets.tolist()]),
        "a Dataset": (TensorDataset(images, targets),),
        "a DataLoader": (DataLoader(TensorDataset(images, targets), batch_size=40),),
        "a Dataset of texts": (Pairs(images, [str(label) for label in targets.tolist()]),),
        "a DataLoader of texts": (DataLoader(Pairs(images, [str(label) for label in targets.tolist()]), 40),),
        "a name": ("digits",),
    }
    for form, given in forms.items():
        limit = {"limit": 150} if form == "a name" else {}
        again = convcvx.fit(*given, **QUICK, **limit)
        assert torch.equal(again.solution.filters, layer.solution.filters), form
    assert again.metrics["test_accuracy"] > 0.5


def test_pixels_of_eight_bits_are_divided_by_255(digits):
    images, targets = digits
    pixels = (255 * images).round().to(torch.uint8)
    options = QUICK | {"max_rounds": 1, "tol": 0.9}
    whole, real = (convcvx.fit(x, targets, **options) for x in (pixels, pixels.float() / 255))
    assert torch.equal(whole.solution.filters, real.solution.filters)


def test_class_ids_may_have_gaps(digits, layer):
    images, targets = digits
    again = convcvx.fit(images, 10 * targets + 7, **QUICK)
    assert torch.equal(again.solution.filters, layer.solution.filters)
    assert again.network.meta["classes"] == [str(10 * k + 7) for k in range(10)]


def test_saved_and_loaded_it_is_the_same(layer, digits, tmp_path):
    folder = layer.save(tmp_path / "layer")
    again = convcvx.load(folder)
    assert again.certificate == layer.certificate
    assert again.config == layer.config
    assert again.history == layer.history
    assert torch.equal(again.network(digits[0]), layer.network(digits[0]))
    with pytest.raises(RunError, match="exists and is not empty"):
        layer.save(folder)
    layer.save(folder, overwrite=True)
    assert answer(cli("report --json", folder))["status"] == "done"
    for command in ("certify", "compare --epochs 1"):
        assert "data were given as arrays, which a run folder does not keep" in refused(command, folder)
    shown = answer(cli("certify --data digits --limit 150 --json", folder, *NO_SEARCH))
    assert shown["primal"] == pytest.approx(layer.certificate.primal, rel=1e-12)


def test_offsets_of_real_targets_come_back_from_the_folder(digits, tmp_path):
    images, _ = digits
    heights = 1e6 + images.flatten(1).sum(dim=1, dtype=torch.float64)
    layer = convcvx.fit(images, heights, kernel_size=4, stride=4, beta_ratio=0.1, tol=0.2)
    again = convcvx.load(layer.save(tmp_path / "layer"))
    torch.testing.assert_close(again.solution.intercept, layer.solution.intercept, rtol=1e-7, atol=0)
    assert float(layer.solution.intercept) > 9e5


def test_out_keeps_every_round(digits, layer, tmp_path):
    seen = []
    again = convcvx.fit(*digits, **QUICK, out=tmp_path / "run", callback=seen.append)
    assert torch.equal(again.solution.filters, layer.solution.filters)
    assert [solution.rounds for solution in seen] == [record["round"] for record in again.history]
    assert (tmp_path / "run" / "state.safetensors").exists()
    with pytest.raises(RunError, match="exists and is not empty"):
        convcvx.fit(*digits, **QUICK, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"targets": None}, InputError, "targets must be given with an array of images"),
        ({"pooling": 2}, InputError, r"unknown option 'pooling' \(is pool meant\?\)"),
        ({"kernel_size": 2.5}, InputError, "kernel_size must be a whole number, or a pair of them.*; got 2.5"),
        ({"pool": np.ones((1, 36))}, InputError, "pool must be a grid such as 4"),
        ({"targets": np.array(["a", None] * 75)}, InputError, "targets must be all numbers or all texts"),
        ({"targets": [[0]] * 149 + [[0, 1]]}, InputError, "targets must be one an image, or as many for each"),
        ({"kernel_size": 9}, InputError, "kernel_size 9x9 is larger than the images"),
        ({"beta": -1.0}, InputError, "beta must be a positive float; got -1"),
        ({"whiten": -0.1}, InputError, "whiten must be a positive float; got -0.1"),
        ({"preset": "best"}, InputError, "preset must be one of"),
        ({"targets": torch.zeros(150, dtype=torch.long)}, DataError, "targets has a single class"),
        ({"targets": torch.zeros(7, dtype=torch.long)}, DataError, "images has 150 images but targets has 7"),
        ({"images": torch.zeros(150, 8, 8, 3)}, InputError, r"pass images.permute\(0, 3, 1, 2\)"),
        ({"images": torch.full((150, 8, 8), torch.nan)}, DataError, "NaN or infinite pixels"),
        ({"images": "nowhere.npz", "targets": None}, DataError, "nowhere.npz"),
        ({"images": "digits"}, InputError, "targets must be left out beside a data set"),
    ],
)
def test_bad_input_is_named(digits, given, error, message):
    images, targets = digits
    with pytest.raises(error, match=message):
        convcvx.fit(**{"images": images, "targets": targets, "preset": "plain"} | given)


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        (None, r"alike for all images \(Could not infer dtype of NoneType\)"),
        ("a", "alike for all images; got texts among numbers"),
        ([0, 1], r"alike for all images; got shapes \(\) and \(2,\)"),
        (10**30, "alike for all images"),
        ({"class": 1}, "alike for all images"),
    ],
)
def test_targets_of_a_dataset_that_are_not_alike_are_named(digits, odd, told):
    images, targets = digits
    with pytest.raises(DataError, match=f"targets must be numbers, tensors or texts, {told}"):
        convcvx.fit(Pairs(images, [*targets.tolist()[:-1], odd]), preset="plain")
    with pytest.raises(DataError, match="targets must be numbers, tensors or texts, alike"):
        convcvx.fit(DataLoader(TensorDataset(images, targets), batch_size=None), preset="plain")


@pytest.mark.parametrize("given", [{"limit": 20}, {"sample_weight": np.arange(150) < 20}])
def test_a_single_class_that_is_left_of_several_is_refused(digits, given):
    images, targets = digits
    targets, rows = (targets > 4).sort()
    for train in (convcvx.fit, convcvx.fit_stack):
        with pytest.raises(DataError, match="targets has a single class in 20 images; training needs two or more"):
            train(images[rows], targets.long(), **given)


def test_short_of_tol_warns(digits):
    with pytest.warns(ConvergenceWarning, match="stopped by max_rounds: raise max_rounds") as caught:
        convcvx.fit(*digits, pool=2, rank=2, beta_ratio=0.01, tol=1e-6, max_rounds=1)
    assert caught[0].filename == __file__


def test_numbers_of_python_are_the_texts_of_the_command_line():
    of_python = TrainConfig.of({"kernel_size": (3, 5), "stride": np.int64(2), "pool": (4, 2), "whiten": 0.2})
    of_flags = TrainConfig.from_dict(
        {"kernel_size": "3x5", "stride": "2", "pool": "4x2", "whiten": True, "whiten_epsilon": 0.2}
    )
    assert of_python == of_flags
    assert TrainConfig.of({"whiten": None, "contrast": True}) == TrainConfig(contrast=True)


def test_every_option_is_declared_once_and_is_in_every_signature():
    hidden = {"data", "data_dir", "paired", "whiten_epsilon", "contrast_epsilon"}
    of_fit = inspect.signature(convcvx.fit).parameters
    assert OPTIONS.keys() - hidden <= of_fit.keys()
    assert OPTIONS.keys() - hidden - {"beta"} <= inspect.signature(convcvx.fit_stack).parameters.keys()
    assert OPTIONS.keys() - hidden - {"limit", "validation", "seed"} <= set(ConvexCNNClassifier._get_param_names())
    for parameter in parameters(TrainConfig):
        assert f"\n{parameter.name} : " in convcvx.fit.__doc__
    assert [of_fit[name].default for name in ("kernel_size", "pool", "whiten", "tol")] == [3, "global", None, 1e-4]


def test_a_stack_is_that_of_the_command(digits, tmp_path):
    options = {"padding": 1, "pool": 2, "beta_ratio": 0.05, "tol": 0.2, "max_filters": [6, 4], "channels": 4, "rank": 2}
    stack = convcvx.fit_stack("digits", limit=150, **options)
    flags = [
        "--padding",
        "1",
        "--pool",
        "2",
        "--beta-ratio",
        "0.05",
        "--tol",
        "0.2",
        "--max-filters",
        "6,4",
        "--rank",
        "2",
    ]
    cli("stack --data digits --limit 150 --channels 4", *flags, "--out", tmp_path / "stack")
    by_command = convcvx.load(tmp_path / "stack")
    for ours, theirs in zip(stack.stages, by_command.stages, strict=True):
        assert torch.equal(ours.solution.filters, theirs.solution.filters)
        assert certified(ours) == certified(theirs)
    assert stack.metrics["test_accuracy"] == by_command.metrics["test_accuracy"]
    again = convcvx.load(stack.save(tmp_path / "saved"))
    assert torch.equal(again.network(digits[0]), stack.network(digits[0]))
    shown = answer(cli("certify --json", tmp_path / "saved" / "stage-1", *NO_SEARCH))
    assert shown["primal"] == stack.stages[0].certificate.primal


def test_a_list_has_a_value_for_each_stage_and_a_tuple_is_a_pair(digits):
    common = {"stages": 2, "max_rounds": 1, "max_filters": 2, "beta_ratio": 0.1, "channels": 2, "rank": 2}
    lists = {"kernel_size": [3, (1, 2)], "activation": ["abs", Activation(0.1)], "whiten": [False, True]}
    stack = convcvx.fit_stack(*digits, padding=(0, 1), **lists, **common)
    first, second = stack.config.stages
    assert (first.kernel_size, first.activation, first.whiten, first.padding) == ("3", "abs", False, "0x1")
    assert (second.kernel_size, second.activation, second.whiten) == ("1x2", "leaky-relu:0.1", True)


def test_a_stack_needs_no_test_set(digits):
    stack = convcvx.fit_stack(
        *digits, padding=1, pool=2, rank=2, beta_ratio=0.1, tol=0.3, max_filters=4, channels=2, validation=0.2
    )
    assert stack.metrics["test_accuracy"] is None
    assert stack.metrics["validation_accuracy"] > 0.3
    dropped = [stage["stage"] for stage in stack.metrics["stages"] if not stage["kept"]]
    assert re.findall(r"stage (\d), dropped:", str(stack)) == [str(number) for number in dropped]


def test_a_comparison_is_that_of_the_command(digits, layer, tmp_path):
    _, test = load("digits", limit=150)
    by_command = convcvx.fit("digits", **QUICK, limit=150, out=tmp_path / "run")
    shown = answer(cli("compare --optimizer sgd --epochs 2 --seeds 1 --json", tmp_path / "run"))
    scored = test.images, test.targets
    found = convcvx.compare(layer, *digits, test=scored, optimizer="sgd", epochs=2, seeds=1)
    for name in ("objective", "test_accuracy", "learning_rate"):
        assert found.metrics["twin"][name] == shown["twin"][name]
    assert found.metrics["convex"]["test_accuracy"] == by_command.metrics["test_accuracy"]
    assert found.network(digits[0]).shape == (150, 10)
    with pytest.raises(DataError, match="is not what the fit was trained on"):
        convcvx.compare(layer, digits[0][:100], digits[1][:100], epochs=1, seeds=1)


def test_a_network_without_loss_is_compared_all_the_same():
    images = np.random.default_rng(0).random((20, 1, 5, 5)).astype(np.float32)
    layer = convcvx.fit(images, np.ones((20, 1)), kernel_size=3)
    found = convcvx.compare(layer, images, np.ones((20, 1)), epochs=1, seeds=1).metrics
    assert (found["convex"]["objective"], found["objective_ratio"], found["twin"]["rel_gap"]) == (0.0, None, 1.0)


@pytest.fixture(scope="module")
def four() -> tuple[convcvx.Fit, Tensor, Tensor]:
    """A fit of the digits 0 to 3, and images that it has not seen."""
    train, test = load("digits", limit=200)
    few, unseen = train.part(train.targets < 4), test.part(test.targets < 4)
    return convcvx.fit(few.images, few.targets, **QUICK), unseen.images, unseen.targets


def test_a_test_set_that_lacks_a_class_is_scored_by_the_classes_of_the_fit(four, monkeypatch):
    monkeypatch.setattr(comparison, "compare_on", lambda settings, config, convex, *_: convex)  # without the twin
    layer, images, labels = four
    train, _ = load("digits", limit=200)
    few, some = train.part(train.targets < 4), labels >= 2
    right = float((layer.network(images[some]).argmax(dim=1) == labels[some]).double().mean())
    assert right > 0.8
    convex = convcvx.compare(layer, few.images, few.targets, test=(images[some], labels[some].numpy()))
    assert convex["test_accuracy"] == right
    for rows in (some, labels == 3):
        counts = layer.plot("confusion", images[rows], labels[rows].tolist()).axes[0]
        assert [text.get_text() for text in counts.get_xticklabels()] == ["0", "1", "2", "3"]
    for unknown in (4, 12):
        with pytest.raises(DataError, match=rf"no class of the network: \['{unknown}'\]; its classes are 0, 1, 2, 3"):
            layer.plot("confusion", images, labels.where(labels != 1, torch.tensor(unknown)))
    real = convcvx.fit(images, labels.double(), **QUICK | {"max_rounds": 1, "tol": 0.9})
    with pytest.raises(DataError, match="targets must be real values, as in training: pass floats"):
        convcvx.compare(real, images, labels.double(), test=(images, labels))


def test_a_data_set_is_certified_by_the_classes_of_the_network(four, tmp_path):
    layer, images, labels = four
    some = labels >= 2
    pixels = images[some].permute(0, 2, 3, 1).numpy()
    path = tmp_path / "some.npz"
    np.savez(path, x_train=pixels, y_train=labels[some], x_test=pixels[:20], y_test=labels[some][:20])
    quick = {"beta": layer.certificate.beta, "tol": 1.0, "time_limit": 1e-3}
    apart = convcvx.certify(layer.network, images[some], labels[some], **quick)
    for held in (path, load(path)[0]):
        found = convcvx.certify(layer.network, held, **quick)
        assert (found.primal, found.train_accuracy) == (apart.primal, apart.train_accuracy)
    (tmp_path / "network.safetensors").write_bytes(layer.network.to_bytes())
    shown = answer(cli("certify --json --beta 0.1 --data", path, tmp_path / "network.safetensors", *NO_SEARCH))
    assert shown["train_accuracy"] == pytest.approx(apart.train_accuracy)
    assert shown["test_accuracy"] > 0.8


def test_without_options_those_that_fit_the_data_are_taken(tmp_path, monkeypatch):
    chosen = entry.chosen_config({"data": "digits"}, None, load("digits")[0])
    assert (chosen.pool, chosen.tol) == ("4", 0.05)
    assert entry.chosen_config({"data": "digits"}, "plain", load("digits")[0]) == TrainConfig()
    assert entry.chosen_config({"data": "digits", "seed": 1}, None, load("digits")[0]).pool == "4"
    assert entry.chosen_config({"data": "digits", "pool": "2"}, None, load("digits")[0]) == TrainConfig(pool="2")


@pytest.mark.parametrize("function", [convcvx.fit, convcvx.fit_stack])
def test_examples_run(function):
    module = entry if function is convcvx.fit else stack_module
    runner = doctest.DocTestRunner()
    for example in doctest.DocTestFinder(recurse=False).find(function, globs=vars(module)):
        assert runner.run(example).failed == 0


def test_no_proof_of_a_file_counts_for_a_resumed_training():
    """A bound that was kept from a round before is that of the file, whatever its record says of g."""
    old, new = {"proved_g": 2.0, "g_max": 2.0}, {"proved_g": 1.0, "g_max": 1.0}
    assert _proving([old, new], resumed=False) == [old, new]
    assert _proving([old, new], resumed=True) == [new]
    assert _proving([old, {**new, "proved_g": 2.0}], resumed=True) == []
    assert _proving([old, dict(old)], resumed=True) == []  # as rounds by climbs keep it
    assert _proving([{"g_max": 1.0}], resumed=True) == _proving([], resumed=True) == []
