"""Images shared out over processes: the same bits as in one, and a lost process costs nothing but the round."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import answer, cli
from helpers.problems import random_parameters
from helpers.rehearsal import Rehearsal
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from convcvx.budget import Budget, Deadline, OutOfTime, clock
from convcvx.certificate import certify_parameters
from convcvx.data.images import StreamedImages
from convcvx.errors import InputError, WorkerError
from convcvx.losses.shares import Shares
from convcvx.machine.wire import _bytes, _object
from convcvx.network import evaluate
from convcvx.patches import PatchEmbedding, PatchSpec
from convcvx.pooling import Pooling
from convcvx.responses import portions
from convcvx.responses import processes as sharding
from convcvx.responses.fused import Fused
from convcvx.responses.passes import Responses
from convcvx.responses.portions import add, portion, segments
from convcvx.responses.table import CORRELATE, PREDICT, Pass
from convcvx.responses.team import ShardedResponses, Team
from convcvx.responses.unrolled import Unrolled
from convcvx.solvers.dictionary import filters
from convcvx.solvers.dictionary.path import fit_dictionaries, fit_dictionary
from convcvx.solvers.slide.coordinates import balanced_gradients, batch_gradients
from convcvx.solvers.slide.descent import _Descent, descend
from convcvx.training.plan import build_problem, solve_problem

# -- the arithmetic, in this process ------------------------------------------------------------------


@given(st.integers(1, 10**6), st.integers(1, 40))
def test_segments_cover_the_images_and_portions_the_segments(n, size):
    places = segments(n)
    assert len(places).bit_count() == 1
    assert [place.stop for place in places] == [place.start for place in places[1:]] + [n]
    assert places[0].start == 0
    lengths = [place.stop - place.start for place in places]
    assert max(lengths) - min(lengths) <= 1
    assert n < 2 * portions.SEGMENT or min(lengths) >= portions.SEGMENT
    assert [i for rank in range(size) for i in portion(len(places), rank, size)] == list(range(len(places)))


def test_contrast_is_taken_alike_from_all_images_that_are_shared_out(monkeypatch):
    """The first part is dark, and might be fused alone, which is coarser than what is allowed for all of them."""
    monkeypatch.setattr(portions, "SEGMENT", 16)
    random = torch.Generator().manual_seed(0)
    images = torch.rand(32, 1, 9, 9, generator=random, dtype=torch.float64)
    embedding = PatchEmbedding.fit(images, PatchSpec((3, 3), contrast=1.0))
    filters = torch.nn.functional.normalize(torch.randn(6, embedding.dim, generator=random, dtype=torch.float64))
    team, how = Team(), {"dtype": torch.float64, "small": False}
    for brightest, way in ((0.0, Fused), (1e7, Unrolled)):
        images[16:] += brightest
        team.share_out(images, None, None)
        shared, alone = (make(images, embedding, Pooling.of(2), **how) for make in (team.responses, Responses))
        assert type(shared.convolution) is type(alone.convolution) is way
        found, exact = (each.correlate(filters, torch.ones(32, 2, dtype=torch.float64)) for each in (shared, alone))
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=0)


@given(st.integers(0, 5), st.integers(1, 7), st.integers(0, 99))
def test_a_pairwise_sum_does_not_depend_on_who_adds_what(level, size, seed):
    count = 2**level
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 1e3
    roots = []
    for parts in (1, size):
        total: portions.Nodes = {}
        for rank in range(parts):
            nodes: portions.Nodes = {}
            for i in portion(count, rank, parts):
                add(nodes, (0, i), [values[i]])
            for place, terms in nodes.items():
                add(total, place, terms)
        assert list(total) == [(level, 0)]
        roots.append(total[level, 0][0])
    assert torch.equal(*roots)
    assert roots[0] == pytest.approx(float(values.double().sum()), abs=1e-1)


def test_negative_control_a_running_sum_does_depend_on_it():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    running = [values[:k].cumsum(0)[-1] + values[k:].cumsum(0)[-1] for k in range(1, 1000)]
    assert len(set(map(float, running))) > 1


def images(n: int = 45) -> torch.Tensor:
    return torch.rand(n, 2, 6, 5, generator=torch.Generator().manual_seed(0))


def identity(source):
    return source


def sharded_problem(size: int, loss: str = "squared", dtype: torch.dtype = torch.float64, team=None, work=None):
    team, data = team or Rehearsal(size), images()
    if work is None:
        team.share_out(data, identity, data)
    else:  # the images that the team has become others
        data = work(data, 0.5)
        team.transform(work, 0.5)
        team.keep(data)
    embedding = team.fit(data, PatchSpec(3, rank=6, whiten=0.1))
    targets = torch.arange(len(data)) % 3
    return build_problem(
        data, targets, 0.01, embedding=embedding, pooling=2, loss=loss, dtype=dtype, responses=team.responses
    )


@pytest.fixture
def short_segments(monkeypatch):
    monkeypatch.setattr(portions, "SEGMENT", 5)  # 45 images: 8 segments


def every_pass(problem) -> list[torch.Tensor]:
    filters, weights, intercept = random_parameters(problem, 4)
    dual_point = problem.dual_point(problem.responses.predict(filters, weights, intercept))

    def residual(predictions, where):
        return predictions.square() * (where[:, None] + 1)

    batch = torch.tensor([44, 3, 17, 2])
    responses = problem.responses
    return [
        responses.embedding.basis,
        responses.predict(filters, weights, intercept),
        *responses.gram(filters, problem.targets),
        responses.correlate(filters, dual_point),
        *responses.ascent(filters, dual_point, weights),
        *responses.gradients(filters, weights, intercept, residual),
        responses.to(images=responses.images[batch]).matrix(filters),
        problem.with_dtype(torch.float64).responses.correlate(filters, dual_point),
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_pass_gives_the_same_bits_in_any_number_of_processes(short_segments, dtype):
    alone = sharded_problem(1, dtype=dtype)
    assert isinstance(alone.responses, ShardedResponses)
    for size in (2, 3, 8, 11):  # 11: some have no segment
        pairs = zip(every_pass(alone), every_pass(sharded_problem(size, dtype=dtype)), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_every_pass_agrees_with_plain_responses(short_segments):
    sharded = sharded_problem(3)
    embedding = PatchEmbedding.fit(images(), PatchSpec(3, rank=6, whiten=0.1))
    plain = build_problem(images(), torch.arange(45) % 3, 0.01, embedding=embedding, pooling=2, dtype=torch.float64)
    assert type(plain.responses) is Responses
    for ours, theirs in zip(every_pass(sharded), every_pass(plain), strict=True):
        assert float((ours - theirs).abs().max()) < 1e-11 * float(theirs.abs().max())


@pytest.mark.parametrize("loss", ["squared", pytest.param("cross-entropy", marks=pytest.mark.slow)])
def test_training_and_certificate_are_the_same(short_segments, loss):
    solutions, certificates = [], []
    for size in (1, 2, 3):
        problem = sharded_problem(size, loss)
        solutions.append(solve_problem(problem, Budget(tol=1e-3, max_rounds=2), oracle="local"))
        found = certify_parameters(problem, solutions[-1].filters, solutions[-1].weights, oracle="local")
        certificates.append((found.primal, found.dual, found.g_max))
    assert solutions[0].n_filters > 1
    assert all(torch.equal(solutions[0].filters, other.filters) for other in solutions[1:])
    assert certificates[0] == certificates[1] == certificates[2]


def test_a_worker_reads_nothing_but_its_portion(short_segments):
    pixels = np.random.default_rng(0).random((45, 6, 5, 2), dtype=np.float32)
    place = segments(45)[4]
    hidden = pixels.copy()
    hidden[: place.start] = np.nan  # the leader's portion
    results = []
    for pages in (pixels, hidden):
        worker = portions.Portion(1, 2)
        worker.load(identity, StreamedImages(pages), 45)
        worker.build([0], PatchEmbedding.fit(StreamedImages(pixels), PatchSpec(3)), None, {"device": "cpu"})
        dual_point = torch.ones(45 - place.start, 3, dtype=torch.float64)
        nodes, _ = worker.run([0], CORRELATE, [torch.ones(2, 18, dtype=torch.float64)], math.inf, [dual_point])
        results.append(
            [*worker.moment(PatchSpec(3), torch.zeros(18, dtype=torch.float64))[0].values(), *nodes.values()]
        )
    assert all(torch.equal(a, b) for x, y in zip(*results, strict=True) for a, b in zip(x, y, strict=True))
    assert all(bool(term.isfinite().all()) for terms in results[1] for term in terms)


def test_portions_keep_what_is_in_use_and_let_go_of_the_rest(short_segments):
    """A master asks for another arithmetic whenever rounding noise is large, and its responses once stayed for ever."""
    problem = sharded_problem(3)
    parameters = random_parameters(problem, 4)
    predictions = problem.responses.predict(*parameters)
    double = problem.with_dtype(torch.float64)
    for _ in range(5):
        problem.with_dtype(torch.float32).responses.predict(*parameters)
    for part in problem.responses._team.portions:
        assert len(part._responses) == 3  # those of both problems, and the last ones that were made
        for segments_ in part._responses.values():
            assert len({id(responses.convolution) for responses in segments_.values()}) == 1
    assert torch.equal(problem.responses.predict(*parameters), predictions)
    assert torch.equal(double.responses.predict(*parameters), predictions)


def test_other_data_in_a_worker_are_refused():
    with pytest.raises(InputError, match="it found 45 images, process 0 44: give all machines the same data"):
        portions.Portion(1, 2).load(identity, images(), 44)


# -- real processes -----------------------------------------------------------------------------------

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
TRAIN = "train --stride 2 --pool 2 --beta-ratio 0.02 --tol 0.01 --json"
EQUAL = ("primal", "dual", "rel_gap", "beta_max", "n_filters", "rounds", "train_accuracy", "test_accuracy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """2,200 noisy digits on disk: two segments."""
    random, digits = np.random.default_rng(0), load_digits()
    chosen = random.integers(len(digits.images), size=2400)
    x = np.clip(16 * digits.images[chosen] + 20 * random.normal(size=(2400, 8, 8)), 0, 255).astype(np.uint8)
    y = digits.target[chosen]
    folder = tmp_path_factory.mktemp("data")
    for key, array in {"x_train": x[:2200], "y_train": y[:2200], "x_test": x[2200:], "y_test": y[2200:]}.items():
        np.save(folder / f"{key}.npy", array)
    return folder


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory) -> dict:
    """The uninterrupted run of one process, this one."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    return answer(cli(f"{TRAIN} --data", folder, "--max-rounds", 3, "--out", out, code=3))


