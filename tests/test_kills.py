"""Killed, or out of disk space, before every single file operation: no finished run is lost, and `--resume` goes on.

Commands run in this process under an audit hook, which sees each operation before it happens. A kill is an exception
there, and from then on for every further operation: whatever `finally` blocks would do, a killed process does not.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import invoke
from safetensors.torch import load_file

import convcvx.training.finish
import convcvx.training.jobs
import convcvx.training.resolve
from convcvx.data.datasets import Dataset
from convcvx.problem import Problem
from convcvx.training.journal import Checkpoint
from convcvx.training.options import TrainConfig

TRAIN = "train --limit 40 --stride 2 --rank 2 --pool 2 --beta-ratio .1 --tol .1"
OTHER = "train --limit 40 --stride 2 --rank 2 --pool 2 --beta-ratio .3 --tol .1"
SLIDE = "train --limit 60 --stride 2 --pool 2 --dictionary 4 --slide 2 --max-rounds 0 --tol 1"
STACK = (
    "stack --limit 100 --validation .2 --stages 2 --kernel-size 3 --padding 1 --pool 2 --channels 4 --beta-ratio .05 "
    "--tol .5 --max-rounds 2"
)
CHANGING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "fcntl.flock")
TAKE_SPACE = ("open", "os.mkdir")
PASSING = ("began", "seconds", "core_seconds", "compiling_seconds", "peak_memory_mb", "cache_mb")
"""What differs between two runs that are alike."""


class Killed(BaseException):
    """The end of the process."""


class Disk:
    """Counts the operations that change files below `root`, and lets one of them strike."""

    def __init__(self) -> None:
        self.root: str | None = None
        self.kills = 0
        self._strike_at: int | None = None
        self._full = False

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.root is None or event not in OPERATIONS or not self._changes(event, arguments):
            return
        self.count += 1
        if self._strike_at is None or self.count < self._strike_at:
            return
        if not self._full:
            if self.count == self._strike_at and event == "os.rename":
                self._tear(arguments[0])
            raise Killed
        if event in TAKE_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _changes(self, event: str, arguments: tuple) -> bool:
        if event == "fcntl.flock":
            return True
        if not isinstance(arguments[0], str | os.PathLike) or not os.fspath(arguments[0]).startswith(self.root):
            return False
        return event != "open" or bool(arguments[2] & CHANGING)

    def _tear(self, source: str | os.PathLike[str]) -> None:
        """A file that was not yet flushed may be there by half."""
        if os.fspath(source).endswith(".tmp"):
            root, self.root = self.root, None
            os.truncate(source, os.path.getsize(source) // 2)
            self.root = root

    def run(self, root: Path, command: str, strike_at: int | None = None, full: bool = False) -> Any:
        """The result of `command` with its --out in `root`; None if it was killed before operation `strike_at`."""
        self.root, self.count, self._strike_at, self._full = str(root), 0, strike_at, full
        try:
            result = invoke(command, "--out", root / "run", "--json")
        except Killed:
            self.kills += 1
            return None
        finally:
            self.root = None
        return result


DISK = Disk()
sys.addaudithook(DISK)


@pytest.fixture(autouse=True)
def cheap(monkeypatch) -> None:
    monkeypatch.setattr(convcvx.training.resolve, "load_sets", functools.cache(convcvx.training.resolve.load_sets))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def replayed(monkeypatch) -> None:
    """Trainings that do the same to files as real ones, but compute nothing twice."""

    def once(compute: Callable[..., Any], replay: Callable[..., None] = lambda *_: None) -> Callable[..., Any]:
        known: dict[Any, Any] = {}

        def computed(*arguments: Any, **options: Any) -> Any:
            key = [part for part in arguments if isinstance(part, TrainConfig | torch.Size)]
            key += [part.images.shape for part in arguments if isinstance(part, Dataset)]
            key += [(part.responses.images.shape, part.beta) for part in arguments if isinstance(part, Problem)]
            if tuple(key) in known:
                replay(known[tuple(key)], *arguments)
            else:
                known[tuple(key)] = compute(*arguments, **options)
            return known[tuple(key)]

        return computed

    def solve(problem, config, report, run, checkpoint, **options):
        return optimise(problem, config, report, run, Checkpoint(), **options)

    def write(optimised, problem, config, report, run, checkpoint):
        run.save_beta_max(optimised.beta_max)
        run.save_state(optimised.solution)

    optimise = convcvx.training.jobs.optimise
    monkeypatch.setattr(convcvx.training.jobs, "optimise", once(solve, write))
    monkeypatch.setattr(convcvx.training.finish, "certify_on", once(convcvx.training.finish.certify_on))
    monkeypatch.setattr(convcvx.training.jobs, "training_problem", once(convcvx.training.jobs.training_problem))
    monkeypatch.setattr(convcvx.training.jobs, "load_data", functools.cache(convcvx.training.jobs.load_data))


def lasting(value: Any) -> Any:
    """What two runs that are alike have in common."""
    if isinstance(value, dict):
        kept = {name: lasting(part) for name, part in value.items() if name not in PASSING}
        return kept | ({"out": kept["out"].rpartition("/run")[1:]} if "out" in kept else {})
    return [lasting(part) for part in value] if isinstance(value, list) else value


def content(folder: Path) -> dict[str, Any]:
    """What lies in the folder of a run, by name."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".json":
            found[str(path.relative_to(folder))] = lasting(json.loads(path.read_text()))
        elif path.suffix == ".safetensors":
            found[str(path.relative_to(folder))] = load_file(path)
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def alike(one: Any, other: Any) -> bool:
    """Equal to rounding: how BLAS sums depends on where in memory the summands lie."""
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(alike(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-7)
    return one == pytest.approx(other, rel=1e-8, abs=1e-12) if isinstance(one, float) else one == other


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {name: (one.get(name), other.get(name)) for name in one | other if not alike(one.get(name), other.get(name))}


@pytest.fixture
def reference(tmp_path) -> Callable[[str], dict[str, Any]]:
    @functools.cache
    def of(command: str) -> dict[str, Any]:
        root = tmp_path / f"reference-{abs(hash(command))}"
        root.mkdir()
        assert DISK.run(root, command).exit_code in (0, 3)
        assert os.listdir(root) == ["run"]
        return content(root / "run")

    return of


def strikes(step: int = 1) -> Iterator[int]:
    yield from range(1, 10_000, step)


def check_that_it_goes_on(tmp_path: Path, command: str, whole: dict[str, Any], *, full: bool, step: int = 1) -> int:
    """Strike before each operation in turn, until none is left; returns how many there were."""
    for at in strikes(step):
        root = tmp_path / f"{'full' if full else 'killed'}-{at}"
        root.mkdir()
        stopped = DISK.run(root, command, at, full)
        if stopped is not None and stopped.exit_code in (0, 3):
            return at - 1
        if full:
            assert stopped.exit_code == 2
            assert "No space left on device" in stopped.output
        resumed = DISK.run(root, f"{command} --resume")
        assert resumed is not None
        assert resumed.exit_code in (0, 3), resumed.output
        assert not differences(content(root / "run"), whole), f"struck before operation {at}"
        assert os.listdir(root) == ["run"]
        shutil.rmtree(root)
    raise AssertionError


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True], ids=["killed", "full"])
@pytest.mark.parametrize("command", [TRAIN, SLIDE, STACK], ids=["train", "slide", "stack"])
def test_a_run_goes_on_from_every_file_operation_at_which_it_is_struck(
    command, full, tmp_path, reference, request, counted
):
    if command is STACK:  # as many operations as three trainings, each of them trainings of its own
        request.getfixturevalue("replayed")
    struck = check_that_it_goes_on(tmp_path, command, reference(command), full=full)
    counted("runs struck by a full disk, 0 lost" if full else "runs killed, 0 lost", struck)
    assert struck > 20


