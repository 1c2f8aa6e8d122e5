"""Time limits, by a clock that goes forward a second whenever somebody looks at it: no test waits or is timed."""

from __future__ import annotations

import math
import threading
import warnings
from dataclasses import dataclass
from functools import cache
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
from helpers.problems import digits_problem, flat_problem, g, random_parameters
from threadpoolctl import threadpool_info, threadpool_limits
from torch import nn

import convcvx
from convcvx import budget
from convcvx.budget import NEVER, Budget, Deadline, OutOfTime
from convcvx.certificate import certify_parameters
from convcvx.data.datasets import Dataset
from convcvx.errors import InputError
from convcvx.machine.jit import njit
from convcvx.machine.threads import sparing_threads
from convcvx.oracles import (
    BranchAndBoundOracle,
    ExactOracle,
    FamilyOracle,
    LocalOracle,
    OracleResult,
    Ternary,
    searched,
)
from convcvx.oracles.cylinders import CylinderOracle
from convcvx.oracles.needs import ONE_MATRIX
from convcvx.oracles.table import ORACLES as TABLE
from convcvx.oracles.table import Effort
from convcvx.patches import PatchSpec
from convcvx.problem import Problem
from convcvx.responses.passes import Responses
from convcvx.solvers import SOLVERS
from convcvx.training.clock import Clock as TrainingClock
from convcvx.training.jobs import prepare
from convcvx.training.options import TrainConfig
from convcvx.training.plan import find_beta_max, solve_problem, time_for_training

EFFORT = Effort(tol=1e-5, thorough=True, gates=20)
ORACLES = {name: FamilyOracle(Ternary()) if name == "family" else TABLE[name].make(EFFORT) for name in TABLE}
ORACLES["cylinders"] = CylinderOracle(max_cylinders=30)  # where no clock is set it would go on for two minutes
SUITED = {name: {"activation": "linear"} if ONE_MATRIX in TABLE[name].needs else {} for name in ORACLES}
"""Options of problems that each oracle takes."""
AT_ONCE = "exact", "copositive", "cylinders"
"""Oracles that prove a bound before they look at the clock."""
LOOSE = "copositive", "sampled", "polynomial", "remainder", "cylinders"
"""Oracles whose bound may be far above the largest g."""
LIMITS = (0.5, 2, 5, 12, 30, 80)
"""Looks at the clock after which time is over: before, in and between the parts of a call."""
PATIENCE = 40
"""Looks that a call may still take after that: one in each loop that it has to leave."""


@dataclass
class Clock:
    """Goes forward a second a look."""

    now: float = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("convcvx.budget.clock", clock)
    return clock


@cache
def small(loss: str, **options: Any) -> tuple[Problem, float, float]:
    """A problem, and two numbers between which its optimum lies."""
    problem = flat_problem(n=8, n_patches=1, dim=2, n_outputs=2, loss=loss, **options)
    record = solve_problem(problem, Budget(tol=1e-4), oracle="exact").history[-1]
    assert record["rel_gap"] <= 1e-4
    return problem, record["lower_bound"], record["objective"]


# -- deadlines ----------------------------------------------------------------------------------------


def test_a_deadline_passes_and_its_shares_before_it(clock):
    deadline = Deadline.after(10)
    assert deadline.at == 11
    assert clock.now < deadline.share(0.5).at < deadline.share(0.9).at < deadline.at
    assert not deadline.passed
    clock.now = 20
    assert deadline.passed
    assert deadline.left == 0
    assert deadline.limit == 1e-9
    assert deadline.later(5).at == clock.now + 5
    with pytest.raises(OutOfTime):
        deadline.check()


def test_what_never_ends_never_looks_at_the_clock(monkeypatch):
    def fail() -> float:
        raise AssertionError("nobody needs to know the time")

    monkeypatch.setattr("convcvx.budget.clock", fail)
    assert (NEVER.left, NEVER.limit, NEVER.passed) == (math.inf, None, False)
    assert {NEVER.share(0.5), NEVER.later(1), NEVER.sooner(NEVER)} == {NEVER}
    problem = flat_problem()
    solution = solve_problem(problem, Budget(tol=1e-3))
    certificate = certify_parameters(problem, solution.filters, solution.weights, tol=1e-3)
    assert certificate.rel_gap <= 1e-3
    assert "stopped" not in certificate.search


