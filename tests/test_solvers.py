"""What all solvers and oracles share: the loop, statuses and scopes as words, tables, and what a problem must have."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from helpers.problems import flat_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import convcvx
from convcvx.budget import Budget, Deadline, OutOfTime
from convcvx.certificate import Certificate
from convcvx.errors import ConvergenceWarning, InputError
from convcvx.oracles import ORACLES, ExactOracle, Oracle, OracleResult, Scope, get_oracle, pick_oracle
from convcvx.oracles.needs import Need, require
from convcvx.oracles.table import Entry
from convcvx.problem import Problem
from convcvx.solution import Round, Solution
from convcvx.solvers import SOLVERS, Solver, drive
from convcvx.solvers.frank_wolfe import frank_wolfe
from convcvx.solvers.gated import gated
from convcvx.solvers.loop import Level, Look
from convcvx.solvers.sliding_frank_wolfe import sliding_frank_wolfe
from convcvx.terms.status import Status
from convcvx.training.plan import Plan, solve_problem

WORDS = [*Scope, *Status]


# -- words --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", WORDS)
def test_a_word_is_its_text(word):
    text = str(word)
    assert (word, f"{word}", repr(word), json.dumps(word)) == (text, text, repr(text), json.dumps(text))
    assert type(word)(text) is word
    assert pickle.loads(pickle.dumps(word)) is word
    assert copy.deepcopy(word) is word
    assert word.meaning
    assert {text: 1}[word] == 1


@pytest.mark.parametrize(("kind", "name"), [(Scope, "scope"), (Status, "status")])
def test_a_word_that_is_none_is_refused(kind, name):
    with pytest.raises(InputError, match=f"{name} must be one of .*; got 'whole'"):
        kind("whole")
    with pytest.raises(InputError):
        kind(kind.__name__)


def test_scopes_say_what_may_be_kept_and_handed_on():
    assert {scope: (scope.proved, scope.shared, scope.for_all) for scope in Scope} == {
        "global": (True, True, True),
        "family": (True, False, False),
        "sampled": (True, False, False),
        "heuristic": (False, True, False),
    }


def test_an_oracle_with_another_scope_is_refused():
    """A scope of a user's own oracle that is misspelt must not pass for a proof."""
    none = torch.zeros(0, 2)
    with pytest.raises(InputError, match="scope must be one of global, family, sampled, heuristic; got 'Global'"):
        OracleResult(none, none[:, 0], 1.0, "Global")
    assert OracleResult(none, none[:, 0], 1.0, "global").scope is Scope.GLOBAL


def certificate(scope: str, dual: float) -> Certificate:
    return Certificate(1.0, dual, 1.0 - dual, scope, 0.1, 0.1, "squared", True, 4, 1, 2, "exact")


@settings(deadline=None)
@given(st.sampled_from(Scope), st.sampled_from(Scope), *(st.floats(0, 1) | st.just(float("nan")) for _ in range(2)))
def test_the_bound_that_counts_is_never_weaker_and_never_less_than_proved(own, other, dual, rival):
    result = certificate(own, dual).with_bound_of(certificate(other, rival))
    taken = (result.scope, result.dual) != (own, dual) and not (dual != dual and result.scope == own)
    if taken:
        assert other not in (Scope.SAMPLED, Scope.FAMILY)
        assert (result.scope, result.dual) == (other, rival) or rival != rival
        assert other.for_all or not own.proved
        assert other.for_all > own.for_all or rival > dual
    if own.for_all:
        assert result.scope.for_all


def test_a_status_says_what_to_try_and_how_a_command_ends():
    assert {status for status in Status if status.exit_code == 0} == {"converged", "done"}
    assert {status.exit_code for status in Status} == {0, 3}
    assert all(status.remedy for status in Status if status.exit_code)
    with pytest.warns(ConvergenceWarning, match=f"stopped by max_rounds: {Status.MAX_ROUNDS.remedy}"):
        convcvx.solve(torch.eye(4), torch.tensor([0, 1, 1, 0]), 0.01, max_rounds=0, tol=1e-9)


def test_what_comes_from_a_file_is_a_word_again():
    solution = Solution.empty(2, 1, 2)
    assert replace(solution, status="stalled").status is Status.STALLED
    with pytest.raises(InputError, match="status must be one of"):
        replace(solution, status="perfect")
    stored = json.loads(json.dumps(certificate("sampled", 0.5).to_dict()))
    assert Certificate.from_dict(stored).scope is Scope.SAMPLED


