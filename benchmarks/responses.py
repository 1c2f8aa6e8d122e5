"""GFLOP/s of the streamed passes against the machine's own GEMM and torch's convolution.

    python benchmarks/responses.py [--threads 2]
    python benchmarks/responses.py --device cuda

Random images of the shapes of MNIST and CIFAR-10, float32. Counted are the multiplications and additions of the
convolution alone, 2·K·h·m an image (twice that where the gradient in the filters is taken too): unrolling,
rectifying and pooling are overhead. The rival is torch's own Conv2d → ReLU → AdaptiveAvgPool2d at its best of three
batch sizes and two memory formats. Competitors alternate in random order; the best of ten rounds counts. Writes
benchmarks/results/responses.md, or responses-cuda.md; on a GPU everything, torch's layers too, is float32 throughout,
without TF32.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from machine import machine
from torch import Tensor

from convcvx.patches import PatchEmbedding, PatchSpec
from convcvx.pooling import Pooling
from convcvx.responses.passes import Responses

CASES = (("MNIST", (1, 28, 28), 5, 4, 64), ("MNIST", (1, 28, 28), 5, 4, 200), ("CIFAR-10", (3, 32, 32), 6, 3, 200))
N = {"cpu": 2048, "cuda": 32768}
BATCHES = {"cpu": (4, 32, 256), "cuda": (256, 1024, 4096)}
SQUARE = {"cpu": 2048, "cuda": 8192}
RESULTS = Path(__file__).parent / "results"


def rates(jobs: dict[str, tuple[float, Callable[[], object]]], rounds: int = 10) -> dict[str, float]:
    """GFLOP/s of each (flops, job), the best of alternating rounds."""
    best = dict.fromkeys(jobs, 0.0)
    order, shuffled = list(jobs), random.Random(0)
    for _ in range(rounds + 1):  # the first warms up
        shuffled.shuffle(order)  # what follows a product on all cores starts on warm, slower ones
        for name in order:
            flops, job = jobs[name]
            began = perf_counter()
            job()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            best[name] = max(best[name], flops / (perf_counter() - began) / 1e9)
    return best


def conv_jobs(images: Tensor, kernel: Tensor, pool: int, flops: float) -> dict[str, tuple[float, Callable]]:
    """torch's own layers, by batch size and memory format."""

    def forward(x: Tensor, weight: Tensor, batch: int) -> None:
        for part in x.split(batch):
            F.adaptive_avg_pool2d(F.conv2d(part, weight).relu_(), pool)

    jobs = {}
    for batch in BATCHES[images.device.type]:
        for name, layout in (("NCHW", torch.contiguous_format), ("channels last", torch.channels_last)):
            x, weight = images.contiguous(memory_format=layout), kernel.contiguous(memory_format=layout)
            jobs[f"conv2d, batch {batch}, {name}"] = flops, lambda x=x, w=weight, b=batch: forward(x, w, b)
    return jobs


def measure(shape: tuple[int, int, int], size: int, pool: int, m: int, device: str) -> dict[str, float]:
    """GFLOP/s of every pass for `m` filters of size x size."""
    generator = torch.Generator().manual_seed(0)
    n, square_size = N[device], SQUARE[device]
    images = torch.rand(n, *shape, generator=generator)
    embedding = PatchEmbedding.fit(images[:64], PatchSpec(size))
    responses = Responses(images, embedding, Pooling.of(pool), dtype=torch.float32, device=device)
    filters = torch.randn(m, responses.dim, generator=generator)
    weights = torch.randn(m, responses.n_cells, 10, generator=generator)
    intercept, dual = torch.zeros(10), torch.randn(n, 10, generator=generator)
    flops = 2.0 * n * responses.n_positions * responses.dim * m
    square = torch.rand(square_size, square_size, generator=generator).to(device)
    jobs: dict[str, tuple[float, Callable]] = {
        "sgemm": (2.0 * square_size**3, lambda: square @ square),
        "predict": (flops, lambda: responses.predict(filters, weights, intercept)),
        "correlate": (flops, lambda: responses.correlate(filters, dual)),
        "ascent": (2 * flops, lambda: responses.ascent(filters, dual, weights)),
        "gradients": (2 * flops, lambda: responses.gradients(filters, weights, intercept, lambda f, where: f)),
    }
    kernel = filters.view(m, shape[0], size, size).to(device)
    found = rates(jobs | conv_jobs(images.to(device), kernel, pool, flops))
    torch_rate = max(rate for name, rate in found.items() if name.startswith("conv2d"))
    return {name: rate for name, rate in found.items() if name in jobs} | {"torch conv2d": torch_rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    device = arguments.device
    torch.backends.cudnn.allow_tf32 = False
    names = ("sgemm", "predict", "correlate", "ascent", "gradients", "torch conv2d")
    lines = [
        "# Streamed responses against GEMM",
        "",
        f"`python benchmarks/responses.py` on {machine(device)}. GFLOP/s, float32; in brackets the share of the sgemm "
        f"rate ({SQUARE[device]} square) of the same run. `torch conv2d` is Conv2d → ReLU → AdaptiveAvgPool2d, "
        "forward, at its best batch size and memory format.",
        "",
        "| images | filters | threads | " + " | ".join(names) + " |",
        "|---" * (len(names) + 3) + "|",
    ]
    for threads in arguments.threads if device == "cpu" else [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        for name, shape, size, pool, m in CASES:
            found = measure(shape, size, pool, m, device)
            cells = [f"{found[key]:.0f} ({found[key] / found['sgemm']:.2f})" for key in names[1:]]
            lines.append(
                f"| {name} {size}x{size}, pool {pool} | {m} | {threads} | {found['sgemm']:.0f} | {' | '.join(cells)} |"
            )
            print(lines[-1], flush=True)
    (RESULTS / ("responses.md" if device == "cpu" else "responses-cuda.md")).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
