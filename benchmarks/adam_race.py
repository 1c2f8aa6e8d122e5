"""Adam and SGD against convcvx on the same network and objective: MNIST, objective against seconds.

    python benchmarks/adam_race.py tune            # learning rates, on 10,000 images
    python benchmarks/adam_race.py run adam        # then sgd, convcvx; one process each, one after the other
    python benchmarks/adam_race.py judge           # objectives in float64; writes results/adam_race.md and .png
    python benchmarks/adam_race.py all --device cuda   # all of it on a GPU; writes results/adam_race-cuda.md and .png

60,000 images, 5x5 filters, 4x4 average pooling, squared loss, beta = 1e-3, no biases. The rivals train Conv2d → ReLU →
AvgPool2d → Linear with torch's own weight decay, which is beta, a cosine schedule and mini-batches of 128, on a GPU by
the fused optimiser; their clock stops while a snapshot is taken. The judge rebuilds the objective of every snapshot in
float64 from weights and images, neurons balanced, with code that neither side uses. Snapshots go to
checkpoints/adam_race.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads that spin would count as work

import torch
from machine import machine
from matplotlib.figure import Figure
from torch import Tensor, nn

from convcvx.budget import Budget
from convcvx.data.datasets import load

BETA, KERNEL, POOL, WIDTH, BATCH = 1e-3, 5, 4, 100, 128
RATES = {"adam": (1e-3, 3e-3, 1e-2, 3e-2), "sgd": (0.01, 0.03, 0.1, 0.3)}
SNAPSHOTS = (2, 5, 10, 20)
COLOURS = {"adam": "tab:orange", "sgd": "tab:green", "convcvx": "black"}
RESULTS = Path(__file__).parent / "results"
FOLDER = Path("checkpoints/adam_race")


class Clock:
    """Wall and CPU seconds since the start, without the pauses."""

    def __init__(self) -> None:
        finish()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        finish()
        return time.perf_counter() - self._wall, time.process_time() - self._cpu

    def pause(self, action: Callable[[], None]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        action()
        self._wall, self._cpu = self._wall + time.perf_counter() - wall, self._cpu + time.process_time() - cpu


def finish() -> None:
    """Wait for what a GPU has still to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def train_rival(name: str, rate: float, images: Tensor, onehot: Tensor, epochs: int, save: Callable) -> None:
    """Train the network for `epochs`; `save(epoch, clock, filters, weights)` after each."""
    torch.manual_seed(0)
    cell = (images.shape[-1] - KERNEL + 1) // POOL
    convolution, classifier = nn.Conv2d(1, WIDTH, KERNEL, bias=False), nn.Linear(POOL**2 * WIDTH, 10, bias=False)
    network = nn.Sequential(convolution, nn.ReLU(), nn.AvgPool2d(cell), nn.Flatten(), classifier).to(images.device)
    options: dict[str, Any] = {"lr": rate, "weight_decay": BETA, "fused": images.device.type == "cuda" or None}
    if name == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(network.parameters(), **options)
    else:
        optimizer = torch.optim.SGD(network.parameters(), momentum=0.9, nesterov=True, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(images) // BATCH))
    clock = Clock()
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(images)).to(images.device).split(BATCH):
            optimizer.zero_grad()
            (0.5 * (network(images[batch]) - onehot[batch]).square().sum(dim=1).mean()).backward()
            optimizer.step()
            schedule.step()
        filters = convolution.weight.detach().cpu().clone().flatten(1)
        weights = classifier.weight.detach().cpu().clone().T.unflatten(0, (WIDTH, POOL**2))
        save(epoch, clock, filters, weights)