def team(processes: int, *arguments: object) -> subprocess.Popen[str]:
    command = [*TORCHRUN, "--nproc-per-node", str(processes), "-m", "convcvx.cli", *TRAIN.split(), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def member(running: subprocess.Popen[str], rank: int) -> int:
    """The process id of `rank`."""
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    for pid in children:
        if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
            return int(pid)
    raise AssertionError(f"no process of rank {rank}")


def wait_for_round(out: Path, number: int) -> None:
    deadline = time.monotonic() + 120
    while not (out / "history.json").exists() or len(json.loads((out / "history.json").read_text())) <= number:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(folder, alone, tmp_path):
    running = team(2, "--data", folder, "--max-rounds", 3, "--out", tmp_path / "two")
    output, text = running.communicate(timeout=300)
    assert len(output.splitlines()) == 1, text  # from the leader alone
    metrics = json.loads(output)
    assert "2 processes" in text
    assert alone["primal"] > alone["dual"] > 0
    for name in EQUAL:
        assert metrics[name] == pytest.approx(alone[name], rel=1e-8), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "message"),
    [(1, "worker 1 of 2 was lost: go on with --resume"), (0, "process 0 of 2 was lost: go on")],
)
def test_a_killed_process_ends_the_run_and_one_process_goes_on(folder, alone, tmp_path, rank, message):
    out = tmp_path / "killed"
    running = team(2, "--data", folder, "--max-rounds", 3, "--out", out)
    wait_for_round(out, 1)
    os.kill(member(running, rank), signal.SIGKILL)
    output, text = running.communicate(timeout=120)
    assert running.returncode != 0
    assert [line for line in text.splitlines() if line.startswith("convcvx:")] == [
        f"convcvx: error: {message.split(':')[0]}: {sharding.RESUME_ADVICE}"
    ], text
    assert message in text
    assert not (out / "metrics.json").exists()
    if rank == 1:
        assert json.loads(output)["status"] == "lost_worker"
    metrics = answer(cli("train --resume --json --out", out, code=3))
    for name in EQUAL:
        assert metrics[name] == pytest.approx(alone[name], rel=1e-8), name


