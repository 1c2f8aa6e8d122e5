"""Every road to the optimum agrees with every other, over ranks, outputs, pooling cells and losses; planted optima."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from helpers.problems import flat_problem, planted_problem

from convcvx.budget import Budget
from convcvx.data import datasets as data
from convcvx.oracles import BranchAndBoundOracle, ExactOracle
from convcvx.patches import PatchSpec
from convcvx.problem import Problem
from convcvx.solvers.copositive import copositive
from convcvx.solvers.programs.cones import Cones
from convcvx.solvers.programs.convex import solve_program
from convcvx.solvers.sliding_frank_wolfe import sliding_frank_wolfe
from convcvx.training.plan import build_problem, find_beta_max, solve_problem

AGREE = 1e-5
MAX_CONES = 400
"""Activation cones up to which cvxpy solves the finite program in seconds."""


def cases(outputs: tuple[int, ...], quick: list[tuple]) -> list:
    """(r, c, P, loss) over all ranks and cells; those that are not `quick` are slow.

    Of ten outputs, which take longest, half: the squared loss with one cell, the cross-entropy with four.
    """
    every = itertools.product((1, 2, 3, 4), outputs, (1, 4), ("squared", "cross-entropy"))
    chosen = [case for case in every if case[1] < 10 or case[2:] in ((1, "squared"), (4, "cross-entropy"))]
    applicable = [case for case in chosen if case[1] > 1 or case[3] == "squared"]
    return [case if case in quick else pytest.param(*case, marks=pytest.mark.slow) for case in applicable]


def small(r: int, c: int, p: int, loss: str) -> Problem:
    """n images of 4 (in rank 4: p) Gaussian patches of rank r, averaged into p cells; one output is a real target.

    Of rank 3 there are few: the relaxation takes four times as long for twice as many cones.
    """
    n, n_patches = {1: 12, 2: 8, 3: 3, 4: 2}[r], p if r == 4 else 4
    pooling = "none" if p == n_patches else f"{p}x1"
    problem = flat_problem(max(n, c), n_patches, r, max(c, 2), beta=0.03, loss=loss, pooling=pooling)
    if c > 1:
        return problem
    random = torch.Generator().manual_seed(r)
    targets = torch.randn(problem.n, 1, generator=random, dtype=torch.float64)
    return Problem.build(problem.responses, targets, 0.03, loss)


def real(images: torch.Tensor, classes: torch.Tensor, r: int, c: int, p: int, loss: str) -> Problem:
    """The four quarters of small pictures as patches in their first r principal directions.

    One output is the class number, two are its parity, ten the classes.
    """
    n = max({1: 12, 2: 8, 3: 3, 4: 3}[r], c)
    first = torch.stack([(classes == k).nonzero()[0, 0] for k in range(10)])
    rest = torch.tensor([i for i in range(n + 10) if i not in first])
    chosen = torch.cat([first, rest])[:n]
    side = images.shape[-1] // 2
    targets = {1: classes / 10, 2: classes % 2, 10: classes}[c][chosen]
    problem = build_problem(
        images[chosen],
        targets,
        spec=PatchSpec((side, side), (side, side), rank=r),
        pooling="none" if p == 4 else None,
        loss=loss,
        dtype=torch.float64,
    )
    return problem.with_beta(0.1 * find_beta_max(problem, "exact"))


def check_all_roads(problem: Problem) -> None:
    """Enumeration, branch and bound, the relaxation, the finite program and both Frank-Wolfe solvers."""
    rank = problem.responses.embedding.patch_rank
    solution = sliding_frank_wolfe(problem, ExactOracle(), Budget(tol=1e-6))
    optimum = solution.history[-1]
    assert optimum["rel_gap"] <= AGREE

    bounding = BranchAndBoundOracle(1e-6 if rank <= 3 else 0.4 * AGREE, 60.0)
    if rank <= 3:
        found = sliding_frank_wolfe(problem, bounding, Budget(tol=1e-6)).history[-1]
        assert found["scope"] == "global"
        assert found["objective"] == pytest.approx(optimum["objective"], rel=AGREE)
        assert found["lower_bound"] == pytest.approx(optimum["objective"], rel=AGREE)
    found = bounding(problem, solution.dual_point, starts=solution.filters)
    assert found.scope == "global"
    assert problem.dual(solution.dual_point, found.g_max) == pytest.approx(optimum["objective"], rel=AGREE)

    if len(Cones.all(problem).cones) <= MAX_CONES:
        record = copositive(problem, ExactOracle(), Budget(tol=1e-6)).history[-1]
        assert record["lower_bound"] <= optimum["objective"] * (1 + 1e-9)
        assert solve_program(problem, Cones.all(problem)).value == pytest.approx(record["lower_bound"], rel=AGREE)
        if rank <= 2 or problem.n_outputs * problem.responses.n_cells == 1:  # nothing is relaxed there
            assert record["rel_gap"] <= AGREE
        if record["rel_gap"] <= AGREE:
            assert record["objective"] == pytest.approx(optimum["objective"], rel=AGREE)

    slower = solve_problem(
        problem, Budget(max_rounds=10 if rank <= 3 else 3), solver="frank-wolfe", oracle="exact"
    ).history[-1]
    assert slower["lower_bound"] <= optimum["objective"] * (1 + 1e-9)
    assert slower["objective"] >= optimum["objective"] * (1 - AGREE)
    if solution.n_filters:  # negative control
        other = sliding_frank_wolfe(problem.with_beta(0.5 * problem.beta), ExactOracle(), Budget(tol=AGREE)).history[-1]
        assert other["objective"] != pytest.approx(optimum["objective"], rel=5 * AGREE)


RANDOM = cases((1, 2, 10), [(1, 2, 1, "squared"), (2, 1, 4, "squared"), (2, 2, 1, "cross-entropy")])
REAL = [
    *cases((1, 2), [(2, 2, 1, "squared")]),
    *(pytest.param(r, 10, p, "cross-entropy", marks=pytest.mark.slow) for r, p in [(1, 4), (2, 1), (3, 4)]),
]


@pytest.mark.parametrize(("r", "c", "p", "loss"), RANDOM)
def test_all_roads_lead_to_the_same_optimum(r, c, p, loss):
    check_all_roads(small(r, c, p, loss))


@pytest.mark.parametrize(("r", "c", "p", "loss"), REAL)
def test_all_roads_lead_to_the_same_optimum_on_digits(r, c, p, loss):
    train, _ = data.load("digits", limit=100)
    check_all_roads(real(train.images, train.targets, r, c, p, loss))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("r", "c", "p", "loss"), [(2, 10, 1, "cross-entropy"), (3, 2, 4, "squared"), (4, 2, 1, "squared")]
)
def test_all_roads_lead_to_the_same_optimum_on_mnist(shared_data: Path, r, c, p, loss):
    train, _ = data.load("mnist", shared_data, limit=100)
    check_all_roads(real(train.images[:, :, 7:21, 7:21], train.targets, r, c, p, loss))


def planted(seed: int) -> tuple[Problem, float]:
    """A problem with a known optimum, of any rank, pooling, loss and number of outputs."""
    random = torch.Generator().manual_seed(seed)
    r, c, p = 1 + seed % 3, 2 + seed % 9, 1 + seed % 4
    loss = ("squared", "cross-entropy")[seed // 2 % 2]
    half = torch.randn(5, p, r, generator=random, dtype=torch.float64)
    blank = flat_problem(10, p, r, c, pooling="none", intercept=False)
    blank.responses.images.copy_(torch.cat([half, -half]).transpose(1, 2)[..., None])
    charges = torch.randn(5, c, generator=random, dtype=torch.float64) * (2e-3 if loss == "squared" else 1e-4)
    charges = charges - charges.mean(dim=1, keepdim=True)
    return planted_problem(blank, torch.cat([charges, charges]), loss)


@pytest.mark.parametrize("seed", [s if s < 8 else pytest.param(s, marks=pytest.mark.slow) for s in range(200)])
def test_planted_optima_are_recovered(seed):
    problem, optimum = planted(seed)
    last = sliding_frank_wolfe(problem, ExactOracle(), Budget(tol=1e-6)).history[-1]
    assert last["objective"] == pytest.approx(optimum, rel=AGREE)
    assert last["lower_bound"] <= optimum * (1 + 1e-9)


def test_negative_control_another_beta_misses_the_planted_optimum():
    problem, optimum = planted(0)
    last = sliding_frank_wolfe(problem.with_beta(1.01 * problem.beta), ExactOracle(), Budget(tol=1e-6)).history[-1]
    assert last["objective"] != pytest.approx(optimum, rel=AGREE)
