"""Scope family: scans against fractions, optima against cvxpy, ternary layers from Python and from the command line."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from itertools import product

import cvxpy as cp
import numpy as np
import pytest
import torch
from helpers.commands import answer, cli, refused
from helpers.problems import digits_problem, flat_problem, g, problem_of, with_mirror_images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

import convcvx
from convcvx.budget import Budget, Deadline
from convcvx.certificate import Certificate, certify_parameters
from convcvx.data.datasets import load
from convcvx.display.words import claims, told
from convcvx.errors import InputError, RunError
from convcvx.estimator import ConvexCNNClassifier
from convcvx.network.certify import outputs_of_export, outputs_without_intercept, parameters_of
from convcvx.network.evaluate import outputs_of
from convcvx.network.layers import read_network
from convcvx.oracles import FamilyOracle, Listed, Scope, Ternary, get_oracle
from convcvx.oracles.family import bound_over_family
from convcvx.patches import PatchSpec
from convcvx.problem import Problem
from convcvx.solvers.column_generation import column_generation
from convcvx.solvers.dictionary.filters import dictionary
from convcvx.solvers.master.table import solve_master
from convcvx.training.dictionary_gap import LeftOut, family_proof, with_dictionary_gap
from convcvx.training.dictionary_start import DICTIONARY_TOL
from convcvx.training.options import TrainConfig
from convcvx.training.plan import build_problem
from convcvx.training.resolve import training_problem

TERNARY = FamilyOracle(Ternary())
QUICK = {"kernel_size": 2, "stride": 2, "pool": 2, "beta_ratio": 0.05, "tol": 0.05, "seed": 3, "filters": "ternary"}
FLAGS = [part for name, value in QUICK.items() for part in (f"--{name.replace('_', '-')}", value)]


def words(dim: int) -> np.ndarray:
    """All ternary vectors but 0, as they are written down."""
    return np.array([word for word in product((-1, 0, 1), repeat=dim) if any(word)])


def exact_square(patches: np.ndarray, dual_point: Tensor, word: np.ndarray) -> Fraction:
    """g² of the unit filter along `word`, without any rounding; patches (n, K, d), pooled to their mean."""
    total = Fraction(0)
    for c in range(dual_point.shape[1]):
        entry = Fraction(0)
        for image, z in zip(patches, dual_point[:, c].tolist(), strict=True):
            for row in image:
                product_ = sum((Fraction(float(x)) * int(w) for x, w in zip(row, word, strict=True)), Fraction(0))
                entry += max(product_, Fraction(0)) * Fraction(z) / len(image)
        total += entry**2
    return total / int((word**2).sum())


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([1e-3, 1.0, 1e6]), n_patches=st.sampled_from([1, 3]))
def test_the_scan_is_never_below_the_maximum_in_fractions(seed, size, n_patches):
    random = np.random.default_rng(seed)
    patches = size * random.standard_normal((4, n_patches, 3)) * 10.0 ** random.integers(-3, 3, (4, 1, 3))
    problem = problem_of(patches, random.standard_normal((4, 2)), intercept=False)
    dual_point = torch.from_numpy(random.standard_normal((4, 2)))
    truth = max(exact_square(patches, dual_point, word) for word in words(3))
    found = TERNARY(problem, dual_point)
    assert Fraction(found.upper_bound) ** 2 >= truth
    assert found.upper_bound == pytest.approx(math.sqrt(truth), rel=1e-9)
    assert float(found.values[0]) == pytest.approx(math.sqrt(truth), rel=1e-9)
    assert not Fraction(found.upper_bound * (1 - 1e-6)) ** 2 >= truth  # the test can fail


def test_the_scan_is_never_below_the_maximum_in_fractions_where_whitening_cancels():
    """Bright patches of little contrast: their mean, which the basis takes off, is far larger than what is left."""
    random = np.random.default_rng(5)
    images = torch.from_numpy(1000 + random.random((3, 1, 3, 3)))
    problem = build_problem(
        images, random.standard_normal((3, 2)), spec=PatchSpec((2, 2), whiten=1e-3, rank=2, hidden_bias=True)
    )
    dual_point = problem.dual_point(problem.constant_predictions())
    rows = problem.responses.rows(slice(None)).tolist()
    basis = [[Fraction(entry) for entry in row] for row in problem.responses.embedding.basis.tolist()]
    patches = [
        [[sum(b * Fraction(x) for b, x in zip(axis, row, strict=True)) for axis in basis] for row in image]
        for image in rows
    ]
    residual = [[Fraction(z) for z in row] for row in dual_point.tolist()]
    mean = [sum(column) / 3 for column in zip(*residual, strict=True)]  # what the point stands for sums to zero exactly

    def exact(word: np.ndarray) -> Fraction:
        pooled = [
            sum(max(sum(int(t) * x for t, x in zip(word, row, strict=True)), Fraction(0)) for row in image) / len(image)
            for image in patches
        ]
        sums = [sum(phi * (z[c] - mean[c]) for phi, z in zip(pooled, residual, strict=True)) for c in range(2)]
        return sum(entry**2 for entry in sums) / int((word**2).sum())

    truth = max(map(exact, words(3)))
    found = TERNARY(problem, dual_point)
    assert Fraction(found.upper_bound) ** 2 >= truth
    assert found.upper_bound == pytest.approx(math.sqrt(truth), rel=1e-5)
    assert bound_over_family(problem, math.nan, dual_point) == math.inf


@pytest.mark.parametrize("whiten", [None, 0.1])
def test_half_of_a_symmetric_family_stands_for_all_of_it(whiten):
    problem = digits_problem(40, spec=PatchSpec((3, 3), whiten=whiten, rank=3, hidden_bias=True), pooling=2)
    dual_point = problem.dual_point(problem.constant_predictions())
    every = normalize(torch.from_numpy(words(4)).double())
    assert Ternary().size(4) == len(every) == 80
    blocks = torch.cat(list(Ternary().blocks(4)))
    assert len(torch.unique(torch.cat([blocks, -blocks]), dim=0)) == len(torch.unique(every, dim=0)) == 80
    assert bool(Listed(every).contains(blocks).all())
    assert bool(Ternary().contains(every).all())
    assert not bool(Ternary().contains(normalize(torch.tensor([[1.0, 0.5, 0, 0]]).double())).any())
    half, whole = TERNARY(problem, dual_point), FamilyOracle(Listed(every))(problem, dual_point)
    assert half.upper_bound == pytest.approx(whole.upper_bound, rel=1e-9)
    assert half.scope is Scope.FAMILY
    assert half.stats["family_size"] == whole.stats["family_size"] == 80
    assert float(g(problem, every, dual_point).max()) <= whole.upper_bound


def by_cvxpy(problem: Problem, filters: Tensor) -> float:
    """The least objective over networks on `filters`."""
    features = problem.responses.matrix(filters).flatten(1).numpy()
    weights, shift = cp.Variable((features.shape[1], problem.n_outputs)), cp.Variable((1, problem.n_outputs))
    outputs = features @ weights + np.ones((problem.n, 1)) @ shift * problem.intercept
    if problem.loss.name == "squared":
        loss = cp.sum_squares(outputs - problem.targets.numpy()) / (2 * problem.n)
    else:
        right = cp.sum(cp.multiply(outputs, problem.targets.numpy()), axis=1)
        loss = cp.sum(cp.log_sum_exp(outputs, axis=1) - right) / problem.n
    cells = problem.responses.n_cells
    groups = [cp.norm(weights[j * cells : (j + 1) * cells], "fro") for j in range(len(filters))]
    program = cp.Problem(cp.Minimize(loss + problem.beta * cp.sum(groups)))
    return float(program.solve(solver=cp.CLARABEL))


@pytest.mark.parametrize(("loss", "dim"), [("squared", 3), ("cross-entropy", 2)])
def test_column_generation_ends_at_the_optimum_over_the_family(loss, dim):
    problem = flat_problem(dim=dim, loss=loss, beta=0.03, seed=dim)
    every = normalize(torch.from_numpy(words(dim)).double())
    optimum = by_cvxpy(problem, every)
    solution = column_generation(problem, TERNARY, Budget(tol=1e-5))
    certificate = certify_parameters(
        problem, solution.filters, solution.weights, solution.intercept, oracle=TERNARY, dual_point=solution.dual_point
    )
    assert certificate.dual - 1e-6 <= optimum <= certificate.primal + 1e-6
    assert certificate.rel_gap == certificate.family_gap < 2e-5
    assert certificate.family_size == len(every)
    assert certificate.scope is Scope.FAMILY
    assert bool(Ternary().contains(solution.filters).all())
    if dim == 2:  # other filters do better: the proof is of the family alone
        rows = problem.responses.images[..., 0].transpose(1, 2)
        free = convcvx.solve(rows, problem.targets.argmax(1), problem.beta, loss=loss, tol=1e-3)
        assert free.certificate.primal < optimum * (1 - 1e-3)


def test_a_bound_over_a_family_says_nothing_of_other_networks():
    problem = flat_problem(beta=0.03)
    solution = convcvx.solve(problem.responses.images[..., 0].transpose(1, 2), problem.targets.argmax(1), 0.03)
    few = FamilyOracle(Listed(-solution.filters[:1]))
    mine = certify_parameters(problem, solution.filters, solution.weights, oracle=few)
    proved = certify_parameters(problem, solution.filters, solution.weights)
    assert mine.scope is Scope.FAMILY
    assert mine.dual <= mine.primal
    assert proved.with_bound_of(mine) == proved
    assert mine.with_bound_of(proved).scope is Scope.GLOBAL
    assert not Scope.FAMILY.for_all
    assert Scope.FAMILY.lasting
    assert not Scope.SAMPLED.lasting


def test_families_of_no_use_are_refused():
    for filters, what in (
        (torch.ones(2, 3), "norm 1"),
        (torch.full((2, 3), math.nan), "norm 1"),
        (torch.zeros(0, 3), "at least one filter"),
        (torch.zeros(3), "at least one filter"),
    ):
        with pytest.raises(InputError, match=what):
            Listed(filters)
    problem = flat_problem(dim=2)
    with pytest.raises(InputError, match="3 entries; the problem's have 2"):
        FamilyOracle(Listed(torch.eye(3)))(problem, problem.targets)
    with pytest.raises(InputError, match="pass --filters ternary"):
        get_oracle("family", problem)
    with pytest.raises(InputError, match="pass --rank 9, or a smaller kernel"):
        Ternary().size(25)
    for options, what in (
        ({"dictionary": 20}, "leave --dictionary out"),
        ({"solver": "sliding-fw"}, "needs solver column-generation, or auto; got sliding-fw"),
        ({"oracle": "exact"}, "needs oracle family, or auto; got exact"),
    ):
        with pytest.raises(InputError, match=what):
            TrainConfig(filters="ternary", **options).check()
    assert "pass --rank 9" in refused("train --data digits --limit 50 --kernel-size 5 --filters ternary --json")


def test_a_scan_without_time_proves_nothing():
    problem = digits_problem(30, spec=PatchSpec((2, 2))).until(Deadline.after(1e-9))
    found = TERNARY(problem, torch.ones(30, 10).double() - 0.5)
    assert found.upper_bound == math.inf
    assert found.cut_short


@pytest.mark.slow
def test_python_the_command_and_the_estimator_train_the_same_ternary_layer(tmp_path):
    train, _ = load("digits", limit=150)
    layer = convcvx.fit(train.images, train.targets, **QUICK)
    assert layer.certificate.scope is Scope.FAMILY
    assert layer.certificate.family_gap < 0.05
    assert bool(Ternary().contains(layer.solution.filters).all())
    shown = answer(cli("train --data digits --limit 150 --json", *FLAGS, "--out", tmp_path / "run"))
    assert torch.equal(convcvx.load(tmp_path / "run").solution.filters, layer.solution.filters)
    for name in ("primal", "dual", "family_size", "family_gap", "n_filters", "solver", "optimum"):
        assert shown[name] == layer.metrics[name], name
    assert (shown["family_size"], shown["scope"], shown["solver"]) == (80, "family", "column-generation")
    assert "no network over them" in shown["meaning"]

    model = ConvexCNNClassifier(**{k: v for k, v in QUICK.items() if k != "seed"})
    model._config = lambda: TrainConfig.of(QUICK)  # the same seed
    model.fit(train.images.numpy(), train.targets.numpy())
    np.testing.assert_array_equal(model.filters_, layer.solution.filters)
    assert model.certificate_.scope is Scope.FAMILY

    again = answer(cli("certify --json", tmp_path / "run"))
    assert again["dual"] == pytest.approx(shown["dual"], rel=1e-9)
    assert again["scope"] == "family"
    assert "more than" in cli("certify", tmp_path / "run").output
    assert answer(cli("certify --oracle local --json", tmp_path / "run", code=3))["scope"] == "heuristic"
    cli("report", tmp_path / "run")
    assert "above the best network over these 80 ternary filters" in (tmp_path / "run" / "report.html").read_text()
    stored = json.loads((tmp_path / "run" / "certificate.json").read_text())
    earlier = {k: v for k, v in stored.items() if k not in ("family_size", "family_gap", "optimum")}
    assert Certificate.from_dict(earlier).family_gap is None


@pytest.mark.slow
def test_a_resumed_ternary_training_ends_where_the_uninterrupted_one_does(tmp_path):
    fine = (*FLAGS, "--tol", 1e-5)
    whole = answer(cli("train --data digits --limit 150 --json", *fine, "--out", tmp_path / "whole"))
    cut, resume = ("--max-rounds", 1), ("--max-rounds", 100, "--resume")
    run = tmp_path / "cut"
    cli("train --data digits --limit 150", *fine, *cut, "--out", run, code=3)
    resumed = answer(cli("train --data digits --limit 150 --json", *fine, *resume, "--out", run))
    for name in ("primal", "dual", "n_filters", "family_gap", "rounds"):
        assert resumed[name] == whole[name], name


def test_a_warm_start_leaves_filters_that_are_not_of_the_family_behind():
    train, _ = load("digits", limit=100)
    images, targets = train.images.numpy(), train.targets.numpy()
    options = {k: v for k, v in QUICK.items() if k not in ("seed", "filters")}
    model = ConvexCNNClassifier(**options, random_state=0, warm_start=True).fit(images, targets)
    assert not bool(Ternary().contains(model.solution_.filters).all())
    model.set_params(filters="ternary").fit(images, targets)
    assert bool(Ternary().contains(model.solution_.filters).all())
    assert model.certificate_.rel_gap < 0.05


def test_certificates_of_the_same_network_are_kept_apart_by_their_families():
    problem = flat_problem(beta=0.03)
    solution = column_generation(problem, TERNARY, Budget(tol=1e-4))
    small = certify_parameters(
        problem, solution.filters, solution.weights, oracle=FamilyOracle(Listed(solution.filters))
    )
    large = certify_parameters(problem, solution.filters, solution.weights, oracle=TERNARY)
    assert small.family_size == solution.n_filters
    assert large.family_size == 8
    assert large.dual <= small.dual + 1e-9  # a larger family has a lower optimum
    assert replace(small, family_size=None).meaning.startswith("a proof for the filters of a family")


DRAWN = {"hidden_bias": True, "whiten": 0.1, "pool": 2, "beta_ratio": 0.01, "max_rounds": 0, "seed": 1}


def of_dictionary(count: int = 150, **options) -> tuple[convcvx.Fit, Problem]:
    """A training from a dictionary, and its problem in float64."""
    train, _ = load("digits", limit=count)
    given = {"dictionary": 24, **DRAWN, **options}
    fit = convcvx.fit(train.images, train.targets, **given)
    config = TrainConfig.of(given)
    problem = training_problem(config, train).with_dtype(torch.float64)
    return fit, problem.with_beta(fit.certificate.beta)


@pytest.mark.filterwarnings("ignore::convcvx.errors.ConvergenceWarning")
@pytest.mark.parametrize("loss", ["squared", "cross-entropy", "bce"])
def test_a_dictionary_proves_its_gap_beside_the_estimate_over_all_filters(loss):
    fit, problem = of_dictionary(loss=loss)
    found = fit.certificate
    assert (found.scope, found.family_size) == (Scope.HEURISTIC, 24)
    drawn = dictionary(problem.responses, 24, seed=1)
    solution = fit.solution
    proved = certify_parameters(
        problem, solution.filters, solution.weights, solution.intercept, oracle=FamilyOracle(Listed(drawn))
    )
    assert found.family_gap == pytest.approx(proved.family_gap, rel=1e-2)
    assert found.family_gap < 0.02 < found.rel_gap
    assert fit.metrics["family_gap"] == found.family_gap
    optimum = solve_master(problem, drawn, tol=1e-6).objective
    assert (1 - found.family_gap) * found.primal <= optimum <= found.primal * (1 + 1e-6)
    assert "over these 24 filters of the dictionary is more than" in told(found.to_dict())["family"]


@pytest.mark.filterwarnings("ignore::convcvx.errors.ConvergenceWarning")
def test_a_bound_over_a_dictionary_above_the_objective_is_a_fault_and_no_gap_of_zero(monkeypatch):
    """Control of the test before: a maximum that is too small makes the bound too large."""
    monkeypatch.setattr("convcvx.training.dictionary_gap.bound_over_family", lambda *_: 1e-9)
    with pytest.raises(RunError, match=r"the lower bound .* is above the objective"):
        of_dictionary(beta_ratio=0.3)


@pytest.mark.filterwarnings("ignore::convcvx.errors.ConvergenceWarning")
def test_the_gap_of_a_dictionary_is_not_proved_where_nothing_is_to_be_proved():
    fit, problem = of_dictionary(count=40, oracle="local")
    assert fit.certificate.family_gap is None
    # The control: it could have been, and is by `certify`.
    network = fit.solution.filters, fit.solution.weights, fit.solution.intercept
    assert 0 < with_dictionary_gap(fit.certificate, fit.config, problem, *network).family_gap < 1


@pytest.mark.filterwarnings("ignore::convcvx.errors.ConvergenceWarning")
@pytest.mark.parametrize("flips", [False, True])
def test_a_proof_that_is_long_beside_the_training_is_left_out_and_said_and_made_by_certify(flips, monkeypatch):
    for name, value in {"LEAST": 0.0, "SHARE": 0.0, "TRIED": 8, "LEAST_TRIED": 8}.items():
        monkeypatch.setattr(f"convcvx.training.dictionary_gap.{name}", value)
    fit, problem = of_dictionary(flips=flips)
    assert (fit.certificate.family, fit.certificate.family_gap) == (None, None)
    assert 0 < fit.metrics["family_seconds"] < 60
    assert told(fit.metrics)["left out"].startswith("no gap over the filters of the dictionary was proved")
    assert all("no gap over" not in claim.text for claim in claims(fit.metrics))
    network = fit.solution.filters, fit.solution.weights, fit.solution.intercept
    config = replace(fit.config, flips=flips)
    assert 0 < with_dictionary_gap(fit.certificate, config, problem, *network).family_gap < 1
    assert isinstance(family_proof(config, problem, *network, training_seconds=1.0), LeftOut)
    asked = of_dictionary(flips=flips, oracle="polynomial")[0]
    assert asked.certificate.family_gap is not None
    monkeypatch.setattr("convcvx.training.dictionary_gap.LEAST", 60.0)
    assert family_proof(config, problem, *network, training_seconds=1.0).gap > 0


@pytest.mark.filterwarnings("ignore::convcvx.errors.ConvergenceWarning")
@pytest.mark.parametrize("flips", [False, True])
def test_the_seconds_of_a_proof_are_those_of_all_images_and_of_all_filters(flips, monkeypatch):
    """A clock that goes by the filters and images that are gone through, 1 ms each, after 5 s for the first ever."""
    fit, problem = of_dictionary(flips=flips)
    seconds = [0.0]

    def surveyed(responses, dual_point, family, weights, where):
        assert len(dual_point) == len(where)
        seconds[0] += (0.0 if seconds[0] else 5.0) + 1e-3 * len(where) * len(family)

    stubs = {"_surveyed": surveyed, "clock": lambda: seconds[0], "TRIED": 8, "LEAST_TRIED": 8, "LEAST": 0.0}
    for name, value in stubs.items():
        monkeypatch.setattr(f"convcvx.training.dictionary_gap.{name}", value)
    network = fit.solution.filters[:12], fit.solution.weights[:12], fit.solution.intercept
    found = family_proof(replace(fit.config, flips=flips), problem, *network, training_seconds=1e-6)
    assert found.seconds == pytest.approx(1e-3 * 150 * 24)


@pytest.mark.filterwarnings("ignore::convcvx.errors.ConvergenceWarning")
@pytest.mark.parametrize("flips", [False, True])
def test_of_a_training_in_float32_the_gap_is_proved_from_what_the_network_itself_says(flips, monkeypatch):
    monkeypatch.setattr("convcvx.responses.streams.PRECISE_SIZE", 1e4)
    fit, problem = of_dictionary(count=80, flips=flips, contrast=True)
    config = replace(fit.config, flips=flips)
    network = fit.solution.filters, fit.solution.weights, fit.solution.intercept
    anew = with_dictionary_gap(replace(fit.certificate, family_gap=None), config, problem, *network)
    assert fit.certificate.family_size == anew.family_size == 24
    assert fit.certificate.family_gap == pytest.approx(anew.family_gap, rel=0.1)  # two dual points


@pytest.mark.filterwarnings("ignore::convcvx.errors.ConvergenceWarning")
def test_an_intercept_far_from_zero_does_not_hide_what_is_proved(monkeypatch):
    """In float32 the network's own outputs are then rounded by more than its residuals."""
    monkeypatch.setattr("convcvx.responses.streams.PRECISE_SIZE", 1e4)
    train, _ = load("digits", limit=80)
    given = {"dictionary": 24, **DRAWN, "loss": "squared"}
    near, far = (convcvx.fit(train.images, train.targets.double() + offset, **given) for offset in (0.0, 1e7))
    assert far.certificate.family_gap == pytest.approx(near.certificate.family_gap, rel=0.1)


