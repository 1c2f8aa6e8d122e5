"""The second moment of patches, a pass before every training: by products of pixels and of patches, in turns.

    python benchmarks/moments.py [--repeats 5]

Random images of the sizes of MNIST and CIFAR-10, 2,000 of them. `auto` is the way that is taken. CPU seconds, medians.
Writes benchmarks/results/moments.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from time import process_time

import torch
from machine import machine

from convcvx.patches import PatchSpec, moments, provisional_mean, shifted_moment
from convcvx.patches.pixel_moments import suits

RESULT = Path(__file__).parent / "results" / "moments.md"
IMAGES = 2000
SHAPES = [
    (1, 28, PatchSpec(3)),
    (1, 28, PatchSpec(5)),
    (1, 28, PatchSpec(6)),
    (1, 28, PatchSpec(7, stride=2, padding=1)),
    (1, 28, PatchSpec(14)),
    (3, 32, PatchSpec(3)),
    (3, 32, PatchSpec(5)),
    (3, 32, PatchSpec(6)),
    (3, 32, PatchSpec(4, stride=3)),
]
"""Channels, pixels on a side, patches."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    lines = [
        "# Second moments of patches",
        "",
        f"`python benchmarks/moments.py` on {machine()}: {IMAGES:,} images, CPU seconds, medians of {repeats}.",
        "",
        "| images | patches | by pixels | by patches | patches / pixels | auto |",
        "|---|---|---|---|---|---|",
    ]
    for channels, side, spec in SHAPES:
        images = torch.rand(IMAGES, channels, side, side, generator=torch.Generator().manual_seed(0))
        about, taken = provisional_mean(images, spec), suits(spec, images)
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(repeats):
            for by_pixels, spent in seconds.items():
                moments.suits = lambda *_, way=by_pixels: way
                began = process_time()
                shifted_moment(images, spec, about)
                spent.append(process_time() - began)
        pixels, patches = median(seconds[True]), median(seconds[False])
        way = "pixels" if taken else "patches"
        lines.append(
            f"| {channels}x{side}x{side} | {spec} | {pixels:.3f} | {patches:.3f} | {patches / pixels:.2f} | {way} |"
        )
        print(lines[-1], flush=True)
    RESULT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
