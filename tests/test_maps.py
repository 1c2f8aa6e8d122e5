"""Passes over maps of the images, patches in the coordinates of the filters, against passes over the pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from convcvx.activations import Activation
from convcvx.budget import Deadline, OutOfTime
from convcvx.data.images import StreamedImages
from convcvx.losses.shares import Shares
from convcvx.patches import PatchEmbedding, PatchSpec
from convcvx.pooling import Pooling
from convcvx.responses.fused import Fused
from convcvx.responses.maps import Maps
from convcvx.responses.passes import Responses

N, M, C = 150, 5, 3
CASES = {
    "contrast": (PatchSpec(5, stride=2, padding=1, rank=3, contrast=0.05), "3", "relu"),
    "whitened": (PatchSpec(4, stride=2, rank=4, whiten=0.1), "window:3,2", "leaky-relu:0.1"),
    "bias": (PatchSpec((4, 3), stride=2, rank=2, hidden_bias=True, dilation=(1, 2)), "global", "relu"),
    "maximum": (PatchSpec(4, stride=2, rank=3), "max:2", "relu"),
    "square": (PatchSpec(4, stride=2, rank=3), "2x3", "quadratic"),
    "alone": (PatchSpec(4, stride=3, rank=3), "none", "abs"),
}
everywhere = pytest.mark.parametrize("case", CASES)


def images(n: int = N) -> Tensor:
    return torch.rand(n, 2, 13, 12, generator=torch.Generator().manual_seed(0))


def responses(case: str, dtype: torch.dtype = torch.float32, **options) -> Responses:
    spec, pool, activation = CASES[case]
    options = {"activation": Activation.of(activation), "dtype": dtype, "small": False, **options}
    return Responses(images(), PatchEmbedding.fit(images(), spec), Pooling.of(pool), **options)


def parameters(r: Responses) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    shapes = (M, r.dim), (M, r.n_cells, C), (C,), (r.n, C)
    return tuple(torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes)


def passes(r: Responses) -> list[Tensor]:
    """What every pass gives, one of them twice: maps are made in the first."""
    filters, weights, intercept, dual_point = parameters(r)
    counts = torch.arange(1.0, r.n + 1, dtype=torch.float64)
    return [
        r.correlate(filters, dual_point),
        r.predict(filters, weights, intercept),
        r.matrix(filters),
        r.shift(filters),
        *r.gram(filters, dual_point, Shares(counts, float(counts.sum())), r.shift(filters)),
        *r.ascent(filters, dual_point, weights),
        *r.gradients(filters, weights, intercept, lambda f, where: f - dual_point[where].to(f)),
        r.predict(filters, weights, intercept),
    ]


def furthest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


@everywhere
def test_every_pass_gives_what_it_gives_of_pixels(case):
    mapped, exact = responses(case), responses(case, torch.float64)
    assert mapped.mapped
    assert not exact.mapped
    assert furthest(passes(mapped), passes(exact)) < 2e-5


def test_negative_control_one_wrong_map_is_seen():
    mapped, exact = responses("contrast"), responses("contrast", torch.float64)
    before = passes(mapped)
    mapped.maps.of(slice(0, 1), mapped.pixels)[:] = 0
    assert furthest(passes(mapped), before) > 1e-3
    assert furthest(before, passes(exact)) < 2e-5


@everywhere
def test_some_of_the_images_have_their_own_maps_whether_made_before_or_not(case):
    where = torch.tensor([140, 3, 77, 4, 5])
    filters, weights, intercept, _ = parameters(responses(case))
    wanted = responses(case, torch.float64).predict(filters, weights, intercept)[where]
    fresh = responses(case)
    assert furthest([fresh.at(where).predict(filters, weights, intercept)], [wanted]) < 1e-5
    fresh.shift(filters)  # looks at the first eight
    assert furthest([fresh.at(where).predict(filters, weights, intercept)], [wanted]) < 1e-5
    fresh.predict(filters, weights, intercept)
    assert furthest([fresh.at(where).predict(filters, weights, intercept)], [wanted]) < 1e-5
    assert furthest([fresh.to(images=images()[where]).predict(filters, weights, intercept)], [wanted]) < 1e-5


@pytest.fixture
def unrolled(monkeypatch):
    """How many images were unrolled at a time."""
    seen: list[int] = []
    plain = PatchSpec.columns
    monkeypatch.setattr(PatchSpec, "columns", lambda spec, part: seen.append(len(part)) or plain(spec, part))
    return seen


def test_maps_are_made_once(unrolled):
    r = responses("contrast")
    unrolled.clear()  # to fit the embedding takes patches too
    arguments = parameters(r)[:3]
    where = torch.arange(0, N, 7)
    for _ in range(2):  # mini-batches make those of their images for those that come after
        r.at(where).predict(*arguments)
        assert sum(unrolled) == len(where)
    r.predict(*arguments)
    r.until(Deadline.after(1e6)).predict(*arguments)
    assert sum(unrolled) == N
    passes(r)
    assert sum(unrolled) == N + 8 * 2  # a shift looks at a few images of its own


def test_no_more_patches_are_unrolled_at_a_time_than_a_chunk_holds(unrolled):
    r = responses("contrast")
    image = r.n_positions * r.embedding.basis.shape[1] * 4
    r = responses("contrast", chunk_bytes=7 * image)
    unrolled.clear()
    passes(r)
    assert max(unrolled) == 7
    r.at(torch.arange(60)).predict(*parameters(r)[:3])
    assert max(unrolled) == 7


def test_a_pass_that_runs_out_of_time_leaves_maps_that_are_right():
    r = responses("contrast")
    with pytest.raises(OutOfTime):
        r.until(Deadline.after(0.0)).predict(*parameters(r)[:3])
    r.at(torch.arange(N)).predict(*parameters(r)[:3])
    assert furthest(passes(r), passes(responses("contrast", torch.float64))) < 2e-5


def test_a_cpu_convolves_them_in_registers_whatever_the_size_of_a_patch():
    spec = PatchSpec(20, stride=2, rank=3)
    data = torch.rand(8, 1, 60, 60, generator=torch.Generator().manual_seed(0))
    embedding = PatchEmbedding.fit(data, spec)
    assert not Fused.suits(spec, Pooling.of("3"), (1, 60, 60), torch.float32)
    assert isinstance(Responses(data, embedding, Pooling.of("3"), dtype=torch.float32, small=False).convolution, Fused)


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (PatchSpec(5, stride=2), {}),  # as many coordinates as entries
        (PatchSpec(5, rank=5), {}),  # 9 x 8 x 5 numbers of an image with 312 pixels
        (PatchSpec(5, stride=2, rank=3), {"dtype": torch.float64}),
        (PatchSpec(5, stride=2, rank=3), {"patch_dtype": torch.bfloat16}),
        (PatchSpec(5, stride=2, rank=3), {"small": True}),
    ],
)
def test_pixels_are_gone_over_where_maps_do_not_pay(spec, options):
    options = {"dtype": torch.float32, "small": False, **options}
    assert not Responses(images(), PatchEmbedding.fit(images(), spec), Pooling.of("2"), **options).mapped


def test_what_is_streamed_from_disk_has_no_maps_in_memory(tmp_path):
    spec = PatchSpec(5, stride=2, rank=3)
    embedding = PatchEmbedding.fit(images(), spec)
    assert Maps.suit(embedding, images(), (5, 4), torch.float32)
    np.save(tmp_path / "images.npy", (images() * 255).byte().numpy())
    streamed = StreamedImages(torch.from_numpy(np.load(tmp_path / "images.npy", mmap_mode="c")))
    assert not Maps.suit(embedding, streamed, (5, 4), torch.float32)
