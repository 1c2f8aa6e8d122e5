"""Patch rows, embeddings and pooling against torch's own unfold, convolution and pooling."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.problems import flat_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convcvx.budget import Budget
from convcvx.errors import InputError
from convcvx.network.architecture import ContrastConv2d
from convcvx.patches import PatchEmbedding, PatchSpec
from convcvx.pooling import Pooling
from convcvx.problem import Problem
from convcvx.responses.passes import Responses
from convcvx.training.functional import patches_to_images
from convcvx.training.plan import find_beta_max, solve_problem

MODES = [
    PatchSpec(3),
    PatchSpec((2, 3), stride=(2, 1), padding=(1, 2)),
    PatchSpec(3, padding=1, hidden_bias=True),
    PatchSpec(3, rank=4),
    PatchSpec(3, padding=1, rank=4, hidden_bias=True),
    PatchSpec(3, whiten=0.01),
    PatchSpec(2, stride=2, whiten=0.01, hidden_bias=True, rank=3),
    PatchSpec(3, contrast=0.1),
    PatchSpec(3, padding=1, contrast=0.1, whiten=0.01, rank=5),
    PatchSpec((3, 2), contrast=0.1, whiten=0.01, hidden_bias=True, stride=2),
    PatchSpec(3, padding=2, hidden_bias=True, dilation=2),
    PatchSpec(2, contrast=0.1, rank=5, dilation=(2, 3)),
]


def images(n: int = 6, channels: int = 2, height: int = 7, width: int = 6, seed: int = 0):
    random = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, height, width, generator=random, dtype=torch.float64)


# Rows


@settings(deadline=None, max_examples=60)
@given(
    channels=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    size=st.tuples(st.integers(7, 9), st.integers(10, 11)),
)
def test_rows_are_those_of_unfold(channels, kernel, stride, padding, dilation, size):
    spec = PatchSpec(kernel, stride, padding, dilation=dilation)
    batch = images(3, channels, *size)
    rows = spec.rows(batch)
    unfolded = F.unfold(batch, kernel, padding=padding, stride=stride, dilation=dilation).transpose(1, 2)
    assert torch.equal(rows, unfolded)
    assert rows.shape[1] == np.prod(spec.output_size(*size))


@pytest.mark.parametrize("scale", [1e-160, 1.0, 1e160])
@pytest.mark.parametrize(
    "spec",
    [
        PatchSpec((2, 3), (2, 1), (1, 2), hidden_bias=True),
        PatchSpec(4, contrast=0.1),
        PatchSpec((1, 5), whiten=1.0),
        PatchSpec((2, 3), (1, 2), (1, 2), dilation=(3, 2)),
    ],
)
def test_norms_and_reach_are_those_of_the_rows_or_above(spec, scale):
    random = torch.Generator().manual_seed(0)
    images = torch.randn(5, 2, 7, 6, generator=random, dtype=torch.float64)
    images[1] = 0.0
    embedding = PatchEmbedding.fit(images, spec)
    images = scale * images
    rows = spec.rows(images)
    patches = rows[..., :-1] if spec.constant else rows
    norms, expected = spec.norms(images), scale * (patches / scale).norm(dim=2)
    if spec.contrast is None:
        torch.testing.assert_close(norms, expected, rtol=1e-14, atol=0)
    else:
        assert bool((norms >= expected).all())
        assert bool((norms == math.sqrt(patches.shape[2])).all())

    responses = Responses(images, embedding, Pooling.of("2"))
    columns = torch.rand(rows.shape[2], generator=random, dtype=torch.float64)
    for entries, reach in ((columns, responses.reach(columns)), (embedding.basis.norm(dim=0), responses.reach())):
        exact = rows.abs() @ entries @ responses.pooling.matrix(*responses.map_size).sum(dim=0)
        assert bool((reach >= exact * (1 - 1e-14)).all())


def test_a_constant_channel_ends_the_rows():
    plain, biased = PatchSpec(3).rows(images()), PatchSpec(3, hidden_bias=True).rows(images())
    assert torch.equal(biased[..., :-1], plain)
    assert bool((biased[..., -1] == 1).all())


def test_contrast_normalises_each_patch_but_not_the_constant():
    rows = PatchSpec(3).rows(images())
    expected = (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, correction=0, keepdim=True) + 0.1).sqrt()
    torch.testing.assert_close(PatchSpec(3, contrast=0.1).rows(images()), expected)
    assert bool((PatchSpec(3, contrast=0.1, hidden_bias=True).rows(images())[..., -1] == 1).all())


def test_rows_do_not_write_into_the_images():
    batch = images()
    before = batch.clone()
    PatchSpec(1, contrast=0.1).rows(batch)
    PatchSpec(batch.shape[2:], contrast=0.1, whiten=0.1).rows(batch)
    assert torch.equal(batch, before)


# The embedding and the convolution that exports it


def convolution(embedding: PatchEmbedding, filters, change: float = 0.0):
    """The exported convolution in float64, one weight `change`d."""
    spec = embedding.spec
    weight, bias = embedding.kernels(filters)
    kind = nn.Conv2d if spec.contrast is None else lambda *a, **k: ContrastConv2d(*a, contrast=spec.contrast, **k)
    place = {name: getattr(spec, name) for name in ("kernel_size", "stride", "padding", "dilation")}
    layer = kind(embedding.channels, len(filters), bias=spec.constant, **place).double()
    layer.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] += change
    return layer


def export_error(embedding: PatchEmbedding, change: float = 0.0) -> float:
    """Largest difference between the convolution and basis times rows."""
    batch = images(seed=1)  # not the images that the embedding was fitted to
    filters = torch.randn(5, embedding.dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours = embedding.spec.rows(batch) @ embedding.basis.T @ filters.T
    with torch.no_grad():
        theirs = convolution(embedding, filters, change)(batch).flatten(2).transpose(1, 2)
    return float((ours - theirs).abs().max() / ours.abs().max())


@pytest.mark.parametrize("spec", MODES, ids=str)
def test_the_exported_convolution_computes_what_the_embedding_does(spec):
    assert export_error(PatchEmbedding.fit(images(40), spec)) < 1e-10


@pytest.mark.parametrize("spec", [MODES[0], MODES[-1]], ids=str)
def test_negative_control_a_changed_kernel_is_seen(spec):
    assert export_error(PatchEmbedding.fit(images(40), spec), change=1e-3) > 1e-6


@pytest.mark.parametrize("spec", MODES, ids=str)
def test_filters_inverts_kernels(spec):
    embedding = PatchEmbedding.fit(images(40), spec)
    filters = torch.randn(4, embedding.dim, dtype=torch.float64)
    torch.testing.assert_close(embedding.filters(*embedding.kernels(filters)), filters, atol=1e-9, rtol=1e-9)


def test_kernels_outside_the_filter_space_are_refused():
    embedding = PatchEmbedding.fit(images(40), PatchSpec(3, rank=4))
    with pytest.raises(InputError, match="outside the filter space"):
        embedding.filters(torch.randn(2, 2, 3, 3), None)
    with pytest.raises(InputError, match="convolution bias but the problem has none"):
        embedding.filters(torch.randn(2, 2, 3, 3), torch.ones(2))
    with pytest.raises(InputError, match="kernels must have 18 entries a filter; got 8"):
        embedding.filters(torch.randn(2, 2, 2, 2), torch.zeros(2))


def test_the_fit_does_not_depend_on_the_chunk():
    whole = PatchEmbedding.fit(images(40), PatchSpec(3, whiten=0.1, rank=5))
    parts = PatchEmbedding.fit(images(40), PatchSpec(3, whiten=0.1, rank=5), chunk=7)
    torch.testing.assert_close(whole.basis, parts.basis)


def test_full_rank_keeps_all_energy_and_less_keeps_the_largest():
    energies = [PatchEmbedding.fit(images(40), PatchSpec(2, rank=rank)).energy for rank in range(1, 9)]
    assert energies == sorted(energies)
    assert energies[-1] == pytest.approx(1)
    assert energies[0] > 1 / 8


# Whitening


@pytest.mark.parametrize("rank", [None, 4])
def test_whitened_patches_have_unit_covariance_as_epsilon_vanishes(rank):
    embedding = PatchEmbedding.fit(images(60), PatchSpec(2, whiten=1e-10, rank=rank))
    rows = (embedding.spec.rows(images(60)) @ embedding.basis.T).flatten(0, 1)
    torch.testing.assert_close(rows.mean(0), torch.zeros(embedding.dim).double(), atol=1e-8, rtol=0)
    torch.testing.assert_close(torch.cov(rows.T, correction=0), torch.eye(embedding.dim).double(), atol=1e-6, rtol=0)


def test_whitening_is_zca_up_to_a_rotation():
    """ZCA multiplies x - mean by (C + ε)^(-1/2); rotated back, our basis does just that."""
    embedding = PatchEmbedding.fit(images(60), PatchSpec(2, whiten=0.05))
    rows = PatchSpec(2).rows(images(60)).flatten(0, 1)
    centred = rows - rows.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(rows))
    zca = vectors @ torch.diag((values + 0.05).rsqrt()) @ vectors.T
    ours = embedding.spec.rows(images(60)).flatten(0, 1) @ embedding.basis.T
    rotation = torch.linalg.lstsq(ours, centred @ zca).solution
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(8).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(ours @ rotation, centred @ zca, atol=1e-9, rtol=0)


def test_the_optimum_is_the_same_in_a_rotated_basis():
    problem = flat_problem(20, beta=0.01)
    embedding = problem.responses.embedding
    angle = torch.tensor(0.7).double()
    rotation = torch.stack([torch.stack([angle.cos(), angle.sin()]), torch.stack([-angle.sin(), angle.cos()])])
    turned = Responses(
        problem.responses.images, replace(embedding, basis=rotation @ embedding.basis), dtype=torch.float64
    )
    other: Problem = replace(problem, responses=turned)
    assert find_beta_max(other) == pytest.approx(find_beta_max(problem), rel=1e-9)
    objectives = [solve_problem(p, Budget(tol=1e-6)).history[-1]["objective"] for p in (problem, other)]
    assert objectives[0] == pytest.approx(objectives[1], rel=2e-6)


# Rank


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_patch_rank_is_the_rank_of_the_data(rank):
    random = np.random.default_rng(rank)
    rows = random.standard_normal((30, 5, rank)) @ random.standard_normal((rank, 6))
    batch = patches_to_images(rows)
    assert PatchEmbedding.fit(batch, PatchSpec(1)).patch_rank == rank
    assert PatchEmbedding.fit(batch, PatchSpec(1, hidden_bias=True)).patch_rank == rank + 1
    assert PatchEmbedding.fit(batch, PatchSpec(1, whiten=0.1)).patch_rank == rank
    assert PatchEmbedding.fit(batch, PatchSpec(1, rank=1)).patch_rank == 1


def test_constant_images_have_rank_one_and_zero_images_rank_zero():
    assert PatchEmbedding.fit(torch.ones(3, 1, 5, 5), PatchSpec(3)).patch_rank == 1
    assert PatchEmbedding.fit(torch.zeros(3, 1, 5, 5), PatchSpec(3)).patch_rank == 0


# Pooling

POOLS = st.one_of(
    st.just("none"),
    st.builds("{}x{}".format, st.integers(1, 5), st.integers(1, 5)),
    st.builds("window:{},{}".format, st.integers(1, 4), st.integers(1, 5)),
)


def pooling_error(pooling: Pooling, module: nn.Module, height: int, width: int) -> float:
    maps = torch.rand(2, 3, height, width, dtype=torch.float64)
    matrix = pooling.matrix(height, width)
    ours = maps.flatten(2) if matrix is None else maps.flatten(2) @ matrix.T
    theirs = module(maps)
    assert tuple(theirs.shape[2:]) == pooling.output_size(height, width)
    return float((ours - theirs.flatten(2)).abs().max())


@settings(deadline=None, max_examples=150)
@given(text=POOLS, height=st.integers(5, 13), width=st.integers(5, 13))
def test_pooling_matrices_pool_as_torch_does(text, height, width):
    pooling = Pooling.of(text)
    if text == "none":
        module: nn.Module = nn.Identity()
    elif text.startswith("window"):
        size, stride = map(int, text.removeprefix("window:").split(","))
        module = nn.AvgPool2d(size, stride)
    else:
        module = nn.AdaptiveAvgPool2d(tuple(map(int, text.split("x"))))
    assert pooling_error(pooling, module, height, width) < 1e-12
    assert pooling_error(pooling, pooling.module(), height, width) < 1e-12
    assert Pooling.of(str(pooling)) == pooling


def test_negative_control_another_pooling_is_seen():
    assert pooling_error(Pooling.of("window:2,1"), nn.MaxPool2d(2, 1), 5, 5) > 1e-3
    assert pooling_error(Pooling.of("2"), nn.AvgPool2d(3, 2), 5, 5) < 1e-12  # they coincide on 5x5
    assert pooling_error(Pooling.of("2"), nn.AvgPool2d(3, 3), 6, 6) < 1e-12
    assert pooling_error(Pooling.of("2"), nn.AvgPool2d(2, 3), 6, 6) > 1e-3


def test_pooling_is_global_by_default_and_takes_a_matrix():
    assert Pooling.of(None) == Pooling.of("global") == Pooling.of(1)
    torch.testing.assert_close(Pooling.of(None).matrix(2, 3), torch.full((1, 6), 1 / 6).double())
    matrix = np.random.default_rng(0).random((4, 6))
    for value in (matrix, torch.as_tensor(matrix), matrix.tolist(), matrix.astype("f4").astype("f8")):
        pooling = Pooling.of(value)
        assert pooling.output_size(2, 3) == (4, 1)
        np.testing.assert_array_almost_equal(pooling.matrix(2, 3), matrix, decimal=6)


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 0}, "kernel_size must be a whole number >= 1, or a pair of them; got 0"),
        ({"kernel_size": 2.5}, "kernel_size must be a whole number >= 1, or a pair of them; got 2.5"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size must be a whole number"),
        ({"kernel_size": "big"}, "kernel_size must be a whole number"),
        ({"kernel_size": None}, "kernel_size must be a whole number"),
        ({"kernel_size": float("nan")}, "kernel_size must be a whole number"),
        ({"stride": 0}, "stride must be a whole number >= 1"),
        ({"dilation": 0}, "dilation must be a whole number >= 1, or a pair of them; got 0"),
        ({"padding": -1}, "padding must be a whole number >= 0, or a pair of them; got -1"),
        ({"contrast": 0.0}, "contrast must be a positive float; got 0.0"),
        ({"whiten": -1.0}, "whiten must be a positive float; got -1.0"),
        ({"whiten": float("nan")}, "whiten must be a positive float; got nan"),
        ({"rank": 0}, "rank must be a whole number >= 1; got 0"),
        ({"rank": 2.5}, "rank must be a whole number >= 1; got 2.5"),
    ],
)
def test_bad_specs_are_refused(options, message):
    with pytest.raises(InputError) as caught:
        PatchSpec(**options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_specs_that_do_not_fit_the_images_are_refused():
    with pytest.raises(InputError, match="kernel_size 9x9 is larger than the images, 7x6 with padding 0x1"):
        PatchEmbedding.fit(images(), PatchSpec(9, padding=(0, 1)))
    with pytest.raises(InputError, match="kernel_size 3x3 with dilation 3x3 is larger than the images, 7x6"):
        PatchEmbedding.fit(images(), PatchSpec(3, dilation=3))
    with pytest.raises(InputError, match="rank must be at most the patch size, 18; got 19"):
        PatchEmbedding.fit(images(), PatchSpec(3, rank=19))


@pytest.mark.parametrize("value", ["", "0", "4x0", "max", "window:0", "window:3,0", "4x4x4", -1, 2.5, (4, 4, 4), True])
def test_bad_pools_are_refused(value):
    with pytest.raises(InputError, match="pool must be global, none, a grid such as 4 or 4x2, or window:SIZE,STRIDE"):
        Pooling.of(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0, 2.0], r"pooling must be a \(P, K\) matrix; got shape \(2,\)"),
        ([[1.0], [1.0, 2.0]], "pooling must be an array of numbers"),
        ([[-1.0, 2.0]], "finite non-negative entries"),
        ([[np.nan, 2.0]], "finite non-negative entries"),
        ([[np.inf, 2.0]], "finite non-negative entries"),
    ],
)
def test_bad_pooling_matrices_are_refused(value, message):
    with pytest.raises(InputError, match=message):
        Pooling.of(value)


def test_pools_that_do_not_fit_the_map_are_refused():
    for text in ("4", "window:4"):
        with pytest.raises(InputError, match="larger than the 3x5 map of patch responses"):
            Pooling.of(text).matrix(3, 5)
    with pytest.raises(InputError, match=r"one column a patch, \(P, 15\); got \(1, 4\)"):
        Pooling.of(np.ones((1, 4))).matrix(3, 5)
    with pytest.raises(InputError, match="has no torch module"):
        Pooling.of(np.ones((1, 4))).module()
