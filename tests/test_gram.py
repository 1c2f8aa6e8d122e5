"""The Gram matrix and its factor in one square: against dense float64 algebra, over batches, after new images."""

from __future__ import annotations

import pytest
import torch

from convcvx.solvers.master.gram import STRIPE, Gram

SIZE = 2 * STRIPE["cpu"] + 37  # more than one stripe, the last one ragged


def blocks(seed: int = 0, n: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Non-negative features with a large mean, as pooled responses are, and targets."""
    random = torch.Generator().manual_seed(seed)
    return [
        (5 + torch.rand(300, SIZE, generator=random).double(), torch.randn(300, 3, generator=random).double())
        for _ in range(n)
    ]


def filled(data, *, dtype=torch.float64, centred=True) -> Gram:
    gram = Gram(SIZE, 3, dtype, centred=centred)
    for features, targets in data:
        gram.add(features.to(dtype), targets)  # `to` float64 is the tensor itself, which `add` shifts
    return gram


def dense(data, centred=True):
    features, targets = (torch.cat(parts) for parts in zip(*data, strict=True))
    if centred:
        features, targets = features - features.mean(dim=0), targets - targets.mean(dim=0)
    return features.T @ features / len(features), features.T @ targets / len(features), targets


@pytest.mark.parametrize("centred", [True, False])
def test_products_are_those_of_dense_algebra(centred):
    gram = filled(blocks(), centred=centred)
    hessian, linear, targets = dense(blocks(), centred)
    matrix = torch.randn(SIZE, 3, generator=torch.Generator().manual_seed(1)).double()
    assert torch.allclose(gram.times(matrix), hessian @ matrix, rtol=1e-10, atol=1e-10)
    assert torch.allclose(gram.linear, linear, atol=1e-12)
    assert gram.total == pytest.approx(float(targets.square().sum(dim=1).mean()), rel=1e-12)
    other, *_ = dense(blocks(seed=2), centred)
    assert not torch.allclose(gram.times(matrix), other @ matrix, rtol=1e-3)


def test_the_intercept_is_that_of_uncentred_features():
    data = blocks()
    gram = filled([(features.clone(), targets) for features, targets in data])
    matrix = torch.randn(SIZE, 3, generator=torch.Generator().manual_seed(1)).double()
    features, targets = (torch.cat(parts) for parts in zip(*data, strict=True))
    assert torch.allclose(gram.intercept(matrix), (targets - features @ matrix).mean(dim=0), atol=1e-9)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_a_factor_leaves_the_gram_matrix_alone(dtype, atol):
    gram = filled(blocks(), dtype=dtype)
    hessian, linear, _ = dense(blocks())
    before = gram.times(linear)
    ridges = torch.linspace(1e-3, 1e-1, SIZE).double()
    gram.factorise(ridges)
    assert torch.equal(gram.times(linear), before)
    exact = torch.linalg.solve(hessian + torch.diag(ridges), linear)
    assert torch.allclose(gram.unfactor(linear), exact, atol=atol * float(exact.abs().max()))
    gram.factorise(10 * ridges)
    assert not torch.allclose(gram.unfactor(linear), exact, atol=1e-2 * float(exact.abs().max()))


def test_more_images_leave_the_factor_alone():
    """The last images join the Gram matrix while the factor of the others still serves as preconditioner."""
    first, last = blocks(n=3), blocks(seed=5, n=1)
    gram = filled(first)
    _, linear, _ = dense(blocks(n=3))
    gram.factorise(torch.full((SIZE,), 1e-2).double())
    solved = gram.unfactor(linear)
    gram.add(*last[0])
    assert torch.equal(gram.unfactor(linear), solved)
    hessian, *_ = dense(blocks(n=3) + blocks(seed=5, n=1))
    assert torch.allclose(gram.times(linear), hessian @ linear, rtol=1e-9, atol=1e-12)


def test_a_singular_gram_matrix_is_factored_with_larger_ridges():
    gram = filled(blocks(n=1), dtype=torch.float32)  # 300 images for 549 features
    gram.factorise(torch.zeros(SIZE).double())
    assert bool(gram.unfactor(gram.linear).isfinite().all())
