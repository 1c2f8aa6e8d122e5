"""Symmetric networks as their first halves: adjoints, mirror images, and a descent that stays among them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.problems import digits_problem
from torch.nn.functional import normalize

from convcvx.errors import InputError, RunError
from convcvx.patches import PatchSpec
from convcvx.problem import Problem
from convcvx.responses.mirror import MirrorPairs, mirror
from convcvx.solvers.dictionary.filters import dictionary
from convcvx.solvers.dictionary.path import fit_dictionary, held_out
from convcvx.solvers.slide.coordinates import balanced_gradients
from convcvx.solvers.slide.descent import _fast_dtype, descend
from convcvx.training.run import Run

SPEC = PatchSpec((3, 3), hidden_bias=True, whiten=0.1)


def digits(n: int = 200, **options) -> Problem:
    return digits_problem(n, 1e-3, **{"spec": SPEC, "pooling": 2, "dtype": torch.float64, "flips": True} | options)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return digits()


@pytest.fixture(scope="module")
def start(problem):
    filters = dictionary(problem.responses, 12, threshold=0.25, flips=True)
    return fit_dictionary(problem, filters, beta=1e-3, flips=True, tol=1e-3).solution


def test_the_mirror_images_of_filters_have_the_same_bits_every_time(problem):
    """LAPACK's gelsy, torch's default for least squares, takes its pivots from memory that nobody has set."""
    filters = dictionary(problem.responses, 12, threshold=0.25)
    first = mirror(problem.responses.embedding, filters)
    for size in range(30):
        garbage = torch.full((8 + size,), size, dtype=torch.int32)
        del garbage
        assert torch.equal(mirror(problem.responses.embedding, filters), first)


@pytest.mark.parametrize("dim", [0, 1])
def test_folding_is_the_adjoint_of_unfolding(problem, dim):
    pairs, random = MirrorPairs(problem.responses), torch.Generator().manual_seed(0)
    half, whole = [3, 4, 10], [6, 4, 10]
    if dim == 1:
        half, whole = [5, 3, 4], [5, 6, 4]
    a = torch.randn(half, generator=random, dtype=torch.float64)
    b = torch.randn(whole, generator=random, dtype=torch.float64)
    assert float((pairs.unfold(a, dim) * b).sum()) == pytest.approx(float((a * pairs.fold(b, dim)).sum()), rel=1e-12)


def test_filters_fold_as_the_adjoint_of_the_mirror(problem):
    pairs, random = MirrorPairs(problem.responses), torch.Generator().manual_seed(0)
    u = torch.randn(3, problem.responses.dim, generator=random, dtype=torch.float64)
    v = torch.randn(6, problem.responses.dim, generator=random, dtype=torch.float64)
    assert torch.allclose(pairs.filters(u)[3:], mirror(problem.responses.embedding, u), atol=1e-9)
    folded = float((u * pairs.fold_filters(v)).sum())
    assert float((pairs.filters(u) * v).sum()) == pytest.approx(folded, rel=1e-12)


def test_a_symmetric_network_says_the_same_of_a_mirror_image(problem):
    pairs, random = MirrorPairs(problem.responses), torch.Generator().manual_seed(1)
    filters = pairs.filters(torch.randn(4, problem.responses.dim, generator=random, dtype=torch.float64))
    weights = pairs.unfold(torch.randn(4, 4, 10, generator=random, dtype=torch.float64))
    mirrored = problem.responses.to(images=problem.responses.images.flip(3))
    bias = torch.zeros(10)
    expected = problem.responses.predict(filters, weights, bias)
    assert torch.allclose(mirrored.predict(filters, weights, bias), expected, atol=1e-9)
    skewed = weights + torch.randn(weights.shape, generator=random, dtype=torch.float64)
    assert not torch.allclose(mirrored.predict(filters, skewed, bias), problem.responses.predict(filters, skewed, bias))


def test_asymmetric_places_are_refused():
    with pytest.raises(InputError, match="flips need patches and pooling cells that lie symmetrically"):
        MirrorPairs(digits(20, spec=PatchSpec((3, 3), (2, 2))).responses)


def test_a_descent_among_symmetric_networks_stays_there_and_gains(problem, start):
    slid = descend(problem, start, 0, 10, pairs=MirrorPairs(problem.responses), batch=20)
    filters = normalize(slid.filters)
    first, second = filters.chunk(2)
    assert torch.allclose(mirror(problem.responses.embedding, first), second, atol=1e-5)
    before = fit_dictionary(problem, start.filters, beta=1e-3, flips=True, tol=1e-3).objective
    after = fit_dictionary(problem, filters, beta=1e-3, flips=True, tol=1e-3).objective
    assert after < 0.9 * before
    free = normalize(descend(problem, start, 0, 10, batch=20).filters)
    first, second = free.chunk(2)
    assert not torch.allclose(mirror(problem.responses.embedding, first), second, atol=1e-2)  # the test can fail


@pytest.mark.parametrize(("crops", "dtype"), [(1, None), (0, torch.bfloat16)])
def test_a_descent_on_moved_images_or_in_few_bits_stays_symmetric_and_gains(problem, start, crops, dtype, monkeypatch):
    pairs = MirrorPairs(problem.responses)
    plain = descend(problem, start, 0, 10, pairs=pairs, batch=20)
    if dtype is not None:
        monkeypatch.setattr("convcvx.solvers.slide.descent._fast_dtype", lambda responses: dtype)
    slid, again = (descend(problem, start, 0, 10, pairs=pairs, batch=20, crops=crops) for _ in range(2))
    assert torch.equal(slid.filters, again.filters)
    assert not torch.equal(slid.filters, plain.filters)
    first, second = normalize(slid.filters).chunk(2)
    assert torch.allclose(mirror(problem.responses.embedding, first), second, atol=1e-5)
    before, after = (
        fit_dictionary(problem, filters, beta=1e-3, flips=True, tol=1e-3).objective
        for filters in (start.filters, normalize(slid.filters))
    )
    assert after < 0.95 * before


def test_images_held_out_do_not_pull_on_the_filters(problem, start):
    """Wrong targets of images that are left out change nothing; those of images that are not do."""
    unseen = held_out(problem.n, 0.1)
    assert int(unseen.sum()) == 20
    wrong = problem.targets.clone()
    wrong[unseen] = wrong[unseen].roll(3, dims=1)
    spoiled = replace(problem, targets=wrong)
    seen = (~unseen).nonzero().flatten()
    expected = descend(problem, start, 0, 2, images=seen).filters
    assert torch.equal(descend(spoiled, start, 0, 2, images=seen).filters, expected)
    assert not torch.equal(descend(spoiled, start, 0, 2).filters, descend(problem, start, 0, 2).filters)


def test_every_version_of_an_image_is_held_out():
    assert torch.equal(held_out(40, 0.25, versions=2).view(2, 20), held_out(20, 0.25).expand(2, 20))
    assert not held_out(40, 0.0).any()


@pytest.mark.parametrize("crops", [0, 1])
def test_a_descent_that_was_interrupted_ends_where_it_would_have(problem, start, crops):
    options = {"pairs": MirrorPairs(problem.responses), "crops": crops, "batch": 30}
    states = []
    whole = descend(problem, start, 0, 4, **options, after_epoch=lambda state, text: states.append(clone(state)))
    assert len(states) == 4
    for state in states:
        resumed = descend(problem, start, 0, 4, **options, state=clone(state))
        assert torch.equal(resumed.filters, whole.filters)
        assert torch.equal(resumed.weights, whole.weights)
    spoiled = states[1] | {"exp_avg-0": states[0]["exp_avg-0"]}
    assert not torch.equal(descend(problem, start, 0, 4, **options, state=spoiled).filters, whole.filters)


def test_the_descent_of_another_version_is_not_gone_on_with(start, tmp_path):
    run = Run(tmp_path)
    run.save_descent(start, 0.1, {"values": torch.zeros(3)})
    loaded, beta, state = run.load_descent()
    assert torch.equal(loaded.filters, start.filters)
    assert (beta, list(state)) == (0.1, ["values"])
    run.save_descent(start, 0.1, {"step": torch.tensor(3)})
    with pytest.raises(RunError, match="another version of convcvx"):
        run.load_descent()


def test_a_descent_that_goes_astray_begins_anew_with_lower_rates(problem, start, monkeypatch):
    options = {"batch": 20, "filter_rate": 2.0, "weight_rate": 2.0}
    lines, states = [], []

    def after_epoch(state, text):
        lines.append(text)
        states.append(clone(state))

    slid = descend(problem, start, 0, 10, **options, after_epoch=after_epoch)
    assert lines[-1].startswith("epoch 10 of 10")
    assert "rates times 0." in lines[-1]
    assert torch.equal(descend(problem, start, 0, 10, **options, state=clone(states[-5])).filters, slid.filters)
    monkeypatch.setattr("convcvx.solvers.slide.descent.ASTRAY", float("inf"))
    torn = descend(problem, start, 0, 10, **options)
    values = [balanced_gradients(problem, (s.filters, s.weights, s.intercept))[0] for s in (slid, torn)]
    assert values[0] < 0.5 * values[1]


def clone(state):
    return {name: part.clone() for name, part in state.items()}


def test_few_bits_are_for_large_patches_in_float32_on_cpus_that_have_them(monkeypatch):
    large = digits(20, spec=PatchSpec(8), dtype=torch.float32, pooling=1).responses
    small = digits(20, dtype=torch.float32).responses
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert _fast_dtype(large) == torch.bfloat16
    assert _fast_dtype(small) == torch.float32
    assert _fast_dtype(large.to(dtype=torch.float64)) == torch.float64
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert _fast_dtype(large) == torch.float32
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in older versions of torch
    assert _fast_dtype(large) == torch.float32
