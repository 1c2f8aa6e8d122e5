"""Dictionaries and the group lasso over them: against the other master, against twice the images, held-out choice."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.problems import digits_problem, problem_of, with_mirror_images

from convcvx.budget import Deadline
from convcvx.data.augment import VERSIONS, shifted
from convcvx.data.datasets import load
from convcvx.errors import InputError
from convcvx.patches import PatchSpec
from convcvx.problem import Problem
from convcvx.responses.mirror import mirror
from convcvx.solvers.dictionary.features import Features
from convcvx.solvers.dictionary.filters import dictionary
from convcvx.solvers.dictionary.kept import KeptFeatures
from convcvx.solvers.dictionary.lasso import DictionaryLasso
from convcvx.solvers.dictionary.path import (
    PATIENCE,
    RATIOS,
    TRUSTED,
    by_error,
    by_loss,
    fit_dictionaries,
    fit_dictionary,
)
from convcvx.solvers.dictionary.products import gather
from convcvx.solvers.master.table import solve_master
from convcvx.terms.names import DICTIONARY_SOURCES
from convcvx.training.plan import build_problem

SPEC = PatchSpec((3, 3), hidden_bias=True, contrast=0.01, whiten=0.1)


def digits(n: int = 150, **options) -> Problem:
    return digits_problem(n, **{"spec": SPEC, "pooling": 2, "dtype": torch.float64} | options)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return digits()


@pytest.mark.parametrize("source", DICTIONARY_SOURCES)
def test_dictionaries_are_distinct_unit_filters_with_the_threshold(problem, source):
    filters = dictionary(problem.responses, 20, source=source, threshold=0.5, seed=3)
    assert torch.allclose(filters.norm(dim=1), torch.ones(20).double())
    assert torch.allclose(filters[:, -1] / filters[:, :-1].norm(dim=1), torch.tensor(-0.5).double())
    assert torch.equal(filters, dictionary(problem.responses, 20, source=source, threshold=0.5, seed=3))
    assert not torch.equal(filters, dictionary(problem.responses, 20, source=source, threshold=0.5, seed=4))
    assert (filters @ filters.T - 2 * torch.eye(20)).max() < 1 - 1e-6


@pytest.mark.parametrize("source", DICTIONARY_SOURCES)
def test_dictionaries_of_large_data_are_drawn_in_their_single_precision(problem, source):
    single = dictionary(digits(dtype=torch.float32).responses, 20, source=source, threshold=0.5, seed=3)
    assert torch.allclose(single, dictionary(problem.responses, 20, source=source, threshold=0.5, seed=3), atol=1e-4)


def test_mirrored_filters_see_mirrored_images():
    problem = digits(40, flips=True)
    filters = dictionary(problem.responses, 10, threshold=0.2, flips=True)
    assert torch.allclose(filters[5:].norm(dim=1), torch.ones(5).double())
    flipped = problem.responses.to(images=problem.responses.images.flip(3))
    expected = flipped.matrix(filters[:5]).unflatten(2, (2, 2)).flip(3).flatten(2)
    assert torch.allclose(problem.responses.matrix(filters[5:]), expected, atol=1e-9)
    assert not torch.allclose(problem.responses.matrix(filters[:5]), expected, atol=1e-3)
    assert torch.allclose(mirror(problem.responses.embedding, filters[5:]), filters[:5], atol=1e-9)


@pytest.mark.parametrize("intercept", [True, False])
def test_the_other_master_agrees(intercept):
    problem = digits(intercept=intercept)
    filters = dictionary(problem.responses, 12, threshold=0.25)
    fit = fit_dictionary(problem, filters, beta=0.01, tol=1e-3)
    reference = solve_master(problem.with_beta(0.01), filters, tol=1e-8)
    assert reference.objective * (1 - 1e-8) <= fit.objective <= reference.objective * (1 + fit.rel_gap)
    assert fit.objective < reference.objective * (1 + 5e-3)
    solution = fit.solution
    predictions = problem.responses.predict(solution.filters, solution.weights, solution.intercept)
    assert problem.with_beta(0.01).primal(predictions, solution.weights) == pytest.approx(fit.objective, rel=1e-9)
    assert fit_dictionary(problem, filters, beta=0.02).objective > reference.objective * 1.05  # the test can fail


OTHER_LOSSES = ["cross-entropy", "bce", "squared-hinge", "huber:0.1"]


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("loss", OTHER_LOSSES)
def test_the_master_of_other_losses_agrees(loss, intercept):
    """The optimum lies between objective and lower bound, and the objective is that of the network."""
    problem, beta = digits(intercept=intercept, loss=loss), 1e-3 if loss.startswith("huber") else 0.01
    filters = dictionary(problem.responses, 8, threshold=0.25)
    fit = fit_dictionary(problem, filters, beta=beta, tol=1e-3)
    reference = solve_master(problem.with_beta(beta), filters, tol=1e-6)
    assert fit.objective * (1 - fit.rel_gap) <= reference.objective * (1 + 1e-9)
    assert reference.objective * (1 - 1e-6) <= fit.objective < reference.objective * (1 + 2e-3)
    assert fit.rel_gap < 1e-2
    solution = fit.solution
    predictions = problem.responses.predict(solution.filters, solution.weights, solution.intercept)
    assert problem.with_beta(beta).primal(predictions, solution.weights) == pytest.approx(fit.objective, rel=1e-9)
    assert fit_dictionary(problem, filters, beta=2 * beta).objective > reference.objective * 1.01  # the test can fail


@pytest.mark.parametrize("loss", OTHER_LOSSES)
def test_beta_max_is_where_the_dictionary_begins_to_help(loss):
    problem = digits(100, loss=loss)
    filters = dictionary(problem.responses, 8, threshold=0.25)
    constant = problem.mean_loss(problem.constant_predictions())
    beta_max = fit_dictionary(problem, filters, beta=1.0).beta_max
    none, some = (fit_dictionary(problem, filters, beta=share * beta_max, tol=1e-9) for share in (1.01, 0.9))
    assert none.objective >= constant * (1 - 1e-9)
    assert some.objective < constant * (1 - 1e-5)


def test_flips_are_twice_the_images_under_the_cross_entropy():
    problem = digits(100, flips=True, loss="cross-entropy")
    filters = dictionary(problem.responses, 8, threshold=0.25, flips=True)
    fit = fit_dictionary(problem, filters, beta=0.005, flips=True, tol=1e-4)
    twice = with_mirror_images(problem.with_beta(0.005))
    reference = solve_master(twice, filters, tol=1e-6)
    assert fit.objective * (1 - fit.rel_gap) <= reference.objective * (1 + 1e-9)
    assert reference.objective * (1 - 1e-6) <= fit.objective < reference.objective * (1 + 5e-3)


def test_no_held_out_image_reaches_the_path_of_the_cross_entropy():
    problem = digits(loss="cross-entropy")
    filters = dictionary(problem.responses, 10, threshold=0.25)
    targets = problem.targets.clone()
    targets[::5] = targets[::5].roll(1, dims=1)
    path = fit_dictionary(problem, filters, tune=0.2).path
    spoiled = fit_dictionary(replace(problem, targets=targets), filters, tune=0.2).path
    assert path[0]["objective"] == pytest.approx(spoiled[0]["objective"], rel=1e-12)
    assert spoiled[0]["held_out_loss"] > path[0]["held_out_loss"]
    kept = (torch.arange(problem.n) % 5 > 0).nonzero()[:, 0]
    alone = fit_dictionary(problem.sample(kept), filters, beta=path[0]["beta"])
    assert path[0]["objective"] * (1 - path[0]["rel_gap"]) <= alone.objective * (1 + 1e-9)


def test_a_second_visit_reads_what_the_first_one_saw(problem):
    filters = [dictionary(problem.responses, 7), dictionary(problem.responses, 4, seed=1)]
    features = KeptFeatures([problem.responses] * 2, filters, False)
    plain = Features([problem.responses] * 2, filters, False)
    for _ in range(3):
        for (where, block), (there, expected) in zip(features.batches(64), plain.batches(64), strict=True):
            assert where == there
            assert torch.equal(block, expected)


def test_the_file_of_features_ends_with_the_fit():
    problem, folder = digits(40, loss="cross-entropy"), Path("/proc/self/fd")
    filters = dictionary(problem.responses, 5)
    fit_dictionary(problem, filters, beta=0.1)
    before = len(list(folder.iterdir()))
    gc.disable()  # which would end it some time
    try:
        for _ in range(3):
            fit_dictionary(problem, filters, beta=0.1)
        assert len(list(folder.iterdir())) == before
    finally:
        gc.enable()


def test_the_gap_is_to_the_best_dual_value_of_all(monkeypatch):
    """More steps bring a lower objective, at which the dual value may be less than that of an earlier step."""
    problem = digits(80, loss="huber:0.05", spec=PatchSpec((3, 3)), pooling=None)
    filters, fits = dictionary(problem.responses, 20), []
    for steps in range(1, 13):
        monkeypatch.setattr("convcvx.solvers.dictionary.newton.DictionaryNewton.max_iter", steps)
        fits.append(fit_dictionary(problem, filters, beta_ratio=0.1, tol=1e-12))
    assert fits[-1].objective <= fits[0].objective
    gaps = [fit.rel_gap for fit in fits]
    assert gaps == sorted(gaps, reverse=True)


def test_features_that_no_disk_has_room_for_are_refused(monkeypatch):
    problem = digits(40, loss="cross-entropy")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"features of 40 images cannot .* GiB are free; set TMPDIR to a folder"):
        fit_dictionary(problem, dictionary(problem.responses, 5), beta=0.1)


def test_a_disk_that_fills_up_in_the_middle_is_told(monkeypatch):
    problem = digits(40, loss="cross-entropy")
    full = Path("/dev/full")
    monkeypatch.setattr("convcvx.solvers.dictionary.kept.TemporaryFile", lambda: full.open("w+b"))
    with pytest.raises(InputError, match=r"of 40 images cannot be kept in .*No space left on device; set TMPDIR"):
        fit_dictionary(problem, dictionary(problem.responses, 400, seed=3), beta=0.1)


def far_digits(offset: float, loss: str, intercept: bool = True, flips: bool = False) -> Problem:
    """In single precision, which far images are not computed in unless that is asked for."""
    near = digits(300, spec=PatchSpec((3, 3)), flips=flips)
    images, labels = (near.responses.images + offset).float(), near.targets.argmax(dim=1)
    options = {"loss": loss, "intercept": intercept, "dtype": torch.float32, "flips": flips}
    return build_problem(images, labels, spec=PatchSpec((3, 3)), pooling=2, **options)


@pytest.mark.parametrize("loss", ["cross-entropy", "huber:0.1"])
def test_filters_that_are_not_needed_get_no_weight_under_other_losses(loss):
    """Smoothed norms give all of them some."""
    problem = digits(loss=loss)
    fit = fit_dictionary(problem, dictionary(problem.responses, 60), beta_ratio=0.5, tol=1e-2)
    assert 0 < fit.solution.n_filters < 40
    assert fit.rel_gap <= 1e-2


@pytest.mark.parametrize("outlier", [1e2, 1e4])
def test_a_loss_that_is_linear_far_out_is_weighed_as_well(outlier):
    """Next to nothing bends there, and Newton's steps are far too long."""
    random = np.random.default_rng(0)
    images, targets = random.standard_normal((100, 4, 6)), random.standard_normal((100, 1))
    targets[0] *= outlier
    problem = problem_of(images, targets, 1.0, loss="huber:1", pooling=1, dtype=torch.float64)
    filters = torch.nn.functional.normalize(torch.from_numpy(random.standard_normal((100, problem.responses.dim))))
    fit = fit_dictionary(problem, filters, beta_ratio=1e-2, tol=1e-3)
    best = solve_master(problem.with_beta(fit.beta), filters, tol=1e-6).objective
    assert best * (1 - 1e-6) <= fit.objective <= best * (1 + 1e-3)
    assert fit.rel_gap <= 1e-3


