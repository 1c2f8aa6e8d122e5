"""The kernels in registers against patches, products and pooling one after the other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from llvmlite import binding
from torch import Tensor

from convcvx.errors import InputError
from convcvx.patches import PatchEmbedding, PatchSpec
from convcvx.pooling import Pooling
from convcvx.responses.fused import Fused
from convcvx.responses.passes import Responses
from convcvx.responses.unrolled import Unrolled

SHAPE = (2, 11, 16)
POOLS = (
    "global",
    "2",
    "4x3",
    "1x5",
    "window:3,2",
    "window:2",
    "window:4x7,2x3",
    "2x16",
    "max:2",
    "max:4x3",
    "max:window:3,2",
)
pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))
specs = st.builds(
    PatchSpec,
    kernel_size=pairs,
    stride=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    hidden_bias=st.booleans(),
    contrast=st.sampled_from([None, None, 1e-2, 1e-6]),
    dilation=st.sampled_from([(1, 1), (1, 1), (2, 3)]),
).filter(lambda spec: spec.contrast is None or spec.dilation == (1, 1))


def everything(way: type, spec: PatchSpec, pool: str, m: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Responses alone, and with their adjoint."""
    random = torch.Generator().manual_seed(seed)
    device = () if way is Fused else (torch.device("cpu"),)
    convolution = way(spec, Pooling.of(pool), SHAPE, dtype, *device)
    images = 3 + torch.randn(3, *SHAPE, generator=random, dtype=torch.float64)
    kernels = torch.randn(m, SHAPE[0] * spec.kernel_size[0] * spec.kernel_size[1] + spec.constant, generator=random)
    responses = convolution(images.to(dtype), kernels.to(dtype)).clone()
    again, pull_back = convolution.vjp(images.to(dtype), kernels.to(dtype))
    slopes = torch.randn(again.shape, generator=random, dtype=torch.float64).to(dtype)
    return [responses, again.clone(), pull_back(slopes)]


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    assert [part.shape for part in ours] == [part.shape for part in theirs]
    return max(
        float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-3))
        for a, b in zip(ours, theirs, strict=True)
    )


@settings(max_examples=100, deadline=None)
@given(specs, st.sampled_from(POOLS), st.integers(1, 40), st.integers(0, 9))
def test_both_ways_agree(spec, pool, m, seed):
    try:
        theirs = everything(Unrolled, spec, pool, m, torch.float64, seed)
    except InputError:  # the pool is larger than the map
        assume(False)
    # A variance taken as a difference is off by some 1e-16, which a contrast constant of 1e-6 damps no further.
    allowed = 1e-9 if spec.contrast else 1e-10
    assert difference(everything(Fused, spec, pool, m, torch.float64, seed), theirs) < allowed


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("m", [1, 32, 33, 100])
def test_float32_responses_agree_to_its_precision(pool, m):
    spec = PatchSpec((3, 2), padding=(3, 1), hidden_bias=True)
    ours, theirs = everything(Fused, spec, pool, m, torch.float32), everything(Unrolled, spec, pool, m, torch.float64)
    assert difference(ours[:2], theirs[:2]) < 1e-5
    assert difference(ours[2:], theirs[2:]) < 1e-2  # a response may be rectified in one of them alone


def test_negative_control_another_kernel_is_seen():
    spec = PatchSpec(3)
    ours, theirs = (everything(Fused, spec, "2", 5, torch.float64, seed) for seed in (0, 1))
    assert difference(ours, theirs) > 0.1


def test_a_gradient_may_be_taken_after_the_next_pass():
    spec, random = PatchSpec(3), torch.Generator().manual_seed(0)
    fused = Fused(spec, Pooling.of("2"), SHAPE, torch.float64)
    images, kernels = torch.rand(3, *SHAPE, generator=random).double(), torch.randn(4, 18, generator=random).double()
    pooled, pull_back = fused.vjp(images, kernels)
    slopes = torch.ones_like(pooled)
    before = pull_back(slopes)
    fused.vjp(images.flip(0), -kernels)
    assert torch.equal(pull_back(slopes), before)
    assert torch.equal(slopes, torch.ones_like(pooled))


