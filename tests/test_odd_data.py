"""Data that are hostile, huge, or merely of another habit: refused or read right, and never at any price."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import socket
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convcvx._compat import import_torchvision
from convcvx.data import array_files, idx_files, image_files
from convcvx.data.datasets import load
from convcvx.errors import DataError, DataWarning

CIFAR10 = import_torchvision().datasets.CIFAR10


def picture(grey: int, size: tuple[int, int] = (4, 3)) -> Image.Image:
    return Image.new("L", size, grey)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes, a of grey 10 and b of grey 200, with two images each in both parts."""
    for part in ("train", "test"):
        for name, grey in (("a", 10), ("b", 200)):
            (tmp_path / "set" / part / name).mkdir(parents=True)
            for number in range(2):
                picture(grey).save(tmp_path / "set" / part / name / f"{number}.png")
    return tmp_path / "set"


def refusal(*args, **kwargs) -> str:
    with pytest.raises(DataError) as caught:
        load(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Image files


def test_no_program_is_started_for_a_file_of_another_format(folder, monkeypatch):
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: started.append(args))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 3\n%%EndComments\nshowpage\n%%EOF\n"
    (folder / "train/a/0.png").write_bytes(eps)
    with Image.open(folder / "train/a/0.png") as image:  # negative control: Pillow by itself knows the format
        assert image.format == "EPS"
    assert "0.png is no complete image" in refusal(folder)
    assert not started


@pytest.mark.parametrize("ending", [e for endings in image_files.FORMATS.values() for e in endings])
def test_every_named_format_is_read(folder, ending):
    (folder / "test/b/0.png").unlink()
    picture(200).save(folder / f"test/b/0{ending}", **({"lossless": True} if ending == ".webp" else {}))
    assert load(folder)[1].images[2].mean().item() == pytest.approx(200 / 255, abs=0.01)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_what_is_transparent_is_white(folder, mode):
    """Black strokes, opaque, on a transparent ground whose colour is black as well."""
    stroke = np.zeros((3, 4), np.uint8)
    stroke[1] = 255
    black = Image.new("L", (4, 3), 0)
    if mode in ("RGBA", "LA"):
        image = black.convert(mode)
        image.putalpha(Image.fromarray(stroke))
        image.save(folder / "test/a/0.png")
    else:
        values = Image.fromarray(np.where(stroke, 0, 7).astype(np.uint8))
        if mode == "P":
            values.putpalette([0] * 768)
        clear = (7, 7, 7) if mode == "RGB" else 7
        (values if mode == "P" else values.convert(mode)).save(folder / "test/a/0.png", transparency=clear)
    read = load(folder)[1].images[0]
    assert len(read) == (1 if mode in ("LA", "L") else 3)
    assert torch.equal(read[0], torch.from_numpy(1 - stroke / np.float32(255)))


def test_a_photograph_is_turned_as_its_exif_data_say(folder):
    for number, file in enumerate(sorted(folder.rglob("*.png"))):
        sideways = np.zeros((4, 3), np.uint8)
        sideways[:, 0] = 255  # turned by 90 degrees clockwise: the first row
        exif = Image.Exif()
        exif[image_files.ORIENTATION] = 6
        upright = number % 2
        image = Image.fromarray(np.rot90(sideways, -1).copy() if upright else sideways)
        image.save(file, exif=None if upright else exif)
    train, _ = load(folder)
    assert train.images.shape == (4, 1, 3, 4)
    assert (train.images[:, 0, 0] == 1).all()
    assert (train.images[:, 0, 1:] == 0).all()


@pytest.mark.parametrize("kind", ["rgb", "ppm", "tiff"])
def test_more_than_8_bits_a_channel_are_refused_and_not_cut_off(folder, kind):
    file = folder / "train/a/0.png"
    if kind == "rgb":
        file.write_bytes(png(4, 3, 16, 2, 3 * (b"\0" + bytes(4 * 6))))
    else:
        file.unlink()
        file = file.with_suffix(".ppm" if kind == "ppm" else ".tif")
        if kind == "ppm":
            file.write_bytes(b"P6 4 3 65535\n" + bytes(4 * 3 * 6))
        else:
            Image.fromarray(np.full((3, 4), 999, np.int32)).save(file)
    said = "has more than 8 bits a channel, or 16 of grey: convert it"
    assert f"{file.name} {said}" in refusal(folder)


def test_a_size_is_offered_that_fits_the_memory(folder):
    for width, file in enumerate(folder.rglob("*.png"), start=13000):
        Image.new("1", (width, 12000)).save(file)
    assert "pass resize, such as --resize 256; " in refusal(folder)


@pytest.mark.filterwarnings("error")
def test_pixels_too_large_for_float32_are_not_called_infinite(tmp_path):
    x = 1e155 * np.random.default_rng(0).random((8, 4, 4))
    np.savez(tmp_path / "set.npz", x_train=x, y_train=np.arange(8) % 2, x_test=x, y_test=np.arange(8) % 2)
    assert ", too large for float32: divide them by that" in refusal(tmp_path / "set.npz")


