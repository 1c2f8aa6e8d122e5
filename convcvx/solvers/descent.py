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

from convcvx.mirror import MirrorPairs
from convcvx.problem import Problem
from convcvx.responses import Responses
from convcvx.shifts import randomly_moved
from convcvx.solution import Solution
from convcvx.solvers.coordinates import Coordinates, balanced_gradients

BATCH = 128
"""Images a step."""
WARM_UP, STILL = 300, 20
"""Steps until they are of full length, and first ones of no length, of a long descent: from an optimum, where gradients
are all noise, Adam's first ones would go far astray."""
ASTRAY = 5.0
"""A descent is astray once its objective over `STILL` steps is so many times that of the first ones. It begins anew
with a third of its rates: many filters that all but interpolate bear less than few do."""
SLOWEST = 1 / 27
"""Share of the rates below which it goes on as it may."""
LARGE_PATCH = 64
"""Entries of a patch from which on its products, not what is done to them, take the time: fewer bits gain nothing
below."""
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
    patch_dtype: torch.dtype | None = None,
    batch: int = BATCH,
    filter_rate: float = 0.1,
    weight_rate: float = 0.03,
    state: State | None = None,
    after_epoch: Callable[[State, str], None] = lambda state, text: None,
) -> Solution:
    """Descend from `solution`; the objective is not guaranteed to fall.

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
    patch_dtype : torch.dtype, optional
        Of the products with patches; by default bfloat16 where a float32 problem with large patches meets a CPU that
        multiplies it in hardware. Steps are taken in the arithmetic of the problem.
    batch : int
    filter_rate, weight_rate : float
        Relative to the root mean square of each group of coordinates; less of them if the descent goes astray.
    state : State, optional
        Go on from there: what `after_epoch` was given by the same descent.
    after_epoch : callable
        Called with the state, and with a line that says how the epoch went.
    """
    random = torch.Generator().manual_seed(seed)
    coordinates = Coordinates(problem, solution, random, pairs)
    scales = [float(part.square().mean().sqrt()) for part in coordinates.start]
    rates = [filter_rate * scales[0], weight_rate * scales[1], weight_rate * scales[2]]
    images = torch.arange(problem.n) if images is None else images
    batch = min(batch, len(images))
    epoch = math.ceil(len(images) / batch)
    steps, step = max(1, math.ceil(epochs * epoch)), 0
    warm_up = min(WARM_UP, math.ceil(0.3 * steps))
    still = min(STILL, warm_up // 3)
    order = torch.randperm(len(images), generator=random)
    parts, optimizer = _begin(coordinates)
    share = 1.0
    values: list[float] = []
    if state is not None:
        share, values, order = _load(state, parts, optimizer, random)
        step = len(values)
    problem = replace(
        problem, responses=problem.responses.to(patch_dtype=patch_dtype or _fast_dtype(problem.responses))
    )
    while step < steps:
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(len(images), generator=random)])
        chosen, order = images[order[:batch]], order[batch:]
        value, slopes = balanced_gradients(_moved(problem.sample(chosen), crops, random), coordinates.network(parts))
        warmth = min(1.0, max(0.0, (step + 1 - still) / (warm_up - still)))
        length = share * warmth * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = length * rate
        for part, slope in zip(parts, coordinates.pullback(*slopes), strict=True):
            part.grad = slope
        optimizer.step()
        values.append(value)
        step = len(values)
        if _astray(values, still) and share > SLOWEST:
            share, values, step = share / 3, [], 0
            parts, optimizer = _begin(coordinates)
        elif step % epoch == 0:
            text = f"epoch {step // epoch} of {epochs:g}: objective {sum(values[-epoch:]) / epoch:.5g} on its way"
            text += "" if share == 1 else f", rates times {share:.2g}"
            after_epoch(_save(share, values, order, parts, optimizer, random), text)
    return solution.with_parameters(*(part.double().cpu() for part in coordinates.network(parts)))


def _begin(coordinates: Coordinates) -> tuple[list[Tensor], torch.optim.Optimizer]:
    parts = [part.clone() for part in coordinates.start]
    return parts, torch.optim.Adam([{"params": [part]} for part in parts])


def _astray(values: list[float], still: int) -> bool:
    """Whether the objective, of each step so far, has left where it was in the first ones."""
    return 0 < still < len(values) and not sum(values[-still:]) <= ASTRAY * sum(values[:still])


def _moved(problem: Problem, pixels: int, random: torch.Generator) -> Problem:
    """The problem on its images, each moved at random."""
    if not pixels:
        return problem
    images = randomly_moved(problem.responses.images[:], pixels, random)
    return replace(problem, responses=problem.responses.to(images=images))


def _fast_dtype(responses: Responses) -> torch.dtype:
    """bfloat16 where a CPU has matrix units for it, and the problem large patches in no more than float32."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    large = responses.embedding.basis.shape[1] >= LARGE_PATCH
    fast = responses.device.type == "cpu" and responses.dtype == torch.float32 and capabilities.get("amx_bf16", False)
    return torch.bfloat16 if fast and large else responses.dtype


def _save(
    share: float,
    values: list[float],
    order: Tensor,
    parts: list[Tensor],
    optimizer: torch.optim.Optimizer,
    random: torch.Generator,
) -> State:
    moments = {
        f"{name}-{k}": optimizer.state[part][name] for k, part in enumerate(parts) for name in ("exp_avg", "exp_avg_sq")
    }
    places = {f"part-{k}": part for k, part in enumerate(parts)}
    numbers = {"share": torch.tensor(share, dtype=torch.float64), "values": torch.tensor(values, dtype=torch.float64)}
    return places | moments | numbers | {"order": order, "random": random.get_state()}


def _load(
    state: State, parts: list[Tensor], optimizer: torch.optim.Optimizer, random: torch.Generator
) -> tuple[float, list[float], Tensor]:
    """Put everything where it was; returns the share of the rates, the objectives, and the order of images to come."""
    values = state["values"].tolist()
    for k, part in enumerate(parts):
        part.copy_(state[f"part-{k}"])
        moments = {name: state[f"{name}-{k}"].clone().to(part.device) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[part] = moments | {"step": torch.tensor(float(len(values)))}
    random.set_state(state["random"])
    return float(state["share"]), values, state["order"]