@pytest.mark.parametrize(
    ("spec", "pool", "dtype", "suits"),
    [
        (PatchSpec(3), "2", torch.float32, True),
        (PatchSpec(3, dilation=2), "2", torch.float32, True),
        (PatchSpec(3, dilation=2, contrast=0.1), "2", torch.float32, False),
        (PatchSpec(3), "2", torch.bfloat16, False),
        (PatchSpec(3), "none", torch.float32, False),
        (PatchSpec(3), "window:3,1", torch.float32, False),  # every position is in nine windows
        (PatchSpec((9, 9)), "2", torch.float32, True),  # 162 entries
        (PatchSpec((11, 12)), "global", torch.float32, False),  # 264 entries
    ],
)
def test_it_is_chosen_where_it_is_faster(spec, pool, dtype, suits):
    assert Fused.suits(spec, Pooling.of(pool), SHAPE, dtype) == suits


NARROW = """
import torch
from convcvx.responses._fused_kernels import lanes
from convcvx.patches import PatchEmbedding, PatchSpec
from test_fused import Fused, Unrolled, difference, everything
assert lanes(4) == 8 and lanes(8) == 4
spec = PatchSpec((3, 2), padding=(1, 1), hidden_bias=True, contrast=0.1)
for dtype, tol in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
    ours = everything(Fused, spec, "4x3", 19, dtype)
    assert difference(ours[:2], everything(Unrolled, spec, "4x3", 19, torch.float64)[:2]) < tol
    assert difference(ours[2:], everything(Unrolled, spec, "4x3", 19, torch.float64)[2:]) < max(tol, 1e-11) * 1000
"""


@pytest.mark.slow
def test_vectors_of_256_bits(tmp_path):
    """What a processor without AVX-512 runs, in a process of its own."""
    features = "+avx2,+fma" if binding.get_host_cpu_features().get("avx2") else "-avx512f"
    numba = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    environment = os.environ | numba | {"PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", NARROW], check=True, env=environment)


@pytest.mark.skipif(np.finfo(np.longdouble).eps >= np.finfo(float).eps, reason="no numbers longer than float64 here")
@pytest.mark.parametrize("brightest", [1.0, 19.0])
def test_contrast_in_float64_is_off_by_no_more_than_proofs_allow(brightest):
    """On flat and bright patches, where variance is a difference of large numbers."""
    random = torch.Generator().manual_seed(4)
    images = brightest * (1 - 1e-3 * torch.rand(6, 3, 9, 9, generator=random, dtype=torch.float64))
    images[3:] -= brightest * torch.rand(3, 3, 9, 9, generator=random, dtype=torch.float64)
    spec = PatchSpec((4, 4), contrast=0.01)
    embedding = PatchEmbedding(spec, 3, torch.eye(48, dtype=torch.float64), 48, 1.0)
    responses = Responses(images, embedding, Pooling.of("window:1"), dtype=torch.float64, small=False)
    assert isinstance(responses.convolution, Fused)
    filters = torch.nn.functional.normalize(torch.randn(5, 48, generator=random, dtype=torch.float64))
    (_, computed) = next(responses.blocks(filters))

    patches = PatchSpec((4, 4)).rows(images).numpy().astype(np.longdouble)
    centred = patches - patches.mean(axis=2, keepdims=True)
    exact = centred / np.sqrt((centred**2).mean(axis=2, keepdims=True) + np.longdouble(spec.contrast))
    exact = np.maximum(exact @ filters.numpy().astype(np.longdouble).T, 0)
    off = float(np.abs(computed.transpose(1, 2).numpy() - exact).max())
    one = responses.contrast_error() / responses.n_positions  # of one position, of all of whose weight it speaks
    assert 0 < off <= one