@pytest.mark.parametrize("loss", ["cross-entropy", "squared-hinge", "bce"])
@pytest.mark.parametrize("ratio", [1e-2, 1e-3])
def test_few_steps_reach_the_gap_under_other_losses(loss, ratio):
    """Twenty ridge regressions with η = ‖W‖ leave 1.2 to 2.9 %."""
    problem = digits(400, spec=PatchSpec(3), loss=loss)
    assert fit_dictionary(problem, dictionary(problem.responses, 60), beta_ratio=ratio, tol=1e-2).rel_gap <= 1e-2


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
@pytest.mark.parametrize("offset", [10.0, 100.0, 1e4])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("ratio", [0.1, 1e-3, 1e-5])
def test_the_objective_of_a_dictionary_is_true_and_never_above_that_of_no_weights(loss, offset, intercept, ratio):
    """However many digits single precision has lost; what means nothing is refused."""
    problem = far_digits(offset, loss, intercept)
    filters, precise = dictionary(problem.responses, 60), problem.with_dtype(torch.float64)
    try:
        fit = fit_dictionary(problem, filters, beta_ratio=ratio)
    except InputError:
        assert ratio < 0.1
        return
    weights = fit.weights[0]
    true = precise.with_beta(fit.beta).primal(precise.responses.predict(filters, weights, fit.intercept), weights)
    assert fit.objective == pytest.approx(true, rel=TRUSTED / 10)
    assert true <= precise.mean_loss(precise.constant_predictions()) * (1 + 1e-9)


