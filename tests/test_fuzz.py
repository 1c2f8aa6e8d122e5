"""Inputs that nobody thought of: arrays, files, folders, options and config files at random.

Whatever comes in, convcvx takes it or refuses it with an error of its own, in bounded time and memory. A few inputs run
always, thousands with the slow tests; the number is printed.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import process_time

import numpy as np
import pytest
import torch
from helpers.commands import DIGITS, invoke
from helpers.data import keras_arrays, write_images
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image

import convcvx.comparison
import convcvx.training.jobs
from convcvx.data.datasets import check_images, check_targets, load
from convcvx.data.idx_files import NAMES, read_idx
from convcvx.data.image_files import ENDINGS
from convcvx.errors import ConvcvxError, DataWarning, InputError
from convcvx.losses.targets import encode_targets
from convcvx.network.two_layer import two_layer_cnn
from convcvx.pooling import Pooling
from convcvx.training.functional import patches_to_images
from convcvx.training.options import TrainConfig
from convcvx.training.plan import build_problem
from convcvx.training.progress import peak_memory_mb
from convcvx.training.run import Run

FEW, MANY = 25, 340
"""Inputs of each kind, in the quick run and in the slow one."""
SECONDS, MEGABYTES = 20.0, 1500.0
"""What one input may take of the processor, and all of them of memory."""
COUNTED: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def little_memory():
    before = peak_memory_mb()
    yield
    assert peak_memory_mb() - before < MEGABYTES


@pytest.fixture(autouse=True)
def stopped_before_training(monkeypatch):
    """All options and data are looked at; then a training, a rival or a certificate would begin."""

    def stop(*_: object, **__: object) -> None:
        raise InputError("good so far")

    monkeypatch.setattr(convcvx.training.jobs, "optimise", stop)
    monkeypatch.setattr(convcvx.training.jobs, "_certify", stop)
    monkeypatch.setattr(convcvx.comparison, "_twin", stop)


def taken_or_refused(use: Callable[[], object]) -> None:
    """Run `use`: it ends, or refuses with an error of convcvx on one line."""
    said = "refused"
    try:
        use()
    except ConvcvxError as error:
        said = str(error)
    assert said.strip()
    assert "\n" not in said


# Arrays

NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from([0, 1, 1e-320, 1e308, True, None, "1", b"x", 1j, [], [1], np.nan, np.int8(3)]),
)
ARRAYS = st.one_of(
    npst.arrays(
        st.one_of(npst.boolean_dtypes(), npst.integer_dtypes(), npst.unsigned_integer_dtypes(), npst.floating_dtypes(),
                  npst.complex_number_dtypes(), npst.unicode_string_dtypes(max_len=3), npst.datetime64_dtypes()),
        npst.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4),
    ),
    st.lists(NUMBERS, max_size=5),
    NUMBERS,
)  # fmt: skip


def arrays(data: st.DataObject) -> None:
    one, other = data.draw(ARRAYS), data.draw(ARRAYS)
    loss, count = data.draw(st.sampled_from(["squared", "cross-entropy"])), data.draw(st.sampled_from([None, 1, 3]))
    taken_or_refused(lambda: encode_targets(one, loss, count))
    taken_or_refused(lambda: check_targets(one, 3))
    taken_or_refused(lambda: check_images(one, other))
    taken_or_refused(lambda: Pooling.of(one))
    taken_or_refused(lambda: patches_to_images(one))
    good = torch.ones(3, 2, 2, 2)
    taken_or_refused(lambda: build_problem(good, one, loss=loss, pooling=other, n_classes=count))


# Files


def mutated(data: st.DataObject, content: bytes) -> bytes:
    """`content` with some of it changed, cut off, doubled or left out."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, max(0, len(changed) - 1)))
        kind = data.draw(st.sampled_from(["bit", "bytes", "cut", "double", "drop", "insert"]))
        length = data.draw(st.integers(1, 40))
        if kind == "bit" and changed:
            changed[place] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "bytes":
            changed[place : place + length] = data.draw(st.binary(min_size=length, max_size=length))
        elif kind == "cut":
            del changed[place:]
        elif kind == "double":
            changed[place:place] = changed[place : place + length]
        elif kind == "drop":
            del changed[place : place + length]
        else:
            changed[place:place] = data.draw(st.binary(max_size=length))
    return bytes(changed)