def objective(filters: Tensor, weights: Tensor, images: Tensor, onehot: Tensor) -> float:
    """The objective at balanced neurons, in float64: mean ½‖f - y‖² + β Σ_j ‖u_j‖ ‖V_j‖."""
    kernel, total = filters.to(images.device).double().view(-1, 1, KERNEL, KERNEL), 0.0
    matrix = weights.to(images.device).double().flatten(0, 1)
    for x, y in zip(images.split(100), onehot.split(100), strict=True):
        maps = nn.functional.conv2d(x.double(), kernel).relu_()
        outputs = nn.functional.avg_pool2d(maps, maps.shape[-1] // POOL).flatten(1) @ matrix
        total += 0.5 * float((outputs - y.double()).square().sum())
    norms = filters.double().norm(dim=1) * weights.double().flatten(1).norm(dim=1)
    return total / len(images) + BETA * float(norms.sum())


def load_mnist(data_dir: str, device: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
    train, _ = load("mnist", data_dir, limit)
    return train.images.float().to(device), nn.functional.one_hot(train.targets, 10).float().to(device)


def tune(data_dir: str, device: str, n: int = 10_000, epochs: int = 6) -> None:
    """The best rate of each rival by its objective on the first `n` images."""
    images, onehot = load_mnist(data_dir, device, n)
    table: dict[str, dict[str, float]] = {}
    for name, rates in RATES.items():
        table[name] = {}
        for rate in rates:
            last: dict[str, tuple[Tensor, Tensor]] = {}
            train_rival(name, rate, images, onehot, epochs, lambda e, c, u, v, last=last: last.update(end=(u, v)))
            table[name][str(rate)] = objective(*last["end"], images, onehot)
            print(name, rate, table[name][str(rate)], flush=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "rates.json").write_text(json.dumps({"images": n, "epochs": epochs, "objectives": table}))


def run(name: str, data_dir: str, device: str, epochs: int, rate: float | None) -> None:
    """Train one competitor on all images; snapshots and their seconds go to FOLDER."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    images, onehot = load_mnist(data_dir, device)
    trace: list[dict] = []

    def save(step: int, clock: Clock, filters: Tensor, weights: Tensor, **more: float) -> None:
        wall, cpu = clock.read()
        trace.append({"step": step, "seconds": wall, "cpu_seconds": cpu, **more, "parameters": (filters, weights)})
        print(name, {k: v for k, v in trace[-1].items() if k != "parameters"}, flush=True)
        clock.pause(lambda: torch.save(trace, FOLDER / f"{name}.pt"))

    if name == "convcvx":
        run_convcvx(images, onehot, save)
        return
    if rate is None:
        objectives = json.loads((FOLDER / "rates.json").read_text())["objectives"][name]
        rate = float(min(objectives, key=objectives.get))
    train_rival(name, rate, images, onehot, epochs, save)


def run_convcvx(images: Tensor, onehot: Tensor, save: Callable) -> None:
    """From images to the network: every round is a snapshot, the clock runs from before the patches are looked at."""
    from convcvx.patches import PatchSpec
    from convcvx.solution import Solution
    from convcvx.training.plan import build_problem, solve_problem

    clock = Clock()
    spec = PatchSpec((KERNEL, KERNEL))
    problem = build_problem(
        images.cpu(),
        onehot.cpu(),
        BETA,
        spec=spec,
        pooling=POOL,
        intercept=False,
        dtype=torch.float32,
        device=images.device.type,
    )

    def callback(solution: Solution) -> None:
        record = solution.history[-1]
        # What a round on a sample bounds is the optimum of that sample.
        bound = {} if "images" in record else {"lower_bound": record["lower_bound"]}
        save(solution.rounds, clock, solution.filters, solution.weights, **bound)

    solve_problem(problem, Budget(tol=2e-2, max_filters=2 * WIDTH, time_limit=2000), callback=callback)


def judge(data_dir: str, device: str, last_only: bool) -> None:
    """Every snapshot's objective in float64, as a table and a picture."""
    images, onehot = load_mnist(data_dir, device)
    traces: dict[str, list[dict]] = {}
    for name in COLOURS:
        if not (file := FOLDER / f"{name}.pt").exists():
            continue
        trace = [point for point in torch.load(file) if len(point["parameters"][0])]
        if name != "convcvx":
            trace = [point for point in trace if point["step"] in SNAPSHOTS]
        traces[name] = trace[-1:] if last_only else trace
        for number, point in enumerate(traces[name], start=1):
            point["objective"] = objective(*point["parameters"], images, onehot)
            if name == "convcvx":  # its rounds are counted anew on every sample
                point["step"] = number
            print(name, point["step"], f"{point['seconds']:.1f} s", point["objective"], flush=True)
    tuned = json.loads((FOLDER / "rates.json").read_text())
    lines = [
        "# Adam and SGD against convcvx",
        "",
        f"`python benchmarks/adam_race.py` on {machine(device)}; where other work shares the machine, CPU seconds are "
        "the fairer clock. "
        f"MNIST 60,000, 5x5 filters, 4x4 pooling, squared loss, beta {BETA}, no biases; rivals with {WIDTH} filters, "
        f"batches of {BATCH}, "
        f"cosine schedule. Rates tuned on {tuned['images']:,} images for {tuned['epochs']} epochs: "
        + "; ".join(
            f"{name} " + ", ".join(f"{r}: {v:.4f}" for r, v in found.items())
            for name, found in tuned["objectives"].items()
        )
        + ".",
        "",
        "| competitor | epoch or round | seconds | CPU seconds | filters | objective | lower bound (estimate) |",
        "|---" * 7 + "|",
    ]
    for name, trace in traces.items():
        for point in trace:
            bound = f"{point['lower_bound']:.5f}" if "lower_bound" in point else ""
            lines.append(
                f"| {name} | {point['step']} | {point['seconds']:.3g} | {point['cpu_seconds']:.3g} "
                f"| {len(point['parameters'][0])} | {point['objective']:.5f} | {bound} |"
            )
    result = RESULTS / ("adam_race" if device == "cpu" else "adam_race-cuda")
    result.with_suffix(".md").write_text("\n".join(lines) + "\n")
    draw(traces).savefig(result.with_suffix(".png"), dpi=120)
    print("\n".join(lines))


def draw(traces: dict[str, list[dict]]) -> Figure:
    """Objective against seconds, and the last lower bound."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, trace in traces.items():
        points = [(point["seconds"], point["objective"]) for point in trace]
        axes.semilogx(*zip(*points, strict=True), "o-", color=COLOURS[name], ms=3, label=name)
    bounds = [point["lower_bound"] for point in traces.get("convcvx", []) if "lower_bound" in point]
    if bounds:
        axes.axhline(bounds[-1], color="grey", ls="--", label="lower bound (estimate)")
    lowest = min(point["objective"] for trace in traces.values() for point in trace)
    axes.set_ylim(0.97 * lowest, 1.2 * lowest)
    axes.set_xlabel("seconds")
    axes.set_ylabel("objective")
    axes.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("tune", "run", "judge", "all"))
    parser.add_argument("competitor", nargs="?", choices=("adam", "sgd", "convcvx"))
    parser.add_argument("--data-dir", default="../shared/data")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rate", type=float, help="instead of the best of `tune`")
    parser.add_argument("--last", action="store_true", help="judge the last snapshot of each only")
    arguments = parser.parse_args()
    where = arguments.data_dir, arguments.device
    if arguments.action in ("tune", "all"):
        tune(*where)
    for name in (arguments.competitor,) if arguments.action == "run" else ("adam", "sgd", "convcvx"):
        if arguments.action in ("run", "all"):
            run(name, *where, arguments.epochs, arguments.rate)
    if arguments.action in ("judge", "all"):
        judge(*where, arguments.last)


if __name__ == "__main__":
    main()