def test_the_copies_of_a_problem_end_when_it_does(clock):
    problem = flat_problem().until(Deadline.after(0))
    one = torch.zeros(1, problem.responses.dim, dtype=torch.float64)
    for copy in (problem, problem.with_beta(1.0), problem.with_dtype(torch.float32), problem.sample(torch.arange(4))):
        with pytest.raises(OutOfTime):
            copy.responses.matrix(one)
    assert problem.until(NEVER).responses.matrix(one).shape == (problem.n, 1, 1)


# -- oracles ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", ORACLES)
def test_an_oracle_that_is_cut_short_claims_no_more_than_it_has_proved(name, limit, clock):
    problem = flat_problem(n=10, n_patches=2, dim=3, n_outputs=2, **SUITED[name])
    dual_point = problem.dual_point(problem.constant_predictions())
    highest = ExactOracle()(problem, dual_point).upper_bound
    began = clock.now
    found = ORACLES[name](problem.until(Deadline.after(limit)), dual_point, n_filters=4, target=0.0)
    assert clock.now - began <= limit + PATIENCE
    torch.testing.assert_close(found.values, g(problem, found.filters, dual_point), rtol=1e-9, atol=1e-12)
    assert bool((found.values <= highest).all())
    if found.scope == "global":
        assert found.upper_bound >= highest * (1 - 1e-9)
    if limit < 1:
        assert found.cut_short
        assert found.g_max > 2 * highest
        assert name in AT_ONCE or problem.dual(dual_point, found.g_max) == 0.0


def test_negative_control_an_oracle_with_time_is_not_cut_short():
    for name, oracle in ORACLES.items():
        problem = flat_problem(n=10, n_patches=2, dim=3, n_outputs=2, **SUITED[name])
        found = oracle(problem, problem.dual_point(problem.constant_predictions()), target=0.0)
        assert not found.cut_short
        assert found.g_max < math.inf


# -- solvers and certificates -------------------------------------------------------------------------


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_out_of_time_still_gives_a_network_and_a_true_certificate(solver, loss, limit, clock):
    if solver == "closed-form" and loss != "squared":
        pytest.skip("the closed form is of the squared loss")
    problem, lowest, highest = small(loss)
    constant = problem.primal(problem.constant_predictions(), torch.zeros(0, 1, 2, dtype=torch.float64))
    began = clock.now
    deadline = Deadline.after(limit)
    solution = solve_problem(problem.until(deadline), Budget(tol=1e-9), solver=solver, oracle="exact")
    certificate = certify_parameters(problem.until(deadline), solution.filters, solution.weights, oracle="exact")
    assert clock.now - began <= limit + PATIENCE
    assert certificate.scope == "global"
    assert certificate.dual <= highest
    assert certificate.primal >= lowest
    assert certificate.primal <= constant * (1 + 1e-9)
    assert solution.history[-1]["lower_bound"] <= highest
    if limit < 1:
        assert solution.status == "time_limit"
        assert "the time limit" in certificate.meaning


def test_a_search_whose_share_of_the_time_is_over_still_finds_filters(clock):
    problem, _, highest = small("squared")
    late, oracle = problem.until(Deadline.after(1e6)), BranchAndBoundOracle(share=1e-9)
    dual_point = problem.dual_point(problem.constant_predictions())
    found = oracle(late, dual_point, n_filters=2)
    assert found.cut_short
    assert (found.scope, found.upper_bound) == ("global", math.inf)
    assert len(found.values) > 0
    torch.testing.assert_close(found.values, g(problem, found.filters, dual_point), rtol=1e-9, atol=1e-12)
    solution = solve_problem(late, Budget(tol=1e-9, max_rounds=2), solver="sliding-fw", oracle=oracle)
    assert solution.n_filters > 0
    assert solution.history[-1]["lower_bound"] <= highest
    assert len(oracle(problem.until(Deadline.after(0.5)), dual_point).values) == 0  # the control: no time at all


