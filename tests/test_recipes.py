"""Recipes: for whatever images, options that are valid, that fit the images, and that are worth something."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import answer, cli
from hypothesis import example, given
from hypothesis import strategies as st

from convcvx.pooling import Pooling
from convcvx.stack.options import StackConfig
from convcvx.training.options import TrainConfig
from convcvx.training.recipes import recipe, stack_recipe

DIGITS, MNIST, CIFAR10 = (1, 8, 8), (1, 28, 28), (3, 32, 32)
SHAPES = st.tuples(st.sampled_from([1, 2, 3, 4, 20]), st.integers(1, 300), st.integers(1, 300))
COUNTS = st.integers(1, 2_000_000)
LOSSES = st.sampled_from(["squared", "cross-entropy"])


@given(SHAPES, COUNTS, LOSSES, st.booleans())
@example((64, 1, 1), 100_000, "squared", True)
@example((3, 224, 224), 1_300_000, "squared", True)
def test_a_recipe_is_valid_and_fits_the_images(image_shape, n_images, loss, classes):
    config = TrainConfig.from_dict(recipe(image_shape, n_images, loss, classes) | {"loss": loss})
    config.check()
    spec = config.patch_spec()
    Pooling.of(config.pool).output_size(*spec.output_size(*image_shape[1:]))
    for length, kernel, stride, padding in zip(
        image_shape[1:], spec.kernel_size, spec.stride, spec.padding, strict=True
    ):
        assert padding < kernel  # no patch sees nothing but padding
        assert stride <= kernel  # no pixel lies between patches
        assert (length + 2 * padding - kernel) % stride == 0  # none behind the last one: flips ask for that


@given(SHAPES, COUNTS, LOSSES, st.booleans())
@example((64, 1, 1), 100_000, "squared", True)
@example((3, 33, 33), 100_000, "squared", True)
def test_a_recipe_of_a_stack_is_valid_and_fits_the_images(image_shape, n_images, loss, classes):
    options, channels, downsample, heads = stack_recipe(image_shape, n_images, loss, classes)
    config = StackConfig.of(2, options | {"loss": loss}, channels, downsample, heads)
    config.check_shapes(image_shape)


def test_many_images_get_a_dictionary_and_few_a_small_gap():
    few, many = recipe((1, 28, 28), 200), recipe((1, 28, 28), 60_000)
    assert "dictionary" not in few
    assert few["tol"] < 0.1
    assert many["dictionary"] > 100
    assert "dictionary" not in recipe((1, 28, 28), 60_000, "cross-entropy")  # which takes longer with one


def test_only_classes_of_colour_images_are_mirrored():
    """A mirrored letter is another one, a mirrored cat is a cat; a real value may be its left side's."""
    assert recipe((3, 32, 32), 50_000)["flips"]
    assert not recipe((3, 32, 32), 50_000, classes=False)["flips"]
    assert not recipe((1, 28, 28), 60_000)["flips"]


def test_more_images_or_larger_ones_get_fewer_filters():
    sizes = [recipe((3, side, side), n)["dictionary"] for side, n in [(32, 20_000), (32, 50_000), (64, 50_000)]]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3


def trained(tmp_path: Path, options: dict[str, Any], data: str, *arguments: object) -> dict[str, Any]:
    """What `convcvx train` answers with exit status 0, given these options in a file."""
    file = tmp_path / "recipe.toml"
    file.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in options.items()))
    return answer(cli("train --json --data", data, "--config", file, *arguments, "--out", tmp_path / "run"))


@pytest.mark.slow
def test_the_recipe_for_digits_reads_them_and_closes_the_gap(tmp_path):
    metrics = trained(tmp_path, recipe(DIGITS, 1000), "digits", "--limit", 1000)
    assert metrics["test_accuracy"] >= 0.96
    assert metrics["rel_gap"] < 0.06


@pytest.mark.slow
@pytest.mark.parametrize(("data", "image_shape", "accuracy"), [("mnist", MNIST, 0.97), ("cifar10", CIFAR10, 0.60)])
def test_the_recipe_for_a_part_of_a_data_set_is_accurate(tmp_path, shared_data, data, image_shape, accuracy):
    options = recipe(image_shape, 5000) | {"dictionary": 200}
    metrics = trained(tmp_path, options, data, "--limit", 5000, "--data-dir", shared_data)
    assert metrics["test_accuracy"] >= accuracy