# -- the loop -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counting(Solver):
    """Takes steps that change nothing; tells what it is asked."""

    name: ClassVar[str] = "counting"

    rounds: int = 3
    late: bool = False

    def ended(self, level: Level, look: Look) -> Status | None:
        return Status.STALLED if look.record["round"] >= self.rounds else level.limit(look.record)

    def step(self, level: Level, look: Look, seed: int) -> tuple[Solution, Tensor]:
        if self.late and look.solution.rounds == 1:
            raise OutOfTime
        return replace(look.solution, rounds=look.solution.rounds + 1), look.predictions


def test_the_loop_records_calls_back_and_ends():
    problem, seen = flat_problem(8), []
    solution = drive(Counting(), problem, ExactOracle(), callback=seen.append)
    assert [s.status for s in seen] == ["running", "running", "running", "stalled"]
    assert [record["round"] for record in solution.history] == [0, 1, 2, 3]
    assert [len(s.history) for s in seen] == [1, 2, 3, 4]
    assert seen[-1] is solution
    always = {"round", "objective", "lower_bound", "rel_gap", "g_max", "scope", "n_filters", "seconds"}
    assert set(solution.history[0]) == always | {"proved_g"}  # of an oracle that proves
    assert always < set(Round.__annotations__)
    seconds = [record["seconds"] for record in solution.history]
    assert seconds == sorted(seconds)
    # the constant is what a network without filters is
    assert torch.equal(solution.intercept, problem.constant_predictions()[0])


def test_the_budget_ends_the_loop_and_a_step_out_of_time_keeps_what_there_is():
    problem = flat_problem(8)
    assert drive(Counting(), problem, ExactOracle(), Budget(max_rounds=1)).status == "max_rounds"
    late = drive(Counting(late=True), problem, ExactOracle())
    assert (late.status, late.rounds, len(late.history)) == ("time_limit", 1, 2)
    assert drive(Counting(), problem.until(Deadline.after(0)), ExactOracle()).status == "time_limit"


def test_a_checkpoint_goes_on_and_its_seconds_count():
    problem = flat_problem(8)
    half = drive(Counting(), problem, ExactOracle(), Budget(max_rounds=1))
    half = replace(half, history=[*half.history[:-1], {**half.history[-1], "seconds": 1e6}])
    whole = drive(Counting(), problem, ExactOracle(), start=half)
    assert [record["round"] for record in whole.history] == [0, 1, 2, 3]
    assert whole.history[-1]["seconds"] > 1e6


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_is_a_record_that_can_be_called(name):
    solver = SOLVERS[name]
    assert solver.name == name
    assert hash(solver) == hash(replace(solver))
    with pytest.raises(TypeError, match="magic"):
        solver(flat_problem(6), ExactOracle(), magic=1)


def test_settings_are_changed_by_call_or_by_record():
    problem, budget = flat_problem(12, beta=0.002), Budget(tol=1e-9, max_rounds=2)
    called = sliding_frank_wolfe(problem, ExactOracle(), budget, fewest=1)
    made = replace(sliding_frank_wolfe, fewest=1)(problem, ExactOracle(), budget)
    usual = sliding_frank_wolfe(problem, ExactOracle(), budget)
    assert torch.equal(called.filters, made.filters)
    assert usual.history[1]["n_filters"] > called.history[1]["n_filters"]


def test_the_sampled_program_is_called_not_driven():
    with pytest.raises(InputError, match="solver gated needs a SampledOracle"):
        drive(gated, flat_problem(6), ExactOracle())


# -- tables and needs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("oracle", ["exact", "branch-and-bound", "copositive"])
def test_too_many_rows_are_refused_before_anything_is_gathered(oracle, monkeypatch):
    monkeypatch.setattr("convcvx.oracles.needs.MAX_BYTES", 0)
    problem = flat_problem(9)
    with pytest.raises(InputError, match=f"oracle {oracle} needs all patches at once, .*; got .*oracle='local'"):
        Plan.of(problem, oracle=oracle)
    with pytest.raises(InputError, match="oracle needs all patches at once"):
        ExactOracle()(problem, problem.dual_point(problem.constant_predictions()))
    plan = Plan.of(problem)
    assert plan.oracle == "local"
    assert "a proof would gather more than" in str(plan)


def test_what_a_solver_needs_is_asked_before_the_training():
    problem = flat_problem(6, loss="cross-entropy")
    message = "solver closed-form needs loss 'squared'; got 'cross-entropy'; use solver='sliding-fw'"
    for refused in (
        lambda: Plan.of(problem, "closed-form"),
        lambda: SOLVERS["closed-form"](problem, ExactOracle()),
        lambda: solve_problem(problem, solver="closed-form"),
    ):
        with pytest.raises(InputError) as caught:
            refused()
        assert str(caught.value) == message
    assert Plan.of(flat_problem(6), "closed-form").solver == "closed-form"