def test_a_training_whose_searches_find_nothing_in_time_ends():
    def nothing(problem, dual_point, **options):
        return OracleResult.unfinished(problem, "global", 0.0)

    solution = solve_problem(small("squared")[0], Budget(), solver="sliding-fw", oracle=nothing)
    assert (solution.status, solution.n_filters) == ("time_limit", 0)


def test_what_a_training_has_proved_outlives_a_search_that_time_cuts_short(clock):
    problem, lowest, _ = small("squared")
    trained = solve_problem(problem, Budget(tol=1e-4), oracle="exact")
    none = problem.responses.dim, problem.responses.n_cells, problem.n_outputs
    network = torch.zeros(0, none[0]), torch.zeros(0, *none[1:])
    proof = {**trained.history[-1], "round": 7}
    estimate, sample = {**proof, "scope": "heuristic"}, {**proof, "images": problem.n - 1}  # of another problem
    options = {"oracle": "branch-and-bound", "dual_point": trained.dual_point}
    late = problem.until(Deadline.after(0.5))
    kept = certify_parameters(late, *network, rounds=[estimate, sample, proof], **options)
    assert 0.999 * lowest < kept.dual <= lowest
    assert (kept.g_max, kept.search["proved_in_round"]) == (proof["proved_g"], 7)
    assert kept.search["stopped"] == "time_limit"
    for others in ([estimate], [proof, sample], []):
        alone = certify_parameters(late, *network, rounds=others, **options)
        assert 0.0 < alone.dual < 0.9 * kept.dual
    far = {**proof, "proved_g": 100 * proof["proved_g"]}
    in_time = certify_parameters(problem, *network, rounds=[far], **options)
    assert in_time.dual > kept.dual / 100  # the search proves more, and counts
    assert "proved_in_round" not in in_time.search


@pytest.mark.parametrize("factor", [1e3, pytest.param(float("inf"), marks=pytest.mark.slow)])
def test_a_weak_proof_of_a_training_takes_no_time_from_polynomials(factor, monkeypatch):
    """Where time cut its searches short; all that was left of the certificate's own were the lengths of patches."""
    problem = digits_problem(200, 5e-3, spec=PatchSpec(3, stride=2, rank=9))
    network = random_parameters(problem, 3)
    point = problem.dual_point(problem.constant_predictions())
    shares = []

    def nothing(self, problem, dual_point, wanted):
        return OracleResult.unfinished(problem, "global", 0.0)

    monkeypatch.setattr(BranchAndBoundOracle, "answer", nothing)
    plain = searched.quick_proofs
    monkeypatch.setattr(searched, "quick_proofs", lambda *call: shares.append(call[0].deadline.left) or plain(*call))

    def proved(rounds):
        shares.clear()
        late = problem.until(Deadline.after(100.0))
        options = {"oracle": "branch-and-bound", "tol": 1e-3, "dual_point": point, "rounds": rounds}
        return certify_parameters(late, *network, **options), shares[0]

    record = {"round": 3, "scope": "global", "proved_g": factor * problem.beta, "seconds": 1.0}
    (alone, first), (beside, second) = proved(()), proved([record])
    assert max(first, second) < 40.0  # a share of the time, before the search
    assert beside.dual > 0.9 * alone.dual


@pytest.mark.parametrize("limit", [0, 5, 30])
@pytest.mark.parametrize("name", ORACLES)
def test_whenever_time_is_over_a_bound_above_zero_is_proved(name, limit, clock):
    problem, _, highest = small("squared", **SUITED[name])
    network = torch.zeros(0, problem.responses.dim), torch.zeros(0, problem.responses.n_cells, problem.n_outputs)
    certificate = certify_parameters(problem.until(Deadline.after(limit)), *network, oracle=ORACLES[name])
    assert 0 < certificate.proved <= highest
    assert certificate.dual > 0
    assert "the training" not in str(certificate.proved_by)  # there was none that it would take long beside


