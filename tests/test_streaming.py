"""Images that stay on disk give what the same images in memory give, and take no memory that grows with the file."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.data import keras_arrays

from convcvx.data.datasets import load, split
from convcvx.data.images import StreamedImages
from convcvx.errors import DataError, InputError
from convcvx.network.evaluate import predict
from convcvx.patches import PatchEmbedding, PatchSpec
from convcvx.training.plan import build_problem

MIB = 2**20


def write(folder, parts: dict[str, np.ndarray]):
    folder.mkdir(exist_ok=True)
    for key, array in parts.items():
        np.save(folder / f"{key}.npy", array)
    np.savez(folder.with_suffix(".npz"), **parts)
    return folder


@pytest.mark.parametrize("shape", [(9, 8, 3), (9, 8)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, ">f8"])
def test_a_folder_of_arrays_is_the_npz_of_them_bit_for_bit(tmp_path, shape, dtype):
    folder = write(tmp_path / "set", keras_arrays(30, 6, shape, dtype=dtype))
    for limit in (None, 17):
        for streamed, loaded in zip(load(folder, limit=limit), load(tmp_path / "set.npz", limit=limit), strict=True):
            assert isinstance(streamed.images, StreamedImages)
            assert isinstance(loaded.images, torch.Tensor)
            assert streamed.images.shape == loaded.images.shape
            assert torch.equal(streamed.images[:], loaded.images)
            assert torch.equal(streamed.images[torch.tensor([5, 0, 3])], loaded.images[[5, 0, 3]])
            assert torch.equal(streamed.images.narrow(0, 2, 3)[1:], loaded.images[3:5])
            assert torch.equal(torch.cat([*streamed.images.split(4)]), loaded.images)
            assert torch.equal(streamed.targets, loaded.targets)
            assert streamed.classes == loaded.classes


def test_passes_and_embedding_are_the_same(tmp_path):
    folder = write(tmp_path / "set", keras_arrays(30, 6, (9, 8, 3)))
    (streamed, _), (loaded, _) = load(folder), load(tmp_path / "set.npz")
    spec = PatchSpec(3, padding=1, rank=5, whiten=0.1)
    problems = [build_problem(part.images, part.targets, spec=spec, pooling=2) for part in (streamed, loaded)]
    assert torch.equal(*(problem.responses.embedding.basis for problem in problems))
    assert PatchEmbedding.fit(streamed.images, spec).patch_rank == 5
    filters = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grams = [problem.responses.gram(filters, problem.targets)[0] for problem in problems]
    assert torch.equal(*grams)
    halves = [problem.responses.to(images=problem.responses.images[torch.arange(0, 30, 2)]) for problem in problems]
    assert torch.equal(*(half.matrix(filters) for half in halves))
    assert not torch.equal(halves[0].matrix(filters), problems[0].responses.matrix(filters)[:15])
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.Flatten())
    assert torch.equal(*(predict(network, part.images) for part in (streamed, loaded)))


def broken(folder, key: str, content: bytes):
    (folder / f"{key}.npy").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "y_test.npy").unlink(), "lacks y_test.npy: add them"),
        (lambda f: broken(f, "x_train", b"nothing"), "x_train.npy is no complete .npy file"),
        (lambda f: broken(f, "x_train", (f / "x_train.npy").read_bytes()[:-1]), "x_train.npy is no complete .npy"),
        (lambda f: np.save(f / "y_train.npy", np.array([None] * 30)), "y_train of .* holds Python objects"),
        (lambda f: np.save(f / "x_train.npy", np.array([None] * 30)), "x_train of .* holds Python objects"),
        (lambda f: np.save(f / "y_train.npy", np.zeros(29, int)), "x_train has 30 images but y_train has 29 labels"),
        (lambda f: np.save(f / "x_train.npy", np.zeros((30, 9, 8, 3), int)), "x_train must be uint8, or float"),
        (lambda f: np.save(f / "x_train.npy", np.full((30, 9, 8, 3), 2.0)), r"lie in \[0, 1\]; got \[2.0, 2.0\]"),
        (lambda f: np.save(f / "x_train.npy", np.full((30, 9, 8, 3), np.nan)), "infinite pixels in 30 images"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(tmp_path, damage, message):
    folder = write(tmp_path / "set", keras_arrays(30, 6, (9, 8, 3)))
    load(folder)
    damage(folder)
    with pytest.raises(DataError, match=message):
        load(folder)


def test_validation_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be held out of images that stay on disk"):
        split(load(write(tmp_path / "set", keras_arrays(30, 6, (9, 8, 3))))[0])


MEASURE = """
import re, sys, threading, time
import torch
from convcvx.data.datasets import load
from convcvx.patches import PatchSpec
from convcvx.training.plan import build_problem

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

def passes(limit):
    train, _ = load(sys.argv[1], limit=limit)
    problem = build_problem(train.images, train.targets, spec=PatchSpec(4, stride=8), pooling=4, dtype=torch.float32)
    responses = problem.responses
    filters = torch.ones(8, responses.dim, dtype=torch.float64)
    weights, intercept = torch.zeros(8, responses.n_cells, 3), torch.zeros(3)
    responses.gram(filters, problem.targets)
    responses.gradients(filters, weights, intercept, lambda outputs, images: outputs)

torch.set_num_threads(1)
passes(500)  # libraries and their buffers
peak, before, done = 0.0, anonymous(), False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.005)
watcher = threading.Thread(target=watch)
watcher.start()
if sys.argv[2] == "all":
    images = load(sys.argv[1])[0].images[:]  # the control: everything in memory
    del images
else:
    passes(None)
done = True
watcher.join()
print(peak - before)
"""


def added_memory(folder, mode: str) -> float:
    """MiB of anonymous memory, of which pages of a mapped file are no part, that the passes over all images add."""
    command = [sys.executable, "-c", MEASURE, str(folder), mode]
    environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": "0"}  # else glibc keeps, by chance, what was freed
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=environment)
    return float(done.stdout)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    """A file of 300 MiB, 1.2 GiB as float32, in less than 128 MiB."""
    n, side = 4800, 256
    folder = write(tmp_path / "set", keras_arrays(6, 6, (side, side)))
    x = np.lib.format.open_memmap(folder / "x_train.npy", "w+", np.uint8, (n, side, side))
    x[:] = np.arange(side, dtype=np.uint8)
    x.flush()
    np.save(folder / "y_train.npy", np.arange(n) % 3)
    assert (folder / "x_train.npy").stat().st_size >= 300 * MIB
    assert added_memory(folder, "streamed") < 128
    assert added_memory(folder, "all") > 1000  # the measure sees what is taken