def test_patches_of_a_high_rank_are_refused_by_branch_and_bound_and_searched_by_auto():
    problem = flat_problem(20, 1, 17)
    with pytest.raises(InputError, match=r"oracle branch-and-bound needs patches of a rank of 16 at most"):
        pick_oracle("branch-and-bound", problem)
    assert pick_oracle("auto", problem)[0] == "local"


def test_images_that_are_all_zero_have_a_closed_form():
    problem = flat_problem(8)
    problem.responses.images.zero_()
    solution = SOLVERS["closed-form"](problem, ExactOracle(), Budget(tol=1e-6))
    constant = problem.primal(problem.constant_predictions(), torch.zeros(0, 1, 3))
    assert (solution.status, solution.n_filters) == ("converged", 0)
    assert solution.history[-1]["lower_bound"] == pytest.approx(constant, rel=1e-6)


class OnAxes(Oracle):
    """An oracle over a finite family: filters along an axis."""

    name = "axes"

    def __call__(self, problem: Problem, dual_point: Tensor, *, n_filters: int = 1, **_: object) -> OracleResult:
        axes = torch.eye(problem.responses.dim, dtype=torch.float64)
        axes = torch.cat([axes, -axes])
        values = problem.responses.correlate(axes, dual_point).flatten(1).norm(dim=1)
        best = values.argsort(descending=True)[:n_filters]
        return OracleResult(axes[best], values[best], float("inf"), Scope.HEURISTIC)


@dataclass(frozen=True)
class Lazy(Solver):
    """Stops at once."""

    name: ClassVar[str] = "lazy"
    needs: ClassVar[tuple[Need, ...]] = (
        Need("few images", lambda p: f"{p.n}" if p.n > 10 else None, "use fewer images"),
    )

    def ended(self, level: Level, look: Look) -> Status | None:
        return super().ended(level, look) or Status.STALLED


@dataclass(frozen=True)
class Saying(Solver):
    name: ClassVar[str] = "saying"
    says: Status = Status.STALLED

    def ended(self, level: Level, look: Look) -> Status | None:
        return self.says


def test_what_a_certificate_shows_is_converged_however_the_training_ended(monkeypatch):
    monkeypatch.setitem(SOLVERS, "giving-up", Saying())
    monkeypatch.setitem(SOLVERS, "content", Saying(Status.CONVERGED))
    x, y = torch.randn(9, 2, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 3
    top = convcvx.beta_max(x, y)
    assert convcvx.solve(x, y, 1.1 * top, solver="giving-up").status is Status.CONVERGED
    with pytest.warns(ConvergenceWarning, match="stopped by stalled"):
        assert convcvx.solve(x, y, 0.5 * top, solver="giving-up").status is Status.STALLED
    with pytest.warns(ConvergenceWarning, match=r"stopped by gap_above_tol: a second, longer search found more"):
        assert convcvx.solve(x, y, 0.5 * top, solver="content").status is Status.GAP_ABOVE_TOL


def test_an_oracle_and_a_solver_of_ones_own_are_an_entry_in_a_table(monkeypatch):
    monkeypatch.setitem(ORACLES, "axes", Entry(lambda effort: OnAxes()))
    monkeypatch.setitem(SOLVERS, "lazy", Lazy())
    problem = flat_problem(9)
    assert get_oracle("axes", problem).name == "axes"
    plan = Plan.of(problem, "lazy", "axes")
    assert (plan.solver, plan.oracle) == ("lazy", "axes")
    x, y = torch.randn(9, 2, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 3
    with pytest.warns(ConvergenceWarning, match=f"stopped by stalled: {Status.STALLED.remedy}"):
        solution = convcvx.solve(x, y, 1e-3, solver="lazy", oracle="axes")
    assert (solution.status, solution.n_filters, solution.certificate.scope) == ("stalled", 0, "heuristic")
    trained = convcvx.solve(x, y, 1e-3, oracle="axes", tol=0.5)
    assert trained.n_filters
    with pytest.raises(InputError, match="solver lazy needs few images; got 12; use fewer images"):
        Plan.of(flat_problem(12), "lazy")
    assert Plan.of(problem) == Plan.of(problem, "auto", "auto")
    assert Plan.of(problem).oracle != "axes"
    require("nobody", (), problem)


def test_a_later_round_never_lowers_what_was_proved():
    solution = frank_wolfe(flat_problem(12, beta=0.01), ExactOracle(), Budget(tol=1e-9, max_rounds=15))
    bounds = [record["lower_bound"] for record in solution.history]
    assert bounds == sorted(bounds)
    assert solution.status == "max_rounds"