@pytest.mark.parametrize(("loss", "ratio"), [("squared", 1e-3), ("cross-entropy", 3e-3)])
def test_negative_control_what_single_precision_says_of_itself_is_not_true(loss, ratio, monkeypatch):
    problem = far_digits(1e4, loss)
    filters = dictionary(problem.responses, 60)
    judged = fit_dictionary(problem, filters, beta_ratio=ratio)
    monkeypatch.setattr("convcvx.solvers.dictionary.path.TRUSTED", math.inf)
    assert fit_dictionary(problem, filters, beta_ratio=ratio).objective != pytest.approx(judged.objective, rel=2e-3)


def test_the_true_objective_of_a_dictionary_counts_mirror_images_and_needs_no_time(monkeypatch):
    problem = far_digits(10.0, "squared", flips=True)
    filters = dictionary(problem.responses, 40, flips=True)
    sure = fit_dictionary(problem, filters, beta_ratio=1e-2, flips=True)
    monkeypatch.setattr("convcvx.solvers.dictionary.path.TRUSTED", 0.0)
    summed = fit_dictionary(problem, filters, beta_ratio=1e-2, flips=True)
    assert summed.objective != sure.objective
    assert summed.objective == pytest.approx(sure.objective, rel=1e-3)
    solve = DictionaryLasso.solve
    late = Deadline.after(1e9)

    def ended(self, *given):
        found = solve(self, *given)
        monkeypatch.setattr("convcvx.budget.Deadline.passed", property(lambda one: one == late))
        return found

    monkeypatch.setattr(DictionaryLasso, "solve", ended)
    again = fit_dictionary(problem.until(late), filters, beta_ratio=1e-2, flips=True)
    assert again.objective == pytest.approx(sure.objective, rel=1e-3)


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_weights_that_are_worse_than_none_are_left_out(loss, problem):
    """Above beta_max no weights are optimal, and the regressions only tend to them."""
    problem = digits(loss=loss)
    fit = fit_dictionary(problem, dictionary(problem.responses, 20), beta_ratio=2.0)
    assert not fit.weights[0].any()
    assert fit.objective == pytest.approx(problem.mean_loss(problem.constant_predictions()), rel=1e-12)
    assert fit.rel_gap <= 1e-2


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_the_weights_of_a_dictionary_end_at_the_deadline(loss, monkeypatch):
    """With what was found by then, whose gap is what it is."""
    problem = digits(100, loss=loss)
    filters = dictionary(problem.responses, 20, threshold=0.25)
    whole = fit_dictionary(problem, filters, beta_ratio=0.01, tol=1e-6)

    def slow_gather(*arguments):
        gathered = gather(*arguments)
        monkeypatch.setattr(Deadline, "passed", property(lambda self: True))
        return gathered

    monkeypatch.setattr("convcvx.solvers.dictionary.path.gather", slow_gather)
    ended = fit_dictionary(problem, filters, beta_ratio=0.01, tol=1e-6)
    assert ended.objective > whole.objective * (1 + 1e-6)
    assert ended.objective * (1 - ended.rel_gap) <= whole.objective


