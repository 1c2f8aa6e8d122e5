"""Streamed responses and their adjoints against autograd on everything at once, in float64."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from convcvx.errors import InputError
from convcvx.patches import PatchEmbedding, PatchSpec
from convcvx.pooling import Pooling
from convcvx.responses.passes import Responses

N, M, C = 7, 4, 3
CASES = {
    "global": (PatchSpec(3), None),
    "grid": (PatchSpec((3, 2), padding=1, hidden_bias=True), "2x3"),
    "window": (PatchSpec(2, stride=(1, 2), dilation=(2, 1)), "window:2,1"),
    "none": (PatchSpec(3, stride=2, rank=4), "none"),
    "matrix": (PatchSpec(3, whiten=0.1), np.random.default_rng(0).random((3, 12))),
    "one position": (PatchSpec((6, 5), contrast=0.1), "none"),
}


def images(n: int = N) -> Tensor:
    return torch.rand(n, 2, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def responses(case: str, **options) -> Responses:
    spec, pool = CASES[case]
    options = {"dtype": torch.float64, "small": False, **options}
    return Responses(images(), PatchEmbedding.fit(images(), spec), Pooling.of(pool), **options)


def parameters(r: Responses, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Filters (m, r), weights (m, P, c), intercept (c,) and a dual point (n, c)."""
    random = torch.Generator().manual_seed(seed)
    shapes = (M, r.dim), (M, r.n_cells, C), (C,), (r.n, C)
    return tuple(torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes)


def plain_matrix(r: Responses, filters: Tensor) -> Tensor:
    """Φ (n, m, P) with everything in memory at once."""
    active = (r.embedding.spec.rows(images()) @ (filters @ r.embedding.basis).T).relu()
    pool = r.pooling.matrix(*r.map_size)
    return (active if pool is None else torch.einsum("pk,bkm->bpm", pool, active)).transpose(1, 2)


def plain_predictions(r: Responses, filters: Tensor, weights: Tensor, intercept: Tensor) -> Tensor:
    return torch.einsum("bmp,mpc->bc", plain_matrix(r, filters), weights) + intercept


def difference(ours, theirs) -> float:
    """Largest relative difference between two tensors or tuples of them."""
    if isinstance(ours, Tensor):
        ours, theirs = (ours,), (theirs,)
    assert [a.shape for a in ours] == [b.shape for b in theirs]
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def test_negative_control_a_difference_is_seen():
    a = torch.ones(3)
    assert difference(a, a + 1e-3) > 1e-4
    assert difference((a, a), (a, -a)) == 2
    with pytest.raises(AssertionError):
        difference(a, torch.ones(3, 1))


everywhere = pytest.mark.parametrize("case", CASES)


@everywhere
def test_matrix_and_predictions(case):
    r = responses(case)
    filters, weights, intercept, _ = parameters(r)
    assert difference(r.matrix(filters), plain_matrix(r, filters)) < 1e-12
    plain = plain_predictions(r, filters, weights, intercept)
    assert difference(r.predict(filters, weights, intercept), plain) < 1e-12
    assert torch.equal(r.predict(filters[:0], weights[:0], intercept), intercept.expand(N, C))


@everywhere
@pytest.mark.parametrize("chunk_bytes", [1, None])
def test_chosen_patches_and_the_norms_of_all(case, chunk_bytes):
    r = responses(case, chunk_bytes=chunk_bytes)
    random = torch.Generator().manual_seed(0)
    chosen, positions = torch.tensor([5, 0, 5]), torch.randint(r.n_positions, (3, 4), generator=random)
    rows, basis = r.rows(chosen), r.embedding.basis
    assert difference(r.patches(chosen, positions), rows[torch.arange(3)[:, None], positions]) < 1e-14
    assert difference(r.patch_norms(chosen, basis), (rows @ basis.T).norm(dim=2)) < 1e-14


@everywhere
def test_gram(case):
    r = responses(case)
    filters, _, _, targets = parameters(r)
    design = torch.cat([plain_matrix(r, filters).flatten(1), torch.ones(N, 1).double()], dim=1)
    assert difference(r.gram(filters, targets), (design.T @ design / N, design.T @ targets / N)) < 1e-12


