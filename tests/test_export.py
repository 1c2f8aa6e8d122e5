"""Exported files: one file, the same scores for any number of images, nothing written that was not checked."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from helpers.commands import DIGITS, answer, cli, refused, said

from convcvx.errors import InputError, RunError
from convcvx.network.architecture import Architecture
from convcvx.network.export import FORMATS, export
from convcvx.network.two_layer import TwoLayerCNN, two_layer_cnn
from convcvx.stack.network import Link, StackedCNN

PLAIN = Architecture((2, 9, 8), 5, 3, (3, 2), stride=(2, 1), padding=(1, 0), pool="2x3", hidden_bias=True)
CONTRAST = replace(PLAIN, contrast=0.1, pool="window:3,2", intercept=False)


FAINT = replace(CONTRAST, contrast=1e-9)


def stacked(contrast: float | None = None) -> StackedCNN:
    second = replace(PLAIN, image_shape=(4, 2, 3), kernel_size=(2, 2), padding=(1, 1), pool="global")
    stages = [TwoLayerCNN(replace(PLAIN, contrast=contrast)), TwoLayerCNN(second)]
    return StackedCNN(stages, [Link(5, 4, 2)], ensemble=True)


@pytest.fixture(params=FORMATS)
def to(request) -> str:
    for package in FORMATS[request.param].packages:
        pytest.importorskip(package)
    return request.param


@pytest.mark.parametrize(
    "build",
    [lambda: TwoLayerCNN(CONTRAST), lambda: TwoLayerCNN(FAINT), stacked, lambda: stacked(contrast=1e-12)],
    ids=["contrast", "faint contrast", "stack", "stack of faint contrast"],
)
def test_one_file_gives_the_scores_of_any_number_of_images(tmp_path, build, to):
    network = build().train()
    file = tmp_path / "exported" / "network.file"
    file.parent.mkdir()
    assert export(network, network.image_shape, file, to) < 1e-6
    assert network.training
    assert list(file.parent.iterdir()) == [file]
    moved = file.rename(tmp_path / "moved")
    for n in (1, 7):
        images = torch.rand(n, *network.image_shape)
        images[n // 2] = images[n // 2].mean()  # flat: nothing but the epsilon keeps its contrast from 0 / 0
        with torch.no_grad():
            torch.testing.assert_close(FORMATS[to].run(str(moved), images), network(images))


def test_a_file_with_other_scores_is_not_left_behind(tmp_path, monkeypatch):
    network = TwoLayerCNN(PLAIN)
    good = FORMATS["torch"]
    for wrong in (lambda path, images: 1.01 * good.run(path, images), lambda path, images: torch.tensor(torch.nan)):
        monkeypatch.setitem(FORMATS, "torch", replace(good, run=wrong))
        with pytest.raises(RunError, match="would give scores that differ by"):
            export(network, PLAIN.image_shape, tmp_path / "model.pt2", "torch")
        assert not any(tmp_path.iterdir())


def test_a_file_that_is_wrong_on_flat_images_alone_is_not_left_behind(tmp_path, monkeypatch):
    good = FORMATS["torch"]

    def wrong(path, images):
        flat = images.flatten(1).std(dim=1) == 0
        return good.run(path, images).masked_fill(flat[:, None], torch.nan)

    monkeypatch.setitem(FORMATS, "torch", replace(good, run=wrong))
    with pytest.raises(RunError, match="would give scores that differ by nan"):
        export(TwoLayerCNN(CONTRAST), PLAIN.image_shape, tmp_path / "model.pt2", "torch")
    assert not any(tmp_path.iterdir())


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    network = TwoLayerCNN(PLAIN)
    with pytest.raises(RunError, match=r"cannot write .*none.*: No such file"):
        export(network, PLAIN.image_shape, tmp_path / "none" / "model.pt2", "torch")
    with pytest.raises(InputError, match="to must be one of onnx, torch, sklearn; got 'tf'"):
        export(network, PLAIN.image_shape, tmp_path / "model", "tf")
    monkeypatch.setitem(FORMATS, "onnx", replace(FORMATS["onnx"], packages=("torch", "no_such_package")))
    with pytest.raises(InputError, match=r"needs no_such_package: pip install 'convcvx\[onnx\]'"):
        network.export_onnx(tmp_path / "model.onnx")


def test_the_command_exports_runs_and_stacks(tmp_path, monkeypatch):
    run = tmp_path / "digits"
    shutil.copytree(DIGITS, run)
    (tmp_path / "stack.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(stacked().to_bytes())
    for folder in (run, tmp_path):
        result = answer(cli("export --to torch --json", folder))
        assert (result["file"], result["status"]) == (str(folder / "model.pt2"), "done")
        assert result["difference"] < 1e-6
    for difference, agree in ((0.0, "exactly"), (2e-7, "to 2.0e-07")):
        monkeypatch.setattr("convcvx.network.export.export", lambda *_, found=difference: found)
        assert f"whose scores agree {agree}\n" in cli("export --to torch", run).stdout
    images = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(FORMATS["torch"].run(str(run / "model.pt2"), images), two_layer_cnn(run)(images))
    refused("export", run / "none")


def test_help_names_the_packages_that_onnx_needs(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert "convcvx[onnx]" in said(cli("export --help"))