def test_single_precision_finds_the_same_optimum(problem):
    """With the Gram matrix and its factor in float32 the objective is still that of the weights, and the gap closes."""
    filters = dictionary(problem.responses, 40, threshold=0.25)
    exact = fit_dictionary(problem, filters, beta=1e-4, tol=1e-3)
    rough = fit_dictionary(problem.with_dtype(torch.float32), filters, beta=1e-4, tol=1e-3)
    assert rough.rel_gap < 1e-2
    assert rough.objective == pytest.approx(exact.objective, rel=1e-3)
    solution = rough.solution
    predictions = problem.responses.predict(solution.filters, solution.weights, solution.intercept)
    assert problem.with_beta(1e-4).primal(predictions, solution.weights) == pytest.approx(rough.objective, rel=1e-4)
    assert fit_dictionary(problem, filters, beta=1e-3).objective > 1.1 * exact.objective  # the test can fail


def test_weight_decay_that_is_lost_in_single_precision_ends_the_path(problem, monkeypatch):
    """More features than images leave the Gram matrix singular: what float32 makes of it is not taken for a network."""
    monkeypatch.setattr("convcvx.solvers.dictionary.path.PATIENCE", 50)
    rough = problem.with_dtype(torch.float32)
    filters = dictionary(problem.responses, 200)
    fit = fit_dictionary(rough, filters, tune=0.2)
    assert 3 < len(fit.path) < len(RATIOS)
    assert all(record["objective"] > 0 and record["held_out_loss"] < 1 for record in fit.path)
    assert fit.rel_gap < 0.1
    assert len(fit_dictionary(problem, filters, tune=0.2).path) == len(RATIOS)  # in double precision nothing is lost
    with pytest.raises(InputError, match=r"lost in the rounding of torch\.float32; use a larger beta"):
        fit_dictionary(rough, filters, beta=1e-8)


