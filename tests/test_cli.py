"""The command line: contract of the JSON, exit codes, certify; in real processes where one is trained and killed."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers.commands import DIGITS, NO_SEARCH, answer, cli, refused, said, strict_json
from safetensors.torch import save_file
from torch import nn

import convcvx
from convcvx.cli import COMMANDS
from convcvx.cli.ending import open_console
from convcvx.cli.flags import LONGEST_STEM, data_name
from convcvx.cli.output import as_flags
from convcvx.cli.training import go_on
from convcvx.data.datasets import load
from convcvx.data.torchvision_sets import DOWNLOADS
from convcvx.terms.launch import LAUNCHED
from convcvx.terms.status import Status
from convcvx.training.folder import Folder
from convcvx.training.options import TrainConfig
from convcvx.training.progress import Progress

TRAIN_KEYS = {
    *("primal", "dual", "rel_gap", "scope", "beta", "beta_max", "n_filters"),
    *("train_accuracy", "test_accuracy", "seconds", "peak_memory_mb", "status"),
}
SMALL = ["train", "--data", "digits", "--limit", "120", "--pool", "2", "--beta-ratio", "0.05", "--tol", "0.02"]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "convcvx.cli", *map(str, arguments)]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict]:
    """Trained by a process of its own, whose standard output is the JSON object alone and whose exit status is 0."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    done = subprocess.run(command(*SMALL, "--out", folder, "--json"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return folder, strict_json(line)


def test_train_keeps_the_contract(run):
    folder, metrics = run
    assert set(metrics) >= TRAIN_KEYS
    assert metrics["status"] == "converged"
    assert metrics["rel_gap"] <= 0.02
    assert 0 < metrics["dual"] <= metrics["primal"]
    assert metrics["beta"] == pytest.approx(0.05 * metrics["beta_max"])
    assert metrics["test_accuracy"] > 0.8
    assert metrics["scope"] == "heuristic"
    assert "not a proof" in metrics["meaning"]
    assert 0 <= metrics["proved"] <= metrics["dual"]
    assert metrics["proved_gap"] == pytest.approx(1 - metrics["proved"] / metrics["primal"])
    assert "polynomials" in metrics["proved_by"]
    assert re.search(
        r"\d+ climbs, each from another filter, ended at \d+ different ones; .* chance of about \d+%",
        metrics["meaning"],
    )
    files = ["config", "environment", "history", "certificate", "metrics"]
    assert all(json.loads((folder / f"{name}.json").read_text()) for name in files)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_objective_never_rises(run):
    objectives = [record["objective"] for record in json.loads((run[0] / "history.json").read_text())]
    assert len(objectives) > 2
    assert all(after <= before for before, after in pairwise(objectives))


def test_certify_agrees_with_train(run):
    folder, metrics = run
    again = answer(cli("certify", folder, "--tol", "0.05", "--json"))
    assert again["primal"] == pytest.approx(metrics["primal"], rel=1e-6)
    assert again["dual"] <= again["primal"]
    certificate = json.loads((folder / "certificate.json").read_text())
    assert again["stored"] == {name: certificate[name] for name in ("dual", "rel_gap", "scope")}
    assert "computed now" in cli("certify", folder, *NO_SEARCH).stdout
    of_other_problem = answer(cli("certify", folder, "--beta", 2 * metrics["beta"], "--json", *NO_SEARCH))
    assert "stored" not in of_other_problem
    assert "stored" not in answer(cli("certify", folder, "--limit", 1436, "--json", *NO_SEARCH))
    by_file = answer(cli("certify", folder / "model.safetensors", "--json", *NO_SEARCH))
    assert by_file["primal"] == again["primal"]


def test_a_damaged_certificate_is_not_needed(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "damaged")
    stored = json.loads((folder / "certificate.json").read_text())
    (folder / "certificate.json").write_text(json.dumps(stored | {"scope": "strange"}))
    assert "stored" not in answer(cli("certify", folder, "--json", *NO_SEARCH))


