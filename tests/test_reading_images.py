"""Images and devices as Python hands them over: read the same everywhere, or refused in a line that says what to do."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from helpers.problems import NO_TIME
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from convcvx import certify, fit, solve, two_layer_cnn
from convcvx.data.images import StreamedImages, read_images
from convcvx.errors import InputError

SHAPE = (20, 1, 5, 5)
IMAGES = np.random.default_rng(0).random(SHAPE).astype(np.float32)
TARGETS = np.arange(20) % 3
ROWS = IMAGES.reshape(20, -1)[:, :2]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


@pytest.fixture(scope="module")
def reference():
    return certify(network(), torch.tensor(IMAGES), torch.tensor(TARGETS), 0.05, **NO_TIME)


def frozen(images: np.ndarray) -> np.ndarray:
    images = images.copy()
    images.flags.writeable = False
    return images


READ = {
    "an array": IMAGES,
    "one channel": IMAGES[:, 0],
    "a tensor without channels": torch.tensor(IMAGES[:, 0]),
    "float64": IMAGES.astype(np.float64),
    "a view backwards": IMAGES[:, :, ::-1].copy()[:, :, ::-1],
    "read-only": frozen(IMAGES),
    "a list of images": list(IMAGES),
    "a list of tensors": list(torch.tensor(IMAGES)),
    "streamed": StreamedImages(IMAGES.transpose(0, 2, 3, 1)),
    "with a gradient": torch.tensor(IMAGES, requires_grad=True),
}


@pytest.mark.parametrize("kind", READ)
def test_images_of_any_kind_are_certified_alike(kind, reference):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        certificate = certify(network(), READ[kind], TARGETS, 0.05, **NO_TIME)
    assert certificate.primal == pytest.approx(reference.primal, rel=1e-12)


LOADER = DataLoader(TensorDataset(torch.tensor(IMAGES)))
REFUSED = {
    "empty": (IMAGES[:0], r"non-empty \(n, C, H, W\) or \(n, H, W\) array; got shape \(0, 1, 5, 5\)"),
    "one image": (IMAGES[0, 0], r"got shape \(5, 5\)"),
    "a loader": (LOADER, "images must be a tensor or an array of numbers; got DataLoader"),
    "a data set": (LOADER.dataset, "got TensorDataset"),
    "text": (np.array([["a"]]), "images must be whole or real numbers"),
    "complex": (IMAGES + 1j, "images must be whole or real numbers; got complex64"),
    "NaN": (np.full(SHAPE, np.nan), "images must be finite"),
    "nothing": (None, "got NoneType"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_are_no_images_is_refused(kind):
    given, message = REFUSED[kind]
    with pytest.raises(InputError, match=message) as caught:
        certify(network(), given, TARGETS, 0.05)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_that_come_last_are_seen(channels):
    size = 17 if channels == 4 else 6
    images = np.random.default_rng(0).random((8, size, size, channels))
    with pytest.raises(InputError, match=r"seem to be \(n, height, width, channels\)"):
        fit(images, np.arange(8) % 2)
    taken = two_layer_cnn(image_shape=(channels, size, size), n_filters=2, n_outputs=2)
    with pytest.raises(InputError, match=rf"images must have {channels} channels, .* pass images\.permute"):
        certify(taken, images, np.arange(8) % 2, 0.05)


def test_maps_of_features_that_are_four_columns_wide_are_taken():
    maps = np.random.default_rng(0).random((8, 8, 6, 4))
    assert fit(maps, np.arange(8) % 2, beta_ratio=0.5, tol=1.0, **NO_TIME).network[0].in_channels == 8


def test_whole_numbers_to_255_are_taken_as_such_with_a_hint():
    whole = (255 * IMAGES).astype(np.uint8)
    with pytest.warns(UserWarning, match="divide them by 255"):
        assert int(read_images(whole).max()) > 1
    with pytest.warns(UserWarning, match="divide them by 255"):
        certificate = certify(network(), whole, TARGETS, 0.05, **NO_TIME)
    assert certificate.primal == certify(network(), whole.astype(np.float32), TARGETS, 0.05, **NO_TIME).primal


def test_patches_are_read_as_images_are():
    expected = solve(ROWS, TARGETS, 0.05)
    assert torch.equal(solve([list(row) for row in ROWS], TARGETS, 0.05).filters, expected.filters)
    for given, message in (
        (LOADER, "patches must be a tensor or an array of numbers; got DataLoader"),
        (ROWS + 1j, "real"),
    ):
        with pytest.raises(InputError, match=message):
            solve(given, TARGETS, 0.05)


def test_targets_are_read_as_images_are():
    real = ROWS[:, :1]
    assert torch.equal(solve(ROWS, real.astype(">f8"), 0.05).filters, solve(ROWS, real, 0.05).filters)
    for given in (LOADER, np.array(["a", "b"] * (len(ROWS) // 2))):
        with pytest.raises(InputError, match="targets must be"):
            solve(ROWS, given, 0.05)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_devices_that_are_not_there_are_refused_and_auto_takes_what_there_is():
    none = dict.fromkeys(
        ("tpu", "cpu:", "cuda:", "cpu:\u0661", "cpu:01", "cpu:300"), "device must be auto, cpu or cuda"
    )
    for device, message in ({"cuda": "torch sees none; use device cpu"} | none).items():
        with pytest.raises(InputError, match=message):
            solve(ROWS, TARGETS, 0.05, device=device)
        with pytest.raises(InputError, match=message):
            certify(network(), IMAGES, TARGETS, 0.05, device=device)
    assert torch.equal(solve(ROWS, TARGETS, 0.05, device="auto").filters, solve(ROWS, TARGETS, 0.05).filters)
