"""The network of the races as its rivals train it, and a judge that no side uses: MNIST, objective against seconds.

Conv2d → ReLU → AvgPool2d → Linear without biases, 5x5 filters, 4x4 cells, squared loss, torch's own weight decay, which
is beta, mini-batches and a cosine schedule. `race` finds the best plans of a rival by successive halving: every batch
and rate for the shortest schedule, the best third of them for twice as long, and so on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from convcvx.data.datasets import load

BETA, KERNEL, POOL, WIDTH = 1e-3, 5, 4, 100
RATES = {"adam": (1e-3, 3e-3, 1e-2, 3e-2), "sgd": (0.01, 0.03, 0.1, 0.3)}
BATCHES = (16, 32, 64, 128, 256, 512)
KEPT = 3
"""One plan in so many goes on to a schedule twice as long."""

Save = Callable[[int, "Clock", Tensor, Tensor], None]
"""Told after each epoch: its number, the clock, filters (m, 25) and weights (m, 16, 10)."""


@dataclass(frozen=True)
class Plan:
    """How a rival trains."""

    optimizer: str
    rate: float
    batch: int
    epochs: int
    compiled: bool = False

    def __str__(self) -> str:
        how = ", compiled" if self.compiled else ""
        return f"{self.optimizer}, rate {self.rate:g}, batches of {self.batch}, {self.epochs} epochs{how}"


@dataclass(frozen=True)
class Trained:
    """What a plan came to, on a clock of CPU seconds of one thread (seconds on a GPU)."""

    plan: Plan
    seconds: float
    objective: float


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


def load_mnist(data_dir: str, device: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 28, 28) and one-hot classes (n, 10)."""
    train, _ = load("mnist", data_dir, limit)
    return train.images.float().to(device), nn.functional.one_hot(train.targets, 10).float().to(device)


def train(plan: Plan, images: Tensor, onehot: Tensor, save: Save) -> None:
    """Train the network as `plan` says. Compiling is done before the clock starts: it is paid once a machine."""
    torch.manual_seed(0)
    cell = (images.shape[-1] - KERNEL + 1) // POOL
    convolution, classifier = nn.Conv2d(1, WIDTH, KERNEL, bias=False), nn.Linear(POOL**2 * WIDTH, 10, bias=False)
    network = nn.Sequential(convolution, nn.ReLU(), nn.AvgPool2d(cell), nn.Flatten(), classifier).to(images.device)
    options: dict[str, Any] = {"lr": plan.rate, "weight_decay": BETA, "fused": images.device.type == "cuda" or None}
    if plan.optimizer == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(network.parameters(), **options)
    else:
        optimizer = torch.optim.SGD(network.parameters(), momentum=0.9, nesterov=True, **options)
    model = network
    if plan.compiled:
        model = torch.compile(network)
        for size in {plan.batch, len(images) % plan.batch} - {0}:
            model(images[:size]).sum().backward()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan.epochs * -(-len(images) // plan.batch))
    clock = Clock()
    for epoch in range(1, plan.epochs + 1):
        for batch in torch.randperm(len(images)).to(images.device).split(plan.batch):
            optimizer.zero_grad()
            (0.5 * (model(images[batch]) - onehot[batch]).square().sum(dim=1).mean()).backward()
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


def run(plan: Plan, images: Tensor, onehot: Tensor) -> Trained:
    """Train by `plan`; only the end counts: a cosine schedule is at its best there."""
    ends: list[tuple[float, Tensor, Tensor]] = []

    def save(epoch: int, clock: Clock, filters: Tensor, weights: Tensor) -> None:
        if epoch == plan.epochs:
            wall, cpu = clock.read()
            ends.append((wall if images.device.type == "cuda" else cpu, filters, weights))

    train(plan, images, onehot, save)
    ((seconds, filters, weights),) = ends
    found = objective(filters, weights, images, onehot)
    # A rate that diverged must not win by a comparison with NaN.
    return Trained(plan, seconds, found if found == found else float("inf"))


def race(
    optimizer: str, images: Tensor, onehot: Tensor, epochs: Sequence[int], batches: Sequence[int] = BATCHES
) -> Iterator[Trained]:
    """Successive halving over batches and rates: all for `epochs[0]`, the best of these for `epochs[1]`, and so on.

    The last schedule's best plan is trained once more by `torch.compile`.
    """
    plans = [Plan(optimizer, rate, batch, epochs[0]) for batch in batches for rate in RATES[optimizer]]
    for last, length in enumerate(epochs, start=1):
        done = []
        for plan in plans:
            done.append(run(replace(plan, epochs=length), images, onehot))
            yield done[-1]
        done.sort(key=lambda trained: trained.objective)
        plans = [trained.plan for trained in done[: -(-len(done) // KEPT)]]
        if last == len(epochs):
            yield run(replace(plans[0], compiled=True), images, onehot)


def steady(trained: Sequence[Trained]) -> list[Trained]:
    """The same, each at the least seconds an epoch of all that share optimiser and batch, compiled or not.

    On a shared machine the same epoch takes up to twice as long, in CPU seconds as well; this favours the rivals.
    """
    pace: dict[tuple[str, int, bool], float] = {}
    for one in trained:
        kind, seconds = _kind(one.plan), one.seconds / one.plan.epochs
        pace[kind] = min(seconds, pace.get(kind, seconds))
    return [replace(one, seconds=one.plan.epochs * pace[_kind(one.plan)]) for one in trained]


def _kind(plan: Plan) -> tuple[str, int, bool]:
    return plan.optimizer, plan.batch, plan.compiled


def frontier(trained: Sequence[Trained]) -> list[Trained]:
    """Those that no other beats in both time and objective, by time."""
    best: list[Trained] = []
    for one in sorted(trained, key=lambda one: (one.seconds, one.objective)):
        if not best or one.objective < best[-1].objective:
            best.append(one)
    return best
