"""Second moments from products of pixels: what they must equal, entry by entry, and in exact arithmetic."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from convcvx.patches import Moments, PatchSpec, provisional_mean
from convcvx.patches import moments as home
from convcvx.patches.pixel_moments import BLOCK_BYTES, suits, sum_over_patches

SIDES = st.tuples(st.integers(1, 3), st.integers(1, 3))
SPECS = st.builds(
    PatchSpec, SIDES, stride=SIDES, padding=st.tuples(st.integers(0, 2), st.integers(0, 2)), dilation=SIDES
)


def made(n: int, channels: int, seed: int, offset: float = 0.0) -> Tensor:
    return torch.randn(n, channels, 7, 8, generator=torch.Generator().manual_seed(seed)) + offset


def patch_by_patch(images: Tensor, spec: PatchSpec, about: Tensor, weights: Tensor | None) -> Tensor:
    columns = replace(spec, hidden_bias=True).columns(images.double())
    columns[:-1] -= about[:, None]
    each = torch.ones(len(images)).double() if weights is None else weights.double()
    return columns @ (columns * each.repeat_interleave(columns.shape[1] // len(images))).T


@settings(max_examples=150, deadline=None)
@given(SPECS, st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_it_is_the_sum_patch_by_patch(spec, n, channels, chunk, weighted, seed):
    images = made(n, channels, seed)
    weights = torch.rand(n, generator=torch.Generator().manual_seed(seed)) + 0.1 if weighted else None
    about = provisional_mean(images, spec)
    found = sum_over_patches(images, spec, about, chunk, weights)
    wanted = patch_by_patch(images, spec, about, weights)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12 * float(wanted.abs().max()))


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
def test_images_far_from_zero_lose_nothing(offset):
    """Against exact arithmetic: pixels in float32 are fractions."""
    spec, images = PatchSpec(2), made(4, 1, 0, offset)[..., :3, :3]
    assert suits(spec, images)
    rows = [[Fraction(float(value)) for value in row] for row in spec.columns(images).T]
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    centred = [[value - middle for value, middle in zip(row, mean, strict=True)] for row in rows]
    exact = [[float(sum(r[a] * r[b] for r in centred) / len(rows)) for b in range(4)] for a in range(4)]
    wanted = torch.tensor(exact, dtype=torch.float64)
    found = Moments.of(images, spec).covariance
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14 * float(wanted.abs().max()))


def test_an_image_unlike_all_others_hides_no_direction():
    """Nor does it make any up: ramps of three directions beside a checkerboard a million times as bright."""
    ramp = torch.stack([torch.ones(8, 8), *torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")])
    whole = torch.randint(-9, 10, (500, 3), generator=torch.Generator().manual_seed(0)).float()
    images = torch.einsum("nk,khw->nhw", whole, ramp)[:, None]
    images[0, 0] = 1e6 * (-1.0) ** (ramp[1] + ramp[2])
    for spec in (PatchSpec(3), PatchSpec(5)):
        assert suits(spec, images)
        assert Moments.of(images, spec).rank == 4


def test_negative_control_products_of_pixels_as_they_are_would_lose_all():
    images = made(4, 1, 0).double()[..., :3, :3] + 1e8
    columns = PatchSpec(2).columns(images)
    mean = columns.mean(dim=1)
    drowned = columns @ columns.T / columns.shape[1] - torch.outer(mean, mean)
    about = Moments.of(images, PatchSpec(2)).covariance
    assert float((drowned - about).abs().max()) > 0.1 * float(about.abs().max())


def test_it_is_the_way_where_patches_overlap_and_nowhere_else(monkeypatch):
    images = torch.rand(2, 1, 28, 28)
    assert suits(PatchSpec(5), images)
    assert not suits(PatchSpec(5, contrast=0.1), images)  # which is no linear map of pixels
    assert not suits(PatchSpec(4, stride=4), images)
    wide = torch.rand(1, 3, 224, 224)
    assert not suits(PatchSpec(9), wide)
    assert BLOCK_BYTES < 8 * 9 * 224 * (3 * 224) ** 2
    taken: list[PatchSpec] = []

    def watched(images: Tensor, spec: PatchSpec, *given: object) -> Tensor:
        taken.append(spec)
        return sum_over_patches(images, spec, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(home, "sum_over_patches", watched)
    for spec in (PatchSpec(5, hidden_bias=True), PatchSpec(5, whiten=0.1), PatchSpec(5, contrast=0.1)):
        Moments.of(images, spec)
    assert [spec.constant for spec in taken] == [False, False]
