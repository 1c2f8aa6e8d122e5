"""What the test files share: the real data, small problems, and threads that suit a shared machine."""

from __future__ import annotations

import os
from pathlib import Path

# Waiting threads that spin starve the working ones on a shared machine; to be set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
import torch
from torch import Tensor

from convcvx.patches import PatchSpec
from convcvx.problem import Problem
from convcvx.training.functional import patches_to_images
from convcvx.training.plan import build_problem

torch.set_num_threads(1)  # the problems here are too small for more

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: a must in CI, a skip elsewhere."""
    if not SHARED.is_dir():
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(f"CI needs the real data in {SHARED}")
        pytest.skip(f"no real data in {SHARED}")
    return SHARED


def flat_problem(
    n: int = 14,
    n_patches: int = 3,
    dim: int = 2,
    n_outputs: int = 3,
    *,
    beta: float = 0.02,
    loss: str = "squared",
    intercept: bool = True,
    pooling=None,
    seed: int = 0,
) -> Problem:
    """Gaussian patches (n, K, d), every class present; with d = 2 the exact oracle is cheap."""
    random = np.random.default_rng(seed)
    patches = random.standard_normal((n, n_patches, dim))
    targets = random.permutation(np.arange(n) % n_outputs)
    images = patches_to_images(patches)
    return build_problem(images, targets, beta, spec=PatchSpec((1, 1)), pooling=pooling, loss=loss, intercept=intercept)


def random_parameters(problem: Problem, m: int, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Unit filters (m, r), weights (m, P, c) and an intercept (c,), zero if the problem has none."""
    random = torch.Generator().manual_seed(seed)
    filters = torch.randn(m, problem.responses.dim, generator=random, dtype=torch.float64)
    shape = m, problem.responses.n_cells, problem.n_outputs
    weights = scale * torch.randn(shape, generator=random, dtype=torch.float64)
    intercept = torch.randn(problem.n_outputs, generator=random, dtype=torch.float64) * problem.intercept
    return torch.nn.functional.normalize(filters), weights, intercept