def png(width: int, height: int, bits: int, colours: int, rows: bytes) -> bytes:
    """A PNG file of any header."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_a_file_of_several_pages_is_refused(folder):
    (folder / "train/a/0.png").unlink()
    picture(10).save(folder / "train/a/0.tif", save_all=True, append_images=[picture(20), picture(30)])
    assert "0.tif has 3 pages, an image has one: save each in a file of its own" in refusal(folder)


def test_sizes_are_looked_at_before_anything_is_decoded(folder, monkeypatch):
    (folder / "test/b/1.png").write_bytes(png(13000, 13000, 8, 0, b""))
    monkeypatch.setattr(image_files, "pixels", None)
    assert "all images must have one size" in refusal(folder)
    for file in folder.rglob("*.png"):
        if file != folder / "test/b/1.png":
            file.write_bytes((folder / "test/b/1.png").read_bytes())
    monkeypatch.setattr("convcvx.machine.memory.available_memory", lambda: 1 << 30)
    assert "8 images of 13000x13000 needs 6.3 GiB of memory, 1 GiB are free" in refusal(folder)


# What lies in a folder


def test_links_in_a_circle_and_things_that_are_no_files_are_passed_over_with_a_word(folder):
    (folder / "train/a/loop").symlink_to(".")
    (folder / "train/a/up").symlink_to("..")
    (folder / "train/again").symlink_to(".")
    (folder / "train/twice").symlink_to("a")
    (folder / "train/a/self.png").symlink_to("self.png")
    (folder / "train/a/gone.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "train/a/pipe.png")
    with socket.socket(socket.AF_UNIX) as spoken:
        spoken.bind(os.path.relpath(folder / "train/b/spoken.png"))
        with pytest.warns(DataWarning, match=r"passed over, as no files or links to folders: .*a/loop.* and 3 more"):
            train, _ = load(folder)
    assert (len(train), train.classes) == (4, ("a", "b"))


def test_links_to_images_and_to_the_folder_of_a_class_are_followed(folder, tmp_path):
    (folder / "train/b").rename(tmp_path / "elsewhere")
    (folder / "train/b").symlink_to(tmp_path / "elsewhere")
    (folder / "train/a/2.png").symlink_to(tmp_path / "elsewhere" / "0.png")
    train, _ = load(folder)
    assert train.targets.bincount().tolist() == [3, 2]


def test_what_is_hidden_is_passed_over(folder):
    for place in (".ipynb_checkpoints", "a/.ipynb_checkpoints", "a/.thumbs/deep"):
        (folder / "train" / place).mkdir(parents=True)
        picture(1).save(folder / "train" / place / "0.png")
    (folder / "train/a/._0.png").write_bytes(b"a resource fork")
    train, _ = load(folder)
    assert (len(train), train.classes) == (4, ("a", "b"))


# Arrays


def arrays(n: int = 8, shape: tuple[int, ...] = (4, 4)) -> dict[str, np.ndarray]:
    x, y = np.zeros((n, *shape), np.uint8), np.arange(n) % 2
    return {"x_train": x, "y_train": y, "x_test": x, "y_test": y}


def test_labels_are_counted_before_images_are_unpacked(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "set.npz", **(arrays(200, (300, 300)) | {"y_train": np.arange(7) % 2}))
    monkeypatch.setattr(np, "load", None)
    assert "x_train has 200 images but y_train has 7 labels" in refusal(tmp_path / "set.npz")


def test_images_that_do_not_fit_in_memory_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "set.npz", **arrays(200, (300, 300)))
    monkeypatch.setattr("convcvx.machine.memory.available_memory", lambda: 1 << 27)
    monkeypatch.setattr(np, "load", None)
    assert "unpacked needs 0.168 GiB of memory, 0.125 GiB are free: give fewer images" in refusal(tmp_path / "set.npz")


def test_a_limit_of_the_address_space_is_kept(tmp_path):
    np.savez_compressed(tmp_path / "set.npz", **arrays(200, (300, 300)))  # 0.17 GiB with what is made of it
    source = """
import resource, sys
from convcvx.data.datasets import DataError, load
used = 4096 * int(open("/proc/self/statm").read().split()[0])
for limit in (100, 1000):
    resource.setrlimit(resource.RLIMIT_AS, (used + (limit << 20), -1))
    try:
        load(sys.argv[1])
        print(limit, "is enough")
    except DataError as error:
        print(error)
