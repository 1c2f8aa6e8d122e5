"""Many small processes that train together: dictionaries, slides and stacks as in one, restarts, and limits of time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convcvx.responses.processes import RESUME_ADVICE

CREW = Path(__file__).parent / "helpers" / "crew.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
DICTIONARY = (
    "train --kernel-size 3 --padding 1 --pool 2 --dictionary 16 --dictionary-source kmeans --threshold 0.25 --flips "
    "--whiten --hidden-bias --max-rounds 0 --tune 0.1 --tol 1 --json"
)
STACK = (
    "stack --limit 300 --validation 0.2 --stages 2 --kernel-size 3 --padding 1 --pool 2 --dictionary 16 --flips yes "
    "--whiten yes --hidden-bias --max-rounds 0 --tol 1 --channels 8 --heads joint --json"
)
OBJECTIVES = ("primal", "beta", "beta_max", "train_accuracy", "test_accuracy", "n_filters")


def crew(size: int, segment: int, command: str, out: Path) -> subprocess.CompletedProcess[str]:
    """`command` in `size` processes, each of which has images by segments of `segment`."""
    whole = [sys.executable, str(CREW), str(size), str(segment), *command.split(), "--out", str(out)]
    return subprocess.run(whole, capture_output=True, text=True, env=ENVIRONMENT, timeout=400)


def result_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return json.loads(line)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "segment", "sizes"),
    [(300, 10, (2, 16)), (12, 1, (11,))],  # the last: shares of one image, and processes that have none
)
def test_a_dictionary_is_that_of_one_process_in_however_many(tmp_path, limit, segment, sizes):
    alone = result_of(crew(1, segment, f"{DICTIONARY} --limit {limit}", tmp_path / "1"))
    for size in sizes:
        together = result_of(crew(size, segment, f"{DICTIONARY} --limit {limit}", tmp_path / str(size)))
        for name in OBJECTIVES:
            assert together[name] == pytest.approx(alone[name], rel=1e-6), (size, name)
        assert together["family_gap"] == pytest.approx(alone["family_gap"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "shape"), [("mnist", (28, 28)), ("cifar10-fast", (32, 32, 3))])
def test_a_whole_preset_is_that_of_one_process_and_goes_on_in_any_number(tmp_path, preset, shape):
    """From k-means to the proof over the family; what a killed leader left goes on in other processes."""
    random = np.random.default_rng(0)
    drawn = {"train": 160, "test": 40}
    classes = {name: random.integers(3, size=count) for name, count in drawn.items()}
    shades = {name: np.sin(np.arange(shape[1]) * (y[:, None] + 1) / 3)[:, None] for name, y in classes.items()}
    shades = {name: x[..., None] if len(shape) == 3 else x for name, x in shades.items()}
    pixels = {f"x_{name}": 90 + 60 * x + 40 * random.random((len(x), *shape)) for name, x in shades.items()}
    labels = {f"y_{name}": np.where(random.random(len(y)) < 0.2, 0, y) for name, y in classes.items()}
    np.savez(tmp_path / "images.npz", **{name: x.astype(np.uint8) for name, x in pixels.items()}, **labels)
    whole = f"train --preset {preset} --data {tmp_path / 'images.npz'} --dictionary 12 --json"
    alone = result_of(crew(1, 20, whole, tmp_path / "1"))
    together = result_of(crew(3, 20, whole, tmp_path / "3"))
    for name in ("metrics.json", "model.safetensors", "certificate.json"):
        (tmp_path / "3" / name).unlink()
    resumed = result_of(crew(2, 20, "train --resume --json", tmp_path / "3"))
    assert alone["primal"] > 1e-3
    assert alone["family_gap"] < 0.1
    for found in (together, resumed):
        for name in (*OBJECTIVES, "family_size"):
            assert found[name] == pytest.approx(alone[name], rel=1e-4), name
        assert found["family_gap"] == pytest.approx(alone["family_gap"], rel=0.2)
    assert resumed["family_gap"] == pytest.approx(together["family_gap"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("Features.batches", "worker 1 of 3 failed: OSError: disk gone"),  # all hear of it, and stop
        ("GramBlocks.times", "process 1: OSError: disk gone"),  # in the middle of a sum: nobody listens
    ],
)
def test_a_process_that_fails_while_all_talk_ends_the_run_in_all(tmp_path, monkeypatch, method, told):
    monkeypatch.setitem(ENVIRONMENT, "CREW_BREAKS", method)
    done = crew(3, 20, f"{DICTIONARY} --limit 100", tmp_path / "run")
    assert done.returncode == 1
    assert json.loads(done.stdout)["status"] == "lost_worker"
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_stack_with_joint_heads_is_that_of_one_process(tmp_path):
    alone = result_of(crew(1, 20, STACK, tmp_path / "1"))
    together = result_of(crew(3, 20, STACK, tmp_path / "3"))
    assert len(together["stages"]) == len(alone["stages"]) == 2
    for ours, theirs in zip(together["stages"], alone["stages"], strict=True):
        for name in (*OBJECTIVES, "kept", "score", *(name for name in theirs if name.startswith("joint"))):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name
    files = [sorted(path.name for path in (tmp_path / run).iterdir()) for run in ("1", "3")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_a_slide_in_three_processes_reaches_what_one_reaches(tmp_path):
    """Not the same steps: mini-batches are drawn of the images of each. The objective is as good."""
    sliding = f"{DICTIONARY} --limit 300 --slide 20 --beta-ratio 0.01"
    alone, together = (result_of(crew(size, 20, sliding, tmp_path / str(size))) for size in (1, 3))
    still = result_of(crew(1, 20, f"{DICTIONARY} --limit 300 --beta-ratio 0.01", tmp_path / "still"))
    assert together["primal"] == pytest.approx(alone["primal"], rel=0.05)
    assert together["primal"] != alone["primal"]
    assert still["primal"] > 1.1 * max(alone["primal"], together["primal"])


@pytest.mark.slow
def test_all_end_when_the_time_is_over(tmp_path):
    began = time.monotonic()
    done = crew(3, 20, f"{DICTIONARY} --limit 300 --slide 100000 --time-limit 40", tmp_path / "run")
    metrics = result_of(done)
    assert metrics["seconds"] < 80
    assert time.monotonic() - began < 240  # with starting three processes on busy cores
    assert not any("Traceback" in line for line in done.stderr.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [("--bogus 3", "No such option: --bogus"), ("--beta", "requires an argument"), ("--beta -1", "positive float")],
)
def test_one_process_of_two_says_what_is_bad(tmp_path, options, said):
    """Whether click finds it or we do."""
    command = [*TORCHRUN, "--nproc-per-node", "2", "-m", "convcvx.cli", "train", *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path, timeout=200)
    assert done.returncode == 1  # torchrun's, whatever a process ends with
    assert done.stderr.count(said) == 1, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_started_anew_and_goes_on(tmp_path, rank):
    out = tmp_path / "run"
    small = tmp_path / "small.py"
    small.write_text(
        "from convcvx.cli import main\nfrom convcvx.responses import portions\nportions.SEGMENT = 20\nmain()"
    )
    sliding = f"{DICTIONARY} --limit 300 --slide 60 --out {out}".split()
    running = subprocess.Popen(
        [*TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "1", str(small), *sliding],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    deadline = time.monotonic() + 200
    while not (out / "descent.safetensors").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for pid in Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
            os.kill(int(pid), signal.SIGKILL)
    output, text = running.communicate(timeout=300)
    assert running.returncode == 0, text
    assert json.loads(output.splitlines()[-1])["status"] == "converged"
    assert RESUME_ADVICE in text
    assert "from where it was" in text
    assert (out / "metrics.json").exists()
