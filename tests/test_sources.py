"""Data as people have them: by name, in lists, tables and folders, of any size, grey or colour, with three sets."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import NO_SEARCH, answer, cli, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

import convcvx
from convcvx._compat import import_torchvision
from convcvx.data.datasets import load, load_sets
from convcvx.data.downloads import _downloads
from convcvx.data.form import ImageForm, grey
from convcvx.data.given import given_dataset
from convcvx.data.torchvision_sets import DOWNLOADS, nearest, other_task, set_named
from convcvx.errors import DataError, InputError
from convcvx.training.options import TrainConfig
from convcvx.training.resolve import load_data

RANDOM = np.random.default_rng(0)
NOISE = RANDOM.integers(0, 256, (12, 9, 7, 3), np.uint8)
DATASETS = import_torchvision().datasets


def folder(root: Path, parts: tuple[str, ...] = ("train", "val", "test"), n: int = 5) -> Path:
    """Two classes, a dark and b bright, `n` images each in every part; a size of its own each."""
    for part in parts:
        for name, level in (("a", 20), ("b", 220)):
            (root / part / name).mkdir(parents=True)
            for k in range(n):
                Image.new("L", (8 + k, 6), level + k).save(root / part / name / f"{k}.png")
    return root


def said(error: type[Exception], *args, **kwargs) -> str:
    with pytest.raises(error) as caught:
        load(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Sizes and channels


def test_images_are_resized_as_pillow_does_whatever_holds_them():
    small = ImageForm((4, 5)).array(NOISE)
    for image, made in zip(NOISE, small, strict=True):
        np.testing.assert_array_equal(made, np.asarray(Image.fromarray(image).resize((5, 4), Image.BILINEAR)))
    floats = ImageForm((4, 5)).images(torch.from_numpy(NOISE).permute(0, 3, 1, 2) / 255)
    assert (floats.permute(0, 2, 3, 1) * 255 - torch.from_numpy(small)).abs().max() < 1


def test_colour_becomes_the_grey_of_pillow_and_grey_becomes_colour():
    for image in NOISE:
        np.testing.assert_array_equal(grey(image)[..., 0], np.asarray(Image.fromarray(image).convert("L")))
    np.testing.assert_allclose(grey(NOISE[0] / 255)[..., 0] * 255, grey(NOISE[0])[..., 0], atol=0.501)
    one = NOISE[..., :1]
    assert (ImageForm(None, 3).array(one) == one).all()
    with pytest.raises(InputError, match="channels 1 can be had from images with 1 or 3; these have 2"):
        ImageForm(None, 1).array(NOISE[..., :2])
    for bad in (2, 4, 0):
        with pytest.raises(InputError, match=r"channels must be 1 \(grey\) or 3"):
            ImageForm(None, bad)


def test_options_reach_arrays_names_and_loaders_alike():
    train, test, _ = load_data(TrainConfig(resize="4x5", channels=3, limit=20))
    assert train.images.shape[1:] == test.images.shape[1:] == (3, 4, 5)
    digits, _ = load("digits", limit=20)
    same = given_dataset(digits.images, digits.targets, form=ImageForm((4, 5), 3))[0]
    assert torch.equal(same.images, train.images)
    pairs = [(Image.new("RGB", (5 + k, 6), (k, 0, 0)), k % 2) for k in range(6)]

    class Loader(torch.utils.data.Dataset):
        def __len__(self):
            return len(pairs)

        def __getitem__(self, k):
            return pairs[k]

    assert given_dataset(Loader(), form=ImageForm((4, 4), 1))[0].images.shape == (6, 1, 4, 4)
    with pytest.raises(DataError, match="pass resize"):
        given_dataset(Loader())
    for options, message in (
        ({"resize": "0"}, "resize must be a whole number >= 1"),
        ({"channels": 2}, "channels must be 1"),
    ):
        with pytest.raises(InputError, match=message):
            TrainConfig.of(options).check()


def test_images_that_stay_on_disk_are_not_resized(tmp_path):
    for key, rows in (("train", slice(None)), ("test", slice(4))):
        np.save(tmp_path / f"x_{key}.npy", NOISE[rows])
        np.save(tmp_path / f"y_{key}.npy", np.arange(12)[rows] % 2)
    assert "stay on disk are read as they are: leave resize" in said(InputError, tmp_path, resize=4)
    assert len(load(tmp_path, resize=(9, 7))[0]) == 12  # as they are


# Folders


def test_a_folder_with_three_sets_is_read_and_its_validation_set_scored(tmp_path):
    root = folder(tmp_path / "set")
    assert "must have one size: pass resize, such as --resize 6x" in said(DataError, root)
    train, test, validation = load_sets(root, form=ImageForm((6, 6)))
    assert (len(train), len(test), len(validation), train.classes) == (10, 10, 10, ("a", "b"))
    fitted = convcvx.fit(root, resize=6, preset="plain", validation=0.2, beta_ratio=0.05, tol=0.5, seed=0)
    assert fitted.metrics["validation_accuracy"] == 1
    assert fitted.origin.sets["validation"]["shape"] == [10, 1, 6, 6]
    assert fitted.origin.sets["train"]["shape"] == [10, 1, 6, 6]  # no share is held out besides
    images = torch.rand(2, 3, 20, 30).mul(255).byte()
    prepared = fitted.network(ImageForm((6, 6), 1).images(images.float() / 255))
    assert prepared.shape == (2, 2)


def test_a_validation_set_alone_is_the_test_set_and_no_set_means_a_share(tmp_path):
    pair = load_sets(folder(tmp_path / "pair", ("train", "val")), form=ImageForm((6, 6)))
    assert (len(pair[0]), len(pair[1]), pair[2]) == (10, 10, None)
    bare = folder(tmp_path / "bare", (".",), 10)
    train, test = load(bare, resize=6, channels=3)
    assert (len(train), len(test), train.images.shape[1]) == (16, 4, 3)
    assert test.targets.bincount().tolist() == [2, 2]  # by class
    again, _ = load(bare, resize=6, limit=8, channels=3)
    assert torch.equal(again.images, train.images[:8])
    (tmp_path / "test" / "a").mkdir(parents=True)
    assert "it has no train" in said(DataError, tmp_path)


def test_16_bits_of_grey_keep_what_8_bits_would_lose(tmp_path):
    root = folder(tmp_path / "set", ("train", "test"), 1)
    deep = np.array([[0, 1, 256, 65535]] * 6, np.uint16).repeat(2, axis=1)
    Image.fromarray(deep).save(root / "train/a/0.png")
    (root / "test/a/0.png").unlink()
    Image.fromarray(deep).save(root / "test/a/0.tif")
    train, test = load(root)
    for images in (train.images[train.targets == 0], test.images[test.targets == 0]):
        torch.testing.assert_close(images[0, 0], torch.from_numpy(deep.astype(np.float32) / 65535))
    assert train.images[train.targets == 1].unique().tolist() == [pytest.approx(220 / 255)]


# Lists and tables


def write_csv(path: Path, rows: list[list[object]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_a_csv_names_images_labels_sets_and_weights(tmp_path):
    root = folder(tmp_path / "set")
    images = [p.relative_to(tmp_path) for p in sorted(root.rglob("*.png"))]
    header = ["split", "Label", "path", "weight"]
    rows = [[p.parts[1], "cat" if p.parts[2] == "a" else "dog", p, 2] for p in images]
    train, test, validation = load_sets(write_csv(tmp_path / "list.csv", [header, *rows]), form=ImageForm((6, 6)))
    assert (len(train), len(test), len(validation)) == (10, 10, 10)
    limited, _ = load(tmp_path / "list.csv", limit=4, resize=6)
    assert torch.equal(limited.images, train.images[:4])
    assert (train.classes, train.weights.unique().tolist()) == (("cat", "dog"), [2])
    dark = train.images.mean(dim=(1, 2, 3)) < 0.5
    assert torch.equal(dark, train.targets == 0)
    bare = [[p, 3 if p.parts[2] == "a" else 11] for p in images]  # no header; whole numbers with a gap
    train, test = load(write_csv(tmp_path / "bare.csv", bare), resize=6)
    assert (train.classes, len(train), len(test)) == (("3", "11"), 24, 6)
    real, _ = load(write_csv(tmp_path / "real.csv", [[p, k / 8] for k, (p, _) in enumerate(bare)]), resize=6)
    assert (real.classes, real.targets.dtype) == ((), torch.float64)


ODD_NAMES = [
    *[("1_0", "2_1"), ("nan", "inf"), ("\u0661", "\u0662"), ("1" * 5000, "2" * 30)],
    *[("007", "12"), ("+1", "-1"), ("-0", "1")],
]


@pytest.mark.parametrize("names", ODD_NAMES)
def test_names_that_python_reads_as_numbers_but_writes_otherwise_are_names_in_a_csv(tmp_path, names):
    Image.new("L", (4, 4)).save(tmp_path / "x.png")
    rows = [["x.png", names[k % 2]] for k in range(20)]
    train, _ = load(write_csv(tmp_path / "list.csv", [["path", "label"], *rows]))
    assert (train.classes, train.targets.dtype) == (tuple(sorted(names)), torch.int64)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty: write a path and a label a line"),
        ([["path", "label"]], "lists no images"),
        ([["a", "b", "c"]], "must have the columns path and label; its first line is 'a,b,c'"),
        ([["path", "label"], ["none.png", "1"]], "none.png, which is no file: paths count from where the list lies"),
        ([["path", "label"], ["x.png"]], "has 1 cells in line 2, the first line 2"),
        ([["x.png", "1"], ["x.png"]], "has 1 cells in line 2, the first line 2"),
        ([["x.png", "1"], [], ["x.png", ""]], "lacks a label or a weight in line 3"),
        ([["path", "label", "split"], ["x.png", "1", "holdout"]], "has the split 'holdout' in line 2: write train"),
        ([["path", "label", "split"], ["x.png", "1", "test"]], "has no training images: write train"),
        ([["path", "label"], ["x.png", ""]], "lacks a label or a weight in line 2"),
        ([["path", "label", "weight"], ["x.png", "1", "much"]], "lacks a label or a weight in line 2"),
        ([["path", "label", "weight"], ["x.png", "1", "1_0"]], "lacks a label or a weight in line 2"),
        ([["path", "label", "weight"], ["x.png", "1", "1"], ["x.png", "1", "inf"]], "has the weight 'inf' in line 3"),
        ([["path", "label", "weight"], ["x.png", "1", "NaN"]], "has the weight 'NaN' in line 2: write 0 to leave"),
        ([["path", "label"], ["x.png", "0.5"], ["x.png", "nan"]], "has the label 'nan' among numbers: drop its image"),
    ],
)
def test_an_unfit_csv_is_refused(tmp_path, rows, message):
    Image.new("L", (4, 4)).save(tmp_path / "x.png")
    assert message in said(DataError, write_csv(tmp_path / "list.csv", rows))


def test_a_csv_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "list.csv").write_bytes(b"\xff\xfe\x00path")
    assert "is no table of text" in said(DataError, tmp_path / "list.csv")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.text(max_size=6) | st.sampled_from(["x.png", "1", "-2", "0.5", "nan", "test"]), max_size=4))
)
def test_any_table_is_taken_or_refused(tmp_path, rows):
    Image.new("L", (4, 4)).save(tmp_path / "x.png")
    try:
        text = io.StringIO()
        csv.writer(text).writerows([["path", "label", "split"], *rows])
        (tmp_path / "list.csv").write_text(text.getvalue(), errors="surrogateescape")
    except (csv.Error, UnicodeError):
        return
    with contextlib.suppress(DataError):
        load(tmp_path / "list.csv")


def test_arrays_without_a_test_set_are_read(tmp_path):
    alone = {"x_train": np.arange(20, dtype=np.uint8)[:, None, None] * np.ones((20, 6, 5), np.uint8)}
    alone |= {"y_train": np.arange(20)[:, None] // 10}
    np.savez(tmp_path / "alone.npz", **alone, w_train=np.arange(1.0, 21))
    train, test = load(tmp_path / "alone.npz")
    assert (len(train), test.targets.bincount().tolist()) == (16, [2, 2])  # by class, though labels are a column
    rows = torch.cat([train.images, test.images])[:, 0, 0, 0] * 255
    assert rows.round().sort().values.tolist() == list(range(20))
    assert torch.equal(torch.cat([train.weights, test.weights]), rows.round() + 1)
    again, other = load(tmp_path / "alone.npz", limit=12)
    assert torch.equal(again.images, train.images[:12])
    assert torch.equal(other.images, test.images)
    pair = alone | {"x_val": alone["x_train"][:3], "y_val": alone["y_train"][:3]}
    np.savez(tmp_path / "pair.npz", **pair)
    (tmp_path / "pair").mkdir()
    for key, array in pair.items():
        np.save(tmp_path / "pair" / f"{key}.npy", array)
    for name in ("pair.npz", "pair"):
        train, test, validation = load_sets(tmp_path / name)
        assert (len(train), len(test), validation) == (20, 3, None)
    for wrong, told in (
        ({"w_train": np.ones(19)}, "w_train must be one number an image, (20,); got shape (19,)"),
        ({"w_train": np.ones(21)}, "w_train must be one number an image, (20,); got shape (21,)"),
        ({"w_test": np.ones(4)}, "has w_test, weights of images that it has not"),
        ({"w_val": np.ones(4)}, "has w_val, weights of images that it has not"),
        ({"y_train": np.int64(3)}, "y_train is a single label for 20 images"),
    ):
        np.savez(tmp_path / "wrong.npz", **alone | wrong)
        assert told in said(DataError, tmp_path / "wrong.npz")
    (tmp_path / "pair" / "x_val.npy").unlink()
    assert "lacks x_test.npy, y_test.npy: add them" in said(DataError, tmp_path / "pair")


def test_the_arrays_of_medmnist_and_texts_are_read(tmp_path):
    x, y = NOISE, np.arange(12, dtype=np.uint8)[:, None] % 2
    parts = {"train": slice(None), "val": slice(6), "test": slice(4)}
    named = {f"{p}_images": x[rows] for p, rows in parts.items()} | {
        f"{p}_labels": y[rows] for p, rows in parts.items()
    }
    np.savez(tmp_path / "med.npz", **named)
    train, test, validation = load_sets(tmp_path / "med.npz")
    assert (len(train), len(test), len(validation), train.classes) == (12, 4, 6, ("0", "1"))
    words = {"x_train": x, "y_train": np.array(["b", "a"] * 6), "x_test": x[:2], "y_test": np.array(["a", "b"])}
    np.savez(tmp_path / "words.npz", **words)
    train, test = load(tmp_path / "words.npz")
    assert (train.classes, test.targets.tolist()) == (("a", "b"), [0, 1])
    np.savez(tmp_path / "half.npz", **words, x_val=x)
    assert "has one of x_val and y_val" in said(DataError, tmp_path / "half.npz")
    np.savez(tmp_path / "odd.npz", **(words | {"y_test": np.array(["a", "z"])}))
    assert "y_test has labels that are no training class: ['z']" in said(DataError, tmp_path / "odd.npz")


# Hugging Face: its objects by what they offer, its files where its packages are installed


class ClassLabel:
    names = ("cat", "dog")


class Table:
    """What convcvx asks of a `datasets.Dataset`."""

    def __init__(self, n: int, labels: list[int] | None = None, size: int = 6) -> None:
        self.column_names = ["picture_id", "image", "label"]
        self.features = {"picture_id": None, "image": type("Image", (), {})(), "label": ClassLabel()}
        self.labels = labels or [k % 2 for k in range(n)]
        self.size = size

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        if key == "label":
            return self.labels
        return {"image": Image.new("L", (self.size, 5), 20 + 200 * self.labels[key]), "label": self.labels[key]}


def test_hugging_face_data_are_taken_with_all_their_parts():
    data = {"train": Table(10), "validation": Table(4), "test": Table(6)}
    train, test, validation = given_dataset(data)
    assert (len(train), len(test), len(validation), train.classes) == (10, 6, 4, ("cat", "dog"))
    assert torch.equal(train.images.mean(dim=(1, 2, 3)) < 0.5, train.targets == 0)
    alone = given_dataset(Table(10), form=ImageForm((3, 3), 3))
    assert (len(alone[0]), alone[1], alone[0].images.shape[1:]) == (10, None, (3, 3, 3))
    hidden = given_dataset({"train": Table(10), "test": Table(3, [-1, -1, -1]), "validation": Table(4)})
    assert (len(hidden[1]), hidden[2]) == (4, None)  # labels that a contest keeps to itself
    with pytest.raises(DataError, match="has no part train; it has dev"):
        given_dataset({"dev": Table(3)})
    bad = Table(3)
    bad.column_names = ["picture_id", "image"]
    with pytest.raises(DataError, match="has no column of labels; it has picture_id, image"):
        given_dataset(bad)
    with pytest.raises(InputError, match="targets must be left out beside a Table"):
        given_dataset(Table(3), [0, 1, 0])


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (6, 5), level).save(file, "PNG")
    return file.getvalue()


def test_parquet_files_are_read_by_part(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    told = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    for part, n in (("train", 10), ("test", 4)):
        cells = [{"bytes": png(20 + 200 * (k % 2)), "path": None} for k in range(n)]
        table = pyarrow.table({"image": cells, "label": [k % 2 for k in range(n)]})
        table = table.replace_schema_metadata({"huggingface": json.dumps(told)})
        parquet.write_table(table, tmp_path / f"{part}-00000-of-00001.parquet")
    train, test = load(tmp_path)
    assert (len(train), len(test), train.classes) == (10, 4, ("cat", "dog"))
    assert torch.equal(train.images.mean(dim=(1, 2, 3)) < 0.5, train.targets == 0)
    assert len(load(tmp_path / "train-00000-of-00001.parquet")[1]) == 2
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    assert "is no parquet file of images and labels" in said(DataError, tmp_path)


def test_what_needs_other_packages_says_which(tmp_path, monkeypatch):
    import sys

    for name in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "train.parquet").write_bytes(b"")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text("{}")
    for place in ("train.parquet", "saved"):
        assert "pip install 'convcvx[datasets]'" in said(DataError, tmp_path / place)


# Sets of torchvision


def test_names_are_known_in_any_case_and_near_misses_are_suggested(tmp_path):
    for name, meant in (("MNIST", "mnist"), ("FashionMNIST", "fashion-mnist"), ("Fashion_MNIST", "fashion-mnist")):
        assert set_named(name) == meant
    assert [set_named(name) for name in ("OxfordIIITPet", "SVHN", "EMNIST-Letters")] == [
        "oxford-iiit-pet", "svhn", "emnist-letters",
    ]  # fmt: skip
    assert set_named("set") is None
    assert nearest("fashion-minst")[0] == "fashion-mnist"
    assert other_task("CocoDetection") == "CocoDetection"
    assert "is CocoDetection of torchvision, whose images have no classes" in said(DataError, "cocodetection", tmp_path)
    assert "(is svhn meant?)" in said(DataError, "shvn", tmp_path)


def test_every_listed_set_is_one_of_torchvision_with_these_arguments():
    from inspect import signature

    for name, listed in DOWNLOADS.items():
        cls = getattr(DATASETS, listed.class_name)
        known = signature(cls).parameters
        for arguments in listed.parts.values():
            assert arguments.keys() <= known.keys() | {"train"}, name
        assert set_named(listed.class_name) is not None or listed.class_name == "EMNIST"


def test_a_set_of_torchvision_is_read_as_torchvision_reads_it(tmp_path, monkeypatch):
    splits = {}
    for part, n in (("train", 12), ("test", 6)):
        x = RANDOM.integers(0, 256, (32, 32, 3, n), np.uint8)
        file = tmp_path / f"{part}_32x32.mat"
        savemat(file, {"X": x, "y": (np.arange(n) % 10)[:, None] + 1})
        splits[part] = ["http://127.0.0.1:1/", file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(DATASETS.SVHN, "split_list", splits)
    train, test = load("SVHN", tmp_path, download=False)
    known = DATASETS.SVHN(tmp_path, "test")
    assert torch.equal(test.images, torch.from_numpy(known.data) / 255)
    assert test.targets.tolist() == known.labels.tolist()
    assert (len(train), train.name) == (12, "svhn")
    assert torch.equal(load("svhn", tmp_path, 5, channels=1)[0].targets, train.targets[:5])
    assert answer(cli("data", "--data-dir", tmp_path, "--json"))["sets"]["svhn"] == str(tmp_path / "train_32x32.mat")
    (tmp_path / "test_32x32.mat").unlink()
    assert "svhn in" in (text := said(DataError, "svhn", tmp_path, download=False))
    assert "is damaged" in text
    assert "is not in" in said(DataError, "food101", tmp_path, download=False)
    assert "torchvision cannot download it" in said(DataError, "fer2013", tmp_path)


def test_a_set_that_torchvision_derives_from_another_is_read(tmp_path):
    (tmp_path / "EMNIST" / "raw").mkdir(parents=True)
    for part, n in (("train", 12), ("test", 6)):
        x, y = RANDOM.integers(0, 256, (n, 5, 4), np.uint8), (np.arange(n) % 10).astype(np.uint8)
        for name, array in (("images-idx3", x), ("labels-idx1", y)):
            header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
            (tmp_path / f"EMNIST/raw/emnist-digits-{part}-{name}-ubyte").write_bytes(header + array.tobytes())
    train, test = load("EMNIST-digits", tmp_path, 5, download=False)
    assert (len(train), len(test), train.classes) == (5, 6, tuple("0123456789"))
    assert torch.equal(test.images[:, 0], torch.from_numpy(x) / 255)
    assert [name for name, listed in DOWNLOADS.items() if not _downloads(getattr(DATASETS, listed.class_name))] == [
        "fer2013", "imagenet",
    ]  # fmt: skip


def test_a_set_of_one_part_and_many_sizes_is_split_and_resized(tmp_path):
    for name, level in (("cup", 20), ("lamp", 220)):
        place = tmp_path / "caltech101" / "101_ObjectCategories" / name
        place.mkdir(parents=True)
        for k in range(1, 11):
            Image.new("RGB", (6 + k, 8), (level, level, k)).save(place / f"image_{k:04d}.jpg")
    (tmp_path / "caltech101" / "101_ObjectCategories" / "BACKGROUND_Google").mkdir()
    assert "all images must be alike: pass resize" in said(DataError, "Caltech101", tmp_path)
    train, test = load("Caltech101", tmp_path, resize=8)
    assert (train.classes, len(train), len(test)) == (("cup", "lamp"), 16, 4)
    assert torch.equal(train.images.mean(dim=(1, 2, 3)) < 0.5, train.targets == 0)


def test_the_command_line_takes_sizes_and_channels(tmp_path):
    root = folder(tmp_path / "set")
    refused("train --data", root, "--resize", "x")
    refused("train --data", root, "--channels", "2")
    out = tmp_path / "run"
    told = answer(
        cli(
            "train --preset plain --resize 6 --channels 3 --rank 2 --beta-ratio 0.05 --tol 0.5 --json --data",
            root,
            "--out",
            out,
        )
    )
    assert (told["validation_accuracy"], told["test_accuracy"]) == (1, 1)
    assert json.loads((out / "config.json").read_text())["resize"] == "6"
    again = answer(cli("certify --json", out, *NO_SEARCH))
    assert again["primal"] == pytest.approx(told["primal"], rel=1e-5)