def test_a_weight_decay_that_all_images_cannot_bear_gives_way_to_the_next_best(problem, monkeypatch):
    filters = dictionary(problem.responses, 30, threshold=0.25)
    whole = fit_dictionary(problem, filters, tune=0.2)
    solve = DictionaryLasso.solve

    def fails(self, beta, start, tol, max_iter):
        point = solve(self, beta, start, tol, max_iter)
        last = max_iter > DictionaryLasso.path_iter and beta == whole.beta
        return replace(point, objective=math.inf) if last else point

    monkeypatch.setattr(DictionaryLasso, "solve", fails)
    fit = fit_dictionary(problem, filters, tune=0.2)
    ranked = sorted(fit.path, key=lambda record: (record["held_out_error"], record["held_out_loss"]))
    assert [ranked[0]["beta"], ranked[1]["beta"]] == [whole.beta, fit.beta]
    assert fit.rel_gap < 0.05


def test_flips_are_twice_the_images():
    problem = digits(100, flips=True)
    filters = dictionary(problem.responses, 8, threshold=0.25, flips=True)
    fit = fit_dictionary(problem, filters, beta=0.01, flips=True, tol=1e-4)
    twice = with_mirror_images(problem.with_beta(0.01))
    reference = solve_master(twice, filters, tol=1e-8)
    assert reference.objective * (1 - 1e-8) <= fit.objective < reference.objective * (1 + 5e-3)
    solution = fit.solution
    predictions = twice.responses.predict(solution.filters, solution.weights, solution.intercept)
    assert torch.allclose(predictions[:100], predictions[100:], atol=1e-8)
    plain = solve_master(problem.with_beta(0.01), filters, tol=1e-8)
    assert plain.objective < reference.objective * (1 - 1e-3)


