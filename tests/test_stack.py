"""Greedy stacks: certificates of every stage, dropped stages, resume, and the exported module."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from helpers.commands import Quiet, answer, cli, invoke
from helpers.problems import NO_TIME

from convcvx import certify
from convcvx.comparison import compare_job
from convcvx.data.datasets import load, split
from convcvx.errors import InputError, RunError
from convcvx.network.architecture import Architecture
from convcvx.network.two_layer import TwoLayerCNN, two_layer_cnn
from convcvx.report import write_report, write_stack_report
from convcvx.stack.features import feature_shape, fit_link, stream_features
from convcvx.stack.jobs import stack_job, stage_data
from convcvx.stack.network import StackedCNN, stacked_cnn
from convcvx.stack.options import StackConfig, stack_left_open
from convcvx.stack.run import StackRun
from convcvx.training.jobs import certify_job
from convcvx.training.resolve import with_run_settings
from convcvx.training.run import Run
from convcvx.training.twin import CompareConfig

OPTIONS = {
    "data": "digits",
    "limit": 300,
    "validation": 0.2,
    "padding": "1",
    "pool": "2",
    "rank": "none,8",
    "beta_ratio": "0.1,0.02",
    "tol": 0.1,
    "max_rounds": 3,
}


def stacked(
    folder: Path, report: Quiet | None = None, stages: int = 2, heads: str = "last", **options
) -> tuple[StackRun, dict]:
    run = StackRun(folder)
    settings = StackConfig.of(stages, OPTIONS | options, channels="6", downsample="2", heads=heads)
    return run, stack_job(settings, run, report or Quiet(), resume=run.begun)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[StackRun, dict]:
    return stacked(tmp_path_factory.mktemp("stacks") / "two")


def images(n: int = 50) -> torch.Tensor:
    return load("digits")[1].images[:n]


def test_each_stage_has_a_certificate_and_the_second_helps(two):
    run, result = two
    first, second = result["stages"]
    assert first["kept"]
    assert second["kept"]
    assert second["score"] > first["score"]
    assert result["n_stages"] == 2
    for record in (first, second):
        assert 0 < record["dual"] < record["primal"]
        assert record["scope"] == "heuristic"
    assert result["test_accuracy"] == pytest.approx(second["test_accuracy"], abs=0.01)  # half against single precision
    assert json.loads((run.folder / "metrics.json").read_text()) == result
    assert not list(run.folder.glob("*.f16"))


def test_the_second_certificate_holds_for_the_features_of_the_first(two):
    """Recomputed from the images through the exported module, and by `certify` on the stage."""
    run, result = two
    train, _ = split(load("digits", limit=300)[0], 0.2, 0)
    stage, record = run.stage(2), result["stages"][1]
    with torch.no_grad():
        features = stacked_cnn(run.folder).features(train.images, 1)
    again = certify(
        two_layer_cnn(stage.folder), features, train.targets, record["beta"], **NO_TIME,
        embedding=stage.load_embedding(), n_classes=10,
    )  # fmt: skip
    assert again.primal == pytest.approx(record["primal"], rel=1e-3)  # the features were rounded to half precision
    data = stage_data(stage)
    metrics = certify_job(
        stage.model_file, with_run_settings(stage), embedding=stage.load_embedding(), given=set(), data=data
    )
    assert metrics["primal"] == pytest.approx(record["primal"], rel=1e-9)
    assert metrics["test_accuracy"] == record["test_accuracy"]
    assert stage_data(run.stage(1))[0].images.shape == train.images.shape
    assert stage_data(Run(run.folder / "elsewhere" / "stage-2")) is None


@torch.no_grad()
def test_the_exported_module_is_its_stages_one_after_the_other(two):
    model = stacked_cnn(two[0].folder)
    x = images()
    first, second = (two_layer_cnn(two[0].stage(k).folder) for k in (1, 2))
    maps = F.conv2d(x.double(), first[0].weight.double(), padding=1).clamp_min(0)
    pooled = F.avg_pool2d(maps, 2)
    features = torch.einsum("nmhw,qm->nqhw", pooled, model.links[0][1].weight.double()[:, :, 0, 0])
    torch.testing.assert_close(model.features(x, 1).double(), features, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(x).double(), second.double()(features), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.sequential()(x), model(x))
    tampered = stacked_cnn(two[0].folder)
    tampered.links[0][1].weight.mul_(1.01)
    assert float((tampered(x) - model(x)).abs().max()) > 1e-4


@torch.no_grad()
def test_an_ensemble_is_the_mean_of_the_heads(two):
    model = stacked_cnn(two[0].folder)
    x = images()
    both = StackedCNN(model.stages, model.links, ensemble=True)
    heads = [model.stages[0](x), model(x)]
    torch.testing.assert_close(both(x), (heads[0] + heads[1]) / 2)


@torch.no_grad()
def test_joint_heads_of_other_losses_have_the_objective_of_the_module(tmp_path):
    """Recomputed from the module that was saved, on the training images; and no shorter or longer head has less."""
    options = {"dictionary": "8,12", "max_rounds": 0, "rank": "none", "tol": 1.0, "tune": 0.2, "loss": "cross-entropy"}
    run, result = stacked(tmp_path / "joint", **options, heads="joint")
    record, model = result["stages"][1], stacked_cnn(run.folder)
    train, _ = split(load("digits", limit=300)[0], 0.2, 0)

    def objective() -> float:
        decay = 0.0
        for k, stage in enumerate(model.stages):
            norms = run.stage(k + 1).load_embedding().filters(stage[0].weight, None).norm(dim=1)
            weights = stage[4].weight.double().unflatten(1, (len(norms), -1)) / 2  # (c, m, P)
            decay += float((weights.permute(1, 0, 2).flatten(1).norm(dim=1) * norms).sum())
        return float(F.cross_entropy(model(train.images).double(), train.targets)) + record["joint_beta"] * decay

    best = objective()
    assert best == pytest.approx(record["joint_objective"], rel=2e-3)  # the features were rounded to half precision
    assert record["joint_rel_gap"] < 0.2
    for factor in (0.8, 1.25 / 0.8):
        for stage in model.stages:
            stage[4].weight.mul_(factor)
        assert objective() > best


@torch.no_grad()
def test_joint_heads_are_the_optimum_over_the_filters_of_both_stages(tmp_path):
    """Objective and dual feasibility recomputed from the module that was saved, on the training images."""
    options = {"dictionary": "8,12", "max_rounds": 0, "rank": "none", "tol": 1.0, "tune": 0.2}
    run, result = stacked(tmp_path / "joint", **options, heads="joint")
    record, model = result["stages"][1], stacked_cnn(run.folder)
    joint = {name: record[f"joint_{name}"] for name in ("beta", "objective", "rel_gap")}
    train, _ = split(load("digits", limit=300)[0], 0.2, 0)
    targets = F.one_hot(train.targets, 10).double()
    norms, columns = [], []
    for k, stage in enumerate(model.stages):
        seen = model.features(train.images, k)
        filters = run.stage(k + 1).load_embedding().filters(stage[0].weight, None)
        norms.append(filters.norm(dim=1))
        columns.append(stage[2](stage[1](stage[0](seen))).flatten(2) / norms[-1][:, None])
    weights = [
        stage[4].weight.double().unflatten(1, (len(norm), -1)) * norm[:, None] / 2
        for stage, norm in zip(model.stages, norms, strict=True)
    ]
    predictions = model(train.images).double()
    penalty = sum(float(part.permute(1, 0, 2).flatten(1).norm(dim=1).sum()) for part in weights)
    primal = float((predictions - targets).square().sum()) / (2 * len(targets)) + joint["beta"] * penalty
    assert primal == pytest.approx(joint["objective"], rel=1e-3)  # the features were rounded to half precision
    residual = (targets - predictions) / len(targets)
    pulls = torch.cat([torch.einsum("njp,nc->jpc", c.double(), residual).flatten(1).norm(dim=1) for c in columns])
    scale, loss = joint["beta"] / float(pulls.max()), primal - joint["beta"] * penalty
    dual = scale * float((residual * targets).sum()) - scale**2 * loss  # the residual, shortened until it is feasible
    assert dual < primal
    assert (primal - dual) / primal == pytest.approx(joint["rel_gap"], abs=5e-3)
    assert joint["rel_gap"] < 0.1
    model.stages[1][4].weight.mul_(0.9)  # a worse network is seen to be one
    worse = float((model(train.images).double() - targets).square().sum()) / (2 * len(targets))
    assert worse + joint["beta"] * penalty > primal * (1 + 1e-3)


def test_joint_heads_refuse_what_they_cannot_fit():
    with pytest.raises(InputError, match="joint heads need flips of all stages or of none; got flips yes, no"):
        StackConfig.of(2, OPTIONS | {"dictionary": 4, "max_rounds": 0, "flips": "yes,no"}, heads="joint")
    with pytest.raises(InputError, match="heads must be"):
        StackConfig.of(2, OPTIONS, heads="both")


def test_the_module_can_be_fine_tuned(two):
    model = stacked_cnn(two[0].folder)
    x, y = images(), load("digits")[1].targets[:50]
    before = float(F.cross_entropy(model(x), y).detach())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    F.cross_entropy(model(x), y).backward()
    assert all(p.grad is not None for p in model.sequential().parameters())
    optimizer.step()
    assert float(F.cross_entropy(model(x), y).detach()) < before


def test_a_stage_that_does_not_help_is_dropped_and_that_is_said(tmp_path):
    report = Quiet()
    run, result = stacked(tmp_path / "run", report, beta_ratio="0.02,0.9", rank="none,4")
    assert [record["kept"] for record in result["stages"]] == [True, False]
    assert result["n_stages"] == 1
    assert any("stage 2 is dropped" in said for said in report.said)
    model = stacked_cnn(run.folder)
    torch.testing.assert_close(model(images()), two_layer_cnn(run.stage(1).folder)(images()))
    assert result["test_accuracy"] == result["stages"][0]["test_accuracy"]


def test_of_equal_stacks_the_smaller_one_is_kept_and_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("convcvx.stack.jobs._score", lambda *_: 0.98)
    report = Quiet()
    _, result = stacked(tmp_path / "run", report, max_rounds=1)
    assert [record["kept"] for record in result["stages"]] == [True, False]
    (said,) = (said for said in report.said if "dropped" in said)
    assert "validation 0.9800, the same as that of the stage before; a stage has to raise it" in said


def test_an_interrupted_stack_goes_on_within_its_stage(two, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        stacked(folder, Quiet(stop=(2, 2)))
    assert not (folder / "metrics.json").exists()
    line = f"convcvx stack --resume --out {folder}"  # by that of a run the stage would be trained on the images
    assert StackRun(folder).go_on == Run(folder / "stage-2").go_on == line
    assert line in cli("runs", folder / "stage-2").output
    assert line in cli("train", "--resume", "--out", folder / "stage-2", code=2).output
    report = Quiet()
    _, result = stacked(folder, report)
    assert len(report.rounds) == 1  # the first stage is read, not trained again
    for again, before in zip(result["stages"], two[1]["stages"], strict=True):
        assert again["primal"] == pytest.approx(before["primal"], rel=1e-6)
    x = images()
    torch.testing.assert_close(stacked_cnn(folder)(x), stacked_cnn(two[0].folder)(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_link_keeps_the_principal_channels_at_mean_square_one(two):
    model = stacked_cnn(two[0].folder)
    stage = model.stages[0]
    link = fit_link(stage, images(), 4, 2)
    rows = link(stage[1](stage[0](images()))).movedim(1, -1).flatten(0, -2).double()
    moment = rows.T @ rows / len(rows)
    assert float(moment.diagonal().mean()) == pytest.approx(1, rel=1e-4)
    assert float((moment - torch.diag(moment.diagonal())).abs().max()) < 1e-4
    random = torch.linalg.qr(torch.randn(link[1].in_channels, 4, generator=torch.Generator().manual_seed(0)))[0]
    maps = link[0](stage[1](stage[0](images()))).movedim(1, -1).flatten(0, -2)
    directions = F.normalize(link[1].weight[:, :, 0, 0]).T
    assert float((maps @ directions).square().sum()) > float((maps @ random).square().sum())


def test_a_stage_has_a_twin_on_the_same_features(two):
    stage, record = two[0].stage(2), two[1]["stages"][1]
    result = compare_job(stage, CompareConfig("sgd", epochs=1, seeds=1, finetune=True))
    start = result["finetune"]["seeds"][0]["history"][0]["objective"]
    assert start == pytest.approx(record["primal"], rel=1e-5)
    assert result["twin"]["objective"] > record["primal"]


def test_the_report_of_a_stack_is_well_formed_and_names_every_stage(two):
    run, result = two
    text = write_stack_report(run).read_text()
    ElementTree.fromstring(text)
    assert "Where filter" in write_report(run.stage(2)).read_text()  # of a stage alone, on its features
    assert all(f"Filters of stage {number}" in text for number in (1, 2))
    assert all(f"{record['primal']:.6g}" in text and record["meaning"] in text for record in result["stages"])


def test_options_are_spread_over_the_stages():
    config = StackConfig.of(
        3, {"kernel_size": "5,3,3", "rank": "none,16,8", "beta_ratio": 0.01, "whiten": "yes,no,no"}, "8,4", "2,1"
    )
    assert [stage.whiten for stage in config.stages] == [True, False, False]
    assert [stage.kernel_size for stage in config.stages] == ["5", "3", "3"]
    assert [stage.rank for stage in config.stages] == [None, 16, 8]
    assert [stage.beta_ratio for stage in config.stages] == [0.01] * 3
    assert (config.channels, config.downsample) == ((8, 4), (2, 1))


@pytest.mark.parametrize(
    ("stages", "options", "said"),
    [
        (2, {"rank": "3,3,3"}, "rank must be one value, or 2 by commas"),
        (2, {"rank": "many"}, "rank must be whole numbers"),
        (2, {"whiten": "0.1"}, "whiten must be yes or no"),
        (2, {"slide": "1,1", "dictionary": "8,none"}, "slide 1 needs the filters of a dictionary"),
        (2, {"slide": "1,0", "dictionary": 8, "crops": "1"}, "crops 1 move the images that filters slide on"),
        (0, {}, "stages"),
        (2, {"kernel_size": "3,x"}, "kernel_size"),
        (2, {"no_such": 1}, "no_such"),
    ],
)
def test_bad_options_name_themselves(stages, options, said):
    with pytest.raises(InputError, match=said):
        StackConfig.of(stages, options)


def test_the_usual_number_of_stages_leaves_the_options_to_the_data():
    assert stack_left_open({"data": "digits", "stages": 2, "time_limit": 9.0}, None)
    assert stack_left_open({"data": "digits"}, None)
    for given in ({"stages": 3}, {"stages": 2, "pool": "4"}):
        assert not stack_left_open(given, None)
    assert not stack_left_open({"stages": 2}, "mnist")


def test_a_stack_needs_a_validation_set_and_spares_other_folders(tmp_path):
    config = StackConfig.of(1, OPTIONS | {"rank": "none", "beta_ratio": 0.1, "validation": 0.0})
    with pytest.raises(InputError, match="validation must be above 0"):
        stack_job(config, StackRun(tmp_path / "run"), Quiet())
    deep = StackConfig.of(3, OPTIONS | {"rank": "none", "padding": "0", "beta_ratio": 0.1})
    with pytest.raises(InputError, match="stage 2, on 3x3 features: pool 2x2 is larger than the 1x1 map"):
        stack_job(deep, StackRun(tmp_path / "run"), Quiet())
    assert not (tmp_path / "run").exists()
    (tmp_path / "precious.txt").write_text("keep me")
    for overwrite in (False, True):
        with pytest.raises(RunError, match="not"):
            StackRun.new(tmp_path, overwrite=overwrite)
    assert (tmp_path / "precious.txt").exists()


def test_a_damaged_model_is_one_error(two, tmp_path):
    shutil.copy(two[0].folder / "stage-1" / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(RunError, match="stacked network"):
        stacked_cnn(tmp_path)


def test_real_targets_are_judged_by_their_loss(tmp_path, monkeypatch):
    data = load("digits", limit=200)
    train, test = (replace(part, targets=part.targets.double()[:, None], classes=()) for part in data)
    monkeypatch.setattr("convcvx.stack.jobs.load_data", lambda config: (train, test, test))
    _, result = stacked(tmp_path / "run", stages=1, rank="none", beta_ratio=0.1)
    assert result["test_accuracy"] is None
    assert result["stages"][0]["score"] < 0


def test_the_command_keeps_the_contract(tmp_path):
    options = [part for name, value in OPTIONS.items() for part in (f"--{name.replace('_', '-')}", value)]
    done = invoke("stack --stages 2 --channels 6 --heads mean --json", *options, "--out", tmp_path / "run")
    result = answer(done)
    assert done.exit_code == (0 if result["status"] == "converged" else 3), done.stderr
    keys = {"rel_gap", "scope", "test_accuracy", "primal", "dual", "n_filters", "seconds", "kept"}
    assert all(keys <= set(record) for record in result["stages"])
    assert {"seconds", "peak_memory_mb", "test_accuracy", "status"} <= set(result)
    assert "half precision on disk" in done.stderr
    assert "not a proof" in " ".join(done.stderr.split())
    assert stacked_cnn(tmp_path / "run").ensemble
    assert stacked_cnn(tmp_path / "run")(images()).shape == (50, 10)


@pytest.mark.parametrize("slide", ["0", pytest.param("1,2", marks=pytest.mark.slow)])
def test_a_stack_with_flips_says_the_same_of_an_image_and_its_mirror_image(slide, tmp_path):
    """Through paired channels the second stage knows what mirroring the images does to its features."""
    options = {"kernel_size": "3", "dictionary": "6,60", "threshold": "0.1", "hidden_bias": True, "max_rounds": 0,
               "rank": "none", "whiten": "yes", "contrast": "no,yes", "tol": 1.0, "slide": slide}  # fmt: skip
    run, result = stacked(tmp_path / "flips", **options, flips="yes")
    assert result["n_stages"] == 2
    model, x = stacked_cnn(run.folder), images()
    seen, mirrored = (model.features(part, 1) for part in (x, x.flip(3)))
    torch.testing.assert_close(mirrored, seen.flip(3).roll(3, dims=1), rtol=0, atol=1e-5)
    assert not torch.allclose(mirrored, seen.flip(3), atol=1e-2)
    torch.testing.assert_close(model(x.flip(3)), model(x), rtol=0, atol=1e-4)
    run, _ = stacked(tmp_path / "plain", **options, flips="yes,no")
    model = stacked_cnn(run.folder)
    assert not torch.allclose(model(x.flip(3)), model(x), atol=1e-2)


def test_flips_of_a_later_stage_need_mirror_pairs():
    with pytest.raises(InputError, match="mirror pairs"):
        StackConfig.of(2, OPTIONS | {"flips": "no,yes"}, channels="6")
    options = OPTIONS | {"flips": "yes", "dictionary": 8, "max_rounds": 0}
    with pytest.raises(InputError, match="downsample that divides"):
        StackConfig.of(2, options, channels="6", downsample="3").check_shapes((1, 8, 8))


@pytest.mark.parametrize("case", [(1, False, None), (2, True, None), (3, True, 1e-2)])
def test_streamed_features_are_those_of_the_torch_modules(case):
    """Downsampling that does and does not divide the maps, strides, padding, a hidden bias, contrast."""
    downsample, hidden_bias, contrast = case
    torch.manual_seed(0)
    architecture = Architecture(
        (3, 9, 8), 10, 4, (3, 2), (1, 2), (1, 1), "2", hidden_bias=hidden_bias, contrast=contrast
    )
    stage, x = TwoLayerCNN(architecture), torch.rand(150, 3, 9, 8)
    link = fit_link(stage, x, 4, downsample)
    features = torch.cat(list(stream_features(stage, link, x)))
    with torch.no_grad():
        expected = link(stage[1](stage[0](x)))
    assert features.dtype == torch.float16
    assert tuple(features.shape[1:]) == feature_shape(stage, link, x)
    torch.testing.assert_close(features.float(), expected, rtol=2e-3, atol=1e-3)
    assert float(expected.std()) > 0.1


def test_an_overwritten_stack_is_trained_anew(tmp_path):
    options = OPTIONS | {"limit": 120, "rank": "none", "beta_ratio": 0.1, "max_rounds": 1}
    _, before = stacked(tmp_path / "stack", stages=1, **options)
    settings = StackConfig.of(1, options | {"beta_ratio": 0.3}, channels="6")
    run = StackRun.new(tmp_path / "stack", overwrite=True)
    after = stack_job(settings, run, Quiet())
    assert after["stages"][0]["beta"] == pytest.approx(3 * before["stages"][0]["beta"], rel=1e-6)
    assert run.config == settings
    assert [path.name for path in tmp_path.iterdir()] == ["stack"]
