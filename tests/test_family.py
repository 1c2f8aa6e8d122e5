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
from helpers.problems import digits_problem, flat_problem, g, problem_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

import convcvx
from convcvx.budget import Budget, Deadline
from convcvx.certificate import Certificate, certify_parameters
from convcvx.data.datasets import load
from convcvx.errors import InputError
from convcvx.estimator import ConvexCNNClassifier
from convcvx.oracles import FamilyOracle, Listed, Scope, Ternary, get_oracle
from convcvx.patches import PatchSpec
from convcvx.problem import Problem
from convcvx.solvers.column_generation import column_generation
from convcvx.training.options import TrainConfig

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
    cli("report", tmp_path / "run")
    assert "no network over these 80 filters" in (tmp_path / "run" / "report.html").read_text()
    stored = json.loads((tmp_path / "run" / "certificate.json").read_text())
    earlier = {k: v for k, v in stored.items() if k not in ("family_size", "family_gap", "optimum")}
    assert Certificate.from_dict(earlier).family_gap is None


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