@pytest.mark.parametrize("first", [torch.float32, torch.float64])
def test_dictionaries_of_several_problems_are_one_dictionary(problem, first):
    """Split over two problems, of other precision perhaps, the filters have the weights that they have together."""
    filters = dictionary(problem.responses, 12, threshold=0.25)
    second = torch.float64 if first == torch.float32 else torch.float32
    parts = problem.with_dtype(first), problem.with_dtype(second)
    split = fit_dictionaries(parts, (filters[:5], filters[5:]), beta=0.01, tol=1e-4)
    whole = fit_dictionary(problem, filters, beta=0.01, tol=1e-4)
    assert split.objective == pytest.approx(whole.objective, rel=1e-4)
    assert torch.allclose(torch.cat(split.weights), whole.weights[0], atol=1e-2 * float(whole.weights[0].abs().max()))
    assert fit_dictionary(problem, filters[:5], beta=0.01).objective > 1.02 * whole.objective  # the test can fail


@pytest.mark.parametrize("names", [("held_out_error", "held_out_loss"), ("held_out_loss", "held_out_error")])
def test_held_out_images_choose_beta(problem, names):
    filters = dictionary(problem.responses, 30, threshold=0.25)
    fit = fit_dictionary(problem, filters, tune=0.2, score=by_error if names[0] == "held_out_error" else by_loss)
    scores = [tuple(record[name] for name in names) for record in fit.path]
    assert fit.beta == fit.path[scores.index(min(scores))]["beta"]
    assert scores.index(min(scores)) in (len(scores) - 1 - PATIENCE, len(RATIOS) - 2, len(RATIOS) - 1)
    assert len(fit.path) > 3
    given = fit_dictionary(problem, filters, beta=fit.beta)
    assert given.objective == pytest.approx(fit.objective, rel=2e-2)  # the last fit is to all images


def test_no_held_out_image_reaches_the_path(problem):
    """Wrong labels on the held-out images alone change the scores but not the networks they score."""
    filters = dictionary(problem.responses, 10, threshold=0.25)
    targets = problem.targets.clone()
    targets[::5] = targets[::5].roll(1, dims=1)
    path = fit_dictionary(problem, filters, tune=0.2).path
    spoiled = fit_dictionary(replace(problem, targets=targets), filters, tune=0.2).path
    assert path[0]["objective"] == pytest.approx(spoiled[0]["objective"], rel=1e-12)
    assert spoiled[0]["held_out_loss"] > path[0]["held_out_loss"]


def test_an_image_is_held_out_in_all_its_versions():
    """Wrong labels on every version of the held-out images change the scores but not the networks they score."""
    train, _ = load("digits", limit=33)  # no multiple of the held-out images' spacing
    moved = shifted(train, 1)
    problem = build_problem(moved.images, moved.targets, spec=SPEC, pooling=2, dtype=torch.float64)
    filters = dictionary(problem.responses, 10, threshold=0.25)
    targets = problem.targets.unflatten(0, (VERSIONS, 33)).clone()
    targets[:, ::5] = targets[:, ::5].roll(1, dims=2)
    spoiled = replace(problem, targets=targets.flatten(0, 1))
    path, other = (fit_dictionary(p, filters, tune=0.2, versions=VERSIONS).path for p in (problem, spoiled))
    assert path[0]["objective"] == pytest.approx(other[0]["objective"], rel=1e-12)
    path, other = (fit_dictionary(p, filters, tune=0.2).path for p in (problem, spoiled))
    assert path[0]["objective"] != pytest.approx(other[0]["objective"], rel=1e-6)


def test_bad_input_is_refused(problem):
    with pytest.raises(InputError, match="even number"):
        dictionary(problem.responses, 3, flips=True)
    with pytest.raises(InputError, match="threshold"):
        dictionary(digits(20, spec=PatchSpec((3, 3))).responses, 3, threshold=0.1)
    striped = digits(40, spec=PatchSpec((3, 3), (2, 2)), flips=True)
    with pytest.raises(InputError, match="symmetrically"):
        fit_dictionary(striped, dictionary(striped.responses, 2, flips=True), beta=1.0, flips=True)


def test_a_dictionary_is_drawn_in_float32_as_in_float64(problem):
    """Large data compute in float32: patches, and their norms, are then of two precisions."""
    rough = dictionary(problem.with_dtype(torch.float32).responses, 12, threshold=0.25)
    assert torch.allclose(rough, dictionary(problem.responses, 12, threshold=0.25), atol=1e-5)