@pytest.mark.slow
def test_bad_input_is_reported_once(tmp_path):
    running = team(2, "--data", tmp_path / "nothing.npz", "--out", tmp_path / "run")
    output, text = running.communicate(timeout=120)
    assert json.loads(output)["status"] == "bad_input"
    assert text.count("convcvx: error:") == 1


def test_sigterm_does_not_drown_an_error_on_its_way():
    rehearsal = Rehearsal(2)
    rehearsal._busy = True
    before = signal.getsignal(signal.SIGTERM)
    try:
        rehearsal.__exit__(None, None, None)
        assert signal.getsignal(signal.SIGTERM) is before
        rehearsal.__exit__(WorkerError, WorkerError("worker 1 of 2 was lost"), None)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sigterm_names_the_workers_that_are_gone():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    rehearsal = Rehearsal(3)
    here = sharding.socket.gethostname()
    rehearsal._places = {1: (here, os.getpid()), 2: (here, gone.pid)}
    with pytest.raises(WorkerError, match="worker 2 of 3 was lost: go on"):
        rehearsal._terminated()
    rehearsal._places.pop(2)
    with pytest.raises(WorkerError, match="stopped by SIGTERM: go on"):
        rehearsal._terminated()


def test_weights_of_images_are_shared_out_with_them(short_segments):
    """The Gram matrix of a portion counts its own images' weights."""
    weights = torch.rand(45, generator=torch.Generator().manual_seed(1)).double() + 0.1
    grams = []
    for size in (1, 2, 3):
        problem = replace(sharded_problem(size), shares=Shares.of(weights, 45))
        filters, *_ = random_parameters(problem, 4)
        grams.append(problem.responses.gram(filters, problem.targets, problem.shares))
    matrix = Responses.matrix(problem.responses, filters).flatten(1)
    design = torch.cat([matrix, torch.ones(45, 1)], dim=1) * (weights / weights.sum()).sqrt()[:, None]
    torch.testing.assert_close(grams[0][0], design.T @ design, rtol=1e-12, atol=1e-13)
    assert all(torch.equal(ours, theirs) for gram in grams[1:] for ours, theirs in zip(grams[0], gram, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_a_dictionary_is_that_of_one_process_but_for_rounding(short_segments, loss, intercept):
    """Each process sums up a Gram matrix of its own, or keeps its own features; who has no segment has none."""
    fits = []
    for size in (1, 2, 3, 11):
        problem = replace(sharded_problem(size, loss), intercept=intercept)
        filters = torch.nn.functional.normalize(random_parameters(problem, 6)[0])
        fits.append(fit_dictionary(problem, filters, tune=0.2, tol=1e-6))
    # Conjugate gradients that end early leave what rounding made of the ways there.
    rel, rtol, atol = (1e-9, 1e-5, 1e-8) if loss == "squared" else (1e-8, 1e-3, 1e-4)
    for fit in fits[1:]:
        assert fit.beta == pytest.approx(fits[0].beta, rel=1e-9)
        assert fit.objective == pytest.approx(fits[0].objective, rel=rel)
        torch.testing.assert_close(fit.weights, fits[0].weights, rtol=rtol, atol=atol)
        assert fit.path[0]["held_out_loss"] == pytest.approx(fits[0].path[0]["held_out_loss"], rel=rel)


def test_a_dictionary_asks_this_machine_for_its_share_of_the_memory(short_segments, monkeypatch):
    responses = sharded_problem(4).responses
    for said, share in (("1", 0.25), ("4", 1.0), ("", 1.0), ("8", 1.0)):  # the last two: as if all were here
        monkeypatch.setenv("LOCAL_WORLD_SIZE", said)
        assert responses.share_here == share
    assert Responses.share_here.fget(responses) == 1.0


@pytest.mark.slow
def test_two_processes_fit_the_dictionary_of_one(folder, tmp_path):
    options = ["--dictionary", "40", "--threshold", "0.25", "--hidden-bias", "--max-rounds", "0", "--tune", "0.1"]
    given = ["--data", folder, *options, "--flips"]
    given = [sys.executable, "-m", "convcvx.cli", "train", "--pool", "2", "--json", *map(str, given)]
    alone = subprocess.run(
        [*given, "--out", str(tmp_path / "one")], capture_output=True, text=True, env=ENVIRONMENT, timeout=300
    )
    both = subprocess.run(
        [*TORCHRUN, "--nproc-per-node", "2", *given[1:], "--out", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=300,
    )
    mine, theirs = (json.loads(done.stdout) for done in (alone, both))
    assert "2 processes" in both.stderr
    for name in ("primal", "beta", "beta_max", "n_filters", "train_accuracy", "test_accuracy"):
        assert theirs[name] == pytest.approx(mine[name], rel=1e-4), name


# -- what is shared out without the promise of bits -----------------------------------------------------


def dictionary_of(problem, count: int = 6) -> torch.Tensor:
    return torch.nn.functional.normalize(random_parameters(problem, count)[0])


@pytest.mark.slow
def test_two_dictionaries_side_by_side_are_those_of_one_process(short_segments):
    """As joint heads are: each process makes the features of all of them, of its own images."""
    fits = []
    for size in (1, 3, 11):
        team = Rehearsal(size)
        problems = [sharded_problem(size, team=team), sharded_problem(size, team=team, work=halved)]
        fits.append(fit_dictionaries(problems, [dictionary_of(p) for p in problems], beta_ratio=0.05, tol=1e-8))
    for fit in fits[1:]:
        assert fit.objective == pytest.approx(fits[0].objective, rel=1e-9)
        for ours, theirs in zip(fit.weights, fits[0].weights, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_mirror_images_are_looked_at_where_the_images_are(short_segments):
    plain = sharded_problem(1)
    network = random_parameters(plain, 4)
    assert type(plain.responses.mirrored()) is Responses
    expected = plain.responses.mirrored().predict(*network)
    assert not torch.allclose(expected, plain.responses.predict(*network))
    for size in (2, 11):
        mirrored = sharded_problem(size).responses.mirrored()
        torch.testing.assert_close(mirrored.predict(*network), expected, rtol=1e-12, atol=1e-13)
        single = mirrored.to(dtype=torch.float32)  # of the mirror images too
        torch.testing.assert_close(single.predict(*network), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mirrored.mirrored().predict(*network), plain.responses.predict(*network))


def test_outputs_of_a_network_are_computed_by_all(short_segments, monkeypatch):
    monkeypatch.setattr(evaluate, "SHARE", 4)
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(36, 2))
    for size in (1, 2, 11):
        responses = sharded_problem(size).responses
        others = images()[:17]
        torch.testing.assert_close(evaluate.predict(network, others, responses), evaluate.predict(network, others))
        (found,) = responses.run(evaluate.OUTPUTS, (), network)
        torch.testing.assert_close(found, evaluate.predict(network, images()))


def halved(images, factor):
    return images * factor


def test_chosen_images_are_looked_at_where_they_are(short_segments):
    weights = torch.rand(45, generator=torch.Generator().manual_seed(1)).double() + 0.1
    chosen = torch.tensor([44, 3, 17, 2, 30])
    moves = torch.tensor([[0, 1], [2, 2], [1, 1], [0, 0], [2, 1]])
    results = []
    for size in (1, 2, 11):
        problem = replace(sharded_problem(size), shares=Shares.of(weights, 45))
        network = random_parameters(problem, 4)
        value, slopes = batch_gradients(problem, network, chosen, 1, moves)
        found = problem.responses.run(replace(PREDICT, exact=False), (), *network, where=chosen)[0]
        results.append([torch.tensor(value), *slopes, found])
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    everything = problem.responses.predict(*network)
    torch.testing.assert_close(results[0][-1], everything[chosen], rtol=1e-10, atol=1e-12)


def test_a_shared_descent_takes_of_each_process_as_many_images_as_its_share(short_segments):
    for size in (1, 2, 3):
        problem = sharded_problem(size)
        descent = _Descent([torch.ones(1)], (0.1,), problem.responses.owners, torch.Generator().manual_seed(0))
        drawn = [descent.draw(9) for _ in range(10)]
        assert torch.equal(torch.cat(drawn[:5]).sort().values, torch.arange(45))
        counts = torch.stack([torch.bincount(problem.responses.owners[part], minlength=size) for part in drawn])
        share = torch.bincount(problem.responses.owners, minlength=size) / 5
        assert float((counts - share).abs().max()) <= 1.5
    alone = torch.randperm(45, generator=torch.Generator().manual_seed(0))
    first = _Descent([torch.ones(1)], (0.1,), torch.zeros(45), torch.Generator().manual_seed(0)).draw(45)
    assert torch.equal(first, alone)


def test_a_slide_is_shared_only_where_it_is_asked_for(short_segments):
    """What the solver slides keeps its bits; a dictionary that slides has its mini-batches shared out."""
    slid = {}
    for size in (1, 2, 3):
        problem = sharded_problem(size)
        start = fit_dictionary(problem, dictionary_of(problem), beta_ratio=0.05).solution
        problem = problem.with_beta(1e-3)
        for shared in (False, True):
            found = descend(problem, start, 0, 20, batch=12, shared=shared)
            slid[size, shared] = balanced_gradients(problem, (found.filters, found.weights, found.intercept))[0]
        slid[size, "start"] = balanced_gradients(problem, (start.filters, start.weights, start.intercept))[0]
    assert slid[1, False] == slid[1, True]
    assert slid[2, False] == pytest.approx(slid[1, False], rel=1e-9)
    for size in (2, 3):
        assert slid[size, True] != slid[1, True]
        assert slid[size, True] < 0.9 * slid[1, "start"]


def test_clusters_are_the_same_bits_in_any_number_of_processes(short_segments, monkeypatch):
    monkeypatch.setattr(filters, "KMEANS_PART", 16)
    found = [
        filters.dictionary(sharded_problem(size, dtype=torch.float32).responses, 5, source="kmeans")
        for size in (1, 2, 3)
    ]
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_deadline_ends_a_pass_in_the_middle(short_segments):
    for size in (1, 3):
        problem = sharded_problem(size)
        late = problem.until(Deadline(clock() + 0.05))

        def slow(stream, *arguments):
            time.sleep(0.1)
            stream.deadline.check()
            return [torch.zeros(1)]

        with pytest.raises(OutOfTime):
            late.responses.run(Pass(slow, ("sum",)), ())
        assert float(problem.responses.run(Pass(slow, ("sum",)), ())[0]) == 0


def test_a_message_has_of_a_tensor_what_it_has_itself():
    whole = torch.arange(10_000).double()
    for part in (whole[5:8], whole.view(100, 100)[:, 3][:3]):
        data = _bytes([part, "text"])
        assert len(data) < 1000
        assert torch.equal(_object(data)[0], part)
    assert len(_bytes(whole)) > 80_000  # negative control


def test_a_team_started_anew_goes_on_and_is_not_started_again(tmp_path, monkeypatch):
    short = "train --limit 40 --stride 2 --rank 2 --pool 2 --beta-ratio .1 --tol 1e-9 --max-rounds 1 --oracle local -q"
    out = tmp_path / "run"
    cli(short, "--out", out, code=3)
    cli(short, "--out", out, code=2)  # there is one
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    marked = out / "environment.json"  # written once, where a run begins
    marked.write_text(json.dumps({"marked": True}))
    cli(short, "--out", out, code=0)
    (out / "metrics.json").unlink()
    cli(short, "--overwrite", "--out", out, code=0)  # unfinished: what it was replaced with, of the same options
    assert "marked" in json.loads(marked.read_text())
    cli(short, "--seed", "1", "--overwrite", "--out", out, code=0)  # finished: what was to be replaced
    assert json.loads((out / "config.json").read_text())["seed"] == 1
    assert "marked" not in json.loads(marked.read_text())
