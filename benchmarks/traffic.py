"""Bytes that processes send each other, counted against what `MODEL` says; and what that means for ImageNet.

    python benchmarks/traffic.py

Runs the parts of a training with a dictionary in 2 and in 4 processes, on random images, and counts. Time on many GPUs
is on paper only: rates and bandwidths are options. Writes benchmarks/results/traffic.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from convcvx.patches import PatchEmbedding, PatchSpec
from convcvx.problem import Problem
from convcvx.responses.team import Team
from convcvx.solvers.dictionary.features import Features
from convcvx.solvers.dictionary.filters import KMEANS_STEPS, PATCHES_PER_FILTER, dictionary
from convcvx.solvers.dictionary.path import fit_dictionary, held_out
from convcvx.solvers.dictionary.products import gather
from convcvx.solvers.master.blocks import striped
from convcvx.solvers.master.gram import STRIPE
from convcvx.solvers.slide.coordinates import batch_gradients
from convcvx.training.plan import build_problem

RESULT = Path(__file__).parent / "results" / "traffic.md"
SINGLE, DOUBLE = 4, 8
"""Bytes of a number."""
HELD = 0.1
"""Share of the images held out: their features go to no other process before they join the others."""


@dataclass(frozen=True)
class Size:
    """A training: n images with K positions of h entries each, m filters of P cells, c outputs, in p processes."""

    p: int
    n: int
    positions: int
    patch: int
    filters: int
    cells: int
    outputs: int
    batch: int = 128

    @property
    def features(self) -> int:
        """D."""
        return self.filters * self.cells

    @property
    def height(self) -> int:
        """Rows of a stripe of the Gram matrix."""
        return striped(self.features, self.p, STRIPE["cpu"])[0].own.stop

    @property
    def away(self) -> float:
        """The share of the images that process 0 has not."""
        return (self.p - 1) / self.p

    @property
    def network(self) -> int:
        """Numbers of a network: filters and weights."""
        return self.filters * self.patch + self.features * self.outputs


MODEL: dict[str, Callable[[Size], float]] = {
    "k-means": lambda s: (
        KMEANS_STEPS
        * (
            s.away * PATCHES_PER_FILTER * s.filters * (s.patch * SINGLE + DOUBLE)  # points there, their centres back
            + (s.p - 1) * s.filters * s.patch * SINGLE
        )
    ),
    "Gram matrix": lambda s: (
        (s.p - 1) * s.n * s.features * SINGLE  # features of all images, to all
        + (s.p - 1) * (s.filters * s.patch + s.features * (1 + 2 * (2 + s.outputs))) * DOUBLE  # filters, shift, sums
        + s.away * s.n * ((s.outputs + 1) * DOUBLE + 1)  # targets, counts, who is held out
    ),
    "factor": lambda s: (s.p - 1) * (s.features * (s.features + s.height) / 2 * SINGLE + s.features * DOUBLE),
    "product with the matrix": lambda s: 2 * (s.p - 1) * s.features * s.outputs * SINGLE,
    "solution by the factor": lambda s: 3 * (s.p - 1) * s.features * s.outputs * SINGLE,
    "step of a slide": lambda s: (
        (s.p - 1) * s.network * (SINGLE + DOUBLE) + s.away * s.batch * (s.outputs + 3) * DOUBLE
    ),
    "predictions": lambda s: (
        (s.p - 1) * s.filters * (s.patch + s.cells * s.outputs) * DOUBLE + s.away * s.n * s.outputs * DOUBLE
    ),
}
"""Bytes from process to process, all together, but for headers of a few hundred bytes a pass."""


def flops(s: Size) -> dict[str, float]:
    """Products and sums of all processes together."""
    return {
        "features": 2.0 * s.n * s.positions * s.patch * s.filters,
        "Gram matrix": 1.0 * s.n * s.features**2,
        "step of a slide": 6.0 * s.batch * s.positions * s.patch * s.filters,
        "factor": s.features**3 / 3,
    }


def measured(p: int) -> dict[str, tuple[int, float]]:
    """Bytes of each part in `p` processes, counted, and by the model."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(p), __file__, "--count"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def read(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def count() -> None:
    """Go through the parts, and print the bytes of each: what each process does that torchrun starts."""
    n, m, c = 8192, 1092, 10  # as many points for k-means as make 4 parts
    with Team.of_torchrun() as team:
        data = read(n)
        team.share_out(data, read, n)
        embedding = PatchEmbedding.fit(data, PatchSpec((5, 5)))
        targets = torch.arange(n) % c
        problem = build_problem(data, targets, 1e-3, embedding=embedding, pooling=2, responses=team.responses)
        responses = problem.responses.to(dtype=torch.float32)
        problem = Problem(responses, problem.targets, problem.shares, problem.beta, problem.loss)
        size = Size(team.size, n, responses.n_positions, responses.dim, m, responses.n_cells, c)
        found: dict[str, tuple[int, float]] = {}
        before = team.traffic

        def note(name: str) -> None:
            nonlocal before
            found[name] = team.traffic - before, MODEL[name](size)
            before = team.traffic

        filters = dictionary(responses, m, source="kmeans")
        note("k-means")
        features = Features([responses], [filters], flips=False)
        products = gather(problem, features, held_out(n, HELD))
        note("Gram matrix")
        products.factorise(torch.ones(features.size))
        note("factor")
        matrix = torch.ones(features.size, c)
        products.times(matrix)
        note("product with the matrix")
        products.unfactor(matrix)
        note("solution by the factor")
        del products
        fit = fit_dictionary(problem, filters, tune=HELD)
        before = team.traffic
        network = filters.float(), fit.weights[0].float(), fit.intercept.float()
        chosen = torch.randperm(n)[: size.batch]
        batch_gradients(problem, network, chosen, 0, torch.zeros(size.batch, 2, dtype=torch.int64))
        note("step of a slide")
        responses.predict(filters, fit.weights[0], fit.intercept)
        note("predictions")
        print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", action="store_true", help="what each process does; torchrun starts it")
    parser.add_argument("--flops", type=float, default=3e13, help="a GPU's rate in these passes, a second")
    parser.add_argument("--bandwidth", type=float, default=2e10, help="bytes a second between machines")
    arguments = parser.parse_args()
    if arguments.count:
        count()
        return
    lines = [
        "# Bytes from process to process",
        "",
        "`python benchmarks/traffic.py`: counted in 2 and 4 processes on random images (8,192 of 3x12x12,",
        "1,092 filters of 5x5, 4 cells, 10 classes), and by the model.",
        "",
        "| part | processes | counted, bytes | model, bytes | counted / model |",
        "|---|---|---|---|---|",
    ]
    for p in (2, 4):
        for name, (bytes_, model) in measured(p).items():
            lines.append(f"| {name} | {p} | {bytes_:,} | {model:,.0f} | {bytes_ / model:.3f} |")
            print(lines[-1], flush=True)
    lines += [
        "",
        "On paper: ImageNet, 1,281,167 images of 224x224, 6x6 patches with stride 2 (12,100 positions), 6,000 filters "
        f"of 2x2 cells, 1,000 classes; {arguments.flops:.0e} operations a second a GPU, {arguments.bandwidth:.0e} bytes"
        " a second between any two. Mini-batches of 1,024.",
        "",
        "| GPUs | features, s | Gram matrix, s | features to all, s | Gram matrix and factor of a GPU, GB | factor, s "
        "| its messages, s | step of a slide, ms | its messages, ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for p in (8, 64, 512):
        s = Size(p, 1_281_167, 110**2, 108, 6000, 4, 1000, batch=1024)
        work, rate, width = flops(s), arguments.flops, arguments.bandwidth
        lines.append(
            f"| {p} | {work['features'] / p / rate:,.0f} | {work['Gram matrix'] / p / rate:,.1f} | "
            f"{s.n * s.features * SINGLE / width:.1f} | {s.features**2 * SINGLE / p / 1e9:.3f} | "
            f"{work['factor'] / p / rate:,.3f} | {s.features**2 / 2 * SINGLE / width:.2f} | "
            f"{1e3 * work['step of a slide'] / p / rate:.1f} | "
            f"{1e3 * 2 * s.network * (SINGLE + DOUBLE) / width:.1f} |"
        )
        print(lines[-1], flush=True)
    RESULT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