def test_a_tampered_model_is_found_out(run, tmp_path):
    folder, metrics = run
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        described = file.metadata()
    state["4.weight"] = state["4.weight"] * 1.5
    save_file(state, tmp_path / "model.safetensors", described)
    tampered = answer(cli("certify", tmp_path / "model.safetensors", "--like", folder, "--json", *NO_SEARCH))
    assert tampered["primal"] > metrics["primal"] * (1 + 1e-4)


@pytest.mark.slow
def test_adam_is_further_from_the_optimum(run, tmp_path):
    folder, metrics = run
    train, _ = load("digits", limit=120)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 32, 3, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    targets = nn.functional.one_hot(train.targets, 10).float()
    for _ in range(100):
        optimizer.zero_grad()
        decay = sum(p.square().sum() for p in (network[0].weight, network[4].weight))
        error = 0.5 * (network(train.images) - targets).square().sum(dim=1).mean()
        (error + 0.5 * metrics["beta"] * decay).backward()
        optimizer.step()
    save_file(network.state_dict(), tmp_path / "adam.safetensors")
    adam = answer(cli("certify", tmp_path / "adam.safetensors", "--like", folder, "--json", code=3))
    assert adam["primal"] > metrics["primal"]
    own = answer(cli("certify", folder, "--json"))  # whose search is more thorough than that of the training
    assert adam["dual"] == pytest.approx(own["dual"], rel=1e-9)  # the better bound of the two networks counts
    same = ["--data", "digits", "--limit", "120", "--beta", metrics["beta"]]
    plain = answer(cli("certify", tmp_path / "adam.safetensors", *same, "--json", code=3))
    assert plain["primal"] == pytest.approx(adam["primal"], rel=1e-9)
    assert plain["dual"] < adam["dual"]
    other = ["--like", folder, "--pool", "1"]
    assert "another architecture" in cli("certify", write_network(tmp_path, 1), *other, code=2).stderr


def write_network(folder: Path, pool: int) -> Path:
    network = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(pool), nn.Flatten())
    file = folder / "other.safetensors"
    save_file(nn.Sequential(*network, nn.Linear(4 * pool**2, 10)).state_dict(), file)
    return file


def test_sigkill_and_resume_give_the_uninterrupted_result(run, tmp_path):
    folder = tmp_path / "killed"
    kill(SMALL, folder, lambda: rounds_done(folder) >= 2)
    resumed = answer(cli(*SMALL, "--out", folder, "--resume", "--json"))
    assert resumed["primal"] == pytest.approx(run[1]["primal"], rel=1e-8)
    assert resumed["rounds"] == run[1]["rounds"]


@pytest.mark.slow
def test_sigkill_while_filters_slide_and_resume_give_the_uninterrupted_result(tmp_path):
    train = ["train", "--limit", "120", "--pool", "2", "--dictionary", "12", "--tune", "0.1", "--max-rounds", "0"]
    train += ["--slide", "150", "--crops", "1", "--tol", "1"]
    whole = answer(cli(*train, "--out", tmp_path / "whole", "--json"))
    folder = tmp_path / "killed"
    kill(train, folder, (folder / "descent.safetensors").exists)
    done = cli("train", "--out", folder, "--resume")
    assert "from where it was" in done.stdout
    assert "epoch 1 of" not in done.stdout
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["primal"] == pytest.approx(whole["primal"], rel=1e-8)
    assert not (folder / "descent.safetensors").exists()


