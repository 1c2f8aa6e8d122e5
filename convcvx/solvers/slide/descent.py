"""Mini-batch descent on filters and weights, from a convex solution: how networks on large data slide.

Adam with a cosine schedule, in the whitened coordinates of `Coordinates`, over all networks or over symmetric ones,
on the images as they are or moved at random. Its products may run in few bits: what it gains is measured by the exact
weights that follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from convcvx.budget import NEVER
from convcvx.data.augment import random_moves
from convcvx.machine.watch import tell
from convcvx.problem import Problem
from convcvx.responses.mirror import MirrorPairs
from convcvx.responses.passes import Responses
from convcvx.solution import Solution
from convcvx.solvers.slide.coordinates import Coordinates, batch_gradients

BATCH = 128
"""Images a step."""
WARM_UP = 300
"""Steps of a long descent until they are of full length: from an optimum, where gradients are all noise, Adam's first
steps would go far astray."""
STILL = 20
"""First steps of no length at all: they give Adam its averages."""
ASTRAY = 5.0
"""A descent is astray once its objective over `STILL` steps is so many times that of the first ones. It begins anew
with a third of its rates: many filters that all but interpolate bear less than few do."""
SLOWEST = 1 / 27
"""Share of the rates below which it goes on as it may."""
LARGE_PATCH = 64
"""Entries of a patch from which on its products, not what is done to them, take the time: fewer bits gain nothing
below."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam keeps of a coordinate's slopes."""
State = dict[str, Tensor]
"""Where a descent is, between two epochs."""


