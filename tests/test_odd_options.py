"""Options, config files and paths that no training can keep: one line that names them, exit status 2, at once."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from errno import ENOMEM
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import DIGITS, invoke, refused
from PIL import Image

import convcvx
from convcvx.errors import InputError
from convcvx.pooling import Pooling
from convcvx.storage.reading import json_text
from convcvx.training.option import parse_pair
from convcvx.training.options import TrainConfig


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--kernel-size", "²"], "kernel_size must be a whole number such as 3"),
        (["--kernel-size", "9" * 5000], "kernel_size must be a whole number such as 3"),
        (["--stride", "100000000000000000000"], "stride must be a whole number such as 3"),
        (["--stride", "5000"], "stride must be at most 4096; got 5000"),
        (["--padding", "10000"], "padding must be at most 4096; got 10000"),
        (
            ["--padding", "4000"],
            "padding must be smaller than patches, 3x3 pixels, lest these see nothing but it; got 4000",
        ),
        (
            ["--kernel-size", "4000", "--padding", "3999"],
            "GiB are free: take a smaller kernel, a larger stride or less",
        ),
        (["--pool", "9" * 5000], "pool must be global, none, a grid"),
        (["--shifts", "1000000000"], "shifts must be at most 4096; got 1000000000"),
        (["--shifts", "8"], "shifts must be smaller than the images, 8x8; got 8"),
        (["--dictionary", "9", "--slide", "1", "--crops", "100000000000"], "crops must be at most 4096"),
        (["--dictionary", "9", "--slide", "1", "--crops", "8"], "crops must be smaller than the images, (8, 8); got 8"),
        (["--gates", "1000000000"], "gates must be at most 100000; got 1000000000"),
        (["--dictionary", "100000000"], "dictionary must be at most 100000; got 100000000"),
        (["--dictionary", "90000", "--pool", "4"], "GiB are free: ask for fewer filters or cells"),
        (["--dictionary-source", "nonsense"], "dictionary_source must be one of patches, kmeans; got 'nonsense'"),
        (["--beta", "1e-300"], "beta must be at least 1e-30; got 1e-300"),
        (["--beta", "1e300"], "beta must be at most 1e+30; got 1e+300"),
        (["--beta", "inf"], "beta must be a positive float; got inf"),
        (["--beta-ratio", "1e-300"], "beta_ratio must be at least 1e-12"),
        (["--whiten", "--whiten-epsilon", "1e-300"], "whiten_epsilon must be at least 1e-12; got 1e-300"),
        (["--contrast", "--contrast-epsilon", "-1"], "contrast_epsilon must be a positive float; got -1"),
        (["--validation", "nan"], "validation must be a non-negative float; got nan"),
        (["--validation", "1"], "validation must be a fraction between 0 and 1"),
        (["--seed", "-1"], "seed must be a whole number >= 0; got -1"),
        (["--limit", "0"], "limit must be a whole number >= 1; got 0"),
        (["--rank", "100000000000000000000"], "rank must be at most 9223372036854775807; got 1"),
    ],
)
def test_options_out_of_bounds_are_refused(tmp_path, options, said):
    assert said in refused("train --limit 30", *options, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("compare", ["--filters", "1000000000"], "filters must be at most 100000; got 1000000000"),
        ("compare", ["--epochs", "1000000000"], "epochs must be at most 1000000"),
        ("compare", ["--batch", "0"], "batch must be a whole number >= 1; got 0"),
        ("certify", ["--tol", "nan"], "tol must be a positive float; got nan"),
        ("certify", ["--seed", "-1"], "seed must be a whole number >= 0; got -1"),
        ("certify", ["--gates", "1000000000"], "gates must be at most 100000"),
        ("certify", ["--beta", "nan"], "beta must be a positive float; got nan"),
    ],
)
def test_options_of_other_commands_are_checked_too(command, options, said):
    assert said in refused(command, DIGITS, *options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--stages", "1000000"], "stages must be at most 100; got 1000000"),
        (["--channels", "1000000000"], "channels must be at most 100000"),
        (["--downsample", "9" * 5000], "downsample must be whole numbers, one value"),
        (["--beta-ratio", "nan"], "beta_ratio must be a positive float; got nan"),
        (["--dictionary", "100000000,none"], "dictionary must be at most 100000"),
    ],
)
def test_options_of_a_stack_are_checked_too(tmp_path, options, said):
    assert said in refused("stack", *options, "--out", tmp_path / "stack")


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("train", ["--limit", "1_0"], "must be a whole number; got '1_0'"),
        ("train", ["--beta", "1_0"], "must be a number; got '1_0'"),
        ("train", ["--beta", "\u0661"], "must be a number; got '\u0661'"),
        ("train", ["--loss", "huber:1_0"], "huber:DELTA needs a number; got 'huber:1_0'"),
        ("train", ["--activation", "leaky-relu:0.0_1"], "activation must be"),
        ("train", ["--class-weight", "3=1_0"], "class_weight must be"),
        ("train", ["--pool", "1_0"], "pool must be"),
        ("train", ["--kernel-size", "1_0"], "kernel_size must be"),
        ("stack", ["--rank", "1_0"], "rank must be whole numbers"),
        ("stack", ["--beta-ratio", "0.0_1"], "beta_ratio must be numbers"),
        ("stack", ["--channels", "1_0"], "channels must be whole numbers"),
        ("compare", ["--epochs", "1_0"], "must be a whole number; got '1_0'"),
    ],
)
def test_what_python_alone_takes_for_a_number_is_none(command, options, said):
    assert said in refused(command, *([DIGITS] if command == "compare" else []), *options).replace("│ ", "")


@pytest.mark.parametrize("beta", ["0.1", "1_0"])
def test_a_text_is_no_number_in_python(beta):
    with pytest.raises(InputError, match=f"beta must be a positive float; got '{beta}'"):
        convcvx.solve(np.ones((4, 3)), [0, 1, 0, 1], beta)


@pytest.mark.parametrize("command", ["train", "stack"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("beta = " + "9" * 400 + ".0", "beta must be a positive float; got inf"),
        ("beta = " + "9" * 400, "beta must be a positive float; got 9999"),
        ("limit = " + "9" * 5000, "cannot read --config"),
        ("limit = 0x" + "f" * 5000, "limit must be"),
        ("kernel_size = 0x" + "f" * 5000, "kernel_size must be a whole number such as 3"),
        ("kernel_size = true", "kernel_size must be"),
        ("limit = true", "limit must be a whole number"),
        ("beta = true", "beta must be a number; got True"),
        ("limit = " + "[" * 900 + "]" * 900, ""),
        ("limit = " + "[" * 100000, "cannot read --config"),
        ('"' + "k" * 9000 + '" = 1', "unknown option"),
        ("[limit]\na = 1", "limit must be a whole number; got {'a': 1}"),
    ],
    ids=lambda value: value[:12],
)
def test_config_files_that_go_too_far_are_refused(tmp_path, command, content, said):
    (tmp_path / "options.toml").write_text(content)
    message = refused(command, "--config", tmp_path / "options.toml", "--out", tmp_path / "run")
    assert said in message or (command == "stack" and "unknown option" in message)
    assert len(message) < 1500


def test_a_pipe_is_no_config_file(tmp_path):
    os.mkfifo(tmp_path / "options.toml")
    assert "cannot read --config" in refused("train", "--config", tmp_path / "options.toml")


@pytest.mark.parametrize("name", ["network.pt", "network.safetensors"])
def test_a_pipe_is_no_network(name, tmp_path):
    os.mkfifo(tmp_path / name)
    assert "it is no file" in refused("certify --data digits --beta 0.1", tmp_path / name)


@pytest.mark.parametrize("name", ["data.npz", "data.csv", "data.parquet", "data"])
def test_a_pipe_is_no_data(name, tmp_path):
    os.mkfifo(tmp_path / name)
    said = refused("train", "--data", tmp_path / name)
    assert " is no file" in said or "is neither a file nor a folder" in said


def test_values_of_another_kind_are_refused_from_python_too():
    for wrong in ("1e5", True, [1], 10**400):
        with pytest.raises(InputError, match="tune must be a"):
            TrainConfig.from_dict({"tune": wrong}).check()
    assert TrainConfig.from_dict({"whiten": None}).whiten is False  # as runs of earlier versions have it
    with pytest.raises(InputError, match="data must be a text; got None"):
        TrainConfig.from_dict({"data": None})
    assert parse_pair("kernel_size", " 3 x 5 ") == (3, 5)
    assert Pooling.of("12x3").size == (12, 3)


# Paths and streams


@pytest.mark.parametrize("path", ["x" * 300, "a/" * 3000, "loop", "loop/run", "file/run", "a\0b"])
def test_odd_places_for_a_run_are_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    for command in ("train", "stack"):
        refused(f"{command} --limit 30 --out", path)
    for command in ("certify", "compare", "report"):
        refused(command, path)
    refused("train --config", path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "loop"]


def test_a_current_folder_that_is_gone_is_no_traceback(tmp_path):
    (tmp_path / "gone").mkdir()
    here = os.getcwd()
    os.chdir(tmp_path / "gone")
    try:
        (tmp_path / "gone").rmdir()
        assert "convcvx: error: " in refused("train --limit 30")
        assert "convcvx: error: " in refused("report nowhere")
    finally:
        os.chdir(here)


def test_a_process_whose_folder_is_gone_is_told_so(tmp_path):
    """Before torch's libraries, which do not load there and end the process in words of their own."""
    gone = shlex.quote(str(tmp_path / "gone"))
    leave = f"mkdir {gone} && cd {gone} && rmdir {gone}"
    done = subprocess.run(
        ["sh", "-c", f"{leave} && {shlex.quote(sys.executable)} -P -m convcvx.cli runs --json"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 2
    assert "convcvx: error: the current folder is gone: change to one that is there" in done.stderr
    assert "FATAL" not in done.stderr
    assert json.loads(done.stdout)["status"] == "bad_input"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is full")
def test_a_help_text_on_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "convcvx.cli", "train", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("convcvx: error: the system refuses")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_warnings_are_lines_of_the_command(tmp_path):
    """In a process, as what Python makes of warnings is its own."""
    images = tmp_path / "set"
    for part in ("train", "test"):
        for name in "ab":
            (images / part / name).mkdir(parents=True)
            for k in range(4):
                Image.fromarray(np.full((4, 4), 40 * k + 90 * (name == "a"), np.uint8)).save(
                    images / part / name / f"{k}.png"
                )
    (images / "train" / "a" / "notes.txt").write_text("no image")
    (images / "train" / "a" / "loop").symlink_to(".")
    command = [
        sys.executable,
        "-m",
        "convcvx.cli",
        "train",
        "--data",
        str(images),
        "--kernel-size",
        "2",
        "--tol",
        "0.9",
    ]
    shown = subprocess.run([*command, "--out", str(tmp_path / "run")], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    said = [line for line in shown.stderr.splitlines() if not line.endswith(" ...")]  # but for long phases
    assert [line.split(": ")[:2] for line in said] == [["convcvx", "warning"]]
    silent = subprocess.run([*command, "--out", str(tmp_path / "two"), "--quiet"], capture_output=True, text=True)
    assert (silent.returncode, silent.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is full")
def test_a_full_disk_and_a_reader_that_has_gone_are_told_of(tmp_path):
    report = [sys.executable, "-m", "convcvx.cli", "train", "--config", "nowhere.toml", "--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(report, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    gone = subprocess.Popen(report, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    gone.stdout.close()
    said = gone.stderr.read()
    assert gone.wait() == 2
    assert "Traceback" not in said
    assert "Exception ignored" not in said


def test_too_little_memory_is_told_of(monkeypatch):
    no_room = OSError("libllvmlite.so: failed to map segment from shared object")
    behind = OSError("Could not find/load shared object file 'libllvmlite.so'")
    behind.__context__ = no_room
    short = "DefaultCPUAllocator: can't allocate memory: you tried to", "can't allocate lock"
    of_system = ImportError(str(no_room)), behind, OSError(ENOMEM, os.strerror(ENOMEM))
    for error in (MemoryError(), *map(RuntimeError, short), *of_system):
        monkeypatch.setattr("convcvx.cli.training.train_into", failing(error))
        assert "out of memory: give fewer or smaller images" in refused("train")
    for bug in (RuntimeError("a bug"), ImportError("a bug")):
        monkeypatch.setattr("convcvx.cli.training.train_into", failing(bug))
        with pytest.raises(type(bug), match="a bug"):  # a traceback: this is no fault of the input
            invoke("train")


def test_threads_and_libraries_that_the_system_refuses_are_no_lack_of_memory(monkeypatch):
    for error, said in {
        RuntimeError("can't start new thread"): "the system starts no more threads: too many run (ulimit -u)",
        OSError("lib.so: failed to map segment from shared object: Operation not permitted"): "the system refuses: lib",
    }.items():
        monkeypatch.setattr("convcvx.cli.training.train_into", failing(error))
        assert said in refused("train")


def failing(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_json_has_no_infinity():
    text = json_text({"a": float("inf"), "b": [float("nan"), (1.0, -float("inf"))], "c": True})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": [None, [1.0, None]], "c": True}
