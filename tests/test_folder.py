"""Run folders: what is a run, who works in it, what takes its place, and which data it was trained on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import DIGITS, NO_SEARCH, answer, cli, refused, said
from hypothesis import given, settings
from hypothesis import strategies as st

import convcvx
from convcvx.callbacks import CSVLogger
from convcvx.data.datasets import Dataset
from convcvx.data.images import StreamedImages
from convcvx.errors import DataError, RunError
from convcvx.network.export import export
from convcvx.stack.run import StackRun
from convcvx.storage.lock import locked
from convcvx.storage.places import Contents, Places
from convcvx.training.options import TrainConfig
from convcvx.training.origin import Origin
from convcvx.training.run import FILES, Run

SMALL = "--limit 40 --stride 2 --rank 2 --pool 2 --beta-ratio .1 --tol .1"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    cli(f"train {SMALL}", "--out", folder)
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_the_home_of_no_user_is_no_path(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nobody = "~nosuchuser/x"
    for command in (
        f"train {SMALL} --out",
        "train --resume --out",
        "train --config",
        f"stack {SMALL} --out",
        *("certify", "compare", "report", "export", "runs", "data --data-dir"),
    ):
        assert "begins with the home of a user whom this machine does not know" in refused(command, nobody)
    images, labels = np.random.default_rng(0).random((20, 4, 4)), np.arange(20) % 2
    fit = convcvx.load(trained)
    for use in (
        lambda: convcvx.fit(images, labels, out=nobody, max_rounds=1, beta_ratio=0.5),
        lambda: convcvx.load(nobody),
        lambda: convcvx.two_layer_cnn(nobody),
        lambda: fit.save(nobody),
        lambda: export(fit.network, fit.network.image_shape, nobody, "torch"),
        lambda: CSVLogger(f"{nobody}.csv"),
    ):
        with pytest.raises(RunError, match=r"write \./~nosuchuser for a folder of that name"):
            use()
    assert not any(tmp_path.iterdir())


def test_a_home_is_where_its_user_has_it(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert convcvx.load(trained).save("~/saved") == tmp_path / "saved"
    assert convcvx.load("~/saved").metrics["primal"] == Run.open(trained).metrics["primal"]


# What is a run


def test_a_folder_with_a_config_of_another_program_is_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["Bert"]}')
    (tmp_path / "model.safetensors").write_text("weights")
    for options in ("--overwrite", "--resume", ""):
        cli(f"train {SMALL} {options}", "--out", tmp_path, code=2)
    assert (tmp_path / "model.safetensors").read_text() == "weights"
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_the_options_of_a_run_among_other_files_make_no_run(run, tmp_path):
    (tmp_path / "mine").mkdir()
    shutil.copy(run / "config.json", tmp_path / "mine" / "config.json")
    Run.new(tmp_path / "mine", overwrite=True)  # a run killed right after it had begun looks like that
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(RunError, match="no run folder"):
        Run.new(tmp_path / "mine", overwrite=True)
    with pytest.raises(RunError, match="no stack folder"):
        StackRun.new(run, overwrite=True)


def test_a_folder_with_options_of_others_is_neither(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    for kind in (Run, StackRun):
        with pytest.raises(RunError, match="choose another --out, or remove it"):
            kind.new(tmp_path)


def test_an_interrupted_overwrite_whose_run_is_gone_goes_on(run, tmp_path):
    shutil.copytree(run, tmp_path / ".kept.new")
    begun = Run.new(tmp_path / "kept", overwrite=True)
    assert begun.out == tmp_path / "kept"
    with pytest.raises(RunError, match="an interrupted --overwrite left"):
        Run.new(tmp_path / "kept")


def test_a_file_is_no_folder_to_begin_in(tmp_path):
    (tmp_path / "notes").write_text("mine")
    for kind in (Run, StackRun):
        with pytest.raises(RunError, match="notes is a file, not a folder: choose another --out"):
            kind.new(tmp_path / "notes", overwrite=True)
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_run_that_is_taken_for_a_stack_is_called_a_run_and_the_other_way_round(run, tmp_path):
    """With the line that goes on with it, and no advice to remove it."""
    (tmp_path / "stack" / "stage-1").mkdir(parents=True)
    (tmp_path / "stack" / "stack.json").write_text("{}")
    for kind, folder, told in (
        (
            Run,
            tmp_path / "stack",
            r"it is a stack.*/stack/stage-1; to go on: convcvx stack --resume --out [^ ]*/stack$",
        ),
        (StackRun, run, r"it is a run: `convcvx train --resume --out [^ ]*` goes on with it$"),
    ):
        for asked in (kind.open, kind.new):
            with pytest.raises(RunError, match=told):
                asked(folder)


def test_runs_of_earlier_versions_are_runs(tmp_path):
    old = Path(shutil.copytree(DIGITS, tmp_path / "old"))
    run = Run.new(old, overwrite=True)
    assert run.origin is None
    assert run.config.data == "digits"


def test_files_of_the_user_stay_in_a_run_that_is_overwritten(run):
    (run / "notes.txt").write_text("mine")
    (run / "models").mkdir()
    (run / "models" / "model.safetensors").write_text("mine, too")
    (run / "report.html").write_text("of the old run")
    cli(f"train {SMALL} --seed 1 --overwrite", "--out", run)
    assert Run(run).config.seed == 1
    assert (run / "notes.txt").read_text() == "mine"
    assert (run / "models" / "model.safetensors").read_text() == "mine, too"
    assert not (run / "report.html").exists()
    assert os.listdir(run.parent) == ["run"]


NAMES = st.sampled_from([*FILES, ".model.safetensors.tmp", "notes.txt", "stage-1", "stage-1-copy", ".config.json"])


@settings(max_examples=60, deadline=None)
@given(old=st.sets(NAMES), new=st.sets(NAMES))
def test_moving_on_removes_files_of_ours_only(old, new, tmp_path_factory):
    root = tmp_path_factory.mktemp("carry")
    for folder, names in ((root / "old", old), (root / "new", new)):
        for name in names:
            path = folder / name / "inner.txt" if name.startswith("stage") else folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(folder.name)
        folder.mkdir(exist_ok=True)
    contents = Contents("config.json", FILES, {r"stage-\d+": Run.CONTENTS})
    contents.carry(root / "old", root / "new")
    contents.clear(root / "old")
    assert not (root / "old").exists()
    theirs = {"notes.txt", "stage-1", "stage-1-copy", ".config.json"}
    texts = [path.read_text() for path in (root / "new").rglob("*") if path.is_file()]
    assert texts.count("old") == len(old & theirs)
    assert texts.count("new") == len(new)


# Who works in it


def test_a_second_process_is_told_that_the_first_one_works_there(run):
    with Run(run).held():
        for command in (f"train {SMALL} --overwrite", "train --resume"):
            assert "another process works in" in refused(command, "--out", run)
        cli("certify", run, *NO_SEARCH)  # reading needs no lock
    cli("train --resume", "--out", run)


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path):
    place, file = tmp_path / "run", tmp_path / ".run.lock"
    program = (
        "import os, pathlib, signal; from convcvx.storage.lock import locked\n"
        f"with locked(pathlib.Path({str(place)!r}), pathlib.Path({str(file)!r})):\n"
        "    print('locked', flush=True); os.kill(os.getpid(), signal.SIGSTOP)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(RunError, match="another process works in"), locked(place, file):
        pass
    process.kill()
    process.wait()
    assert file.exists()
    with locked(place, file):
        pass
    assert not list(tmp_path.iterdir())


# What takes its place


def test_a_run_of_which_nothing_but_half_a_file_was_written_begins_with_resume(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".config.json.tmp").write_text("{")
    assert "nothing has begun" in said(cli(f"train {SMALL} --resume", "--out", run))
    assert not list(run.glob(".*"))


def test_a_resumed_run_has_its_environment(run):
    (run / "environment.json").unlink()
    cli("train --resume", "--out", run)
    assert "versions" in json.loads((run / "environment.json").read_text())


def test_what_an_earlier_version_left_of_an_interrupted_overwrite_is_named_and_put_in_place(run, tmp_path):
    """It moved the old run aside first."""
    aside = tmp_path / ".run.replaced"
    run.rename(aside)
    assert str(aside) in refused("certify", run)
    assert str(aside) in refused("report", run)
    cli("train --resume", "--out", run)
    assert os.listdir(tmp_path) == ["run"]
    assert (run / "metrics.json").exists()


def test_two_interrupted_overwrites_of_an_earlier_version_end_with_a_finished_run(run, tmp_path):
    """The old run aside, the new one half done in its place, and that is overwritten."""
    shutil.copytree(run, tmp_path / ".run.replaced")
    for name in ("metrics.json", "certificate.json", "model.safetensors"):
        (run / name).unlink()
    assert "interrupted --overwrite left" in refused(f"train {SMALL}", "--out", run)
    before = (tmp_path / ".run.replaced" / "model.safetensors").read_bytes()
    cli("train --data nowhere.npz --overwrite", "--out", run, code=2)
    assert (tmp_path / ".run.replaced" / "model.safetensors").read_bytes() == before
    cli(f"train {SMALL} --seed 1 --overwrite", "--out", run)
    assert os.listdir(tmp_path) == ["run"]
    assert Run(run).config.seed == 1


@pytest.mark.parametrize("size", [245, 255])
def test_names_as_long_as_the_file_system_allows_are_fine(size, tmp_path):
    run = tmp_path / ("n" * size)
    cli(f"train {SMALL}", "--out", run)
    cli(f"train {SMALL} --seed 1 --overwrite", "--out", run)
    assert os.listdir(tmp_path) == [run.name]


def test_a_longer_name_is_refused_before_any_training(tmp_path):
    done = cli(f"train {SMALL}", "--out", tmp_path / ("n" * 256), code=2)
    assert "256 bytes" in done.output
    assert "training on" not in done.output
    assert "nnn" in refused("certify", tmp_path / ("n" * 256))


def test_a_disk_that_is_full_in_the_middle_of_a_file_leaves_no_half_of_it(run, monkeypatch):
    before = sorted(os.listdir(run))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device; mend that" in refused("report", run)
    assert sorted(os.listdir(run)) == before


# Which data


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    """Two folders with other images in a data.npz."""
    places = tmp_path / "a", tmp_path / "b"
    for seed, place in enumerate(places):
        place.mkdir()
        random = np.random.default_rng(seed)
        x, y = random.random((40, 8, 8)).astype("float32"), np.arange(40) % 3
        np.savez(place / "data.npz", x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])
    return places


def test_a_run_finds_its_data_from_anywhere_and_takes_no_others(files, tmp_path, monkeypatch):
    a, b = files
    run = tmp_path / "run"
    monkeypatch.chdir(a)
    cli(f"train --data data.npz {SMALL}", "--out", run, code=0)
    primal = json.loads((run / "metrics.json").read_text())["primal"]
    monkeypatch.chdir(b)
    certified = answer(cli("certify --json", run, *NO_SEARCH))
    assert certified["primal"] == pytest.approx(primal, rel=1e-9)
    assert json.loads((run / "config.json").read_text())["data"] == "data.npz"
    others = refused("certify --data data.npz --tol 1 --json", run)  # asked for by name
    assert "another filter space than these options on these images give" in others
    (a / "data.npz").rename(tmp_path / "moved.npz")
    for command in ("certify", "compare --epochs 1", "train --resume --out"):
        message = refused(command, run)
        assert str(b / "data.npz") in message
        assert str(a / "data.npz") in message
    shutil.copy(tmp_path / "moved.npz", b / "data.npz")  # where the option says, seen from here
    cli("train --resume", "--out", run)


@pytest.mark.parametrize("content", ["[]", "5", "{}", '{"options": 1, "paths": {}, "sets": {}}', '{"a": 1}', "{"])
def test_a_damaged_record_of_the_data_is_one_error(run, content):
    (run / "data.json").write_text(content)
    assert "data.json" in refused("certify", run)


def dataset(streamed: bool = False) -> Dataset:
    pixels = np.random.default_rng(0).integers(0, 256, (3000, 4, 4, 1), dtype=np.uint8)
    images = StreamedImages(pixels)
    return Dataset(images if streamed else images[:], torch.arange(3000) % 2, ("a", "b"), "noise")


def test_a_fingerprint_tells_images_targets_and_classes_apart():
    config, data = TrainConfig(), dataset()
    origin = Origin.of(config, (data, data, None))
    Origin.from_dict(json.loads(json.dumps(origin.to_dict())), Path("data.json")).check(origin, Path("run"))
    images = data.images.clone()
    images[1234, 0, 2, 3] += 1 / 255
    for changed in (
        replace(data, images=images),
        replace(data, targets=1 - data.targets),
        replace(data, classes=("a", "c")),
        replace(data, images=data.images[1:], targets=data.targets[1:]),
    ):
        with pytest.raises(DataError, match="its train set is"):
            origin.check(Origin.of(config, (changed, data, None)), Path("run"))
        with pytest.raises(DataError, match="its test set is"):
            origin.check(Origin.of(config, (data, changed, None)), Path("run"))


def test_of_images_on_disk_a_sample_is_looked_at():
    streamed, config = dataset(streamed=True), TrainConfig()
    origin = Origin.of(config, (streamed, streamed, None))
    origin.check(Origin.of(config, (dataset(streamed=True),) * 2 + (None,)), Path("run"))
    for row in (0, 2999):
        pixels = streamed.images._pixels.copy()
        pixels[row] ^= 1
        other = replace(streamed, images=StreamedImages(pixels))
        with pytest.raises(DataError):
            origin.check(Origin.of(config, (other, streamed, None)), Path("run"))


def test_a_place_has_other_places_for_names_that_are_too_long():
    short, long = (Places(Path("/tmp") / name, Run.CONTENTS) for name in ("run", "n" * 250))
    assert short.staged.name == ".run.new"
    assert len({long.staged, long.replaced, long.place}) == 3
    assert all(len(path.name) <= 255 for path in (long.staged, long.replaced))
