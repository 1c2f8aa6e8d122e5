"""The two ways from images to pooled responses, one against the other: `Fused` and `Unrolled`, on one core.

    python benchmarks/convolutions.py

Random images, float32. A pass is the pooled responses and the gradient in the kernels; the ways alternate, the best of
ten rounds counts. From this table come `LARGEST` and `WASTE` of convcvx/responses/fused.py. Writes
benchmarks/results/convolutions.md.
"""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

import torch
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
    ((1, 28, 28), PatchSpec(14, padding=5), "4", 500),
    ((16, 14, 14), PatchSpec(5, padding=2), "4", 256),
    ((64, 14, 14), PatchSpec(5, padding=2), "4", 256),
)
RESULT = Path(__file__).parent / "results" / "convolutions.md"


def seconds(shape: tuple[int, int, int], spec: PatchSpec, pool: str, m: int, rounds: int = 10) -> list[float]:
    """Of a pass, an image, fused and unrolled."""
    random = torch.Generator().manual_seed(0)
    problem = spec, Pooling.of(pool), shape, torch.float32
    ways = Fused(*problem), Unrolled(*problem, torch.device("cpu"))
    kernels = torch.randn(m, shape[0] * spec.kernel_size[0] * spec.kernel_size[1], generator=random)
    best = [float("inf")] * len(ways)
    for _ in range(rounds + 1):  # the first compiles
        for k, way in enumerate(ways):
            n = min(LARGEST_SPAN, max(1, CHUNK_BYTES["cpu"] // way.bytes_per_image(m)))  # as `Responses` does
            images = torch.rand(n, *shape, generator=random)
            began = perf_counter()
            pooled, pull_back = way.vjp(images, kernels)
            pull_back(torch.ones_like(pooled))
            best[k] = min(best[k], (perf_counter() - began) / n)
    return best


def main() -> None:
    torch.set_num_threads(1)
    lines = [
        "# In registers or by matrix products",
        "",
        f"`python benchmarks/convolutions.py` on {machine()}. One core; GFLOP/s of the convolution and its adjoint, "
        "unrolling, rectifying and pooling being overhead.",
        "",
        "| images | patches | entries | pool | filters | fused | unrolled | ratio | chosen |",
        "|---" * 9 + "|",
    ]
    for shape, spec, pool, m in CASES:
        fused, unrolled = seconds(shape, spec, pool, m)
        size = shape[0] * spec.kernel_size[0] * spec.kernel_size[1]
        height, width = spec.output_size(*shape[1:])
        flops = 4e-9 * height * width * size * m
        chosen = "fused" if Fused.suits(spec, Pooling.of(pool), shape, torch.float32) else "unrolled"
        lines.append(
            f"| {'x'.join(map(str, shape))} | {spec.kernel_size[0]}x{spec.kernel_size[1]}"
            f"{', contrast' if spec.contrast else ''} | {size} | {pool} | {m} | {flops / fused:.0f} | "
            f"{flops / unrolled:.0f} | {unrolled / fused:.2f} | {chosen} |"
        )
        print(lines[-1], flush=True)
    RESULT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