@pytest.mark.filterwarnings("ignore::convcvx.errors.ConvergenceWarning")
@pytest.mark.parametrize("flips", [False, True])
def test_a_filter_that_rounding_made_zero_costs_no_proof(flips):
    fit, problem = of_dictionary(count=60, flips=flips)
    filters, weights = fit.solution.filters.clone(), fit.solution.weights.clone()
    for gone in (0, len(filters) // 2) if flips else (0,):
        filters[gone] = 0.0
    network = filters, weights, fit.solution.intercept
    proof = family_proof(replace(fit.config, flips=flips), problem, *network)
    assert proof is not None
    assert 0 < proof.gap < 1
    assert bool(proof.outputs.isfinite().all())


@pytest.mark.filterwarnings("ignore::convcvx.errors.ConvergenceWarning")
@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_certifying_a_run_from_a_dictionary_proves_its_gap_anew(tmp_path, loss):
    flags = "--limit 80 --dictionary 24 --hidden-bias --whiten --pool 2 --beta-ratio 0.01 --max-rounds 0 --flips"
    flags += f" --loss {loss}"
    trained = answer(cli(f"train --data digits --json {flags}", "--out", tmp_path / "run", code=3))
    again = answer(cli("certify --json", tmp_path / "run", code=3))
    assert (again["family"], again["family_size"]) == (trained["family"], trained["family_size"])
    assert again["family_gap"] == pytest.approx(trained["family_gap"], rel=1e-6)


@pytest.mark.filterwarnings("ignore::convcvx.errors.ConvergenceWarning")
def test_a_training_whose_weights_cancel_in_float32_is_not_lost():
    """Held-out images prefer a β at which outputs are differences of sums that float32 rounds: a ten-thousandth off."""
    train, _ = load("digits", limit=150)
    options = {"dictionary": 16, "tune": 0.2, "max_rounds": 0, "flips": True, "kernel_size": 3, "seed": 0}
    fit = convcvx.fit(train.images, train.targets, **options)
    with torch.no_grad():
        plain, exact = fit.network(train.images), fit.network.double()(train.images.double())
    difference = float((plain - exact).abs().max() / exact.abs().max())
    assert 1e-4 < difference < 1e-2


@pytest.mark.filterwarnings("ignore::convcvx.errors.ConvergenceWarning")
def test_with_flips_the_gap_of_a_dictionary_is_that_on_images_and_mirror_images():
    fit, problem = of_dictionary(count=80, flips=True)
    solution, doubled = fit.solution, with_mirror_images(problem)
    proved = certify_parameters(
        doubled, solution.filters, solution.weights, solution.intercept, oracle=FamilyOracle(Listed(solution.filters))
    )
    assert fit.certificate.family_size == proved.family_size == 24
    assert fit.certificate.family_gap == pytest.approx(proved.family_gap, rel=1e-2)
    plain = certify_parameters(
        problem, solution.filters, solution.weights, oracle=FamilyOracle(Listed(solution.filters))
    )
    assert plain.family_gap > 5 * proved.family_gap  # the images alone would be another objective


@pytest.mark.filterwarnings("ignore::convcvx.errors.ConvergenceWarning")
@pytest.mark.parametrize("options", [{"slide": 1.0}, {"max_rounds": 1}])
def test_the_family_of_a_dictionary_is_the_networks_own_filters_and_those_that_it_does_not_use(options):
    fit, _ = of_dictionary(count=80, **options)
    own = fit.solution.n_filters
    assert fit.certificate.family_gap is not None
    assert fit.certificate.family_gap < 1
    if "slide" in options:
        assert fit.certificate.family_size == own
    else:
        assert own <= fit.certificate.family_size <= own + 24


@pytest.mark.filterwarnings("ignore::convcvx.errors.ConvergenceWarning")
def test_filters_of_a_dictionary_that_a_network_does_not_use_belong_to_the_family():
    fit, problem = of_dictionary(count=80, beta_ratio=0.1)
    drawn = dictionary(problem.responses, 24, seed=1)
    few = solve_master(problem, drawn[:10], tol=1e-6)
    network = drawn[:10], few.weights, few.intercept
    config = TrainConfig.of({"dictionary": 24, **DRAWN})
    found = with_dictionary_gap(fit.certificate, config, problem, *network)
    proved = certify_parameters(problem, *network, oracle=FamilyOracle(Listed(drawn)))
    assert found.family_size == proved.family_size == 24
    assert found.family_gap == pytest.approx(proved.family_gap, rel=1e-6)
    assert found.family_gap > 2 * fit.certificate.family_gap  # filters that are missing show
    late = with_dictionary_gap(
        replace(fit.certificate, family_gap=None), config, problem.until(Deadline.after(1e-9)), *network
    )
    assert late.family_gap is None


@pytest.mark.filterwarnings("ignore::convcvx.errors.ConvergenceWarning")
def test_an_estimator_with_a_dictionary_proves_the_same_gap():
    train, _ = load("digits", limit=80)
    images, labels = train.images.numpy(), train.targets.numpy()
    given = {"dictionary": 24, "kernel_size": 3, **{name: value for name, value in DRAWN.items() if name != "seed"}}
    model = ConvexCNNClassifier(**given, random_state=5).fit(images, labels)
    seed = np.random.RandomState(5).randint(np.iinfo(np.int32).max - 1)
    fit = convcvx.fit(images, labels, **given, seed=seed)
    assert model.certificate_.family_size == fit.certificate.family_size == 24
    assert model.certificate_.family_gap == pytest.approx(fit.certificate.family_gap, rel=1e-3)
    assert model.certificate_.family_gap < 2 * DICTIONARY_TOL  # which bounds the gap of its own dual point


@pytest.mark.filterwarnings("ignore::convcvx.errors.ConvergenceWarning")
def test_a_twin_of_free_filters_is_held_against_what_is_proved_of_all_networks():
    train, _ = load("digits", limit=60)
    images, classes = train.images, train.targets % 3
    layer = convcvx.fit(images, classes, filters="ternary", rank=3, pool=2, beta_ratio=0.1, tol=0.05)
    assert layer.certificate.scope == "family"
    found = convcvx.compare(layer, images, classes, epochs=1, seeds=1).metrics
    assert found["twin"]["scope"] == found["convex"]["scope"] == "global"
    assert found["convex"]["meaning"].endswith("whose filters are of rank 3 of 9")
    assert found["twin"]["lower_bound"] == layer.certificate.proved < layer.certificate.dual


@pytest.mark.filterwarnings("ignore::convcvx.errors.ConvergenceWarning")
def test_a_network_that_was_just_made_is_asked_where_images_are_bright_or_outputs_large(monkeypatch):
    monkeypatch.setattr("convcvx.network.certify.LOOKED_AT", 5)
    train, _ = load("digits", limit=60)
    images = train.images.clone()
    images[31] *= 4
    problem = build_problem(images, train.targets, 1e-3, spec=PatchSpec(kernel_size=3), pooling=2)
    fit = convcvx.fit(images, train.targets, kernel_size=3, pool=2, beta=1e-3, oracle="local", max_rounds=1)
    network = fit.network
    own = parameters_of(read_network(network, (1, 8, 8)), problem.responses.embedding)
    outputs, said = outputs_of_export(problem, network, *own)
    torch.testing.assert_close(outputs, outputs_without_intercept(problem, *own[:2]))
    assert said is None
    order = outputs.abs().amax(dim=1).argsort(descending=True).tolist()
    largest = next(k for k in order if k != 31 and k % 12)
    unseen = next(k for k in reversed(order) if images[k].abs().max() < 1 and k % 12)

    def spoiled(image):
        def outputs_but(network, some):
            found = outputs_of(network, some)
            found[(some == images[image]).flatten(1).all(dim=1)] += found.abs().max()
            return found

        return outputs_but

    for image in (largest, 31, 48):
        monkeypatch.setattr("convcvx.network.certify.outputs_of", spoiled(image))
        with pytest.raises(InputError, match="are not those of its"):
            outputs_of_export(problem, network, *own)
    monkeypatch.setattr("convcvx.network.certify.outputs_of", spoiled(unseen))
    outputs_of_export(problem, network, *own)  # which `certify` would find