def kill(train: list[str], folder: Path, when: Callable[[], bool], sent: int = signal.SIGKILL) -> tuple[int, str]:
    """Start a training and send it a signal as soon as `when` is true: its exit status, and what it said.

    On one thread, as the tests' own process goes on: with more of them products round in another way.
    """
    process = subprocess.Popen(
        command(*train, "--out", folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background may ignore it
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not when():
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
    finally:
        process.send_signal(sent)
        if sent == signal.SIGTERM:  # twice, as `timeout` does
            time.sleep(0.005)
            process.send_signal(sent)
        _, said = process.communicate()
    assert not (folder / "metrics.json").exists()
    return process.returncode, said


@pytest.mark.parametrize(
    ("sent", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_training_that_is_asked_to_end_says_how_it_goes_on(sent, code, word, tmp_path):
    folder = tmp_path / "run"
    ended, said = kill(SMALL, folder, lambda: rounds_done(folder) >= 1, sent)
    assert (ended, said.splitlines()[-1]) == (
        code,
        f"convcvx: {word}; to go on: convcvx train --resume --out {folder}",
    )
    assert "Traceback" not in said


def rounds_done(folder: Path) -> int:
    try:
        return len(json.loads((folder / "history.json").read_text()))
    except (OSError, ValueError):
        return 0


def test_resuming_a_finished_run_changes_nothing(run):
    folder, metrics = run
    again = answer(cli("train", "--out", folder, "--resume", "--json"))
    assert again["primal"] == metrics["primal"]


def test_a_resumed_run_that_may_not_go_on_says_which_budget_is_used_up(run, tmp_path):
    folder, metrics = run
    assert "no round was added: the gap was within --tol 0.02" in cli("train", "--out", folder, "--resume").stdout
    short = shutil.copytree(folder, tmp_path / "short")
    resume = ["train", "--out", short, "--resume", "--tol", "1e-6"]
    rounds = ["--max-rounds", metrics["rounds"]]
    used = f"no round was added: the budget --max-rounds {metrics['rounds']} is used up; raise it to train further\n"
    assert used in cli(*resume, *rounds, code=3).stdout
    time = cli(*resume, *rounds, "--time-limit", "1e-6", code=3).stdout
    assert "no round was added: the budget --time-limit 1e-06 is used up" in time
    further = cli(*resume, "--max-rounds", metrics["rounds"] + 1, "--time-limit", 100, code=3).stdout
    assert "no round was added" not in further


def test_a_gap_that_a_longer_search_showed_asks_for_a_smaller_tol_to_go_on(run):
    fit = convcvx.load(run[0])
    seen = f"with a --tol below {fit.history[-1]['rel_gap']:.1e}, the gap that the training saw"
    larger = f"--tol {1.1 * fit.metrics['rel_gap']:.1e}, say: more rounds alone change nothing"
    told_of = {"gap_above_tol": seen, "time_limit": "with another budget or --tol", "stalled": larger}
    for status, told in told_of.items():
        assert go_on(replace(fit, metrics=fit.metrics | {"status": status})).endswith(told)


def test_a_solver_that_goes_on_from_no_checkpoint_says_so(tmp_path):
    small = ["train", "--limit", "40", "--solver", "gated", "--gates", "5", "--tol", "1", "--out", tmp_path / "run"]
    began = cli(*small).stdout
    again = cli(*small, "--resume").stdout
    told = "solver gated goes on from no checkpoint: all of it was solved again"
    assert told in again
    assert told not in began
    assert "no round was added" not in again


def test_resume_refuses_another_problem(run):
    done = cli(*SMALL, "--loss", "cross-entropy", "--out", run[0], "--resume", code=2)
    assert "loss" in done.stderr


def test_a_run_is_never_overwritten_silently(run):
    before = (run[0] / "model.safetensors").read_bytes()
    done = cli(*SMALL, "--out", run[0], code=2)
    assert "--overwrite" in done.stderr
    assert (run[0] / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(("command", "name"), [("train", "digits-seed0"), ("stack", "digits-stack")])
def test_a_second_training_is_refused_before_data_are_read_and_says_what_to_type(command, name, tmp_path, monkeypatch):
    begun = tmp_path / "checkpoints" / name
    begun.mkdir(parents=True)
    if command == "train":
        shutil.copy(DIGITS / "config.json", begun)
    else:
        (begun / "stack.json").write_text(json.dumps({"stages": [json.loads((DIGITS / "config.json").read_text())]}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("convcvx.training.resolve.load_sets", lambda *_, **__: pytest.fail("data were read"))
    done = cli(command, "--data", "digits", code=2)
    for typed in ("--out ANOTHER", f"--resume --out checkpoints/{name}", "--overwrite"):
        assert typed in done.stderr


def test_a_data_set_with_too_long_a_name_is_what_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in ("train", "stack"):
        assert "cannot read data '/tmp/aaa" in refused(command, "--data", "/tmp/" + 300 * "a")


def test_data_sets_whose_long_names_begin_alike_have_folders_of_their_own():
    long = LONGEST_STEM * "\U0001f600"
    names = {
        data_name(TrainConfig(data=f"/tmp/{name}.npz")) for name in (long, f"{long}1", f"{long}2", "\udcff" + long)
    }
    assert len(names) == 4
    assert long in names
    assert all(len(name) <= LONGEST_STEM for name in names)


def test_bad_input_spares_the_run_it_would_have_overwritten(run):
    before = (run[0] / "model.safetensors").read_bytes()
    cli(*SMALL, "--data", "nowhere.npz", "--out", run[0], "--overwrite", code=2)
    cli("train", "--tol", "-1", "--out", run[0], "--resume", code=2)
    assert (run[0] / "model.safetensors").read_bytes() == before
    assert json.loads((run[0] / "config.json").read_text())["tol"] == 0.02


def test_overwrite_spares_folders_that_are_no_runs(tmp_path):
    (tmp_path / "precious.txt").write_text("keep me")
    done = cli(*SMALL, "--out", tmp_path, "--overwrite", code=2)
    assert "no run folder" in done.stderr
    assert (tmp_path / "precious.txt").exists()


def test_stopping_short_of_tol_is_exit_3(tmp_path):
    done = cli(*SMALL[:-1], "1e-6", "--rank", "2", "--max-rounds", "1", "--out", tmp_path / "short", "--json", code=3)
    metrics = answer(done)
    assert metrics["status"] == "max_rounds"
    assert metrics["rel_gap"] > 1e-6


def test_a_config_file_and_flags_that_beat_it(tmp_path):
    file = tmp_path / "options.toml"
    file.write_text('data = "digits"\nlimit = 100\nkernel-size = 5\nbeta_ratio = 0.5\ntol = 0.1\nrank = 2\n')
    cli("train", "--config", file, "--beta-ratio", "0.6", "--out", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["limit"], config["kernel_size"], config["beta_ratio"]) == (100, "5", 0.6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--beta", "-1"], "beta must be a positive float; got -1.0"),
        (["--beta", "1", "--beta-ratio", "0.1"], "not both"),
        (["--kernel-size", "9"], "kernel_size 9x9 is larger than the images, 8x8"),
        (["--kernel-size", "three"], "kernel_size"),
        (["--pool", "7"], "pool 7x7 is larger than the 6x6 map"),
        (["--pool", "max"], "pool must be"),
        (["--loss", "hinge"], "loss must be one of squared, cross-entropy"),
        (["--data", "nowhere.npz"], "nowhere.npz"),
        (["--solver", "magic"], "solver must be one of"),
        (["--oracle", "magic"], "oracle must be one of"),
        (["--rank", "10"], "rank must be at most the patch size, 9"),
        (["--max-filters", "0"], "max_filters"),
        (["--tol", "nan"], "tol"),
        (["--slide", "2"], "slide 2 needs the filters of a dictionary"),
        (["--slide", "-1", "--dictionary", "8"], "slide must be a non-negative float; got -1"),
        (["--crops", "1", "--dictionary", "8"], "crops 1 move the images that filters slide on; pass --slide EPOCHS"),
        (["--crops", "-1"], "crops must be a whole number >= 0; got -1"),
        (["--preset", "magic"], "preset must be one of"),
        (["--config", "nowhere.toml"], "cannot read --config"),
        (["--no-such-option"], "No such option"),
    ],
)
def test_bad_input_is_named_and_exit_2(arguments, message, tmp_path):
    done = cli("train", "--limit", "100", *arguments, "--out", tmp_path / "run", code=2)
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "run").exists()  # the corrected command need not clear anything away


@pytest.mark.parametrize(("arguments", "code"), [(["data"], 0), (["train", "--tol", "-1"], 2)])
def test_a_process_of_torchrun_ends_with_all_that_it_has_said(arguments, code, tmp_path):
    environment = os.environ | dict(zip(LAUNCHED, ["0", "1", "127.0.0.1", "29500"], strict=True))
    script = "import atexit; atexit.register(print, 'taken down'); from convcvx.cli import main; main()"
    command = [sys.executable, "-c", script, *arguments, "--json"]
    for launched in (True, False):
        given = environment if launched else {k: v for k, v in environment.items() if k not in LAUNCHED}
        done = subprocess.run(command, env=given, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        said, _, rest = done.stdout.partition("\n")
        assert strict_json(said)
        assert rest == ("" if launched else "taken down\n")


def test_cuda_that_is_not_there_is_bad_input(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert "cuda" in cli("train", "--device", "cuda", "--out", tmp_path / "run", code=2).stderr


def test_paths_are_printed_whole_and_as_they_are(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    path = f"run [red]/a[/b]/:fire:/{'long' * 20}"
    Progress(open_console(False), 0.1).begin(f"training into {path}")
    assert capsys.readouterr().out == f"training into {path}\n"


def test_help_teaches():
    assert "weight_decay" in (text := said(cli("train --help")))
    assert "checkpoints/DATA-seedSEED, such" in text.replace(" │ │", "")  # brackets are words of ours, not markup
    assert {"certify", "--install-completion"} <= set(said(cli("--help")).split())


def test_an_unfinished_run_cannot_be_certified(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    os.remove(folder / "model.safetensors")
    assert "--resume" in cli("certify", folder, code=2).stderr


def test_a_preset_trains_on_the_data_named_beside_it(tmp_path):
    preset = ["train", "--preset", "cifar10-fast", "--data", "digits", "--limit", "100", "--dictionary", "12"]
    small = ["--kernel-size", "3", "--pool", "2"]
    metrics = answer(cli(*preset, *small, "--out", tmp_path / "run", "--json"))
    assert metrics["test_accuracy"] > 0.5
    assert metrics["n_filters"] <= 12
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["data"], config["flips"], config["beta"]) == ("digits", True, None)
    again = answer(cli("certify", tmp_path / "run", "--json", *NO_SEARCH))
    assert again["primal"] == pytest.approx(metrics["primal"], rel=1e-6)
    assert again["beta"] == metrics["beta"]
    resumed = answer(cli(*preset, *small, "--out", tmp_path / "run", "--resume", "--json"))
    assert resumed["primal"] == pytest.approx(metrics["primal"], rel=1e-9)


@pytest.mark.slow
def test_filters_of_a_dictionary_that_slide_reach_a_lower_objective(tmp_path):
    train = ["train", "--limit", "150", "--pool", "2", "--dictionary", "16", "--max-rounds", "0", "--tol", "1"]
    drawn = answer(cli(*train, "--beta-ratio", "0.01", "--out", tmp_path / "drawn", "--json"))
    slid = answer(cli(*train, "--beta-ratio", "0.01", "--slide", "20", "--out", tmp_path / "slid", "--json"))
    assert slid["beta"] == drawn["beta"]
    assert slid["primal"] < 0.98 * drawn["primal"]
    assert slid["n_filters"] <= 16
    done = cli(*train, "--tune", "0.2", "--slide", "2", "--crops", "1", "--out", tmp_path / "tuned")
    assert done.stdout.count("held-out error") > 6  # beta is chosen anew for the filters that slid
    assert "2 epochs of descent" in done.stdout
    assert "epoch 2 of 2: objective" in done.stdout


def test_the_command_line_does_not_wait_for_what_it_may_not_need():
    """They take seconds to import on a slow machine."""
    slow = ("matplotlib", "sklearn", "cvxpy", "scipy.optimize", "scipy.spatial")
    probe = f"print([m for m in {slow} if m in sys.modules])"
    code = f"import sys, convcvx.cli.training, convcvx.cli.stacking; {probe}"
    code += f"; import convcvx.report; {probe}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "['matplotlib']"]  # the second is the negative control


QUICK = {
    "": 0,
    "--help": 0,
    "--version": 0,
    "data": 0,
    "runs": 2,
    f"runs {shlex.quote(str(DIGITS.parent))}": 0,
    f"runs {shlex.quote(str(DIGITS))} --json": 0,
    **{f"{name} --help": 0 for name in COMMANDS},
    "train --kernel-size 0": 2,
    "train --kernel-size 3x": 2,
    "train --solver simplex": 2,
    "train --tol -1": 2,
    "train --slide 3": 2,
    "train --resume": 2,
    "train --preset nothing": 2,
    "train --bogus 3": 2,
    "stack --stages 0": 2,
    "stack --kernel-size 3,4,5": 2,
    "compare nowhere": 2,
    f"compare {DIGITS} --epochs 0": 2,
    "report nowhere": 2,
    "export nowhere": 2,
    f"export {DIGITS} --to word": 2,
    "trian": 2,
}
"""Commands that need no torch, and how they end."""


def test_what_needs_no_torch_does_not_wait_for_it(tmp_path):
    """All in one process: none of them may leave it imported."""
    code = f"""
import shlex, sys
from typer.testing import CliRunner
from convcvx.cli import app
for command, status in {QUICK}.items():
    done = CliRunner().invoke(app, shlex.split(command))
    assert done.exit_code == status, (command, done.output)
    assert not {{"torch", "numba", "scipy"}} & sys.modules.keys(), command
for name in {[*COMMANDS]}:
    words = {{"COMP_WORDS": f"convcvx {{name}} --", "COMP_CWORD": "2", "_CONVCVX_COMPLETE": "complete_bash"}}
    assert "--json" in CliRunner().invoke(app, env=words, prog_name="convcvx").output, name
    assert "torch" not in sys.modules, name
assert CliRunner().invoke(app, ["train", "--pool", "nothing"]).exit_code == 2
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout == "True\n", done.stderr  # the control: what a text stands for takes torch to say


def test_the_command_alone_says_what_to_do_next_and_its_commands_exist():
    shown = cli("").stdout
    lines = [line.split("    ")[0].split()[1:] for line in shown.splitlines() if line.startswith("  convcvx")]
    assert len(lines) >= 6
    assert {line[0] for line in lines} <= {*COMMANDS, "--help"}
    assert cli(" ".join(lines[-1])).stdout


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_80_columns_and_no_line_of_it_is_broken(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    assert all(len(line) <= 80 for line in cli(f"{name} --help").stdout.splitlines())
    command = getattr(import_module(f"convcvx.cli.{name}"), name) if name else cli
    first, *rest = inspect.getdoc(command).split("\n\n")
    assert not name or first == COMMANDS[name]
    assert all(len(line) <= 78 for paragraph in rest for line in paragraph.splitlines())  # rich takes one at each side


def test_runs_lists_folders_with_accuracy_gap_and_scope(run, tmp_path):
    folder, metrics = run
    (found,) = answer(cli("runs", folder.parent, "--json"))["runs"]
    assert found["run"] == str(folder)
    for key in ("test_accuracy", "rel_gap", "scope", "n_filters", "status"):
        assert found[key] == metrics[key]
    assert answer(cli("runs", folder, "--json"))["runs"] == [found]
    assert "heuristic" in cli("runs", folder.parent).stdout
    shutil.copytree(folder, tmp_path / "cut", ignore=shutil.ignore_patterns("metrics.json"))
    shutil.copytree(folder, tmp_path / "odd")
    (tmp_path / "odd" / "metrics.json").write_text("{}")
    cut, odd = answer(cli("runs", tmp_path, "--json"))["runs"]
    assert "--resume" in cut["status"]
    assert "damaged" in odd["status"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"architectures": ["Bert"]}')
    assert "no run of convcvx" in cli("runs", tmp_path / "bert").output
    assert "train --preset demo" in said(cli("runs", tmp_path / "empty"))
    assert "no folder" in cli("runs", tmp_path / "nowhere", code=2).stderr


def test_runs_cuts_no_name_in_a_narrow_terminal(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    named = [tmp_path / f"a folder whose name is long, and ends with {end}" for end in ("one", "two")]
    for folder in named:
        shutil.copytree(run[0], folder)
    _, *lines = cli("runs", tmp_path).stdout.splitlines()
    assert [str(folder) in line and line.split()[-1] == "converged" for folder, line in zip(named, lines, strict=True)]


@pytest.mark.parametrize(("name", "job"), [("train", "training.train_into"), ("stack", "stacking.stack_job")])
@pytest.mark.parametrize("begins", [False, True])
def test_an_interrupt_tells_by_which_line_a_training_goes_on(name, job, begins, tmp_path, monkeypatch):
    def stop(*arguments, **_):
        if begins:
            run = next(argument for argument in arguments if isinstance(argument, Folder))
            run.folder.mkdir()
            (run.folder / run.CONTENTS.options).write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(f"convcvx.cli.{job}", stop)
    told = cli(name, "--data", "digits", "--pool", "2", "--out", tmp_path / "a run", code=130).stderr
    line = f"to go on: convcvx {name} --resume --out '{tmp_path}/a run'"
    assert (line if begins else "nothing was kept yet: give the command again") in told


@pytest.mark.parametrize("name", ["config.json", "beta_max.json"])
def test_a_run_whose_beta_is_not_its_networks_any_more_is_refused(name, run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    text = (folder / name).read_text()
    cut = text.rstrip()[:4] if name == "beta_max.json" else json.dumps({**json.loads(text), "beta_ratio": None})
    (folder / name).write_text(cut)
    for command in (["certify", folder], ["compare", folder, "--epochs", "1"], ["train", "--resume", "--out", folder]):
        told = refused(*command)
        assert "config.json and beta_max.json in" in told
        assert f"its network was trained at {run[1]['beta']}" in told
    assert (folder / name).read_text() == cut


@pytest.mark.parametrize(
    ("name", "content"), [("model.safetensors", b""), ("model.safetensors", None), ("beta_max.json", None)]
)
def test_what_a_run_has_lost_beside_its_checkpoint_is_made_anew(name, content, run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    again = answer(cli("train", "--resume", "--out", folder, "--json"))
    assert again["beta"] == pytest.approx(run[1]["beta"], rel=1e-6)
    assert again["primal"] == pytest.approx(run[1]["primal"], rel=1e-8)
    assert (folder / name).stat().st_size


def interrupted_at_its_certificate(monkeypatch, *arguments: object) -> str:
    """What such a command says."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("convcvx.training.finish.certify_on", stop)
        return cli(*arguments, code=130).stderr


def test_a_training_interrupted_at_its_certificate_has_left_its_network(run, tmp_path, monkeypatch):
    folder = tmp_path / "cut"
    told = interrupted_at_its_certificate(monkeypatch, *SMALL, "--out", folder)
    assert f"a network is in {folder}/model.safetensors; to go on: convcvx train --resume --out {folder}" in told
    early = convcvx.two_layer_cnn(folder).state_dict()
    assert not (folder / "certificate.json").exists()
    assert "finish it with" in refused("report", folder)
    resumed = answer(cli("train", "--resume", "--out", folder, "--json"))
    assert resumed["primal"] == pytest.approx(run[1]["primal"], rel=1e-8)
    final = convcvx.two_layer_cnn(folder).state_dict()
    assert all(torch.equal(early[name], final[name]) for name in final)


def test_a_finished_run_keeps_network_and_certificate_until_both_are_new(run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    names = ("model.safetensors", "certificate.json", "metrics.json")
    before = [(folder / name).read_bytes() for name in names]
    told = interrupted_at_its_certificate(monkeypatch, "train", "--resume", "--out", folder, "--tol", "0.002")
    assert f"interrupted; to go on: convcvx train --resume --out {folder}" in told
    assert [(folder / name).read_bytes() for name in names] == before
    cli("train", "--resume", "--out", folder, "--tol", "0.002")
    assert all((folder / name).read_bytes() != old for name, old in zip(names, before, strict=True))


def test_a_network_without_filters_says_why(tmp_path):
    small = ["--data", "digits", "--limit", "60", "--pool", "2", "--tol", "0.1"]
    shown = cli("train", *small, "--beta-ratio", "2", "--out", tmp_path / "none").stdout
    assert re.search(r"filters +0 \(beta 0\.\d+ is not below beta_max, 0\.\d+, from which on none helps", shown)
    assert str(convcvx.load(tmp_path / "none")).startswith("0 filters (beta ")


def test_runs_gives_a_stack_its_own_accuracy_and_the_gap_of_its_last_stage_kept(tmp_path):
    stage = dict.fromkeys(("primal", "dual", "rel_gap", "seconds"), 0.5)
    stage |= {"scope": "heuristic", "meaning": "", "status": "converged", "n_filters": 3}
    stages = [
        stage | {"train_accuracy": 0.1, "test_accuracy": 0.1, "stage": i, "kept": i < 3, "rel_gap": i / 10}
        for i in (1, 2, 3)
    ]
    (tmp_path / "stack").mkdir()
    (tmp_path / "stack" / "stack.json").write_text("{}")
    whole = {"stages": stages, "test_accuracy": 0.9, "seconds": 7.0, "status": "gap_above_tol"}
    (tmp_path / "stack" / "metrics.json").write_text(json.dumps(whole))
    (found,) = answer(cli("runs", tmp_path, "--json"))["runs"]
    assert (found["test_accuracy"], found["rel_gap"], found["status"]) == (0.9, 0.2, "gap_above_tol")


def test_data_says_where_sets_lie(tmp_path):
    assert answer(cli("data", "--data-dir", tmp_path, "--json"))["sets"] == dict.fromkeys(DOWNLOADS)
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "cifar10.npz").touch()
    assert answer(cli("data", "--data-dir", tmp_path, "--json"))["sets"]["mnist"] is None  # an empty folder
    (tmp_path / "MNIST" / "raw" / "file").touch()
    found = answer(cli("data", "--data-dir", tmp_path, "--json"))["sets"]
    assert found["mnist"] == str(tmp_path / "MNIST" / "raw")
    assert found["cifar10"] == str(tmp_path / "cifar10.npz")
    assert "downloads it" in said(cli("data", "--data-dir", tmp_path))


def test_quiet_prints_nothing_but_json_and_errors(run, tmp_path):
    quiet = cli(*SMALL, "--rank", "2", "--out", tmp_path / "run", "--quiet")
    assert quiet.output == ""
    both = cli("certify", run[0], "--quiet", "--json", *NO_SEARCH)
    assert both.stderr == ""
    assert answer(both)["n_filters"] > 0
    assert "beta must be" in cli("train", "--beta", "-1", "--quiet", code=2).stderr
    short = ["certify", run[0], "--tol", "1e-9", "--time-limit", "0.001"]
    quiet, loud = cli(*short, "--quiet", code=3), cli(*short, code=3)
    assert quiet.stdout == ""
    (line,) = quiet.stderr.splitlines()
    assert line.startswith("exit status 3: the gap is")
    assert line in loud.stdout.splitlines()


def test_exit_status_3_is_explained_where_it_happens(run, tmp_path):
    again = shutil.copytree(run[0], tmp_path / "again")
    short = cli("train", "--resume", "--out", again, "--tol", "1e-9", "--max-rounds", "1", code=3).stdout
    assert "exit status 3: the gap is above --tol, as all rounds are used up; raise --max-rounds\n" in short
    assert f"convcvx train --resume --out {again}" in short
    assert "exit status 3" in cli("certify", run[0], "--tol", "1e-9", "--time-limit", "0.001", code=3).stdout
    assert "exit status" not in cli("certify", run[0], *NO_SEARCH).stdout
    assert as_flags(Status.RELAXATION_GAP.remedy).endswith("use --solver sliding-fw, or raise --tol")
