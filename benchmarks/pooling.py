"""Maximum against average pooling at equal filters: accuracy and CPU time.

    python benchmarks/pooling.py [--data-dir ../shared/data] [--filters 256] [--sizes mnist=10000,cifar10=5000]
        [--to pooling.md]

Networks over a dictionary of filters, weights optimal, β chosen on a tenth of the training images (`tune`). Which cells
to pool over is chosen, for averages and for maxima, on another fifth of the training images, which no fit has seen;
with these cells a network is trained on all of them and scored once on the test images. CPU seconds are those of the
process, of a whole fit and of a pass over the images with its gradient in the filters; average and maximum alternate.
Writes benchmarks/results/pooling.md, or what `--to` names there.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from statistics import median
from time import process_time
from typing import Any

import torch
from by_size import write_page

import convcvx
from convcvx.data.datasets import Dataset, load
from convcvx.patches import PatchEmbedding, PatchSpec
from convcvx.pooling import Pooling
from convcvx.responses import Responses

COMMON: dict[str, Any] = {"dictionary_source": "kmeans", "tune": 0.1, "max_rounds": 0, "tol": 1.0}
MODELS: dict[str, dict[str, Any]] = {
    "mnist": {**COMMON, "kernel_size": 5, "whiten": 0.3},
    "cifar10": {**COMMON, "kernel_size": 5, "contrast": 1e-2, "whiten": 0.1, "hidden_bias": True, "threshold": 0.25},
}
CELLS = ("global", "2", "3", "4")
HELD = 5
"""One in so many training images is held out to choose the cells by."""
PASS_IMAGES = 1000
"""Images of a timed pass."""
PASS_FILTERS = 64
PASS_ROUNDS = 9
"""Timed passes, of which the median counts."""


def accuracy(network: torch.nn.Module, data: Dataset) -> float:
    with torch.no_grad():
        scores = torch.cat([network(part) for part in data.images[:].float().split(500)])
    return float((scores.argmax(dim=1) == data.targets).double().mean())


def fitted(train: tuple[torch.Tensor, torch.Tensor], name: str, pool: str, m: int) -> tuple[torch.nn.Module, float]:
    """The network, and the CPU seconds it took."""
    began = process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", convcvx.errors.ConvergenceWarning)
        fit = convcvx.fit(*train, pool=pool, dictionary=m, **MODELS[name])
    return fit.network, process_time() - began


def pass_seconds(data: Dataset, name: str) -> dict[str, float]:
    """CPU seconds of a pass with its gradient, by pooling; the two of a shape by turns."""
    images = data.images[:PASS_IMAGES].float()
    spec = PatchSpec(MODELS[name]["kernel_size"])
    embedding = PatchEmbedding.fit(images, spec)
    made = {
        pool: Responses(images, embedding, Pooling.of(pool), dtype=torch.float32)
        for cells in CELLS
        for pool in (cells, f"max:{cells}")
    }
    filters = torch.randn(PASS_FILTERS, embedding.dim, generator=torch.Generator().manual_seed(0)).double()
    point = torch.randn(len(images), 10, generator=torch.Generator().manual_seed(1)).double()
    seconds: dict[str, list[float]] = {pool: [] for pool in made}
    for turn in range(PASS_ROUNDS + 1):
        for pool, responses in made.items():
            directions = torch.ones(PASS_FILTERS, responses.n_cells, 10).double()
            began = process_time()
            responses.ascent(filters, point, directions)
            if turn:  # the first compiles
                seconds[pool].append(process_time() - began)
    return {pool: median(times) for pool, times in seconds.items()}


def compare(name: str, size: int, m: int, folder: str) -> list[str]:
    train, test = load(name, folder, limit=size)
    images, targets = train.images[:].float(), train.targets
    held = torch.arange(len(images)) % HELD == 0
    rest, unseen = (images[~held], targets[~held]), replace(train, images=images[held], targets=targets[held])
    passes = pass_seconds(train, name)
    lines = [
        f"## {name}, {len(images):,} training images, {m} filters",
        "",
        "| pool | held-out accuracy | fit, CPU s | pass with gradient, CPU ms |",
        "|---|---|---|---|",
    ]
    best: dict[bool, tuple[float, str]] = {}
    for cells in CELLS:
        for pool in (cells, f"max:{cells}"):
            network, seconds = fitted(rest, name, pool, m)
            score = accuracy(network, unseen)
            lines.append(f"| `{pool}` | {score:.2%} | {seconds:.0f} | {1e3 * passes[pool]:.0f} |")
            print(lines[-1], flush=True)
            kind = pool.startswith("max:")
            best[kind] = max(best.get(kind, (0.0, "")), (score, pool))
    lines += ["", "| chosen on held-out images | test accuracy |", "|---|---|"]
    for _, pool in best.values():
        network, _ = fitted((images, targets), name, pool, m)
        lines.append(f"| `{pool}` | {accuracy(network, test):.2%} of {len(test.targets):,} |")
        print(lines[-1], flush=True)
    return [*lines, ""]


NOTES = (
    "Filters are centres of patches, weights optimal, β chosen on a tenth of the training images. A fifth of the",
    "training images, seen by no fit, chooses the cells; the test images are looked at once, with these.",
    "A pass: 1,000 images, 64 filters, on raw patches, in float32; average and maximum by turns.",
)

if __name__ == "__main__":
    write_page(
        __doc__,
        "pooling",
        "Maximum against average pooling at equal filters",
        compare,
        sizes="mnist=10000,cifar10=5000",
        filters=256,
        notes=NOTES,
    )