@everywhere
def test_correlate_is_the_adjoint(case):
    r = responses(case)
    filters, weights, _, dual_point = parameters(r)
    ours = r.correlate(filters, dual_point)
    assert difference(ours, torch.einsum("bmp,bc->mpc", plain_matrix(r, filters), dual_point)) < 1e-12
    # <Φ V, Z> = <V, Φᵀ Z>
    forward = r.predict(filters, weights, torch.zeros(C))
    assert float((forward * dual_point).sum()) == pytest.approx(float((weights * ours).sum()))


@everywhere
def test_ascent_is_the_gradient_of_the_correlations(case):
    r = responses(case)
    filters, directions, _, dual_point = parameters(r)
    filters.requires_grad_()
    correlations = torch.einsum("bmp,bc->mpc", plain_matrix(r, filters), dual_point)
    (slope,) = torch.autograd.grad((correlations * directions).sum(), filters)
    assert difference(r.ascent(filters.detach(), dual_point, directions), (correlations.detach(), slope)) < 1e-11


@everywhere
def test_gradients(case):
    r = responses(case)
    leaves = [part.requires_grad_() for part in parameters(r)[:3]]
    plain_predictions(r, *leaves).sin().sum().backward()
    seen = []

    def residual(predictions: Tensor, where: Tensor) -> Tensor:
        seen.extend(where.tolist())
        return predictions.cos()

    ours = r.gradients(*(leaf.detach() for leaf in leaves), residual)
    assert difference(ours, [leaf.grad for leaf in leaves]) < 1e-11
    assert seen == list(range(N))


def test_gradients_pass_gradcheck():
    r = responses("grid")

    class Value(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *leaves):
            ctx.leaves = leaves
            return r.predict(*leaves).square().sum()

        @staticmethod
        def backward(ctx, slope):
            gradients = r.gradients(*ctx.leaves, lambda predictions, where: 2 * predictions)
            return tuple(slope * part for part in gradients)

    assert torch.autograd.gradcheck(Value.apply, [part.requires_grad_() for part in parameters(r)[:3]])


@everywhere
def test_patches_in_bfloat16_change_every_pass_a_little(case):
    exact, rough = responses(case), responses(case, dtype=torch.float32, patch_dtype=torch.bfloat16)
    assert rough.to(images=images()).patch_dtype == torch.bfloat16
    assert rough.to(dtype=torch.float64).patch_dtype == torch.float64  # who asks for precision gets it
    for fine, coarse in zip(everything(exact), everything(rough), strict=True):
        assert coarse.dtype in (torch.float32, torch.float64)
        error = float((coarse.double() - fine).norm() / fine.norm())
        assert 1e-5 < error < 3e-2


def everything(r: Responses) -> list[Tensor]:
    """Every pass once."""
    filters, weights, intercept, dual_point = (part.double() for part in parameters(r))
    return [
        r.matrix(filters),
        r.predict(filters, weights, intercept),
        *r.gram(filters, dual_point),
        r.correlate(filters, dual_point),
        *r.ascent(filters, dual_point, weights),
        *r.gradients(filters, weights, intercept, lambda predictions, where: predictions),
    ]


@everywhere
@pytest.mark.parametrize("chunk_bytes", [1, 5000])
def test_chunks_do_not_matter(case, chunk_bytes):
    assert difference(everything(responses(case, chunk_bytes=chunk_bytes)), everything(responses(case))) < 1e-11


@everywhere
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_patches_that_a_small_problem_keeps_give_the_same(case, dtype, tolerance):
    streamed, small = (responses(case, dtype=dtype, small=small) for small in (False, True))
    for _ in range(2):  # made, and made use of
        assert difference(everything(small), everything(streamed)) < tolerance
    assert small.kept["columns"]
    assert difference(everything(small.to(dtype=torch.float64)), everything(streamed)) < 1e-5
    part = small.to(images=images()[2:5])
    assert difference(part.matrix(parameters(small)[0]), streamed.matrix(parameters(small)[0])[2:5]) < tolerance


def test_few_images_of_many_are_no_small_problem():
    assert Responses(images(), PatchEmbedding.fit(images(), PatchSpec(3))).small
    large = responses("grid")
    for few in (large.to(images=images()[:2]), large.to(images=images()[:2], dtype=torch.float32)):
        everything(large.to(dtype=torch.float32))
        assert not few.small
        assert "columns" not in few.kept
    assert not responses("grid", small=True).to(images=images(20)).small


def test_blocks_do_not_matter(monkeypatch):
    whole = everything(responses("grid"))
    monkeypatch.setattr("convcvx.responses.streams.BLOCK_BYTES", 400)
    r = responses("grid")
    assert len(list(r.blocks(parameters(r)[0]))) == 4  # two images at a time
    assert difference(everything(r), whole) < 1e-11


