"""What "auto" stands for: the sensible solver and oracle for a problem's size, and why; the number of gates."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.commands import answer, cli, invoke, refused
from helpers.problems import flat_problem, problem_of

from convcvx.budget import Budget
from convcvx.errors import InputError
from convcvx.oracles import SampledOracle, get_oracle
from convcvx.problem import Problem
from convcvx.solvers.closed_form import whitened
from convcvx.solvers.copositive import copositive
from convcvx.training.plan import Plan, solve_problem


def one_hot_rows(n: int, d: int, *, intercept: bool = False, loss: str = "squared") -> Problem:
    x = np.random.default_rng(0).standard_normal((n, d))
    return problem_of(x, np.arange(n) % 3, 0.01, intercept=intercept, loss=loss)


def test_the_closed_form_is_picked_where_its_conditions_hold():
    problem = whitened(one_hot_rows(9, 12))
    plan = Plan.of(problem)
    assert plan.solver == "closed-form"
    assert "the soft-thresholded SVD is the optimum of these data" in str(plan)
    assert Plan.of(problem.with_beta(1.0)).solver == "closed-form"  # whatever β is, which is not known when it matters
    solution = solve_problem(problem, Budget(tol=1e-6))
    assert "closed_form" in solution.history[-1]
    iterated = solve_problem(problem, Budget(tol=1e-7), solver="sliding-fw")
    assert solution.history[-1]["objective"] == pytest.approx(iterated.history[-1]["objective"], rel=1e-6)


@pytest.mark.parametrize(
    "problem",
    [
        one_hot_rows(9, 12),  # not whitened
        whitened(one_hot_rows(9, 12, intercept=True)),  # signs do not fit
        whitened(one_hot_rows(9, 12, loss="cross-entropy")),
        flat_problem(6, n_patches=2, dim=9),  # several patches
        flat_problem(9, n_patches=1, dim=2),  # more samples than features
    ],
)
def test_elsewhere_neurons_on_demand_are(problem):
    plan = Plan.of(problem)
    assert plan.solver == "sliding-fw"
    assert "no closed form holds on these data" in str(plan)


@pytest.mark.parametrize(
    ("n", "rank", "oracle", "reason"),
    [
        (50, 2, "exact", "rank 2 are swept completely"),
        (10, 3, "exact", "20 patches of rank 3 have at most 382 activation patterns"),
        (2000, 3, "branch-and-bound", "rank 3 can be bounded in seconds"),
        (5, 5, "exact", "10 patches of rank 5 have at most 512 activation patterns"),
        (50, 4, "local", "rank 4: the cost of a proof grows exponentially"),
        (5, 9, "local", "rank 9: the cost of a proof grows exponentially"),
    ],
)
def test_the_oracle_goes_by_size_and_says_why(n, rank, oracle, reason):
    plan = Plan.of(flat_problem(n, n_patches=2, dim=rank))
    assert plan.oracle == oracle
    assert reason in str(plan)


def test_what_is_named_is_taken():
    plan = Plan.of(flat_problem(9, dim=2), "frank-wolfe", "local")
    assert (plan.solver, plan.oracle, plan.reasons) == ("frank-wolfe", "local", ("as asked", "as asked"))


# Gates

TINY = "train --data digits --limit 30 --kernel-size 4 --stride 4 --beta-ratio 0.3 --json"


def test_gates_reach_solver_and_oracle():
    problem = flat_problem(30, n_patches=1, dim=3)
    assert get_oracle("sampled", problem, gates=7).gates(problem).shape == (7, 3)
    few, many = (
        solve_problem(problem, Budget(max_rounds=3), solver="gated", oracle="exact", gates=k) for k in (2, 200)
    )
    assert many.history[0]["gated_dual"] < few.history[0]["gated_dual"] * (1 - 1e-3)
    with pytest.raises(InputError, match="gates must be a whole number >= 1; got 0"):
        solve_problem(problem, solver="gated", gates=0)
    with pytest.raises(InputError, match="gates must be a whole number >= 1; got 0"):
        SampledOracle(0)


def test_gates_on_the_command_line(tmp_path):
    run = tmp_path / "run"
    metrics = answer(cli(f"{TINY} --solver gated --oracle sampled --tol 0.5 --gates 7 --out", run))
    assert metrics["scope"] == "sampled"
    assert json.loads((run / "config.json").read_text())["gates"] == 7
    certificate = json.loads((run / "certificate.json").read_text())
    assert certificate["search"]["sampled_patterns"] == 7
    again = answer(cli("certify --json", run))
    assert again["dual"] == metrics["dual"]
    more = answer(invoke("certify --gates 60 --json", run))
    assert more["dual"] <= again["dual"]  # a larger program, a lower bound
    assert "gates is 7" in refused("train --resume --gates 8 --out", run)
    assert "gates must be a whole number >= 1; got 0" in refused(f"{TINY} --gates 0 --out", tmp_path / "none")
    assert not (tmp_path / "none").exists()


# Sizes


def test_a_hopeless_program_is_refused_on_the_command_line(tmp_path):
    message = refused(f"{TINY} --limit 300 --rank 3 --solver copositive --out", tmp_path)
    assert "solver='copositive' would need" in message
    assert "use solver='sliding-fw'" in message


def test_a_long_one_is_warned_of(monkeypatch):
    monkeypatch.setattr("convcvx.solvers.programs.cones.WARN_ENTRIES", 100)
    with pytest.warns(UserWarning, match="this takes minutes to hours"):
        copositive(flat_problem(6, n_patches=1), get_oracle("exact", flat_problem(6)))
