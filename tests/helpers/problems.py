"""Small problems: Gaussian, on the digits, and with an optimum that is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convcvx.data.datasets import load
from convcvx.losses.shares import Shares
from convcvx.oracles import ExactOracle
from convcvx.patches import PatchSpec
from convcvx.problem import Problem
from convcvx.training.functional import patches_to_images
from convcvx.training.plan import build_problem

NO_TIME = {"time_limit": 1e-3}
"""For a certificate whose bound is not looked at: no time for a search, which is what takes time."""


def problem_of(
    patches: np.ndarray | Tensor, targets: np.ndarray | Tensor, beta: float = 1.0, **options: Any
) -> Problem:
    """Patches (n, d) or (n, K, d) as they are; `options` are those of `build_problem`."""
    return build_problem(patches_to_images(patches), targets, beta, **{"spec": PatchSpec((1, 1)), **options})


def flat_problem(
    n: int = 14,
    n_patches: int = 3,
    dim: int = 2,
    n_outputs: int = 3,
    *,
    beta: float = 0.02,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """Gaussian patches (n, K, d), every class present; with d = 2 the exact oracle is cheap."""
    random = np.random.default_rng(seed)
    patches = random.standard_normal((n, n_patches, dim))
    targets = random.permutation(np.arange(n) % n_outputs)
    return problem_of(patches, targets, beta, **options)


def digits_problem(n: int | None, beta: float = 1.0, **options: Any) -> Problem:
    """The first `n` training images of the digits, or all."""
    train, _ = load("digits", limit=n)
    return build_problem(train.images, train.targets, beta, **options)


def with_mirror_images(problem: Problem) -> Problem:
    """The problem on its images, which count alike, and their mirror images."""
    images = problem.responses.images
    return replace(
        problem,
        responses=problem.responses.to(images=torch.cat([images, images.flip(3)])),
        targets=problem.targets.repeat(2, 1),
        shares=Shares.equal(2 * problem.n),
    )


def planted_problem(blank: Problem, dual_point: Tensor, loss: str) -> tuple[Problem, float]:
    """The problem, and its optimal objective, that has `dual_point` Z (n, c) for its optimal dual point.

    The data of `blank` and Z are to be symmetric under x → -x, hence g(u) = g(-u) and both filters are optimal. β is
    max g, V points along the correlations at ±u, and targets y = f + nZ (squared) or softmax(f) + nZ make Z the
    residual of f.
    """
    found = ExactOracle()(blank, dual_point).filters[:1]
    filters = torch.cat([found, -found])
    correlations = blank.responses.correlate(filters, dual_point)
    beta = float(correlations.flatten(1).norm(dim=1).max())
    weights = correlations / beta * torch.tensor([0.6, 0.2])[:, None, None]
    predictions = blank.responses.predict(filters, weights, torch.zeros(dual_point.shape[1]))
    mean = predictions if loss == "squared" else predictions.softmax(dim=1)
    problem = Problem.build(blank.responses, mean + len(mean) * dual_point, beta, loss, intercept=False)
    return problem, problem.primal(predictions, weights)


def random_parameters(problem: Problem, m: int, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Unit filters (m, r), weights (m, P, c) and an intercept (c,), zero if the problem has none."""
    random = torch.Generator().manual_seed(seed)
    filters = torch.randn(m, problem.responses.dim, generator=random, dtype=torch.float64)
    shape = m, problem.responses.n_cells, problem.n_outputs
    weights = scale * torch.randn(shape, generator=random, dtype=torch.float64)
    intercept = torch.randn(problem.n_outputs, generator=random, dtype=torch.float64) * problem.intercept
    return torch.nn.functional.normalize(filters), weights, intercept


def g(problem: Problem, filters: Tensor, dual_point: Tensor) -> Tensor:
    """‖Σ φ(x_i; u) Z_iᵀ‖ of each filter u (m, r)."""
    return problem.responses.correlate(filters, dual_point).flatten(1).norm(dim=1)