def test_a_run_goes_on_from_a_sample_of_file_operations(tmp_path, reference, replayed):
    for full in (False, True):
        assert check_that_it_goes_on(tmp_path, TRAIN, reference(TRAIN), full=full, step=5) > 20


def finished_runs(root: Path, *known: dict[str, Any]) -> list[int]:
    """Which of the `known` runs lie complete below `root`, anywhere."""
    found = [content(path) for path in root.iterdir() if path.is_dir()]
    found = [{name: part for name, part in run.items() if name[0] != "." and name != "notes.txt"} for run in found]
    return [number for number, run in enumerate(known) if any(alike(run, other) for other in found)]


def check_replacement(tmp_path: Path, reference: Any, first: range, stride: int) -> int:
    """Kill a replacement before its operations `first`, and the command after it; returns how many kills there were.

    The second kill strikes before every `stride`-th operation, others after each first kill.
    """
    old, new = reference(TRAIN), reference(OTHER)
    kept = tmp_path / "kept"
    kept.mkdir()
    assert DISK.run(kept, TRAIN).exit_code == 0
    (kept / "run" / "notes.txt").write_text("mine")
    before, root = DISK.kills, tmp_path / "struck"
    for at in first:
        once = tmp_path / "once"
        shutil.copytree(kept, once)
        if DISK.run(once, f"{OTHER} --overwrite", at) is not None:
            break
        check_kept(once, old, new)
        for following in (f"{OTHER} --overwrite", "train --resume"):
            for again in range(1 + at % stride, 1000, stride):
                shutil.copytree(once, root)
                ended = DISK.run(root, following, again)
                check_kept(root, old, new)
                if ended is None:
                    done = DISK.run(root, "train --resume")
                    assert done is not None
                    assert done.exit_code == 0, done.output
                    check_kept(root, old, new)
                check_settled(root, old, new)
                shutil.rmtree(root)
                if ended is not None:
                    assert ended.exit_code == 0, ended.output
                    break
        shutil.rmtree(once)
    return DISK.kills - before


def check_kept(root: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """The old run or the new one is there, complete, in its place or in one of those that messages name."""
    assert finished_runs(root, old, new)
    assert all(path.name in ("run", ".run.new", ".run.replaced", ".run.lock") for path in root.iterdir())
    assert [path.read_text() for path in root.rglob("notes.txt")] == ["mine"]


def check_settled(root: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """One finished run in its place, and nothing beside it."""
    assert os.listdir(root) == ["run"]
    run = content(root / "run")
    assert run.pop("notes.txt") == b"mine"
    assert alike(run, old) or alike(run, new)


@pytest.mark.slow
def test_two_kills_around_overwrite_lose_nothing(tmp_path, reference, replayed, counted):
    kills = check_replacement(tmp_path, reference, range(1, 1000), 5)
    counted("replaced runs killed twice, 0 lost", kills)
    assert kills > 500


def test_a_sample_of_kills_around_overwrite_loses_nothing(tmp_path, reference, replayed):
    assert check_replacement(tmp_path, reference, range(3, 100, 17), 13) > 10
