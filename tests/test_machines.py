"""Machines of other kinds: nowhere to cache, other encodings and systems, few threads, what other launchers left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from convcvx.errors import InputError
from convcvx.responses.team import Team
from convcvx.terms.launch import LAUNCHED
from convcvx.training.run import Run

PACKAGE = Path(__file__).parents[1] / "convcvx"
TRAIN = ["train", "--limit", "30", "--stride", "2", "--pool", "2", "--rank", "2", "--beta-ratio", "0.2", "--tol", "0.1"]


def python(*arguments: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {name: value for name, value in os.environ.items() if name not in (*LAUNCHED, "NUMBA_CACHE_DIR")}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        cwd=PACKAGE.parents[1],  # not this checkout, which would come before PYTHONPATH
        env=known | {"PYTHONPATH": str(PACKAGE.parent)} | environment,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


# Compiled code


@pytest.mark.slow
def test_an_installation_that_cannot_be_written_to_compiles_anew_and_says_so_once(tmp_path):
    """Files where folders would have to be keep even root from writing."""
    package = tmp_path / "convcvx"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (package, *(path for path in package.rglob("*") if path.is_dir())):
        (folder / "__pycache__").write_text("no folder")
    nowhere = {"HOME": os.devnull, "XDG_CACHE_HOME": os.devnull, "PYTHONPATH": str(tmp_path)}
    code = "import convcvx, convcvx.arrangements._rays as r; print(convcvx.__file__, r._dot.stats.cache_path)"
    done = python("-c", code, **nowhere)
    assert done.stdout.split() == [str(package / "__init__.py"), "None"]
    assert done.stderr.count("compiled code cannot be kept") == 1
    control = python("-c", code, **nowhere, NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    assert str(tmp_path / "cache") in control.stdout
    assert not control.stderr


# Other builds


def test_torchvision_can_be_imported_where_its_operators_are_missing(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("""
import torch
torch.library.register_fake("torchvision::nms")(lambda *arguments: None)  # as the real one does
""")
    path = {"PYTHONPATH": os.pathsep.join(map(str, (tmp_path, PACKAGE.parent)))}
    assert "operator torchvision::nms does not exist" in python("-c", "import torchvision", code=1, **path).stderr
    code = "import convcvx._compat as c; c.import_torchvision()\nimport torchvision; print(torchvision.__file__)"
    assert python("-c", code, **path).stdout.strip() == str(tmp_path / "torchvision" / "__init__.py")


# Terminals


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.slow
def test_every_help_can_be_read_on_any_terminal():
    code = """
import sys
from convcvx.cli import app, main
for encoding in ("ascii", "cp1252"):
    for command in [[], *([command.name] for command in app.registered_commands)]:
        sys.stdout.reconfigure(encoding=encoding, errors="strict")
        sys.argv = ["convcvx", *command, "--help"]
        try:
            main()
        except SystemExit as ended:
            assert ended.code == 0
sys.stdout.reconfigure(errors="strict")
try:
    print("Σ")
except UnicodeEncodeError:
    print("negative control")
"""
    shown = python("-c", code).stdout
    assert shown.count("Usage:") >= 2 * 6
    assert shown.count("\\u03a3 loss") == 2
    assert "negative control" in shown


@pytest.mark.slow
def test_a_training_can_be_followed_on_any_terminal(tmp_path):
    done = python("-m", "convcvx", *TRAIN, "--out", str(tmp_path / "run-β"), **ASCII)
    assert "g/beta" in done.stdout
    assert "run-\\" in done.stdout


def test_a_report_can_name_a_folder_whose_name_is_no_text(tmp_path):
    assert Run(tmp_path).save_report("run-\udcce").read_text() == "run-\\udcce"


# Windows


@pytest.mark.slow
def test_the_package_needs_nothing_that_windows_lacks():
    """What others import on Linux is theirs: they have other code for Windows."""
    code = """
import multiprocessing.util, os, pathlib, sys
import numba, rich.console, scipy.optimize, sklearn.base, torch, typer
for name in ("fork", "forkpty", "register_at_fork", "getuid", "sched_getaffinity"):
    del os.__dict__[name]
for name in ("resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[name] = None
import convcvx.cli, convcvx.estimator, convcvx.training.progress
convcvx.training.progress.Path = lambda name: pathlib.Path("no") / name[1:]
print(convcvx.training.progress.peak_memory_mb())
"""
    assert python("-c", code).stdout.strip() == "None"


# Threads


@pytest.mark.slow
def test_compiled_work_takes_as_many_threads_as_torch_and_leaves_the_number_alone():
    code = """
import numpy as np, torch, convcvx
from concurrent.futures import ThreadPoolExecutor
start, used = ThreadPoolExecutor.__init__, set()
ThreadPoolExecutor.__init__ = lambda self, threads, **options: used.add(threads) or start(self, threads, **options)
convcvx.problem.SMALL = convcvx.responses.streams.SMALL = 0  # what is small takes one thread in any case
x = np.random.default_rng(0).standard_normal((40, 4, 3))
for threads in (1, 3):
    torch.set_num_threads(threads)
    convcvx.solve(x, np.arange(40) % 3, 0.02, oracle="branch-and-bound", tol=0.01)
    print(max(used), torch.get_num_threads())
"""
    assert python("-c", code).stdout.split() == ["1", "1", "3", "3"]


# Processes


def test_a_variable_that_other_work_left_starts_no_team(monkeypatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (Team.of_torchrun().rank, Team.of_torchrun().size) == (0, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert Team.of_torchrun().size == 1
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert (Team.of_torchrun().rank, Team.of_torchrun().size) == (1, 4)
    for name, value, message in [
        ("RANK", "4", "RANK must be below WORLD_SIZE = 4; got 4"),
        ("WORLD_SIZE", "many", "WORLD_SIZE must be a whole number; got 'many'"),
        ("RANK", "-1", "RANK must be a whole number; got '-1'"),
    ]:
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(InputError, match=message):
                Team.of_torchrun()


def test_whoever_waits_for_other_processes_says_so(monkeypatch, capsys):
    for name, value in zip(LAUNCHED, ["0", "2", "127.0.0.1", "29500"], strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: pytest.exit("it would wait here"))
    with pytest.raises(pytest.exit.Exception), Team.of_torchrun():
        pass
    said = capsys.readouterr().err
    assert "process 0 of 2 waits for the others at 127.0.0.1:29500" in said
    assert "unset them to work alone" in said
