"""The filter space of a run is fitted anew, never believed: it says how long a filter is, and so what is proved."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import DIGITS, Quiet
from safetensors.torch import save_file
from torch import nn

from convcvx.errors import InputError, RunError
from convcvx.patches import PatchEmbedding, PatchSpec
from convcvx.training.jobs import certify_job, train_into
from convcvx.training.options import TrainConfig
from convcvx.training.resolve import fitted_embedding, load_data, with_run_settings
from convcvx.training.run import Run

CONFIG = TrainConfig(limit=30, kernel_size="3", stride="2", pool="2", rank=2, beta_ratio=0.3, tol=0.1, device="cpu")


def trained(folder: Path, config: TrainConfig = CONFIG) -> Run:
    run = Run(folder)
    train_into(run, config, Quiet())
    return run


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> Run:
    return trained(tmp_path_factory.mktemp("runs") / "honest")


@pytest.fixture
def run(honest, tmp_path) -> Run:
    """A copy to tamper with."""
    shutil.copytree(honest.folder, tmp_path / "run")
    return Run(tmp_path / "run")


def certified(run: Run, like: Run | None = None) -> dict:
    source = like or run
    settings = with_run_settings(source)
    return certify_job(run.model_file, settings, embedding=source.load_embedding(), given=set(), like=like)


def test_an_honest_run_is_certified_and_its_filters_are_named(honest):
    found = certified(honest)
    assert found["scope"] == "global"
    assert found["meaning"].endswith("among networks whose filters are of rank 2 of 9")
    assert found["primal"] == pytest.approx(honest.metrics["primal"], rel=1e-9)
    assert found["assumed"] is None


def rotated(embedding: PatchEmbedding) -> PatchEmbedding:
    rotation, _ = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    return replace(embedding, basis=rotation @ embedding.basis)


FORGED = {
    "shorter": lambda e: replace(e, basis=0.5 * e.basis),
    "another plane": lambda e: replace(e, basis=e.basis.roll(1, dims=1)),
    "one direction": lambda e: replace(e, basis=e.basis[:1]),
    "not a number": lambda e: replace(e, basis=e.basis * float("nan")),
    "another kernel": lambda e: replace(e, spec=replace(e.spec, stride=(1, 1))),
}


@pytest.mark.parametrize("how", FORGED)
def test_a_forged_space_is_found_out_by_whatever_reads_it(how, run, honest):
    run.save_embedding(FORGED[how](run.load_embedding()))
    for action in (
        lambda: certified(run),
        lambda: certified(honest, like=run),
        lambda: train_into(run, run.config, Quiet(), resume=True),
    ):
        with pytest.raises(RunError, match=r"holds another filter space|has NaN or infinity"):
            action()


def test_a_basis_that_is_no_number_is_in_no_space(honest):
    stored = honest.load_embedding()
    broken = replace(stored, basis=stored.basis * float("nan"))
    assert stored.same_space(rotated(stored))
    assert not stored.same_space(broken)
    assert not broken.same_space(stored)


def test_directions_in_which_no_patch_lies_may_be_any():
    """Rounding chooses them; an embedding that another version, or another order of sums, has stored is the same."""
    ramp = torch.stack([torch.ones(6, 6), *torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij")])
    images = torch.einsum("nk,khw->nhw", torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), ramp)[:, None]
    fresh = PatchEmbedding.fit(images, PatchSpec(3, rank=2, subspaces=2))  # patches of rank 3, and 4 directions
    assert fresh.span.shape == (3, 9)
    null = torch.linalg.svd(fresh.span)[2][3:]
    basis = fresh.basis.clone()
    basis[3] = null[2]
    assert not torch.allclose(basis[3].abs(), fresh.basis[3].abs(), atol=0.1)
    assert replace(fresh, basis=basis, span=None).same_space(fresh)
    for k, other in ((3, 2 * null[2]), (3, torch.full((9,), torch.nan).double()), (2, null[0]), (0, null[1])):
        forged = basis.clone()
        forged[k] = other
        assert not replace(fresh, basis=forged).same_space(fresh)
    whole = PatchEmbedding.fit(torch.rand(50, 1, 6, 6), PatchSpec(3, rank=2, subspaces=2))
    assert whole.span is None


def test_negative_control_a_rotation_is_the_same_space(run, honest):
    run.save_embedding(rotated(run.load_embedding()))
    assert certified(run)["dual"] == pytest.approx(certified(honest)["dual"], rel=1e-9)


def test_the_rank_of_the_patches_is_not_believed(run):
    run.save_embedding(replace(run.load_embedding(), patch_rank=1))
    assert fitted_embedding(run.config, load_data(run.config)[0].images, run.load_embedding()).patch_rank == 2


def test_a_run_of_another_rank_is_found_out_though_all_its_files_are_its_own(run, tmp_path):
    one = trained(tmp_path / "one", replace(CONFIG, rank=1))
    for name in ("model.safetensors", "state.safetensors", "embedding.safetensors", "beta_max.json"):
        shutil.copy(one.folder / name, run.folder)
    with pytest.raises(RunError, match=r"another filter space .*\(rank 1, not 2\)"):
        certified(run)


def test_other_images_have_another_space(honest):
    settings = replace(with_run_settings(honest), limit=40)
    with pytest.raises(RunError, match=r"options are the same: other training images, or a damaged file\); use"):
        certify_job(honest.model_file, settings, embedding=honest.load_embedding(), given=set())


@pytest.mark.parametrize(
    "options",
    [
        {"whiten": True, "rank": None, "padding": "1", "hidden_bias": True},
        {"kernel_size": "2", "dilation": "3x2", "rank": 2},
        {"contrast": True, "whiten": True, "dictionary": 6, "flips": True, "max_rounds": 0, "stride": "1", "tol": 1.0},
    ],
)
def test_every_kind_of_space_is_found_again(options, tmp_path, monkeypatch):
    monkeypatch.setattr("convcvx.patches.embedding.WHITENING_PRODUCTS", 1e5)  # whitening is fitted to a sample
    run = trained(tmp_path / "run", replace(CONFIG, oracle="local", **options))
    assert certified(run)["primal"] == pytest.approx(run.metrics["primal"], rel=1e-9)


def test_what_a_bare_file_does_not_show_is_said(tmp_path):
    convolution, linear = nn.Conv2d(1, 6, 3, stride=2, bias=False), nn.Linear(24, 10)
    state = {"a.weight": convolution.weight, "b.weight": linear.weight, "b.bias": linear.bias}
    save_file({name: tensor.detach() for name, tensor in state.items()}, tmp_path / "bare.safetensors")
    settings = replace(CONFIG, beta=0.01, beta_ratio=None, rank=None, dilation="2")
    found = certify_job(tmp_path / "bare.safetensors", settings, embedding=None, given=set())
    assert found["assumed"] == "ReLU, average pooling 2, stride 2x2, padding 0x0, dilation 2x2, images in [0, 1]"


def faint_digits(folder: Path) -> str:
    """Digits of little contrast on a bright ground."""
    train, test = load_data(TrainConfig(limit=60))[:2]
    arrays = {"y_train": train.targets.numpy(), "y_test": test.targets.numpy()}
    for name, part in (("x_train", train), ("x_test", test)):
        arrays[name] = (0.9 + 0.001 * part.images[:, 0]).numpy()
    np.savez(folder / "faint.npz", **arrays)
    return str(folder / "faint.npz")


def test_faint_images_are_trained_exported_and_certified(tmp_path):
    config = replace(
        CONFIG, data=faint_digits(tmp_path), limit=None, rank=None, contrast=True, contrast_epsilon=1e-7, oracle="local"
    )
    run = trained(tmp_path / "run", config)
    assert run.metrics["n_filters"] > 0
    assert certified(run)["primal"] == pytest.approx(run.metrics["primal"], rel=1e-9)


def test_whitening_that_no_float32_network_can_keep_is_refused_before_training(tmp_path):
    config = replace(CONFIG, data=faint_digits(tmp_path), limit=None, rank=None, whiten=True, whiten_epsilon=1e-8)
    with pytest.raises(InputError, match=r"whiten_epsilon 1e-08 leaves patches .* times their spread from zero"):
        train_into(Run(tmp_path / "run"), config, Quiet())
    assert not (tmp_path / "run").exists()


def test_a_network_that_fails_its_check_leaves_what_was_trained(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise InputError("the network's outputs are not those of its layers")

    monkeypatch.setattr("convcvx.training.finish.certify_on", refuse)
    with pytest.raises(RunError, match=r"not those of its layers; what was trained is kept in .*state.safetensors"):
        trained(tmp_path / "run")
    monkeypatch.undo()
    run = Run(tmp_path / "run")
    train_into(run, run.config, Quiet(), resume=True)
    assert run.metrics["rel_gap"] <= CONFIG.tol


def test_files_of_earlier_versions_are_read():
    """They know no `paired`."""
    run = Run(DIGITS)
    stored = run.load_embedding()
    assert fitted_embedding(run.config, load_data(run.config)[0].images, stored).spec == stored.spec
    assert json.loads((run.folder / "certificate.json").read_text())["scope"]
    assert PatchSpec(**asdict(stored.spec)) == stored.spec
