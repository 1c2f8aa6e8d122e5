"""The two ways from images to pooled responses, one against the other: `Fused` and `Unrolled`, on one core.

    python benchmarks/convolutions.py [--instructions avx2] [--rounds R]

Random images. A pass is the pooled responses and the gradient in the kernels; the ways and a matrix product as large as
both alternate, the best of ten rounds of CPU time counts. From this table come `LARGEST` and `DEAREST` of
convcvx/responses/fused.py. Writes benchmarks/results/convolutions.md, or convolutions-avx2.md: there
neither side has AVX-512 or AMX.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from time import process_time

import torch
from llvmlite import binding
from machine import machine

from convcvx.patches import PatchSpec
from convcvx.pooling import Pooling
from convcvx.responses.fused import Fused
from convcvx.responses.streams import CHUNK_BYTES, LARGEST_SPAN
from convcvx.responses.unrolled import Unrolled

CASES = (
    ((1, 28, 28), PatchSpec(5), "4", 20),
    ((1, 28, 28), PatchSpec(5), "4", 64),
    ((1, 28, 28), PatchSpec(5), "4", 200),
    ((1, 28, 28), PatchSpec(5), "global", 64),
    ((1, 28, 28), PatchSpec(5), "8", 64),
    ((1, 28, 28), PatchSpec(5), "window:3,2", 64),
    ((1, 28, 28), PatchSpec(5), "window:3,1", 64),
    ((3, 32, 32), PatchSpec(5, contrast=1e-2), "3", 600),
    ((3, 32, 32), PatchSpec(6), "3", 200),
    ((1, 28, 28), PatchSpec(12, padding=4), "4", 472),
    ((1, 28, 28), PatchSpec(14, padding=5), "4", 500),
    ((1, 28, 28), PatchSpec(14, padding=5), "global", 500),
    ((16, 14, 14), PatchSpec(5, padding=2), "4", 256),
    ((16, 14, 14), PatchSpec(5, padding=2), "2", 256),
    ((64, 14, 14), PatchSpec(5, padding=2), "4", 256),
)
GEMM_ROWS = 4096
"""Rows of the matrix product beside the passes: patches of a few images, more than a cache holds."""
RESULT = Path(__file__).parent / "results" / "convolutions.md"


def seconds(
    shape: tuple[int, int, int], spec: PatchSpec, pool: str, m: int, dtype: torch.dtype, rounds: int
) -> tuple[float, float, float]:
    """CPU seconds of a pass, an image, fused and unrolled; and of a matrix product, a multiplication."""
    random = torch.Generator().manual_seed(0)
    problem = spec, Pooling.of(pool), shape, dtype
    ways = Fused(*problem), Unrolled(*problem, torch.device("cpu"))
    size = shape[0] * spec.kernel_size[0] * spec.kernel_size[1]
    kernels = torch.randn(m, size, generator=random, dtype=dtype)
    rows, product = torch.randn(GEMM_ROWS, size, dtype=dtype), torch.empty(GEMM_ROWS, m, dtype=dtype)
    best = [float("inf")] * 3
    for _ in range(rounds + 1):  # the first compiles
        for k, way in enumerate(ways):
            n = min(LARGEST_SPAN, max(1, CHUNK_BYTES["cpu"] // way.bytes_per_image(m)))  # as `Responses` does
            images = torch.rand(n, *shape, generator=random, dtype=dtype)
            began = process_time()
            pooled, pull_back = way.vjp(images, kernels)
            pull_back(torch.ones_like(pooled))
            best[k] = min(best[k], (process_time() - began) / n)
        began = process_time()
        torch.mm(rows, kernels.T, out=product)
        best[2] = min(best[2], (process_time() - began) / (GEMM_ROWS * size * m))
    return best[0], best[1], best[2]


def without_avx512() -> None:
    """Start this script anew with what numba and torch then read from the environment."""
    left = [
        ("+" if there and not name.startswith(("avx512", "amx")) else "-") + name
        for name, there in binding.get_host_cpu_features().items()
    ]
    told = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ",".join(left), "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    os.environ.update(told, ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2")
    os.execv(sys.executable, [sys.executable, *sys.argv])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instructions", choices=("all", "avx2"), default="all")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    if arguments.instructions == "avx2" and os.environ.get("NUMBA_CPU_NAME") != "haswell":
        without_avx512()
    torch.set_num_threads(1)
    flags = "" if arguments.instructions == "all" else f" --instructions {arguments.instructions}"
    lines = [
        f"`python benchmarks/convolutions.py{flags}` on {machine()}. One core; GFLOP/s of the convolution and its "
        "adjoint, unrolling, rectifying and pooling being overhead, and of a matrix product of patches and kernels.",
        "",
        "| images | patches | entries | pool | filters | arithmetic | fused | unrolled | product | chosen | share |",
        "|---" * 11 + "|",
    ]
    for shape, spec, pool, m in CASES:
        for dtype in (torch.float32, torch.float64):
            fused, unrolled, product = seconds(shape, spec, pool, m, dtype, arguments.rounds)
            size = shape[0] * spec.kernel_size[0] * spec.kernel_size[1]
            height, width = spec.output_size(*shape[1:])
            flops, peak = 4e-9 * height * width * size * m, 2e-9 / product
            name = str(dtype).removeprefix("torch.")
            chosen = "fused" if Fused.suits(spec, Pooling.of(pool), shape, dtype) else "unrolled"
            reached = flops / (fused if chosen == "fused" else unrolled)
            lines.append(
                f"| {'x'.join(map(str, shape))} | {spec.kernel_size[0]}x{spec.kernel_size[1]}"
                f"{', contrast' if spec.contrast else ''} | {size} | {pool} | {m} | {name} "
                f"| {flops / fused:.0f} | {flops / unrolled:.0f} | {peak:.0f} | {chosen} | {reached / peak:.2f} |"
            )
            print(lines[-1], flush=True)
    result = RESULT.with_stem(RESULT.stem + flags.replace(" --instructions ", "-"))
    result.write_text("# In registers or by matrix products\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
