"""Frank-Wolfe: the same optimum as sliding Frank-Wolfe, an exact plane search, budgets, checkpoints, sparse optima."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.commands import answer, cli
from helpers.problems import flat_problem, random_parameters
from scipy.optimize import minimize

from convcvx.budget import Budget
from convcvx.oracles import ExactOracle, LocalOracle
from convcvx.problem import Problem
from convcvx.solution import Solution
from convcvx.solvers.frank_wolfe import frank_wolfe, search_plane
from convcvx.solvers.sliding_frank_wolfe import sliding_frank_wolfe
from convcvx.solvers.sparsify import sparsify
from convcvx.training.plan import solve_problem

CASES = [
    {"loss": "squared"},
    {"loss": "squared", "pooling": "none", "intercept": False},
    {"loss": "cross-entropy"},
    {"loss": "cross-entropy", "pooling": "none", "intercept": False},
]


def objective(problem: Problem, solution: Solution) -> float:
    predictions = problem.responses.predict(solution.filters, solution.weights, solution.intercept)
    return problem.primal(predictions, solution.weights)


@pytest.mark.parametrize("case", CASES)
def test_frank_wolfe_closes_in_on_the_optimum(case):
    problem = flat_problem(14, beta=0.06, **case)
    optimum = sliding_frank_wolfe(problem, ExactOracle(), Budget(tol=1e-6)).history[-1]["objective"]
    solution = frank_wolfe(problem, ExactOracle(), Budget(tol=0.1, max_rounds=200))
    last = solution.history[-1]
    assert (solution.status, last["scope"]) == ("converged", "global")
    assert last["objective"] == pytest.approx(objective(problem, solution), rel=1e-10)
    assert optimum * (1 - 1e-6) <= last["objective"] <= optimum * (1 + 0.1)
    for record in solution.history:
        assert record["lower_bound"] <= optimum * (1 + 1e-12)
    objectives = [record["objective"] for record in solution.history]
    assert all(b <= a * (1 + 1e-14) for a, b in pairwise(objectives))
    # Negative control: the optimum of another beta is not met.
    other = sliding_frank_wolfe(problem.with_beta(0.12), ExactOracle(), Budget(tol=1e-6)).history[-1]["objective"]
    assert not other * (1 - 1e-6) <= last["objective"] <= other * (1 + 0.1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_plane_search_is_exact(case, seed):
    problem = flat_problem(14, beta=0.05, **case)
    filters, weights, intercept = random_parameters(problem, 4, seed)
    current = problem.responses.predict(filters[:3], weights[:3], torch.zeros(3))
    atom = problem.responses.predict(filters[3:], weights[3:] / weights[3:].norm(), torch.zeros(3))
    penalty = float(weights[:3].flatten(1).norm(dim=1).sum())
    kept, added, shift = search_plane(problem, current, penalty, atom, intercept)

    def value(point: np.ndarray) -> float:
        predictions = point[0] * current + point[1] * atom + problem.intercept * torch.as_tensor(point[2:])
        loss = float(problem.loss.value(predictions, problem.targets).mean())
        return loss + problem.beta * (point[0] * penalty + point[1])

    best = minimize(value, np.ones(5), bounds=[(0, None)] * 2 + [(None, None)] * 3, options={"ftol": 1e-15})
    found = value(np.concatenate([[kept, added], shift.numpy()]))
    assert min(kept, added) >= 0
    assert found <= best.fun * (1 + 1e-12)
    assert found == pytest.approx(best.fun, rel=1e-6)
    assert value(np.array([kept + 0.1, added, *shift.tolist()])) > found * (1 + 1e-6)  # negative control


@pytest.mark.parametrize(
    ("budget", "status"),
    [
        (Budget(max_rounds=3), "max_rounds"),
        (Budget(max_rounds=0), "max_rounds"),
        (Budget(time_limit=1e-6), "time_limit"),
        (Budget(max_filters=2), "max_filters"),
    ],
)
def test_budgets_stop_it(budget, status):
    seen = []
    solution = solve_problem(flat_problem(20, beta=0.003), budget, solver="frank-wolfe", callback=seen.append)
    assert solution.status == status
    assert solution.n_filters <= (budget.max_filters or 3)
    assert [s.rounds for s in seen] == list(range(solution.rounds + 1))
    sliding = solve_problem(flat_problem(20, beta=0.003), Budget(max_rounds=1))
    assert list(solution.history[0]) == list(sliding.history[0])


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_a_resumed_run_goes_on_where_it_stopped(loss):
    problem, saved = flat_problem(20, beta=0.01, loss=loss), []
    full = solve_problem(problem, Budget(max_rounds=30), solver="frank-wolfe", callback=saved.append)
    resumed = solve_problem(problem, Budget(max_rounds=30), solver="frank-wolfe", start=saved[11])
    assert [r["round"] for r in resumed.history] == list(range(31))
    assert resumed.history[-1]["objective"] == pytest.approx(full.history[-1]["objective"], rel=1e-9)
    cold = solve_problem(problem, Budget(max_rounds=18), solver="frank-wolfe")  # negative control: the start counts
    assert cold.history[-1]["objective"] > full.history[-1]["objective"] * (1 + 1e-6)


def test_the_local_oracle_will_do_too():
    solution = frank_wolfe(flat_problem(20, beta=0.03), LocalOracle(), Budget(tol=5e-2, max_rounds=200))
    assert (solution.status, solution.history[-1]["scope"]) == ("converged", "heuristic")


def test_patches_that_are_all_zero_leave_the_constant():
    problem = flat_problem(8)
    problem.responses.images.zero_()
    solution = frank_wolfe(problem, LocalOracle())
    assert (solution.n_filters, solution.status) == (0, "converged")


def test_the_command_line_runs_and_resumes_it(tmp_path):
    train = "train --data digits --limit 40 --kernel-size 2 --stride 2 --rank 2 --beta-ratio 0.3 --tol 1e-6"
    train = f"{train} --solver frank-wolfe --json --out"
    cli(train, tmp_path / "run", "--max-rounds", 4, code=3)
    assert answer(cli(train, tmp_path / "run", "--max-rounds", 8, "--resume", code=3))["rounds"] == 8


# Sparse optima


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("m", [5, 60, 150])
def test_sparsify_keeps_the_network_with_at_most_nc_neurons(case, m):
    problem = flat_problem(7, **case)
    filters, weights, intercept = random_parameters(problem, m)
    solution = Solution.empty(2, problem.responses.n_cells, 3).with_parameters(filters, weights, intercept)
    sparse = sparsify(problem, solution)
    assert sparse.n_filters <= min(m, problem.targets.numel())
    predictions = problem.responses.predict(filters, weights, intercept)
    torch.testing.assert_close(
        problem.responses.predict(sparse.filters, sparse.weights, sparse.intercept), predictions, rtol=0, atol=1e-10
    )
    assert objective(problem, sparse) <= objective(problem, solution) * (1 + 1e-12)
    assert sparse.n_filters == m or objective(problem, sparse) < objective(problem, solution)


@pytest.mark.parametrize("case", CASES)
def test_an_over_parameterised_optimum_becomes_sparse_at_the_same_objective(case):
    """Every optimal neuron split in many is still optimal; so is a mixture with a sparse one."""
    problem = flat_problem(6, beta=0.01, **case)
    optimum = sliding_frank_wolfe(problem, ExactOracle(), Budget(tol=1e-5))
    shares = torch.rand(60, len(optimum.filters), generator=torch.Generator().manual_seed(0)).double()
    shares = (shares / shares.sum(dim=0)).flatten()
    wide = optimum.with_parameters(
        optimum.filters.repeat(60, 1), optimum.weights.repeat(60, 1, 1) * shares[:, None, None], optimum.intercept
    )
    assert wide.n_filters > problem.n * problem.responses.n_cells * problem.n_outputs + 1
    sparse = sparsify(problem, wide)
    assert sparse.n_filters <= problem.targets.numel()
    # `optimum` is one to 1e-5: removing neurons along the flat directions may still lower its objective.
    assert objective(problem, sparse) <= objective(problem, optimum) * (1 + 1e-10)
    assert objective(problem, sparse) == pytest.approx(objective(problem, optimum), rel=1e-5)
    # Negative control: dropping the smallest neurons instead does not keep the objective.
    order = wide.weights.flatten(1).norm(dim=1).argsort(descending=True)[: sparse.n_filters]
    cut = wide.with_parameters(wide.filters[order], wide.weights[order], wide.intercept)
    assert objective(problem, cut) > objective(problem, optimum) * (1 + 1e-10)


def test_frank_wolfe_keeps_its_network_sparse():
    problem = flat_problem(4, n_patches=1, beta=1e-4, n_outputs=2)
    solution = frank_wolfe(problem, ExactOracle(), Budget(tol=1e-9, max_rounds=60))
    assert solution.n_filters <= 2 * problem.targets.numel()
    assert objective(problem, solution) == pytest.approx(solution.history[-1]["objective"], rel=1e-9)
