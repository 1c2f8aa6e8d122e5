"""Filters of several subspaces: what is proved holds over all of them, and no filter leaves its own."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import answer, cli
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import convcvx
from convcvx.baseline import Twin, train_twin
from convcvx.budget import Budget, Deadline
from convcvx.certificate import certify_parameters
from convcvx.errors import ConvergenceWarning, InputError
from convcvx.oracles import BranchAndBoundOracle, ExactOracle, LocalOracle, Oracle, OracleResult, PolynomialOracle
from convcvx.oracles._patch_rows import PatchRows
from convcvx.oracles.table import pick_oracle
from convcvx.patches import PatchEmbedding, PatchSpec
from convcvx.problem import Problem
from convcvx.solution import Solution
from convcvx.solvers import sliding_frank_wolfe
from convcvx.solvers.master.table import solve_master
from convcvx.solvers.slide.descent import descend
from convcvx.solvers.slide.joint import slide
from convcvx.solvers.table import pick_solver
from convcvx.terms.scope import Scope
from convcvx.training.options import TrainConfig
from convcvx.training.plan import build_problem

RIGOROUS = (ExactOracle(), BranchAndBoundOracle(1e-3), PolynomialOracle())


def circle(size: int, seed: float = 0.0) -> Tensor:
    """(size, 2) unit vectors."""
    angles = 2 * math.pi * (torch.arange(size, dtype=torch.float64) + seed) / size
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def everywhere(embedding: PatchEmbedding, size: int, seed: float = 0.0) -> Tensor:
    """Filters on circles in all subspaces of two dimensions."""
    parts = []
    for number in range(embedding.spec.subspaces):
        filters = torch.zeros(size, embedding.dim, dtype=torch.float64)
        filters[:, embedding.coordinates(number)] = circle(size, seed)
        parts.append(filters)
    return torch.cat(parts)


def subspace_problem(seed: int, *, subspaces: int = 3, n: int = 12, loss: str = "squared") -> Problem:
    random = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 1, 5, 5, generator=random) + (seed % 2)
    spec = PatchSpec((3, 3), stride=(2, 2), rank=2, subspaces=subspaces)
    problem = build_problem(images, np.arange(n) % 3, spec=spec, loss=loss, n_classes=3, dtype=torch.float64)
    start = problem.dual_point(problem.constant_predictions())
    return problem.with_beta(0.1 * LocalOracle()(problem, start).g_max)


def in_one(embedding: PatchEmbedding, filters: Tensor) -> bool:
    """Whether each filter lies in one of the subspaces, to the last bit."""
    parts = filters.unflatten(1, (embedding.spec.subspaces, -1))
    return bool(((parts != 0).any(dim=2).sum(dim=1) <= 1).all())


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), loss=st.sampled_from(["squared", "cross-entropy"]))
def test_bounds_are_above_g_of_filters_in_every_subspace(seed, loss):
    problem = subspace_problem(seed, loss=loss)
    random = torch.Generator().manual_seed(seed)
    point = problem.dual_point(torch.randn(problem.n, 3, generator=random, dtype=torch.float64))
    known = everywhere(problem.responses.embedding, 200)
    heights = problem.responses.correlate(known, point).flatten(1).norm(dim=1)
    for oracle in RIGOROUS:
        found = oracle(problem, point, starts=known[:50], n_filters=5)
        assert found.upper_bound >= float(heights.max()) * (1 - 1e-12), oracle.name
        assert in_one(problem.responses.embedding, found.filters)
        measured = problem.responses.correlate(found.filters, point).flatten(1).norm(dim=1)
        torch.testing.assert_close(measured, found.values)
    exact = RIGOROUS[0](problem, point)
    assert exact.upper_bound <= float(heights.max()) * 1.01  # the circles are that dense: nothing else was searched


def test_the_optimum_is_that_over_a_dense_set_of_filters_in_all_subspaces():
    problem = subspace_problem(0, n=20)
    solution = sliding_frank_wolfe(problem, ExactOracle(), Budget(tol=1e-4))
    certificate = certify_parameters(problem, solution.filters, solution.weights, oracle=ExactOracle(), tol=1e-4)
    assert certificate.scope is Scope.GLOBAL
    assert certificate.rel_gap <= 1e-4
    filters = everywhere(problem.responses.embedding, 400, 0.5)
    none = torch.zeros(len(filters), problem.responses.n_cells, 3, dtype=torch.float64)
    dense = solve_master(problem, filters, none, none[0, 0], tol=1e-6)
    assert certificate.dual <= dense.objective <= certificate.primal * (1 + 1e-3)


def test_more_subspaces_have_a_lower_optimum_and_all_directions_at_once_a_lower_one_still():
    values = []
    for subspaces in (1, 2, 3):
        problem = subspace_problem(1, subspaces=subspaces).with_beta(1e-3)
        solution = sliding_frank_wolfe(problem, ExactOracle(), Budget(tol=1e-4))
        values.append((solution.history[-1]["objective"], solution.history[-1]["lower_bound"]))
    for (_, before), (after, _) in itertools.pairwise(values):
        assert after < before
    whole = replace(problem.responses.embedding, spec=PatchSpec((3, 3), stride=(2, 2), rank=6))
    free = replace(problem, responses=type(problem.responses)(problem.responses.images, whole, dtype=torch.float64))
    best = sliding_frank_wolfe(free, LocalOracle(), Budget(tol=1e-3), start=solution)
    assert best.history[-1]["objective"] <= values[-1][0] * (1 + 1e-9)


@pytest.mark.parametrize("by", [lambda *given: slide(*given, accuracy=0.0), lambda *given: descend(*given, 4.0)])
def test_filters_slide_within_their_subspaces(by):
    problem = subspace_problem(2, n=40)
    embedding = problem.responses.embedding
    filters = everywhere(embedding, 4, 0.3)
    none = torch.zeros(len(filters), problem.responses.n_cells, 3, dtype=torch.float64)
    solution = solve_master(problem, filters, none, none[0, 0], tol=1e-6)
    slid = by(problem, Solution(filters, solution.weights, solution.intercept), 0)
    assert in_one(embedding, slid.filters)
    assert slid.n_filters > 3
    again = solve_master(problem, slid.filters, slid.weights, slid.intercept, tol=1e-6)
    assert again.objective < solution.objective


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_filters_of_the_twin_keep_to_their_subspaces(optimizer):
    """One that mixes them is of another problem, and may be better than what is proved of this one."""
    problem = subspace_problem(10)
    embedding, begun = problem.responses.embedding, Twin(problem, 7)
    trained = train_twin(problem, optimizer, 7, rate=0.03, epochs=20, batch=4).twin
    assert in_one(embedding, trained.filters.detach())
    assert bool((embedding.mask(trained.filters.detach()).unflatten(1, (3, 2))[:, :, 0].sum(dim=0) >= 2).all())
    assert not torch.equal(trained.filters, begun.filters)
    embedding.filters(trained.network()[0].weight.detach(), None)  # which refuses kernels of no subspace
    solution = sliding_frank_wolfe(problem, ExactOracle(), Budget(tol=1e-3))
    tuned = train_twin(problem, optimizer, 0, rate=0.003, epochs=5, batch=12, start=solution)
    assert in_one(embedding, tuned.twin.filters.detach())
    assert tuned.objective >= solution.history[-1]["lower_bound"]


def test_the_maps_of_subspaces_have_the_arithmetic_that_is_asked_for():
    problem = subspace_problem(11).with_dtype(torch.float32)
    assert {part.dtype for part in problem.responses.subspaces} == {torch.float32}
    precise = problem.with_dtype(torch.float64)
    assert {part.dtype for part in precise.responses.subspaces} == {torch.float64}
    assert {part.dtype for part in problem.responses.subspaces} == {torch.float32}
    PatchRows.of(problem.responses.subspaces[1])
    assert "rows" in precise.responses.subspaces[1].kept  # which are gathered once for all
    found = LocalOracle()(precise, problem.targets, n_filters=3)
    measured = precise.responses.correlate(found.filters, problem.targets).flatten(1).norm(dim=1)
    torch.testing.assert_close(found.values, measured, rtol=1e-12, atol=0)


def test_what_an_oracle_needs_is_reckoned_of_one_subspace(monkeypatch):
    """As many patches in memory as one of them has: the others come after it."""
    problem = subspace_problem(12, subspaces=4)
    whole, part = (
        PatchRows.size(responses, problem.n_outputs)
        for responses in (problem.responses, problem.responses.subspaces[0])
    )
    assert part < 0.8 * whole
    monkeypatch.setattr("convcvx.oracles.needs.MAX_BYTES", 0.5 * (part + whole))
    assert pick_oracle("auto", problem)[0] == "exact"
    assert pick_oracle("exact", problem) == ("exact", "as asked")


def test_too_many_patches_of_rank_two_for_a_sweep_are_bounded(monkeypatch):
    problem = subspace_problem(13)
    own = problem.responses.subspaces[0]
    merged, bundled = (PatchRows.size(own, problem.n_outputs, merged=merged) for merged in (True, False))
    assert bundled < 0.8 * merged
    monkeypatch.setattr("convcvx.oracles.needs.MAX_BYTES", 0.5 * (merged + bundled))
    oracle, why = pick_oracle("auto", problem)
    assert (oracle, why) == ("branch-and-bound", "patches of rank 2 can be bounded in seconds")


@pytest.mark.parametrize("subspaces", [1, 2])
def test_a_model_card_says_of_which_networks_the_bound_is(subspaces, tmp_path):
    images, classes = torch.randn(30, 1, 5, 5, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    options: dict[str, Any] = {"kernel_size": 3, "rank": 2, "beta_ratio": 0.5, "tol": 0.05, "preset": "plain"}
    fit = convcvx.fit(images, classes, subspaces=subspaces, **options)
    fit.save_pretrained(tmp_path / "card")
    card = " ".join((tmp_path / "card" / "README.md").read_text().split())
    assert ("each in one of 2 subspaces of rank 2 of 9" if subspaces == 2 else "of rank 2 of 9") in card


def test_one_subspace_changes_nothing():
    images, classes = torch.randn(30, 1, 5, 5, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    options: dict[str, Any] = {"kernel_size": 3, "rank": 2, "beta_ratio": 0.1, "tol": 1e-3, "preset": "plain"}
    one, other = (convcvx.fit(images, classes, **options, **more) for more in ({}, {"subspaces": 1}))
    assert torch.equal(one.solution.filters, other.solution.filters)
    assert one.certificate == other.certificate


@dataclass(frozen=True)
class Says(Oracle):
    """One thing after another."""

    answers: list[OracleResult]
    scope: Scope = Scope.GLOBAL
    name = "says"

    def answer(self, problem, dual_point, wanted):
        return self.answers.pop(0)


@pytest.mark.parametrize(
    ("bounds", "scopes", "expected"),
    [
        ((1.0, 3.0, 2.0), "ggg", (3.0, Scope.GLOBAL)),
        ((1.0, math.nan, 2.0), "ggg", (math.inf, Scope.GLOBAL)),
        ((1.0, math.inf, 2.0), "ggg", (math.inf, Scope.GLOBAL)),
        ((5.0, 3.0, 2.0), "ghg", (5.0, Scope.HEURISTIC)),
    ],
)
def test_what_is_known_of_all_subspaces_is_no_more_than_of_any(bounds, scopes, expected):
    problem = subspace_problem(3)
    kinds = {"g": Scope.GLOBAL, "h": Scope.HEURISTIC}
    one, height = torch.eye(2, dtype=torch.float64)[:1], torch.ones(1, dtype=torch.float64)
    answers = [OracleResult(one, height, bound, kinds[kind]) for bound, kind in zip(bounds, scopes, strict=True)]
    found = Says(answers)(problem, problem.targets, n_filters=9)
    assert (found.upper_bound, found.scope) == expected
    assert len(found.filters) == 3
    assert in_one(problem.responses.embedding, found.filters)


def test_a_search_that_time_cuts_short_in_one_subspace_is_cut_short():
    problem = subspace_problem(4)
    one, height = torch.eye(2, dtype=torch.float64)[:1], torch.ones(1, dtype=torch.float64)
    stats = [{"cones": 1}, {"cones": 2, "stopped": "time_limit"}, {"cones": 3}]
    found = Says([OracleResult(one, height, 1.0, Scope.GLOBAL, each) for each in stats])(problem, problem.targets)
    assert found.cut_short
    assert found.stats["cones"] == 6


def test_a_time_limit_leaves_time_for_every_subspace():
    problem = subspace_problem(5, n=60)
    late = problem.until(Deadline.after(4.0))
    found = BranchAndBoundOracle(1e-9)(late, late.targets)
    assert math.isfinite(found.upper_bound)


def test_the_parts_of_a_space_belong_to_it():
    """The same directions in other subspaces are another problem."""
    problem = subspace_problem(6)
    embedding = problem.responses.embedding
    order = [0, 2, 1, 3, 4, 5]
    other = replace(embedding, basis=embedding.basis[order])
    assert embedding.same_space(embedding)
    assert not embedding.same_space(other)
    turned = torch.block_diag(*[torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)] * 3)
    assert embedding.same_space(replace(embedding, basis=turned @ embedding.basis))
    changed = replace(problem, responses=type(problem.responses)(problem.responses.images, other, dtype=torch.float64))
    filters = everywhere(embedding, 3)
    weights = torch.ones(len(filters), problem.responses.n_cells, 3, dtype=torch.float64)
    mine, others = (certify_parameters(p, filters, weights, oracle=ExactOracle()) for p in (problem, changed))
    with pytest.raises(InputError, match="another space"):
        mine.check_same_problem(others)


def test_kernels_outside_all_subspaces_are_refused():
    embedding = subspace_problem(7).responses.embedding
    inside = everywhere(embedding, 3)
    weight, bias = embedding.kernels(inside)
    torch.testing.assert_close(embedding.filters(weight, bias), inside)
    with pytest.raises(InputError, match="subspaces"):
        embedding.filters(*embedding.kernels(torch.ones(1, 6, dtype=torch.float64)))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"subspaces": 2}, "subspaces 2 need a rank"),
        ({"subspaces": 2, "rank": 2, "hidden_bias": True}, "hidden bias"),
        ({"subspaces": 2, "rank": 2, "dictionary": 8}, "--dictionary 8"),
        ({"subspaces": 2, "rank": 2, "filters": "ternary"}, "--filters ternary"),
        ({"subspaces": 0, "rank": 2}, "subspaces"),
    ],
)
def test_what_does_not_go_with_subspaces_is_refused(options, match):
    with pytest.raises(InputError, match=match):
        TrainConfig.from_dict(options).check()


def test_more_directions_than_patches_have_are_refused():
    with pytest.raises(InputError, match="rank times subspaces must be at most the patch size, 9; got 2 times 5"):
        subspace_problem(8, subspaces=5)


@pytest.mark.parametrize("name", ["copositive", "gated", "closed-form"])
def test_solvers_that_make_filters_of_their_own_refuse(name):
    with pytest.raises(InputError, match="filters of one space"):
        pick_solver(name, subspace_problem(9))


@pytest.mark.filterwarnings(f"ignore::{ConvergenceWarning.__module__}.{ConvergenceWarning.__name__}")
def test_a_run_of_the_command_line_is_certified_resumed_and_reported(tmp_path):
    out = str(tmp_path / "run")
    options = "--kernel-size 3 --stride 2 --rank 2 --subspaces 3 --pool 2 --beta-ratio 0.1 --tol 0.02 --preset plain"
    digits = ("--data", "digits", "--limit", "60", *options.split())
    answer(cli("train", *digits, "--max-rounds", "1", "--out", out, "--json", code=3))
    found = answer(cli("train", "--resume", "--max-rounds", "30", "--out", out, "--json"))
    assert found["scope"] == "global"
    assert found["rel_gap"] <= 0.02
    assert "each in one of 3 subspaces of rank 2 of 9" in found["meaning"]
    assert "subspaces" in answer(cli("certify", out, "--json"))["meaning"]
    cli("report", out)
    assert "each in one of 3 subspaces" in (tmp_path / "run" / "report.html").read_text()