def test_a_pass_that_is_over_in_time_outlives_a_search_that_is_not(clock):
    """Rows are gathered until the time is over: what polynomials proved before stands."""

    class Gathering(BranchAndBoundOracle):
        def __call__(self, problem: Problem, dual_point: torch.Tensor, **options: object) -> OracleResult:
            clock.now += 1000
            return super().__call__(problem, dual_point, **options)

    problem, _, highest = small("squared")
    network = torch.zeros(0, problem.responses.dim), torch.zeros(0, problem.responses.n_cells, problem.n_outputs)
    late = certify_parameters(problem.until(Deadline.after(900)), *network, oracle=Gathering())
    alone = certify_parameters(problem.until(Deadline.after(0)), *network, oracle=Gathering())
    assert (late.oracle, alone.oracle) == ("polynomial", "lengths")
    assert late.search["stopped"] == "time_limit"
    assert 0 < alone.dual < late.dual <= highest


@pytest.mark.parametrize("name", ORACLES)
def test_a_training_with_any_oracle_ends_with_its_time(name, clock):
    problem = flat_problem(n=8, n_patches=1, dim=2, n_outputs=2, **SUITED[name])
    began = clock.now
    solution = solve_problem(problem, Budget(tol=1e-12, time_limit=60), oracle=ORACLES[name])
    assert clock.now - began <= 60 + PATIENCE
    assert solution.status in ("time_limit", "stalled", "converged")


def test_a_gap_that_a_cut_search_shows_is_not_believed(clock):
    """A local search that found nothing for want of time has shown nothing."""

    class Blind(LocalOracle):
        def __call__(self, problem: Problem, dual_point: torch.Tensor, **options: object) -> OracleResult:
            clock.now += 100
            filters = torch.ones(1, problem.responses.dim, dtype=torch.float64)
            return OracleResult(filters, torch.zeros(1, dtype=torch.float64), math.inf, "heuristic")

    problem = flat_problem()
    for limit, status in ((50.0, "time_limit"), (1e6, "converged")):
        assert solve_problem(problem, Budget(tol=0.99, time_limit=limit), oracle=Blind()).status == status


def test_a_resumed_training_has_the_time_that_is_left(clock):
    problem = flat_problem()
    first = solve_problem(problem, Budget(tol=1e-9, max_rounds=1))
    spent = first.history[-1]["seconds"]
    assert Budget(time_limit=spent + 5).deadline(problem.deadline, spent).left <= 5
    again = solve_problem(problem, Budget(tol=1e-9, time_limit=spent), start=first)
    assert again.status == "time_limit"
    assert again.n_filters == first.n_filters


def test_a_training_leaves_the_time_that_the_last_passes_take(clock, monkeypatch):
    """The slower a pass over all images, the earlier a training ends: by its share at the latest, and half of that."""
    problem = flat_problem(n=2000, n_patches=2, dim=3, n_outputs=2)
    predict = Responses.predict
    left = []
    for seconds in (0, 3, 25, 50):

        def slow(responses: Responses, *given: torch.Tensor, cost: float = seconds) -> torch.Tensor:
            clock.now += cost * responses.n / problem.n
            return predict(responses, *given)

        monkeypatch.setattr(Responses, "predict", slow)
        limited = problem.until(Deadline.after(100))
        left.append(limited.deadline.at - time_for_training(limited, 4).at)
    assert min(left) >= 20  # their share of the time left
    assert max(left[:2]) < 30 < 43 < left[2] < 46
    assert left[3] < 100 * (1 - 0.375)
    assert time_for_training(problem) == NEVER


