"""Sliding Frank-Wolfe: proved optima, planted optima, monotone rounds, checkpoints, paths."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.problems import digits_problem, flat_problem, planted_problem, problem_of, random_parameters
from torch import Tensor

import convcvx
from convcvx.budget import Budget, Deadline
from convcvx.certificate import certify_parameters
from convcvx.data import datasets as data
from convcvx.data.datasets import spiral
from convcvx.errors import ConvergenceWarning, InputError
from convcvx.losses.table import LOSSES
from convcvx.oracles import BranchAndBoundOracle, ExactOracle
from convcvx.oracles.base import OracleResult
from convcvx.patches import PatchSpec
from convcvx.problem import Problem
from convcvx.solution import Solution
from convcvx.solvers.loop import Level
from convcvx.solvers.master.table import solve_master
from convcvx.solvers.rounds import _refuting, begin, consult, predicted
from convcvx.solvers.slide.coordinates import _factor
from convcvx.solvers.slide.descent import descend
from convcvx.solvers.sliding_frank_wolfe import SlidingFrankWolfe, sliding_frank_wolfe
from convcvx.solvers.table import SOLVERS
from convcvx.training.plan import build_problem, find_beta_max, solve_problem


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# Proofs

SPIRALS = [
    ("squared", 0.1),
    ("squared", 0.03),
    ("squared", 0.01),
    ("squared", 0.003),
    ("squared", 0.001),
    ("cross-entropy", 0.1),
    slow("cross-entropy", 0.03),
    slow("cross-entropy", 0.01),
]


@pytest.mark.parametrize(("loss", "beta"), SPIRALS)
def test_the_spiral_is_solved_with_a_proof(loss, beta):
    x, y = spiral(60)
    solution = convcvx.solve(x, y, beta / 60, loss=loss, intercept=False, tol=1e-6)
    certificate = solution.certificate
    assert certificate.scope == "global"
    assert -1e-9 <= certificate.rel_gap <= 1e-6
    assert solution.status == "converged"
    torch.testing.assert_close(solution.filters.norm(dim=1), torch.ones(solution.n_filters).double())
    assert float(solution.intercept.abs().max()) == 0


@pytest.mark.parametrize("loss", ["squared", pytest.param("cross-entropy", marks=pytest.mark.slow)])
@pytest.mark.parametrize("pooling", [None, "none"])
def test_pooled_patches_with_an_intercept_are_solved_with_a_proof(loss, pooling):
    problem = flat_problem(24, beta=0.01, loss=loss, pooling=pooling)
    solution = solve_problem(problem, Budget(tol=1e-5))
    record = solution.history[-1]
    assert (solution.status, record["scope"]) == ("converged", "global")
    assert record["rel_gap"] <= 1e-5


def test_real_targets_and_a_single_output():
    random = np.random.default_rng(0)
    x, noise = random.standard_normal((40, 2)), 0.1 * random.standard_normal(40)
    solution = convcvx.solve(x, np.abs(x[:, 0]) + noise, 0.01, tol=1e-6)
    assert solution.certificate.rel_gap <= 1e-6
    assert solution.weights.shape[2] == 1


# Planted optima: a dual point first, then the targets that make it optimal


def planted(loss: str, n_patches: int, pooling, seed: int) -> tuple[Problem, float]:
    random = torch.Generator().manual_seed(seed)
    half = torch.randn(12, n_patches, 2, generator=random, dtype=torch.float64)
    patches = torch.cat([half, -half])
    charges = torch.randn(12, 3, generator=random, dtype=torch.float64) * 0.02 / 24
    charges = charges - charges.mean(dim=1, keepdim=True)
    blank = problem_of(patches, torch.zeros(24, 3), pooling=pooling, intercept=False)
    return planted_problem(blank, torch.cat([charges, charges]), loss)


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
@pytest.mark.parametrize(("n_patches", "pooling"), [(1, None), (3, None), (3, "none")])
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_optima_are_found(loss, n_patches, pooling, seed):
    problem, optimum = planted(loss, n_patches, pooling, seed)
    solution = solve_problem(problem, Budget(tol=1e-6))
    last = solution.history[-1]
    assert solution.status == "converged"
    assert last["objective"] == pytest.approx(optimum, rel=2e-6)
    for record in solution.history:
        assert record["lower_bound"] <= optimum * (1 + 1e-12)
        assert record["objective"] >= optimum * (1 - 1e-12)


def test_negative_control_another_beta_has_another_optimum():
    problem, optimum = planted("squared", 1, None, 0)
    other = solve_problem(problem.with_beta(1.01 * problem.beta), Budget(tol=1e-6))
    assert other.history[-1]["objective"] != pytest.approx(optimum, rel=2e-6)
    assert other.history[-1]["lower_bound"] > optimum


# Rounds


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    train, _ = data.load("digits", limit=150)
    return train.images, train.targets


def rises(history: list[dict]) -> list[float]:
    objectives = [record["objective"] for record in history]
    return [b / a - 1 for a, b in pairwise(objectives) if b > a * (1 + 1e-9)]


@pytest.mark.parametrize("loss", ["squared", slow("cross-entropy")])
def test_the_objective_never_rises_on_digits(digits, loss):
    problem = build_problem(*digits, spec=PatchSpec(3, stride=2), pooling="2", loss=loss)
    problem = problem.with_beta(0.02 * find_beta_max(problem))
    solution = solve_problem(problem, Budget(max_rounds=4, max_filters=40))
    assert solution.history[-1]["objective"] < 0.8 * solution.history[0]["objective"]
    assert rises(solution.history) == []
    assert all(record["scope"] == "heuristic" for record in solution.history)
    assert solution.n_filters <= 40
    assert rises([{"objective": 1.0}, {"objective": 1.1}]) == [pytest.approx(0.1)]  # negative control


@pytest.mark.slow
def test_mini_batch_sliding_keeps_the_objective_falling(digits, monkeypatch):
    monkeypatch.setattr("convcvx.solvers.slide.joint.DETERMINISTIC_FLOPS", 0)
    problem = build_problem(*digits, spec=PatchSpec(3, stride=2), pooling="2", dtype=torch.float32)
    problem = problem.with_beta(0.02 * find_beta_max(problem))
    solution = solve_problem(problem, Budget(max_rounds=3, max_filters=30))
    assert rises(solution.history) == []


def test_history_and_callback_tell_every_round():
    seen = []
    solution = solve_problem(flat_problem(20, beta=0.003), Budget(tol=1e-6), callback=seen.append)
    assert [s.rounds for s in seen] == list(range(solution.rounds + 1))
    assert [record["round"] for record in solution.history] == list(range(solution.rounds + 1))
    assert {"round", "objective", "lower_bound", "rel_gap", "g_max", "n_filters", "seconds"} <= set(seen[0].history[0])
    assert [s.status for s in seen[:-1]] == ["running"] * solution.rounds


# Stopping short


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"max_rounds": 1}, "max_rounds"),
        ({"max_rounds": 0}, "max_rounds"),
        ({"time_limit": 1e-6}, "time_limit"),
        ({"max_filters": 2}, "max_filters"),
    ],
)
def test_stopping_short_warns_with_gap_tol_and_remedy(options, status):
    x, y = spiral(30)
    with pytest.warns(ConvergenceWarning) as caught:
        solution = convcvx.solve(x, y, 0.01 / 30, intercept=False, tol=1e-6, **options)
    message = str(caught[0].message)
    assert f"relative gap {solution.certificate.rel_gap:.2e} (global) is above tol 1.00e-06" in message
    assert f"stopped by {status}: raise {status}" in message
    assert solution.status == status
    assert caught[0].filename == __file__
    assert solution.n_filters <= options.get("max_filters", 100)


@pytest.mark.slow
def test_a_full_budget_is_spent_on_filters_that_a_long_descent_hardly_improves(monkeypatch):
    """Rounds of two epochs each stopped far above what their own filters can do, by 22 % here."""
    monkeypatch.setattr("convcvx.solvers.slide.joint.DETERMINISTIC_FLOPS", 0)  # as on larger data
    problem = digits_problem(None, 1e-3, spec=PatchSpec((3, 3), padding=(1, 1)), pooling=4)
    solution = solve_problem(problem, Budget(max_filters=4))
    assert solution.n_filters == 4
    assert solution.status == "max_filters"
    longer = descend(problem, solution, 0, 60)
    improved = solve_master(problem, longer.filters, longer.weights, longer.intercept).objective
    assert improved >= 0.95 * solution.history[-1]["objective"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta must be a positive float; got 0.0"),
        ({"beta": float("nan")}, "beta must be a positive float; got nan"),
        ({"tol": 0}, "tol must be a positive float; got 0"),
        ({"max_rounds": -1}, "max_rounds must be a whole number >= 0; got -1"),
        ({"max_rounds": None}, "max_rounds must be a whole number >= 0; got None"),
        ({"max_filters": 0}, "max_filters must be a whole number >= 1; got 0"),
        ({"max_filters": 2.5}, "max_filters must be a whole number >= 1; got 2.5"),
        ({"time_limit": -1}, "time_limit must be a positive float; got -1"),
        ({"loss": "hinge"}, f"loss must be one of {', '.join(LOSSES)}; got 'hinge'"),
        ({"solver": "magic"}, "solver must be one of"),
        ({"oracle": "delphi"}, "oracle must be one of"),
        ({"pooling": np.ones((1, 3))}, "pooling must have one column a patch"),
        ({"patches": np.ones(4)}, "patches must be a non-empty (n, d) or (n, K, d) array; got shape (4,)"),
        ({"patches": np.ones((0, 2))}, "patches must be a non-empty"),
        ({"patches": np.full((4, 2), np.nan)}, "patches must be finite"),
        ({"targets": np.arange(3)}, "targets must have one row an image, 4; got 3"),
        ({"targets": np.zeros(4, dtype=int)}, "targets must have at least two classes; all of them are 0"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(options, message):
    options = {"patches": np.eye(4)[:, :2], "targets": np.array([0, 1, 1, 0]), "beta": 0.1, **options}
    with pytest.raises(InputError) as caught:
        convcvx.solve(**options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_patches_that_are_all_zero_leave_the_constant(loss):
    solution = convcvx.solve(np.zeros((6, 2)), np.arange(6) % 2, 0.1, loss=loss)
    assert solution.n_filters == 0
    assert solution.certificate.rel_gap <= 1e-9


def test_a_matrix_pools_as_its_grid_does():
    random = np.random.default_rng(0)
    patches, targets = random.standard_normal((20, 4, 2)), np.arange(20) % 2
    rows = convcvx.solve(patches, targets, 0.01, tol=1e-6, pooling=np.kron(np.eye(2), [0.5, 0.5]))
    grid = convcvx.solve(patches, targets, 0.01, tol=1e-6, pooling="2x1")
    assert rows.weights.shape[1] == 2
    assert rows.certificate.primal == pytest.approx(grid.certificate.primal, rel=2e-6)


# Checkpoints, warm starts, determinism


def same(a, b) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("filters", "weights", "intercept"))


def objectives(solution) -> list[float]:
    return [record["objective"] for record in solution.history]


@pytest.mark.parametrize("loss", ["squared", pytest.param("cross-entropy", marks=pytest.mark.slow)])
def test_a_resumed_run_repeats_the_uninterrupted_one(loss):
    problem, saved = flat_problem(30, beta=0.002, loss=loss), []
    full = solve_problem(problem, Budget(tol=1e-5), callback=saved.append)
    assert full.rounds >= 3
    for checkpoint in (saved[0], saved[len(saved) // 2], saved[-1]):
        resumed = solve_problem(problem, Budget(tol=1e-5), start=checkpoint)
        assert same(resumed, full)
        assert resumed.status == full.status
        assert objectives(resumed) == objectives(full)
    assert not same(saved[0], full)  # negative control


def test_a_resumed_training_has_no_dual_point_of_a_record_that_is_taken_again():
    problem, saved = flat_problem(20, beta=0.005), []
    solve_problem(problem, Budget(tol=1e-9, max_rounds=30), solver="frank-wolfe", callback=saved.append)
    seen = set()
    for before, solution in pairwise(saved):
        begun, _ = begin(problem, solution)
        assert len(begun.history) == len(solution.history) - 1
        risen = solution.history[-1]["lower_bound"] > before.history[-1]["lower_bound"]
        seen.add(risen)
        if risen:
            assert begun.dual_point is None
        else:  # it is that of a record that is kept
            assert torch.equal(begun.dual_point, before.dual_point)
    assert seen == {True, False}


def test_a_run_resumes_after_its_budget_is_raised():
    problem = flat_problem(30, beta=0.002)
    full = solve_problem(problem, Budget(tol=1e-6))
    short = solve_problem(problem, Budget(tol=1e-6, max_rounds=2))
    assert short.status == "max_rounds"
    assert same(solve_problem(problem, Budget(tol=1e-6), start=short), full)


@pytest.fixture
def sampled_problem(monkeypatch) -> Problem:
    """720 digits, with samples of 180 and of 45 to begin with."""
    monkeypatch.setitem(SOLVERS, "sliding-fw", replace(sliding_frank_wolfe, sample_size=45))
    return digits_problem(720, 1e-3, spec=PatchSpec(3, stride=2))


def test_filters_are_looked_for_on_samples_first(sampled_problem):
    problem = sampled_problem
    seen: list[tuple[int, int]] = []

    def callback(solution):
        seen.append((solution.history[-1].get("images", problem.n), solution.history[-1]["round"]))

    solution = solve_problem(problem, Budget(max_rounds=3), callback=callback)
    sizes = [size for size, _ in seen]
    assert sizes == sorted(sizes)
    assert set(sizes) == {45, 180, 720}
    assert [seen[sizes.index(size)][1] for size in (45, 180, 720)] == [0, 0, 0]
    # What is reported in the end is of all images, and the samples have led somewhere.
    assert not any("images" in record for record in solution.history)
    constant = problem.primal(problem.constant_predictions(), torch.zeros(0, 1, 10))
    assert solution.history[0]["objective"] < 0.7 * constant


@pytest.fixture
def records_of(monkeypatch):
    """Of a training with proofs on 360 digits, with samples of 90 to begin with: the records on all images."""
    if SOLVERS["sliding-fw"] is sliding_frank_wolfe:
        monkeypatch.setitem(SOLVERS, "sliding-fw", replace(sliding_frank_wolfe, sample_size=45, scout_size=360))
    problem = digits_problem(360, 2e-3, spec=PatchSpec(3, stride=2, rank=3))

    def train(oracle="branch-and-bound", **options):
        records = []
        solution = solve_problem(
            problem, Budget(**options), oracle=oracle, callback=lambda s: records.append((s.history[-1], s.dual_point))
        )
        of_samples = {record["scope"] for record, _ in records if "images" in record}
        assert of_samples == {"heuristic"}
        return solution, [entry for entry in records if "images" not in entry[0]]

    return train


def test_climbs_look_for_filters_until_a_proof_may_show_a_small_gap(records_of):
    solution, records = records_of(tol=5e-3)
    scopes = [record["scope"] for record, _ in records]
    assert scopes[0] == "heuristic"
    assert scopes == sorted(scopes, reverse=True)  # no guess behind a proof
    assert (scopes[-1], solution.status) == ("global", "converged")
    for record, dual_point in records:
        assert (dual_point is None) == (record["scope"] == "heuristic")
        assert record["scope"] == "global" or record["rel_gap"] > 0.5 * 5e-3


def test_a_small_gap_that_climbs_show_before_a_proof_ends_nothing(records_of, monkeypatch):
    setting = replace(sliding_frank_wolfe, sample_size=45, scout_size=360, near=0.01)
    monkeypatch.setitem(SOLVERS, "sliding-fw", setting)
    solution, records = records_of(tol=0.05)
    small = [record for record, _ in records if record["scope"] == "heuristic" and record["rel_gap"] <= 0.05]
    assert small
    assert (records[-1][0]["scope"], solution.status) == ("global", "converged")


def test_rounds_by_climbs_keep_what_was_proved_before_them(records_of, monkeypatch):
    asked = []
    monkeypatch.setattr(SlidingFrankWolfe, "_scouts", lambda *call: bool(asked))
    monkeypatch.setitem(SOLVERS, "sliding-fw", replace(sliding_frank_wolfe, sample_size=45, near=0.0))
    plain = BranchAndBoundOracle.answer
    monkeypatch.setattr(BranchAndBoundOracle, "answer", lambda *call: asked.append(1) or plain(*call))
    _, records = records_of(tol=5e-3, max_rounds=4)
    assert (len(asked), len(records)) == (1, 5)
    (proof, point), *others = records
    for record, kept in others:
        for name in ("scope", "lower_bound", "g_max", "proved_g"):
            assert record[name] == proof[name]
        assert torch.equal(kept, point)
        assert record["rel_gap"] == pytest.approx(1 - record["lower_bound"] / record["objective"], rel=1e-9)
        assert record["rel_gap"] < proof["rel_gap"]


@pytest.mark.parametrize(("scope", "ends"), [("heuristic", None), ("global", "converged")])
def test_a_gap_that_an_earlier_round_has_proved_ends_a_training(monkeypatch, scope, ends):
    problem = digits_problem(60, 1e-2)
    solver = replace(sliding_frank_wolfe, scout_size=60, near=0.0)
    solution = solve_problem(problem, Budget(max_rounds=3))
    predictions = predicted(problem, solution)
    bound = 0.999 * problem.primal(predictions, solution.weights)
    last = {**solution.history[-1], "scope": scope, "lower_bound": bound}
    solution = replace(solution, history=[last], dual_point=problem.dual_point(predictions), rounds=1)
    level = Level(problem, Budget(tol=0.5))
    look = solver.look(level, BranchAndBoundOracle(), solution, predictions, 0)
    assert look.record["rel_gap"] < 0.5
    assert solver.ended(level, look) == ends


def test_no_climbs_come_before_a_proof_under_a_time_limit_or_on_few_images():
    problem = digits_problem(60, 1e-2)
    many = replace(sliding_frank_wolfe, scout_size=60)
    assert many._scouts(problem)
    assert not many._scouts(problem.until(Deadline.after(1000.0)))
    assert not sliding_frank_wolfe._scouts(problem)


def test_a_sample_is_no_larger_than_memory_allows(sampled_problem, monkeypatch):
    monkeypatch.setattr("convcvx.problem.SAMPLE_BYTES", 4 * 64 * 100)
    sizes = []
    solve_problem(
        sampled_problem, Budget(max_rounds=1), callback=lambda s: sizes.append(s.history[-1].get("images", 720))
    )
    assert set(sizes) == {45, 720}


def test_a_run_resumes_on_the_sample_where_it_was(sampled_problem):
    problem, saved = sampled_problem, []
    full = solve_problem(problem, Budget(max_rounds=2), callback=saved.append)
    on_samples = [k for k, solution in enumerate(saved) if "images" in solution.history[-1]]
    for k in (on_samples[1], on_samples[-1]):
        assert same(solve_problem(problem, Budget(max_rounds=2), start=saved[k]), full)
    other = replace(saved[on_samples[-1]], weights=2 * saved[on_samples[-1]].weights)
    assert not same(solve_problem(problem, Budget(max_rounds=0), start=other), full)  # negative control


@pytest.mark.usefixtures("sampled_problem")
def test_a_training_that_is_stopped_on_a_sample_is_certified_on_all_images():
    """What an oracle proves of a sample has a dual point of other images: fit once refused its own."""
    problem = flat_problem(720, 1, beta=0.02)
    solution = solve_problem(problem, Budget(), solver="sliding-fw", oracle="exact", callback=lambda solution: True)
    assert (solution.status, solution.history[-1]["scope"]) == ("callback", "global")
    assert solution.history[-1]["images"] < problem.n
    assert solution.dual_point is None
    options = {"oracle": "exact", "dual_point": solution.dual_point, "rounds": solution.history, "tol": 1.0}
    certificate = certify_parameters(problem, solution.filters, solution.weights, solution.intercept, **options)
    assert certificate.scope == "global"
    assert "proved_in_round" not in certificate.search


def test_another_problem_s_solution_is_a_warm_start():
    """Its history does not count: an objective above the old one once passed for a stall."""
    problem = flat_problem(30, beta=0.002)
    start = solve_problem(problem, Budget(tol=1e-6))
    solution = solve_problem(problem.with_beta(0.01), Budget(tol=1e-6), start=start)
    assert solution.status == "converged"
    assert solution.history[0]["round"] == 0
    assert 0 < solution.history[0]["n_filters"] <= start.n_filters
    assert solution.history[0]["rel_gap"] < 0.5  # the weights were fitted to this β before the oracle was asked


@pytest.mark.parametrize("solver", ["sliding-fw", "frank-wolfe", "copositive"])
@pytest.mark.parametrize("other", [{"dim": 3}, {"pooling": "none"}, {"n_outputs": 2}])
def test_a_start_of_other_dimensions_is_refused(solver, other):
    start = Solution(*random_parameters(flat_problem(14, **other), 5))
    with pytest.raises(
        InputError, match=r"start must have filters \(m, r\), weights \(m, P, c\) and intercept"
    ) as caught:
        solve_problem(flat_problem(14), Budget(max_rounds=1), solver=solver, start=start)
    assert f"fit the problem, (5, 2), (5, 1, 3), (3,); got {tuple(start.filters.shape)}, " in str(caught.value)


def test_equal_seeds_give_equal_results(digits):
    problem = build_problem(*digits, 0.002, spec=PatchSpec(3, stride=2))
    runs = [solve_problem(problem, Budget(max_rounds=2, max_filters=12), seed=seed) for seed in (0, 0, 1)]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_the_solution_does_not_depend_on_the_start():
    problem = flat_problem(30, beta=0.005)
    cold = solve_problem(problem, Budget(tol=1e-6))
    start = replace(cold, history=[], rounds=0).with_parameters(*random_parameters(problem, 7, scale=0.3))
    warm = solve_problem(problem, Budget(tol=1e-6), start=start)
    assert warm.history[-1]["objective"] == pytest.approx(cold.history[-1]["objective"], rel=2e-6)


@pytest.mark.parametrize("scope", ["global", "sampled", "heuristic"])
def test_only_what_an_earlier_round_proved_stays(scope):
    problem = flat_problem(9)
    solution = solve_problem(problem, Budget(tol=1e-2), oracle="exact")
    last = solution.history[-1]
    earlier = replace(solution, history=[last | {"scope": scope, "lower_bound": last["objective"]}])
    predictions = problem.responses.predict(solution.filters, solution.weights, solution.intercept)
    _, record, point = consult(problem, ExactOracle(), earlier, predictions, n_filters=1, tol=1e-2, seed=0)
    assert record["scope"] == "global"
    assert (record["lower_bound"] == last["objective"]) == (scope == "global")
    assert (point is earlier.dual_point) == (scope == "global")


def test_a_start_on_as_many_images_again_leaves_its_bounds_behind():
    """The objective is the same on images that are there twice, but the dual point has another shape."""
    random = np.random.default_rng(0)
    x = random.standard_normal((12, 3))
    y = (x[:, 0] > np.abs(x[:, 1])).astype(int)
    start = convcvx.solve(x, y, 0.01, oracle="exact")
    coarse = BranchAndBoundOracle(rel_tol=0.9, max_cones=0)
    with pytest.warns(ConvergenceWarning):
        twice = convcvx.solve(np.tile(x, (2, 1)), np.tile(y, 2), 0.01, start=start, oracle=coarse, max_rounds=1)
    assert twice.certificate.primal <= start.certificate.primal * (1 + 1e-9)
    assert twice.history[0]["round"] == 0


def test_paths_match_cold_solves():
    random = np.random.default_rng(0)
    x = random.standard_normal((30, 2))
    y = (x[:, 0] > np.abs(x[:, 1])).astype(int)
    solutions = list(convcvx.path(x, y, n_betas=5, ratio=0.03, tol=1e-5))
    betas = [s.certificate.beta for s in solutions]
    assert betas[0] == pytest.approx(convcvx.beta_max(x, y))
    assert betas[-1] == pytest.approx(0.03 * betas[0])
    assert solutions[0].n_filters == 0
    for solution in solutions[1:]:
        cold = convcvx.solve(x, y, solution.certificate.beta, tol=1e-5)
        assert solution.certificate.primal == pytest.approx(cold.certificate.primal, rel=2e-5)
        assert solution.status == "converged"
    primals = [s.certificate.primal for s in solutions]
    assert primals == sorted(primals, reverse=True)


def test_paths_take_betas_in_any_order():
    x, y = spiral(30)
    found = {s.certificate.beta: s for s in convcvx.path(x, y, betas=[0.001, 0.01], tol=1e-5)}
    assert sorted(found) == [0.001, 0.01]
    assert found[0.01].certificate.primal > found[0.001].certificate.primal


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"patches": torch.utils.data.DataLoader([])}, "patches must be a tensor"),
        ({"betas": [0.1, -0.1]}, "betas must be a positive"),
        ({"n_betas": 0}, "n_betas must be a whole number"),
        ({"ratio": -1.0}, "ratio must be a positive"),
        ({"loss": "hub"}, "loss"),
        ({"betas": 0.1}, "betas must be a sequence"),
        ({"betas": []}, "betas must be a sequence of positive numbers; got none"),
        ({"betas": np.ones((2, 1))}, "betas must be a sequence"),
        ({"tol": -1.0}, "tol must be a positive"),
        ({"solver": "nonsense"}, "solver must be"),
        ({"oracle": "nonsense"}, "oracle must be"),
        ({"callback": 3}, "callback must be a function"),
        ({"time_limit": -1.0}, "time_limit must be"),
    ],
)
def test_paths_refuse_at_once(changed, message):
    x, y = spiral(10)
    with pytest.raises(InputError, match=message):
        convcvx.path(**{"patches": x, "targets": y} | changed)


@pytest.mark.parametrize("noise", [0.0, 1e-5, 1.0])
def test_the_whitening_survives_a_moment_that_rounding_made_indefinite(noise):
    """Single precision leaves eigenvalues below zero, of the size of its rounding of the largest."""
    random = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(20, 20, generator=random, dtype=torch.float64)).Q
    values = torch.linspace(1, 0, 20, dtype=torch.float64) - noise
    moment = basis @ values.diag() @ basis.T
    factor = _factor(moment, 1e-9)
    assert bool(factor.isfinite().all())
    assert bool((factor.diagonal() > 0).all())
    if noise < 1e-3:
        torch.testing.assert_close(factor @ factor.T, moment, rtol=0, atol=1e-3)


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_a_claim_is_searched_for_filters_that_would_refute_it(loss):
    """A search for confirmation may stop at the first filter that breaks the claim, and at none that does not."""
    problem = flat_problem(30, beta=0.03, loss=loss)
    solution = solve_problem(problem, Budget(tol=1e-2), oracle="local")
    predictions = problem.responses.predict(solution.filters, solution.weights, solution.intercept)
    primal, dual_point = problem.primal(predictions, solution.weights), problem.dual_point(predictions)
    limit = _refuting(problem, dual_point, 0.9 * primal, problem.beta)
    assert problem.dual(dual_point, limit) < 0.9 * primal <= problem.dual(dual_point, 0.99 * limit)
    targets = []

    def oracle(problem: Problem, dual_point: Tensor, *, target: float, **_: object) -> OracleResult:
        targets.append(target)
        value = problem.beta if len(targets) < 3 else 1.01 * limit
        return OracleResult(solution.filters[:1], torch.tensor([value]).double(), float("inf"), "heuristic")

    _, record, _ = consult(problem, oracle, solution, predictions, n_filters=1, tol=0.1, seed=0)
    assert targets[1:] == pytest.approx([limit, limit], rel=1e-6)
    assert record["rel_gap"] > 0.1


@pytest.mark.slow
def test_a_gap_that_a_run_believes_outlives_the_search_of_a_certificate():
    """The plain search sees half of this gap: with confirmations by it the run stops at one of 1.1e-2."""
    problem = digits_problem(400, spec=PatchSpec(3), pooling=4)
    problem = problem.with_beta(0.05 * find_beta_max(problem, "local"))
    solution = solve_problem(problem, Budget(tol=1e-2), oracle="local", seed=3)
    certificate = certify_parameters(problem, solution.filters, solution.weights, oracle="local", tol=1e-2, seed=3)
    assert solution.status == "converged"
    assert certificate.rel_gap <= 1e-2