@everywhere
def test_float32_agrees_with_float64(case):
    ours = everything(responses(case, dtype=torch.float32))
    assert difference(ours, everything(responses(case))) < 1e-5
    assert all(part.dtype == torch.float64 for part in ours[1:])


def test_passes_leave_their_arguments_alone():
    r = responses("none")
    arguments = parameters(r)
    copies = [part.clone() for part in arguments]
    filters, weights, intercept, dual_point = arguments
    r.ascent(filters, dual_point, weights)
    r.gradients(filters, weights, intercept, lambda predictions, where: dual_point[where])
    assert all(torch.equal(a, b) for a, b in zip(arguments, copies, strict=True))


def test_images_that_do_not_fit_are_refused():
    embedding = PatchEmbedding.fit(images(), PatchSpec(3))
    for shape in ((0, 2, 6, 5), (2, 6, 5)):
        with pytest.raises(InputError, match=r"images must be a non-empty \(n, C, H, W\) tensor; got shape"):
            Responses(torch.zeros(shape), embedding)
    with pytest.raises(InputError, match="images must have 2 channels as the embedding has; got 1"):
        Responses(torch.zeros(4, 1, 6, 5), embedding)


def far_from_zero(spec: PatchSpec) -> tuple[Responses, float]:
    """Float32 images whose patches differ by a thousandth of what they are; and how far float32 predictions are off."""
    pictures = 0.9 + 0.001 * images().float()
    r = Responses(pictures, PatchEmbedding.fit(pictures, spec), Pooling.of("2"), dtype=torch.float32)
    exact = r.to(dtype=torch.float64)
    filters, weights, intercept, _ = parameters(r)
    return r, difference(r.predict(filters, weights, intercept), exact.predict(filters, weights, intercept))


def test_faint_contrast_outlasts_float32():
    assert far_from_zero(PatchSpec(3, contrast=1e-7))[1] < 1e-5


def test_where_whitening_would_be_lost_in_float32_the_default_is_float64(monkeypatch):
    monkeypatch.setattr("convcvx.responses.streams.PRECISE_SIZE", 0)
    r, error = far_from_zero(PatchSpec(3, whiten=1e-7))
    assert error > 1e-5
    assert Responses(r.images, r.embedding).dtype == torch.float64
    near = PatchEmbedding.fit(images(), PatchSpec(3, whiten=0.1))
    assert Responses(r.images, near).dtype == torch.float32


MEMORY = """
import sys, torch
import convcvx.responses.passes
from convcvx.training.progress import peak_memory_mb
from convcvx.patches import PatchEmbedding, PatchSpec
from convcvx.pooling import Pooling
from convcvx.responses.passes import Responses
torch.set_num_threads(1)
images, chunk_bytes = torch.rand(8000, 1, 28, 28), int(sys.argv[2]) or None
if sys.argv[1] == "unrolled":
    convcvx.responses.streams.Fused.suits = lambda *arguments: False
if chunk_bytes:
    convcvx.responses.streams.SPAN = convcvx.responses.streams.LARGEST_SPAN = 8000
filters, weights = torch.randn(32, 25), torch.randn(32, 4, 10)
embedding = PatchEmbedding.fit(images, PatchSpec(5))  # its chunks are not those of the passes
for n in (500, 8000):
    r = Responses(images[:n], embedding, Pooling.of("2"), dtype=torch.float32, chunk_bytes=chunk_bytes)
    dual_point = torch.randn(n, 10)
    r.gram(filters, dual_point)
    r.ascent(filters, dual_point, weights)
    r.gradients(filters, weights, torch.zeros(10), lambda predictions, where: predictions)
    print(peak_memory_mb())
"""


def growth_of_peak_megabytes(way: str, chunk_bytes: int = 0) -> float:
    """What passes over 8,000 images need beyond those over 500, in one process that has made its allocations."""
    command = [sys.executable, "-c", MEMORY, way, str(chunk_bytes)]
    few, many = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(many) - float(few)


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_patches():
    """8,000 images have 4.6 million patches: 440 MiB of rows, 560 MiB of responses."""
    assert growth_of_peak_megabytes("fused") < 150
    assert growth_of_peak_megabytes("unrolled") < 150
    assert growth_of_peak_megabytes("unrolled", chunk_bytes=1 << 40) > 500  # negative control
