"""convcvx.data.datasets: every source, every refusal with its message, and downloads that break half-way."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import io
import pickle
import random
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.data import Bomb, keras_arrays, write_images
from PIL import Image

from convcvx._compat import import_torchvision
from convcvx.data import datasets as data
from convcvx.data import downloads as data_sources
from convcvx.data import torchvision_sets
from convcvx.data.augment import moved, random_moves, shifted
from convcvx.data.datasets import check_images, check_targets, load, split
from convcvx.data.given import given_dataset
from convcvx.data.images import to_floats
from convcvx.errors import DataError, InputError


@pytest.fixture
def save(tmp_path):
    """Write the arrays above, changed by keyword (None leaves one out), and return the path."""

    def write(**changes):
        arrays = {key: value for key, value in (keras_arrays() | changes).items() if value is not None}
        np.savez(tmp_path / "set.npz", **arrays)
        return tmp_path / "set.npz"

    return write


def refused(message, *args, error=DataError, **kwargs):
    """Assert that `load` refuses in one line that contains `message`."""
    with pytest.raises(error) as caught:
        load(*args, **kwargs)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_negative_control_a_good_set_is_not_refused(save):
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        refused("", save())
    with pytest.raises(AssertionError):
        refused("another message", save(x_train=None))


# Sources


def test_digits_is_a_fixed_stratified_split():
    train, test = load("digits")
    assert (len(train), len(test), train.n_classes) == (1437, 360, 10)
    assert train.images.shape[1:] == (1, 8, 8)
    assert train.images.dtype == torch.float32
    assert train.targets.dtype == torch.int64
    assert (train.images.min(), train.images.max()) == (0, 1)
    assert train.classes == test.classes == tuple("0123456789")
    assert train.targets[:10].tolist() == [3, 9, 1, 3, 1, 9, 4, 4, 2, 8]
    assert test.targets.bincount().min() >= 34
    rows = {image.numpy().tobytes() for part in (train, test) for image in part.images}
    assert len(rows) == 1797  # all digits differ, so no image is in both parts


def test_digits_and_npz_do_not_import_torchvision(save):
    code = f"import sys; from convcvx.data.datasets import load; load('digits'); load({str(save())!r})\n"
    code += "assert 'torchvision' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1), (5, 4, 2), (5, 4, 3), (1, 9), (3, 3, 3)])
def test_npz_is_transposed_and_scaled(save, shape):
    arrays = keras_arrays(shape=shape)
    train, test = load(save(**arrays))
    channels = shape[2] if len(shape) == 3 else 1
    assert train.images.shape == (12, channels, *shape[:2])
    assert train.images.is_contiguous()
    expected = arrays["x_train"].reshape(12, *shape[:2], channels).transpose(0, 3, 1, 2) / np.float32(255)
    np.testing.assert_array_equal(train.images.numpy(), expected)
    assert len(test) == 6
    assert train.name == "set"


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_npz_float_images_keep_their_values(save, dtype):
    x = np.linspace(0, 1, 12 * 20).reshape(12, 5, 4).astype(dtype)
    train, _ = load(save(x_train=x))
    assert train.images.dtype == torch.float32
    np.testing.assert_array_equal(train.images[:, 0].numpy(), x.astype("f4"))


@pytest.mark.parametrize("dtype", ["uint8", "int8", ">i4", "int64", "uint64", "bool"])
def test_npz_integer_labels(save, dtype):
    y = np.arange(12) % 2
    train, _ = load(save(y_train=y.astype(dtype)[:, None], y_test=y[:6].astype(dtype)[:, None]))
    assert train.targets.dtype == torch.int64
    assert train.targets.tolist() == y.tolist()


def test_npz_labels_are_numbered_by_the_training_set(save):
    train, test = load(save(y_train=np.array([7, -3, 40] * 4), y_test=np.array([40, 40, 7, -3, 7, 40])))
    assert train.classes == test.classes == ("-3", "7", "40")
    assert train.targets[:3].tolist() == [1, 0, 2]
    assert test.targets.tolist() == [2, 2, 1, 0, 1, 2]


def test_npz_real_targets(save):
    y = np.linspace(-1, 1, 12)
    train, test = load(save(y_train=y, y_test=y[:6].astype("f4")))
    assert train.targets.shape == (12, 1)
    assert train.targets.dtype == test.targets.dtype == torch.float64
    assert (train.classes, train.n_classes) == ((), 0)
    train, _ = load(save(y_train=np.eye(12)[:, :3], y_test=np.eye(6)[:, :3]))
    assert train.targets.shape == (12, 3)


def test_limit_keeps_the_first_training_images_the_classes_and_the_whole_test_set(save):
    path = save()
    everything, (train, test) = load(path)[0], load(path, limit=2)
    assert torch.equal(train.images, everything.images[:2])
    assert (len(train), len(test), train.n_classes) == (2, 6, 3)
    assert len(load(path, limit=1000)[0]) == 12
    for wrong in (0, -1, 1.5, True):
        refused("limit must be a whole number >= 1", path, limit=wrong, error=InputError)
    refused("y_train has a single class in 1 images; training needs two or more: raise the limit", path, limit=1)


def test_mnist_is_read_without_a_download(shared_data, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", None)
    train, test = load("mnist", shared_data)
    assert train.images.shape == (60000, 1, 28, 28)
    assert test.images.shape == (10000, 1, 28, 28)
    assert train.images.mean().item() == pytest.approx(0.1307, abs=1e-4)
    assert train.targets[:5].tolist() == [5, 0, 4, 1, 9]
    assert train.classes == tuple("0123456789")


def test_cifar10_npz_in_the_data_dir_is_read(shared_data):
    train, test = load("cifar10", shared_data)
    assert train.images.shape == (50000, 3, 32, 32)
    assert len(test) == 10000
    means = torch.tensor([0.4914, 0.4822, 0.4465])
    torch.testing.assert_close(train.images.mean(dim=(0, 2, 3)), means, atol=1e-4, rtol=0)
    assert train.targets.bincount().tolist() == [5000] * 10
    assert (train.classes[0], train.classes[9]) == ("airplane", "truck")
    assert train.name == "cifar10"


# Refusals


def test_an_unknown_name_or_a_missing_file_is_refused(tmp_path):
    refused("data 'mnits' is no set of a known name (is mnist or", "mnits")
    refused("none.npz does not exist: give an .npz file with x_train, y_train", tmp_path / "none.npz")


NAN, BIG = np.full((12, 5, 4), np.nan), np.full((12, 5, 4), 255.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": None}, "lacks x_train: add them; it holds y_train, x_test, y_test"),
        ({"y_test": None, "z": np.zeros(1)}, "has one of x_test and y_test: give both, or neither"),
        ({"y_train": np.arange(11) % 3}, "x_train has 12 images but y_train has 11 labels"),
        ({"y_test": np.arange(7) % 3}, "x_test has 6 images but y_test has 7 labels"),
        ({"x_train": NAN}, "x_train has NaN or infinite pixels in 12 images"),
        ({"x_train": np.where(np.arange(12)[:, None, None] == 3, np.inf, NAN * 0 + 0.5)}, "x_train has NaN"),
        ({"x_train": BIG}, "x_train must be uint8 or lie in [0, 1]; got [255.0, 255.0]: rescale it"),
        ({"x_test": -0.1 * np.ones((6, 5, 4))}, "x_test must be uint8 or lie in [0, 1]; got [-0.1"),
        ({"x_train": np.zeros((12, 5, 4), int)}, "x_train must be uint8, or float in [0, 1]; got int64"),
        (
            {"x_train": np.zeros((12, 5))},
            "x_train must be (n, height, width) or (n, height, width, channels)",
        ),
        ({"x_train": np.uint8(3)}, "x_train must be (n, height, width)"),
        ({"x_train": np.zeros((12, 3, 32, 32))}, "x_train must have its channels last; got (12, 3, 32, 32)"),
        ({"x_test": np.zeros((6, 4, 5))}, "x_train is uint8 (12, 5, 4) but x_test is float64 (6, 4, 5)"),
        ({"x_test": np.zeros((6, 5, 4, 3))}, "make them alike"),
        (
            {"x_train": np.zeros((0, 5, 4)), "y_train": np.zeros(0, int), "y_test": np.zeros(6, int)},
            "y_test has",
        ),
        ({"x_test": np.zeros((0, 5, 4)), "y_test": np.zeros(0, int)}, "x_test is empty, (0, 1, 5, 4)"),
        ({"x_train": np.zeros((12, 0, 4)), "x_test": np.zeros((6, 0, 4))}, "x_train is empty, (12, 1, 0, 4)"),
        ({"y_train": np.full(12, 4), "y_test": np.full(6, 4)}, "y_train has a single class in 12 images"),
        ({"y_test": np.array([0, 1, 2, 3, 9, 0])}, "y_test has labels that are no training class: [3, 9]"),
        (
            {"y_train": 2 * np.eye(12, 3, dtype=int)},  # with 1 in place of 2 they are labels
            "y_train must be (n,) integer classes or (n, c) floats; got int64",
        ),
        ({"y_train": np.zeros((12, 0))}, "y_train must be (n,) integer classes or (n, c) floats"),
        ({"y_train": np.zeros((12, 1, 1), int)}, "y_train must be (n,) integer classes or (n, c) floats"),
        (
            {"y_train": np.array(["cat"] * 12)},
            "y_test has labels that are no training class: ['0', '1', '2']; drop their images",
        ),
        ({"y_train": np.full(12, np.nan), "y_test": np.zeros(6)}, "y_train has NaN or infinite values"),
        ({"y_train": np.zeros(12)}, "y_train is float64 (12,) but y_test is int64 (6,): make them alike"),
        (
            {"y_train": np.zeros((12, 2)), "y_test": np.zeros((6, 3))},
            "y_train is float64 (12, 2) but y_test is",
        ),
        ({"y_train": np.array([None] * 12)}, "holds Python objects, which are never unpickled: save plain"),
    ],
)
def test_an_unfit_npz_is_refused(save, changes, message):
    refused(message, save(**changes))


def test_an_empty_training_set_is_refused(save):
    empty = {"x_train": np.zeros((0, 5, 4)), "y_train": np.zeros(0)}
    refused("x_train is empty", save(**empty, y_test=np.zeros(6)))


def test_a_file_that_is_no_npz_is_refused_and_never_unpickled(tmp_path, save):
    path = tmp_path / "other.npz"
    for content in (b"", b"nonsense", pickle.dumps(Bomb()), b"PK\x03\x04", b"PK\x05\x06" + bytes(18)):
        path.write_bytes(content)
        refused(f"{path} ", path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(path)
    refused("is no complete .npz file: write it again", path)
    np.savez(path, **keras_arrays(), **{"bomb": np.array([Bomb()])})
    load(path)  # an array that is not asked for is not read
    with zipfile.ZipFile(path, "w") as archive:
        for key in data.KEYS:
            archive.writestr(f"{key}.npy", b"no array")
    refused("the magic string is not correct", path)
    refused("Python objects", save(y_train=np.array([Bomb()] * 12)))


def test_a_truncated_or_flipped_npz_is_refused(tmp_path, save):
    good = save().read_bytes()
    path = tmp_path / "bad.npz"
    for size in range(0, len(good) - 1, 97):
        path.write_bytes(good[:size])
        refused("is no complete .npz file", path)
    rng, refusals = random.Random(0), 0
    for _ in range(200):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        try:
            load(path)
        except DataError as error:
            refusals += "\n" not in str(error)
    assert refusals > 100


def test_checks_speak_of_the_callers_names():
    images = torch.zeros(4, 1, 3, 3)
    with pytest.raises(DataError, match="images has 4 images but targets has 3 labels"):
        check_images(images, [0, 1, 0])
    with pytest.raises(DataError, match="X has 4 images but y has 3 labels"):
        check_images(images, [0, 1, 0], ("X", "y"))
    with pytest.raises(DataError, match=r"images must be \(n, channels, height, width\); got \(4, 3, 3\)"):
        check_images(images[:, 0], [0, 1, 0, 1])
    with pytest.raises(DataError, match="targets has a single class in 4 images"):
        check_images(images, [1, 1, 1, 1])
    assert check_images(images, [1, 1, 1, 1], training=False)[1].tolist() == [1, 1, 1, 1]
    assert check_images(images.numpy(), torch.tensor([0, 1, 0, 1]))[0].shape == (4, 1, 3, 3)
    assert check_images(images + 7, np.ones(4))[1].shape == (4, 1)  # neither range nor constant real targets
    images[2, 0, 1, 1] = torch.nan
    with pytest.raises(DataError, match="NaN or infinite pixels in 1 images"):
        check_images(images, [0, 1, 0, 1])


def test_check_targets_gives_classes_or_real_values():
    assert check_targets(np.array([[2], [0]], dtype=np.uint8), 2).tolist() == [2, 0]
    real = check_targets(torch.tensor([0.5, 1.0], requires_grad=True), 2)
    assert (real.dtype, real.shape) == (torch.float64, (2, 1))


# Image folders


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("1", 1), ("RGB", 3), ("RGBA", 3), ("P", 3)])
def test_an_image_folder_is_read(tmp_path, mode, channels):
    train, test = load(write_images(tmp_path, mode))
    assert train.images.shape == (8, channels, 5, 6)
    assert train.classes == ("cat", "dog")
    assert train.targets.bincount().tolist() == [4, 4]
    assert train.targets[:4].unique().tolist() == [0, 1]  # shuffled: a limit meets both classes
    assert test.targets.tolist() == [0, 0, 1, 1]
    assert train.name == tmp_path.name
    first = np.asarray(Image.open(tmp_path / "test/cat/0.png").convert("L" if channels == 1 else "RGB"))
    np.testing.assert_array_equal(test.images[0].permute(1, 2, 0).squeeze(-1), first / np.float32(255))
    limited, _ = load(tmp_path, limit=4)
    assert torch.equal(limited.images, train.images[:4])


def test_one_colour_image_makes_a_folder_rgb(tmp_path):
    write_images(tmp_path)
    Image.new("RGB", (6, 5), (255, 0, 0)).save(tmp_path / "test/dog/9.png")
    train, test = load(tmp_path)
    assert train.images.shape[1] == 3
    assert test.images[-1].amax(dim=(1, 2)).tolist() == [1, 0, 0]


def test_a_test_folder_may_lack_a_class_but_keeps_the_numbers(tmp_path):
    write_images(tmp_path)
    for file in (tmp_path / "test/cat").iterdir():
        file.unlink()
    (tmp_path / "test/cat").rmdir()
    assert load(tmp_path)[1].targets.tolist() == [1, 1]


def test_an_unfit_image_folder_is_refused(tmp_path):
    refused("must hold train/CLASS/IMAGE and test/CLASS/IMAGE", tmp_path)
    write_images(tmp_path / "sizes", sizes=((6, 5), (7, 5)))
    refused("all images must have one size: pass resize, such as --resize 5x6;", tmp_path / "sizes")
    write_images(tmp_path / "empty")
    (tmp_path / "empty/train/bird").mkdir()
    refused("has no images of the classes bird: add some", tmp_path / "empty")
    write_images(tmp_path / "more")
    (tmp_path / "more/test/bird").mkdir()
    refused("has classes that train lacks, bird", tmp_path / "more")
    file = write_images(tmp_path / "cut") / "train/cat/1.png"
    file.write_bytes(file.read_bytes()[:60])
    refused("1.png is no complete image", tmp_path / "cut")
    file.write_bytes(b"")
    refused("1.png is no complete image", tmp_path / "cut")


# Downloads


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def idx_files(n=20):
    for part in ("train", "t10k"):
        yield f"{part}-images-idx3-ubyte", idx(np.full((n, 4, 4), 51, np.uint8))
        yield f"{part}-labels-idx1-ubyte", idx((np.arange(n) % 10).astype(np.uint8))


class Server(http.server.SimpleHTTPRequestHandler):
    broken = ""

    def do_GET(self):
        if not (self.broken and self.path.endswith(self.broken)):
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Length", "5000")
        self.end_headers()
        return self.wfile.write(b"half")

    def log_message(self, *args):
        pass


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A real server of tiny sets that torchvision is told to download as MNIST."""
    (tmp_path / "mirror").mkdir()
    resources = []
    for name, content in idx_files():
        packed = gzip.compress(content)
        (tmp_path / "mirror" / f"{name}.gz").write_bytes(packed)
        resources.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))
    handler = functools.partial(Server, directory=tmp_path / "mirror")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    mnist = import_torchvision().datasets.MNIST
    monkeypatch.setattr(mnist, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(mnist, "resources", resources)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield tmp_path / "new" / "root"
    server.shutdown()
    server.server_close()


def test_a_broken_download_leaves_nothing_and_the_next_one_works(mirror, monkeypatch, capsys):
    monkeypatch.setattr(Server, "broken", "t10k-images-idx3-ubyte.gz")
    refused("mnist could not be downloaded to", "mnist", mirror)
    assert list(mirror.rglob("*")) == []
    assert socket.getdefaulttimeout() is None
    monkeypatch.setattr(Server, "broken", "")
    (mirror / "MNIST/raw").mkdir(parents=True)  # what torchvision itself leaves of a failed download
    train, test = load("mnist", mirror)
    assert (len(train), len(test)) == (20, 20)
    assert train.images.unique().tolist() == [pytest.approx(0.2)]
    assert [path.name for path in mirror.iterdir()] == ["MNIST"]
    monkeypatch.setattr(import_torchvision().datasets.MNIST, "mirrors", [])
    assert len(load("mnist", mirror, download=False)[0]) == 20
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", torchvision_sets.FILE_BY_FILE)
def test_without_a_network_a_missing_set_fails_fast(tmp_path, monkeypatch, name):
    cls = getattr(import_torchvision().datasets, torchvision_sets.DOWNLOADS[name][0])
    monkeypatch.setattr(cls, "mirrors", ["http://127.0.0.1:1/"], raising=False)
    monkeypatch.setattr(cls, "url", "http://127.0.0.1:1/set.tar.gz", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    start = time.perf_counter()
    for _ in range(2):
        refused(f"{name} could not be downloaded to {tmp_path}: try again with a network", name, tmp_path)
    refused(f"--data-dir that holds it, or put {name}.npz there", name, tmp_path)
    refused(f"{name} is not in {tmp_path}: allow its download", name, tmp_path, download=False)
    assert time.perf_counter() - start < 5
    assert list(tmp_path.iterdir()) == []


def test_a_silent_server_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(data_sources, "TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/set.tar.gz"
        monkeypatch.setattr(import_torchvision().datasets.CIFAR100, "url", url)
        start = time.perf_counter()
        refused("cifar100 could not be downloaded to", "cifar100", tmp_path)
        assert time.perf_counter() - start < 5


def test_a_data_dir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    refused("mnist could not be downloaded to", "mnist", tmp_path / "file")


@pytest.mark.parametrize(
    ("error", "told"),
    [(ValueError("the address is broken"), "could not be downloaded"), (ImportError("no h5py"), "needs a package")],
)
def test_what_torchvision_says_of_a_download_is_told(error, told, tmp_path, monkeypatch):
    """By a ValueError of a set that has no address any more, by an ImportError of what reads another."""

    def fail(*_):
        raise error

    monkeypatch.setattr("convcvx.data.downloads._download_any", fail)
    refused(f"svhn {told}", "svhn", tmp_path)


def mnist_folder(root: Path) -> Path:
    (root / "MNIST/raw").mkdir(parents=True)
    for name, content in idx_files():
        (root / "MNIST/raw" / name).write_bytes(content)
    return root


@pytest.mark.parametrize("name", [name for name, _ in idx_files()])
@pytest.mark.parametrize("damage", ["truncated", "longer", "header", "empty", "magic", "missing"])
def test_a_damaged_idx_file_is_refused(tmp_path, name, damage):
    root = mnist_folder(tmp_path)
    assert len(load("mnist", root)[0]) == 20
    file = root / "MNIST/raw" / name
    content = file.read_bytes()
    damaged = {
        "truncated": content[:-1], "longer": content + b"\0", "header": content[:6], "empty": b"",
        "magic": b"\0\0\x09" + content[3:], "missing": None,
    }[damage]  # fmt: skip
    if damaged is None:
        file.unlink()
    else:
        file.write_bytes(damaged)
    refused("MNIST/raw is damaged: delete that folder and run again to download it again", "mnist", root)
    if damage in ("truncated", "longer", "magic"):
        refused(f"({name} has {file.stat().st_size} bytes, its header", "mnist", root)


def test_damaged_cifar_batches_are_refused_and_not_unpickled(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py/data_batch_1").write_bytes(pickle.dumps(Bomb()))
    np.savez(tmp_path / "cifar10.npz", **keras_arrays())
    refused("cifar-10-batches-py is damaged: delete that folder", "cifar10", tmp_path)


@pytest.fixture
def cifar_archive(tmp_path, monkeypatch) -> Path:
    """Of the true layout, with twenty images a batch; torchvision knows it by its checksums, and has no network."""
    cls, random = import_torchvision().datasets.CIFAR10, np.random.default_rng(0)
    monkeypatch.setattr(cls, "url", "http://127.0.0.1:1/set.tar.gz")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    batches = {}
    for batch in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        pixels = random.integers(0, 256, (20, 3072)).astype(np.uint8)
        batches[batch] = pickle.dumps({"labels": [*range(10)] * 2, "data": pixels}, protocol=2)
    batches["batches.meta"] = pickle.dumps({"label_names": list(data_sources.CIFAR10)}, protocol=2)
    sums = {batch: hashlib.md5(content).hexdigest() for batch, content in batches.items()}
    monkeypatch.setattr(cls, "train_list", [[f"data_batch_{k}", sums[f"data_batch_{k}"]] for k in range(1, 6)])
    monkeypatch.setattr(cls, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(cls, "meta", cls.meta | {"md5": sums["batches.meta"]})
    path = tmp_path / "made" / "archive"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as archive:
        for batch, content in batches.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{batch}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(cls, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    return path


@pytest.mark.parametrize(
    "name",
    ["cifar-10-python.tar.gz", "cifar-10-python.tgz", "cifar-10-python (1).tar.gz", "cifar10/cifar-10-python.tar.gz"],
)
def test_an_archive_of_cifar_is_unpacked_by_whatever_name_and_without_a_network(name, cifar_archive, tmp_path):
    packed = tmp_path / "root" / name
    packed.parent.mkdir(parents=True)
    shutil.copy(cifar_archive, packed)
    train, test = load("cifar10", tmp_path / "root", download=False)
    assert (train.images.shape, len(test), train.classes) == ((100, 3, 32, 32), 20, data_sources.CIFAR10)
    assert sorted(path.name for path in (tmp_path / "root").iterdir()) == sorted(
        {"cifar-10-batches-py", Path(name).parts[0]}
    )
    packed.unlink()
    assert len(load("cifar10", tmp_path / "root", download=False)[0]) == 100


def test_an_archive_of_another_checksum_is_neither_unpacked_nor_called_damaged(cifar_archive, tmp_path):
    other = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(other, "w:gz") as archive:
        archive.add(__file__, "cifar-10-batches-py/data_batch_1")
    refused("is not the archive that torchvision knows, by its checksum", "cifar10", tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name != "made"] == [other.name]
    shutil.copy(cifar_archive, tmp_path / "cifar-10-python (1).tar.gz")
    assert len(load("cifar10", tmp_path)[0]) == 100


def test_a_downloadable_set_may_be_an_npz(tmp_path):
    np.savez(tmp_path / "fashion-mnist.npz", **keras_arrays())
    np.savez(tmp_path / "cifar10.npz", **(keras_arrays() | {"y_train": np.array([0, 10] * 6)}))
    assert load("fashion-mnist", tmp_path)[0].classes == ("0", "1", "2")
    refused("y_train has labels that are no training class: [10]", "cifar10", tmp_path)


def test_the_default_data_dir_is_never_a_foreign_package(tmp_path, monkeypatch):
    assert data_sources.default_data_dir() == Path(data.__file__).parents[2] / "datasets"
    (tmp_path / "datasets").mkdir()
    elsewhere = tmp_path / "convcvx" / "data" / "downloads.py"  # as in site-packages
    monkeypatch.setattr(data_sources, "__file__", str(elsewhere))
    assert data_sources.default_data_dir() == Path("datasets")


# Validation split


def test_split_is_stratified_seeded_and_keeps_the_order():
    digits, _ = load("digits")
    train, validation = split(digits, 0.2, seed=3)
    assert (len(train), len(validation)) == (1149, 288)
    assert (validation.targets.bincount() - digits.targets.bincount() * 0.2).abs().max() < 1
    again = split(digits, 0.2, seed=3)[1]
    assert torch.equal(validation.images, again.images)
    assert not torch.equal(validation.targets, split(digits, 0.2, seed=4)[1].targets)
    place = {image.numpy().tobytes(): row for row, image in enumerate(digits.images)}
    rows = [[place[image.numpy().tobytes()] for image in part.images] for part in (train, validation)]
    assert rows == [sorted(rows[0]), sorted(rows[1])]
    assert sorted(rows[0] + rows[1]) == list(range(len(digits)))
    assert validation.classes == digits.classes


def test_split_of_real_targets_and_refusals(save):
    y = np.linspace(0, 1, 12)
    train, validation = split(load(save(y_train=y, y_test=y[:6]))[0], 0.25)
    assert (len(train), len(validation)) == (9, 3)
    small = load(save())[0]
    for wrong in (0, 1, -0.1, 2, float("nan")):
        with pytest.raises(InputError, match="validation must be a fraction between 0 and 1"):
            split(small, wrong)
    with pytest.raises(DataError, match=r"set: cannot hold out 0\.1 of 12 images by class; give more images"):
        split(small, 0.1)
    alone = load(save(y_train=np.array([0] * 11 + [1]), y_test=np.zeros(6, int)))[0]
    with pytest.raises(DataError, match=r"cannot hold out 0\.5 of 12 images by class"):
        split(alone, 0.5)


def test_shifted_images_are_moved_by_whole_pixels_and_keep_their_targets():
    train, _ = load("digits", limit=7)
    moved = shifted(train, 2)
    original, left, right, up, down = moved.images.split(7)
    assert torch.equal(original, train.images)
    assert torch.equal(left[..., :-2], train.images[..., 2:])
    assert torch.equal(right[..., 2:], train.images[..., :-2])
    assert torch.equal(up[:, :, :-2], train.images[:, :, 2:])
    assert torch.equal(down[:, :, 2:], train.images[:, :, :-2])
    for vacated in (left[..., -2:], right[..., :2], up[:, :, -2:], down[:, :, :2]):
        assert not vacated.any()
    assert torch.equal(moved.targets, train.targets.repeat(5))
    with pytest.raises(InputError, match="shifts"):
        shifted(train, -1)


def test_every_image_is_moved_at_random_on_its_own():
    image = load("digits", limit=2)[0].images[:1]
    moves = random_moves(400, 1, torch.Generator().manual_seed(0))
    found = moved(image.repeat(400, 1, 1, 1), 1, moves)
    wide = torch.nn.functional.pad(image, (1, 1, 1, 1))[0]
    places = [wide[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    counts = torch.tensor([[torch.equal(one, place) for place in places] for one in found]).sum(dim=0)
    assert int(counts.sum()) == 400  # no two places of this image look alike
    assert int(counts.min()) > 20
    assert torch.equal(moved(image, 0, random_moves(1, 0, torch.Generator())), image)


def test_images_lie_where_torch_would_have_put_them():
    """On memory that begins anywhere, as numpy's does, BLAS rounds otherwise: equal data would give other last bits."""
    memory = np.zeros(12 * 5 * 4 + 16, np.float32)
    for offset in range(16):
        pixels = memory[offset:][: 12 * 5 * 4].reshape(12, 5, 4)
        pixels[:] = 0.5
        dataset, *_ = given_dataset(pixels, np.arange(12) % 2)
        assert dataset.images.data_ptr() % 64 == 0
        assert to_floats(pixels[..., None]).data_ptr() % 64 == 0
        assert dataset.images.unique().tolist() == [0.5]