KERAS = keras_arrays(6, 6, (4, 3), 2)
FOLDER = {"mode": "RGB", "sizes": [(5, 4)], "classes": ("a", "b"), "counts": (1, 1)}
"""Options of `write_images`: an image a class, in folders with names that `WORDS` meets."""


def files(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["npz", "npy", "image", "idx"]))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        if kind == "npz":
            file = root / "set.npz"
            (np.savez if data.draw(st.booleans()) else np.savez_compressed)(file, **KERAS)
            source = file
        elif kind == "npy":
            for key, array in KERAS.items():
                np.save(root / f"{key}.npy", array)
            file, source = root / f"{data.draw(st.sampled_from(list(KERAS)))}.npy", root
        elif kind == "image":
            ending = data.draw(st.sampled_from(ENDINGS))
            source = write_images(root, ending=".png" if ending == ".pgm" else ending, **FOLDER)
            file = next(source.rglob("0.*"))
        else:
            file = root / data.draw(st.sampled_from([stem + end for stem in NAMES.values() for end in ("", ".gz")]))
            shape = (6, 4, 3) if "idx3" in file.name else (6,)
            content = bytes((0, 0, 8, len(shape))) + np.array(shape, ">u4").tobytes() + bytes(int(np.prod(shape)))
            file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
        file.write_bytes(mutated(data, file.read_bytes()))
        if kind == "idx":
            with suppress(ValueError, OSError, EOFError, zlib.error):  # for its caller to put into words
                taken_or_refused(lambda: read_idx(file))
        else:
            taken_or_refused(lambda: load(source))


# Run folders

RUN_FILES = {
    "config.json": lambda run: (run.config, run.continued({})),
    "beta_max.json": lambda run: run.beta_max,
    "history.json": lambda run: run.history,
    "metrics.json": lambda run: run.metrics,
    "embedding.safetensors": lambda run: run.load_embedding(),
    "state.safetensors": lambda run: run.load_state(),
    "model.safetensors": lambda run: two_layer_cnn(run.folder),
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def run_folders(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(RUN_FILES)))
    content = (DIGITS / name).read_bytes()
    how = data.draw(st.sampled_from(["bytes", "json", "value"]))
    if how == "bytes" or name.endswith(".safetensors"):
        content = mutated(data, content)
    elif how == "json" or not isinstance(held := json.loads(content), dict):
        content = json.dumps(data.draw(JSON)).encode()
    else:
        content = json.dumps(held | {data.draw(st.sampled_from(sorted(held))): data.draw(JSON)}).encode()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(DIGITS / "config.json", folder)
        Path(folder, name).write_bytes(content)
        taken_or_refused(lambda: RUN_FILES[name](Run(folder)))


# Folders of images

WORDS = st.sampled_from(
    ["a", "b", "train", "test", ".hidden", "._0.png", "0.png", "1.PNG", "x.jpg", "notes", "é", "up"]
)


def folders(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = write_images(Path(name, "set"), **FOLDER)
        for _ in range(data.draw(st.integers(1, 6))):
            place = Path(root, *data.draw(st.lists(WORDS, min_size=1, max_size=4)))
            kind = data.draw(st.sampled_from(["folder", "file", "image", "link", "pipe"]))
            try:
                if not place.parent.resolve().is_relative_to(root.resolve()):
                    continue  # a link leads out of here
                place.parent.mkdir(parents=True, exist_ok=True)
                if os.path.lexists(place):
                    place.unlink()  # and not written to: a pipe would wait for a reader
                if kind == "folder":
                    place.mkdir()
                elif kind == "file":
                    place.write_bytes(data.draw(st.binary(max_size=50)))
                elif kind == "image":
                    size = data.draw(st.sampled_from([(5, 4), (5, 4), (4, 5), (1, 1)]))
                    Image.new(data.draw(st.sampled_from(["L", "RGB", "RGBA", "1", "P", "I;16"])), size).save(place)
                elif kind == "link":
                    place.symlink_to(data.draw(st.sampled_from([".", "..", "../..", "0.png", "a", "/", "nowhere"])))
                else:
                    os.mkfifo(place)
            except (OSError, ValueError):
                continue  # a folder is there, or Pillow does not know the ending
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)
            taken_or_refused(lambda: load(root))


# Options and config files

