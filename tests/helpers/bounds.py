"""What a proved bound on g has to hold for: problems of every kind, filters from everywhere, and climbs from there."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from convcvx.oracles import LocalOracle
from convcvx.oracles.base import OracleResult
from convcvx.problem import Problem
from helpers.problems import g, problem_of


def sphere(n: int, d: int, seed: int = 0) -> Tensor:
    points = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(points)


@st.composite
def awkward(draw) -> tuple[Problem, Tensor]:
    """Problems of any rank, cells, outputs and loss, with rows that are equal, antipodal, zero, or of odd size."""
    seed, n, k, d = (
        draw(st.integers(0, 10**6)),
        draw(st.integers(2, 6)),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 7)),
    )
    cells, c = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    random = np.random.default_rng(seed)
    x = random.standard_normal((n, k, d))
    kind = draw(st.sampled_from(["plain", "whole", "antipodal", "far", "sparse", "line"]))
    if kind == "whole":
        x = random.integers(-1, 2, (n, k, d)).astype(float)
    if kind == "antipodal":
        x[n // 2 :] = -x[: n - n // 2]
    if kind == "far":
        x[..., 0] += 30
    if kind == "sparse":
        x *= random.random((n, k, 1)) < 0.4
    if kind == "line":
        x = random.standard_normal((n, k, 1)) * random.standard_normal(d)
    x *= draw(st.sampled_from([1.0, 1e-9, 1e9]))
    loss = draw(st.sampled_from(["squared", "cross-entropy"]))
    y = random.permutation(np.arange(n) % c) if loss == "cross-entropy" else random.standard_normal((n, c))
    pool = random.random((cells, k)) * (random.random((cells, k)) < 0.7)
    problem = problem_of(x, y, pooling=pool, loss=loss, intercept=draw(st.booleans()), n_classes=c)
    point = torch.from_numpy(random.standard_normal((n, c)) * draw(st.sampled_from([1.0, 1e-120, 1e120])))
    if draw(st.booleans()):  # charges that cancel
        point -= point.mean(dim=0)
    return problem, problem.dual_point(problem.constant_predictions()) if draw(st.booleans()) else point


def correlated() -> tuple[Problem, Tensor]:
    """As images are: most of the energy of the patches in two directions."""
    random = np.random.default_rng(1)
    x = random.standard_normal((60, 4, 6)) * np.array([4.0, 2.0, 0.3, 0.2, 0.1, 0.1]) + np.array([3.0, 0, 0, 0, 0, 0])
    problem = problem_of(x, (x[:, :, 1].mean(axis=1) > 0).astype(int), beta=1.0)
    point = problem.dual_point(problem.constant_predictions())
    return problem.with_beta(0.4 * LocalOracle()(problem, point).g_max), point


def assert_never_below_g(problem: Problem, point: Tensor, result: OracleResult) -> None:
    """Its bound is one for all filters: random ones, those it gives, and those that a climb reaches."""
    assert result.scope == "global"
    filters = torch.cat([sphere(100, problem.responses.dim), result.filters])
    assert float(g(problem, filters, point).max()) <= result.upper_bound * (1 + 1e-12)
    if float(point.abs().max()) < 1e100:
        climbed = LocalOracle(n_climbers=8, n_steps=12, n_batches=1)(problem, point).g_max
        assert climbed <= result.upper_bound * (1 + 1e-12)