def descend(
    problem: Problem,
    solution: Solution,
    seed: int,
    epochs: float,
    *,
    images: Tensor | None = None,
    pairs: MirrorPairs | None = None,
    crops: int = 0,
    batch: int = BATCH,
    shared: bool = False,
    filter_rate: float = 0.1,
    weight_rate: float = 0.03,
    state: State | None = None,
    after_epoch: Callable[[State, str], None] = lambda state, text: None,
) -> Solution:
    """Descend from `solution`; the objective is not guaranteed to fall. At the deadline it ends where it is.

    Parameters
    ----------
    problem : Problem
    solution : Solution
        The start; with `pairs` a symmetric network.
    seed : int
        Of the order of the images, and of their moves.
    epochs : float
    images : Tensor, optional
        Indices of the images to train on; all by default.
    pairs : MirrorPairs, optional
        Descend among symmetric networks.
    crops : int
        Each image is moved by up to so many pixels, up or down and left or right, anew whenever it is seen.
    batch : int
    shared : bool
        Let the processes that share the images share each mini-batch too: sums are then right to rounding, and the
        order of the images goes by the number of processes. Else one process descends, as it would alone.
    filter_rate, weight_rate : float
        Relative to the root mean square of each group of coordinates; less of them if the descent goes astray.
    state : State, optional
        Go on from there: what `after_epoch` was given by the same descent.
    after_epoch : callable
        Called with the state, and with a line that says how the epoch went.
    """
    random = torch.Generator().manual_seed(seed)
    if not shared and problem.responses.n_processes > 1:
        problem = replace(problem, responses=problem.responses.to(images=problem.responses.images))
    deadline, problem = problem.deadline, problem.until(NEVER)  # a sample or a mini-batch takes no time
    coordinates = Coordinates(problem, solution, random, pairs)
    images = torch.arange(problem.n) if images is None else images
    batch = min(batch, len(images))
    seen = problem.shares.sample(images)  # the objective is the mean over these
    problem = replace(problem, shares=replace(problem.shares, total=seen.total * problem.n / len(images)))
    epoch = math.ceil(len(images) / batch)
    steps = max(1, math.ceil(epochs * epoch))
    warm_up = min(WARM_UP, math.ceil(0.3 * steps))
    still = min(STILL, warm_up // 3)
    owners = problem.responses.owners[images]
    descent = _Descent(coordinates.start, (filter_rate, weight_rate, weight_rate), owners, random)
    if state is not None:
        descent.load(state)
    problem = replace(problem, responses=problem.responses.to(patch_dtype=_fast_dtype(problem.responses)))
    while (step := len(descent.values)) < steps and not deadline.passed:
        tell("steps of the descent", step, steps)
        chosen = images[descent.draw(batch)]
        moves = random_moves(len(chosen), crops, random) if crops else chosen.new_zeros(len(chosen), 2)
        value, slopes = batch_gradients(problem, coordinates.network(descent.parts), chosen, crops, moves)
        warmth = min(1.0, max(0.0, (step + 1 - still) / (warm_up - still)))
        descent.step(value, coordinates.pullback(*slopes), warmth * 0.5 * (1 + math.cos(math.pi * step / steps)))
        if descent.astray(still):
            descent.begin_anew()
        elif (step + 1) % epoch == 0:
            mean = sum(descent.values[-epoch:]) / epoch
            slower = "" if descent.share == 1 else f", rates times {descent.share:.2g}"
            text = f"epoch {(step + 1) // epoch} of {epochs:g}: objective {mean:.5g} on its way{slower}"
            after_epoch(descent.save(), text)
    return solution.with_parameters(*(part.double().cpu() for part in coordinates.network(descent.parts)))


class _Descent:
    """A descent under way.

    Attributes
    ----------
    parts : list of Tensor
        Where it is, in the coordinates.
    values : list of float
        Objective of each step so far.
    share : float
        Of its rates that it goes at.
    """

    def __init__(self, start: list[Tensor], rates: tuple[float, ...], owners: Tensor, random: torch.Generator) -> None:
        self._start, self._random, self.share = start, random, 1.0
        self._rates = [rate * float(part.square().mean().sqrt()) for rate, part in zip(rates, start, strict=True)]
        self._owners = owners
        self._order = self._shuffled()
        self._begin()

    def _begin(self) -> None:
        self.values: list[float] = []
        self.parts = [part.clone() for part in self._start]
        self._adam = torch.optim.Adam([{"params": [part]} for part in self.parts])

    def begin_anew(self) -> None:
        """From the start, at a third of the rates."""
        self.share /= 3
        self._begin()

    def astray(self, still: int) -> bool:
        """Whether the objective has left where it was in the first `still` steps, and slower ones may help."""
        if not 0 < still < len(self.values) or self.share <= SLOWEST:
            return False
        return not sum(self.values[-still:]) <= ASTRAY * sum(self.values[:still])

    def draw(self, batch: int) -> Tensor:
        """The next images: every one of them before any comes again, and of each process as many as its share."""
        if len(self._order) < batch:
            self._order = torch.cat([self._order, self._shuffled()])
        chosen, self._order = self._order[:batch], self._order[batch:]
        return chosen

    def _shuffled(self) -> Tensor:
        order = torch.randperm(len(self._owners), generator=self._random)
        place = torch.empty(len(order), dtype=torch.float64)
        for owner in self._owners.unique():
            own = self._owners[order] == owner
            count = int(own.sum())
            place[own] = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        return order[place.argsort(stable=True)]

    def step(self, value: float, slopes: list[Tensor], length: float) -> None:
        """Go down the `slopes` of the objective, which is `value` here, at `length` times the rates."""
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = self.share * length * rate
        for part, slope in zip(self.parts, slopes, strict=True):
            part.grad = slope
        self._adam.step()
        self.values.append(value)

    def save(self) -> State:
        """Everything that `load` needs."""
        parts = {f"part-{k}": part for k, part in enumerate(self.parts)}
        moments = {f"{name}-{k}": self._adam.state[part][name] for k, part in enumerate(self.parts) for name in MOMENTS}
        numbers = {"values": self.values, "share": self.share}
        exact = {name: torch.tensor(number, dtype=torch.float64) for name, number in numbers.items()}
        return parts | moments | exact | {"order": self._order, "random": self._random.get_state()}

    def load(self, state: State) -> None:
        """Be where the descent was that saved `state`."""
        self.values, self.share, self._order = state["values"].tolist(), float(state["share"]), state["order"]
        self._random.set_state(state["random"])
        for k, part in enumerate(self.parts):
            part.copy_(state[f"part-{k}"])
            moments = {name: state[f"{name}-{k}"].clone().to(part.device) for name in MOMENTS}
            self._adam.state[part] = moments | {"step": torch.tensor(float(len(self.values)))}


def _fast_dtype(responses: Responses) -> torch.dtype:
    """bfloat16 where a CPU has matrix units for it, and the problem large patches in no more than float32."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    large = responses.embedding.basis.shape[1] >= LARGE_PATCH
    fast = responses.device.type == "cpu" and responses.dtype == torch.float32 and capabilities.get("amx_bf16", False)
    return torch.bfloat16 if fast and large else responses.dtype