def test_to_time_passes_draws_no_random_number():
    problem, state = flat_problem(n=20), torch.get_rng_state()
    time_for_training(problem.until(Deadline.after(100)))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_solver_ends_when_the_last_passes_have_to_begin(clock, monkeypatch):
    problem = flat_problem(n=2000, n_patches=2, dim=3, n_outputs=2)
    ends = []

    class Seen(LocalOracle):
        def __call__(self, problem: Problem, dual_point: torch.Tensor, **options: object) -> OracleResult:
            ends.append(problem.deadline.at)
            return super().__call__(problem, dual_point, **options)

    predict = Responses.predict

    def slow(responses: Responses, *given: torch.Tensor) -> torch.Tensor:
        clock.now += 25 * responses.n / problem.n
        return predict(responses, *given)

    monkeypatch.setattr(Responses, "predict", slow)
    limited = problem.until(Deadline.after(100))
    solve_problem(limited, Budget(tol=0.5, max_rounds=1), oracle=Seen())
    assert 43 < limited.deadline.at - max(ends) < 46


def test_the_pass_for_the_directions_of_patches_is_in_the_time(clock, monkeypatch):
    data = Dataset(torch.rand(4, 1, 4, 4), torch.arange(4) % 2, ("a", "b"), "made")

    def slow(*_: object, **__: object) -> Problem:
        clock.now += 30
        return flat_problem(n=4)

    monkeypatch.setattr("convcvx.training.jobs.training_problem", slow)
    problem, _ = prepare(TrainConfig(time_limit=50), data, spent=10)
    assert 0 < problem.deadline.left < 10


def test_beta_max_is_found_in_any_time(clock):
    for name, oracle in ORACLES.items():
        problem = flat_problem(n=10, n_patches=2, dim=3, n_outputs=2, **SUITED[name])
        highest = find_beta_max(problem, ExactOracle())
        for limit in LIMITS:
            found = find_beta_max(problem.until(Deadline.after(limit)), oracle)
            assert 0 < found < math.inf, (name, limit)
            assert found <= highest * 1.5 or name in LOOSE, (name, limit)


# -- what users call ----------------------------------------------------------------------------------


def test_certify_takes_a_time_limit_and_says_when_it_has_cut_the_search_short(clock):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    images, targets = torch.randn(8, 1, 3, 3), torch.arange(8) % 2
    whole = convcvx.certify(network, images, targets, 0.05, oracle="local")
    short = convcvx.certify(network, images, targets, 0.05, oracle="local", time_limit=0.5)
    assert "left no time" in short.meaning
    assert "time" not in whole.meaning
    assert short.primal == pytest.approx(whole.primal)
    assert (short.scope, short.oracle) == ("global", "lengths")
    assert 0.0 < short.dual < whole.dual
    with pytest.raises(InputError, match="time_limit must be a positive float; got 0"):
        convcvx.certify(network, images, targets, 0.05, time_limit=0)


@pytest.mark.parametrize("limit", LIMITS)
def test_solve_and_the_estimators_end_in_time(limit, clock):
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).double()
    y = (x[:, 0] > x[:, 1].abs()).long()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for call in (
            lambda: convcvx.solve(x, y, 1e-3, tol=1e-9, oracle="local", time_limit=limit).certificate,
            lambda: convcvx.ConvexCNNClassifier(tol=1e-9, time_limit=limit).fit(x.numpy(), y.numpy()).certificate_,
        ):
            began = clock.now
            certificate = call()
            assert clock.now - began <= limit + 2 * PATIENCE
            assert 0 <= certificate.dual <= certificate.primal


def test_the_search_at_the_end_of_a_training_costs_a_share_of_it_and_a_search_by_hand_its_full_effort():
    problem = flat_problem(n=30, n_patches=2, dim=4, n_outputs=3, beta=0.05)
    solution = solve_problem(problem, Budget(tol=1e-2), oracle="local")
    network = solution.filters, solution.weights
    options = {"oracle": "local", "tol": 1e-2}
    starts = {
        n: certify_parameters(problem, *network, training=n * solution.history[:1], **options).search["starts"]
        for n in (1, 6, 11, 1000)
    }
    by_hand = certify_parameters(problem, *network, **options)
    assert starts[1] < starts[6] < starts[11] < starts[1000] == by_hand.search["starts"]
    assert "stopped" not in by_hand.search