VALUES = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["", "0", "-1", "nan", "inf", "1e-300", "1e300", "9" * 400, "3x3", "0x4", "²", "٣", "x" * 300,
                     "none", "yes", "3,3", "window:2,1", "global", "auto", "squared", "cuda", "digits", "a\0b", "~x"]),
    st.text(max_size=6),
)  # fmt: skip
NUMERIC = [name for name in TrainConfig().to_dict() if name not in ("data", "data_dir", "paired")]
COMMANDS = {
    "train": [name for name in NUMERIC if name not in ("whiten", "contrast", "hidden_bias", "intercept", "flips")],
    "certify": ["limit", "stride", "padding", "pool", "beta", "loss", "oracle", "gates", "tol", "seed", "device"],
    "compare": ["optimizer", "epochs", "seeds", "batch", "filters", "device"],
    "stack": ["stages", "kernel_size", "stride", "pool", "rank", "whiten", "beta_ratio", "channels", "downsample",
              "heads", "slide", "crops", "flips", "dictionary", "shifts", "validation", "tol"],
}  # fmt: skip


def stop_as_told(command: str, *options: object) -> None:
    """Whatever the options, the command ends with a status of its own."""
    assert invoke(command, *options).exit_code in (0, 2, 3), (command, options)


def options(data: st.DataObject) -> None:
    command = data.draw(st.sampled_from(sorted(COMMANDS)))
    names = data.draw(st.lists(st.sampled_from(COMMANDS[command]), min_size=1, max_size=3, unique=True))
    given_options = [f"--{name.replace('_', '-')}={data.draw(VALUES)}" for name in names]
    with tempfile.TemporaryDirectory() as folder:
        if command in ("train", "stack"):
            if "--limit" not in " ".join(given_options):
                given_options.append("--limit=30")
            stop_as_told(command, *given_options, f"--out={folder}/run")
        else:
            stop_as_told(command, DIGITS, *given_options)


TOML = st.recursive(
    st.one_of(
        st.integers().map(str),
        st.floats().map(str),
        st.booleans().map(lambda value: str(value).lower()),
        st.text(st.characters(codec="ascii", exclude_characters='"\\\n\r'), max_size=6).map(lambda text: f'"{text}"'),
        st.sampled_from(["0x" + "f" * 4000, "9" * 400 + ".0", "1979-05-27", "nan", "'", "[" * 900 + "]" * 900]),
    ),
    lambda inner: st.lists(inner, max_size=3).map(lambda parts: "[" + ", ".join(parts) + "]"),
    max_leaves=4,
)


def configs(data: st.DataObject) -> None:
    names = st.sampled_from([*NUMERIC, "data", "data_dir", "data-dir", "unknown", "stages", "channels", '"a b"', "x.y"])
    lines = data.draw(st.lists(st.tuples(names, TOML), max_size=3))
    content = "\n".join(f"{name} = {value}" for name, value in lines).encode()
    if data.draw(st.integers(0, 3)) == 0:
        content = mutated(data, content)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "options.toml")
        file.write_bytes(content)
        limited = ["--limit=30"] if data.draw(st.booleans()) else []
        stop_as_told(
            data.draw(st.sampled_from(["train", "stack"])), f"--config={file}", *limited, f"--out={folder}/run"
        )


KINDS = {kind.__name__: kind for kind in (arrays, files, run_folders, folders, options, configs)}


def fuzz(kind: str, count: int) -> int:
    """Try `count` inputs of a kind, or more; how many."""

    @settings(
        max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def one(data: st.DataObject) -> None:
        COUNTED[kind] += 1
        began = process_time()
        KINDS[kind](data)
        assert process_time() - began < SECONDS

    before = COUNTED[kind]
    one()
    assert COUNTED[kind] - before >= count
    return COUNTED[kind] - before


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_inputs_are_taken_or_refused(kind, counted):
    counted("inputs fuzzed", fuzz(kind, FEW))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_inputs_are_taken_or_refused(kind, counted):
    counted("inputs fuzzed", fuzz(kind, MANY))


def test_negative_control_a_fault_is_found(monkeypatch):
    def broken(data: st.DataObject) -> None:
        if data.draw(st.integers(0, 9)) == 7:
            taken_or_refused(lambda: [][0])

    monkeypatch.setitem(KINDS, "broken", broken)
    with pytest.raises(IndexError):
        fuzz("broken", FEW)
    del COUNTED["broken"]