"""
    said = subprocess.run([sys.executable, "-c", source, str(tmp_path / "set.npz")], capture_output=True, text=True)
    assert "GiB are free: give fewer images" in said.stdout.splitlines()[0]
    assert said.stdout.splitlines()[1:] == ["1000 is enough"]


def test_a_header_that_promises_other_than_the_file_has_is_refused(tmp_path):
    np.savez(tmp_path / "good.npz", **arrays())
    with zipfile.ZipFile(tmp_path / "good.npz") as good, zipfile.ZipFile(tmp_path / "bad.npz", "w") as bad:
        for name in good.namelist():
            bad.writestr(name, good.read(name) + b"\0" * (name == "x_test.npy"))
    assert "x_test promises 256 bytes and has 257" in refusal(tmp_path / "bad.npz")


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 8, 8), (3, 8, 8), (4, 32, 32), (4, 32, 48), (12, 32, 32)])
def test_channels_that_come_first_are_refused_whatever_their_number(tmp_path, shape):
    np.savez(tmp_path / "set.npz", **arrays(8, shape))
    assert "x_train must have its channels last" in refusal(tmp_path / "set.npz")
    with pytest.raises(DataError):
        array_files.check_pixels(np.zeros((8, *shape), np.float32), "x")


@pytest.mark.parametrize("shape", [(4, 32, 4), (3, 3, 3), (32, 32, 12), (64, 48, 200), (6, 34, 32)])
def test_channels_that_come_last_are_read(tmp_path, shape):
    np.savez(tmp_path / "set.npz", **arrays(8, shape))
    assert load(tmp_path / "set.npz")[0].images.shape == (8, shape[2], *shape[:2])


@pytest.mark.parametrize("streamed", [False, True])
def test_rounding_above_one_is_clipped_and_more_is_refused(tmp_path, streamed):
    x = np.linspace(0, 1, 8 * 16, dtype=np.float32).reshape(8, 4, 4)

    def written(largest: float) -> Path:
        named = arrays() | {"x_train": np.where(x == 1, np.float32(largest), x), "x_test": x}
        np.savez(tmp_path / "set.npz", **named)
        for key, array in named.items():
            np.save(tmp_path / f"{key}.npy", array)
        return tmp_path if streamed else tmp_path / "set.npz"

    train, _ = load(written(1.0000001))
    assert train.images[:].max() == train.images.aminmax()[1] == train.images.to("cpu")[:].max() == 1
    assert torch.equal(train.images[:].flatten()[:-1], torch.from_numpy(x).flatten()[:-1])
    assert "x_train must be uint8 or lie in [0, 1]" in refusal(written(1.0001))


# Downloaded sets


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dotted", [False, True])
def test_mnist_is_read_by_its_other_names(tmp_path, packed, dotted):
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for name in idx_files.NAMES.values():
        shape = (20, 4, 4) if "idx3" in name else (20,)
        content = bytes((0, 0, 8, len(shape))) + np.array(shape, ">u4").tobytes()
        content += (np.arange(np.prod(shape)) % 10).astype(np.uint8).tobytes()
        stem = name.replace("-idx", ".idx") if dotted else name
        (raw / (f"{stem}.gz" if packed else stem)).write_bytes(gzip.compress(content) if packed else content)
    train, _ = load("mnist", tmp_path, download=False)
    assert (len(train), train.images.shape[1:], train.classes[3]) == (20, (1, 4, 4), "3")
    broken = next(raw.glob("t10k-images*"))
    broken.write_bytes(broken.read_bytes()[:-3])
    assert "MNIST/raw is damaged" in refusal("mnist", tmp_path, download=False)


def test_an_archive_of_cifar_beside_its_place_is_unpacked(tmp_path, monkeypatch):
    archive = tmp_path / CIFAR10.filename
    batch = {"data": np.zeros((10, 3072), np.uint8), "labels": list(range(10))}
    contents = {"data_batch_1": batch, "test_batch": batch, "batches.meta": {"label_names": list("abcdefghij")}}
    checksums = {}
    with tarfile.open(archive, "w:gz") as made:
        for name, content in contents.items():
            packed = pickle.dumps(content)
            checksums[name] = hashlib.md5(packed).hexdigest()
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(packed)
            made.addfile(member, io.BytesIO(packed))
    assert f"{archive} is not the archive that torchvision knows" in refusal("cifar10", tmp_path, download=False)
    assert not (tmp_path / "cifar-10-batches-py").exists()
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert "Dataset not found or corrupted" in refusal("cifar10", tmp_path, download=False)  # a good archive of others
    assert not (tmp_path / "cifar-10-batches-py").exists()
    for batches, name in (("train_list", "data_batch_1"), ("test_list", "test_batch")):
        monkeypatch.setattr(CIFAR10, batches, [[name, checksums[name]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": checksums["batches.meta"]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    train, _ = load("cifar10", tmp_path, download=False)
    assert (len(train), train.classes) == (10, tuple("abcdefghij"))


# Paths


@pytest.mark.parametrize("path", ["x" * 300, "~nosuchuser/set.npz", "a\0b.npz", "/dev/null/x.npz", "/proc/self/mem"])
def test_odd_paths_are_refused_in_one_line(path):
    refusal(path)
    refusal("mnist", path, download=False)


def test_a_link_to_itself_is_no_data(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    refusal(tmp_path / "loop")
    refusal(tmp_path / "loop" / "set.npz")