def test_a_hopeless_search_is_left_and_the_certificate_says_so():
    """A network far from the optimum has a large gap, whatever else a search finds; one near it has not (control)."""
    problem = flat_problem(n=30, n_patches=2, dim=4, n_outputs=3, beta=1e-3)
    good = solve_problem(problem, Budget(tol=1e-2), oracle="local")
    for solution, hopeless in ((good, False), (solve_problem(problem, Budget(max_filters=1), oracle="local"), True)):
        network = solution.filters, solution.weights
        certificate = certify_parameters(problem, *network, oracle="local", training=solution.history)
        full = certify_parameters(problem, *network, oracle="local")
        assert ("the search ended early" in certificate.meaning) == hopeless
        assert "ended early" not in full.meaning
        assert (certificate.rel_gap > 0.5) == hopeless
        assert certificate.dual >= full.dual * (1 - 0.05)


def blas() -> list[int]:
    """The threads of each BLAS that is loaded."""
    return [found["num_threads"] for found in threadpool_info() if found["user_api"] == "blas"]


@pytest.mark.parametrize("given", [1, 2])
def test_small_problems_keep_torch_and_blas_to_one_core_and_give_the_others_back(given):
    """BLAS has threads of its own, also where torch was told to use one: on busy cores they took four times as long."""
    seen = []

    @sparing_threads
    def inner(problem: Problem) -> None:
        seen.append((torch.get_num_threads(), *blas()))
        raise OutOfTime

    @sparing_threads
    def work(problem: Problem) -> None:
        with pytest.raises(OutOfTime):
            inner(problem)
        inner(problem)

    before = torch.get_num_threads()
    torch.set_num_threads(given)
    try:
        with threadpool_limits(2, user_api="blas"):
            own = blas()
            with pytest.raises(OutOfTime):
                work(flat_problem())
            assert own
            assert seen == [(1, *[1] * len(own))] * 2
            assert (torch.get_num_threads(), blas()) == (given, own)
    finally:
        torch.set_num_threads(before)


def test_oracles_keep_blas_to_one_core_whatever_the_size(monkeypatch):
    """numpy multiplies few filters by many patches there: on two busy cores that took twenty times as long."""
    problem, seen = flat_problem(), []

    def nothing(self, problem, dual_point, wanted):
        seen.append(max(blas()))
        raise OutOfTime

    monkeypatch.setattr(BranchAndBoundOracle, "answer", nothing)
    with threadpool_limits(2, user_api="blas"):
        BranchAndBoundOracle()(problem, problem.constant_predictions())
        assert (seen, max(blas())) == ([1], 2)


def test_blas_has_its_threads_again_after_fits_side_by_side():
    """The one that began first ends first: what it gives back, the other one must not take away for good."""
    inside, may_end = threading.Barrier(2), threading.Event()

    @sparing_threads
    def work(problem: Problem, last: bool) -> None:
        inside.wait(60)
        if last:
            may_end.wait(60)

    with threadpool_limits(2, user_api="blas"):
        own = blas()
        assert 2 in own
        both = [threading.Thread(target=work, args=(flat_problem(), last)) for last in (False, True)]
        for thread in both:
            thread.start()
        both[0].join(60)
        may_end.set()
        both[1].join(60)
        assert blas() == own


def test_the_clock_of_deadlines_stands_still_while_functions_are_compiled():
    def slow(x):
        total = 0.0
        for value in x:
            total += np.sin(value) * np.cos(value)
        return total

    compiled = njit()(slow)
    seconds, training = [], TrainingClock.now()
    for _ in range(2):  # compiled by the first call alone
        wall, limit = perf_counter(), budget.clock()
        compiled(np.ones(10))
        seconds.append((perf_counter() - wall, budget.clock() - limit))
    (wall, counted), (again, all_of_it) = seconds
    assert wall > 100 * again
    assert training.compiling_seconds == pytest.approx(wall - counted, abs=0.01)  # which summaries tell of
    assert TrainingClock.now().compiling_seconds == 0
    assert counted < 0.1 * wall
    assert all_of_it > 0.5 * again > 0
