"""Climbs of a local search along gradients, many at once; those that come to the same maximum go on as one.

For a fixed direction V = G(u)/g(u) uphill is the gradient of <V, G(u)>, which is Mᵀ M u within a cell of the
arrangement (a step of length one, without preconditioner, is that of the power iteration). V is one step old, so that a
step costs one pass. Steps are preconditioned (`Metric`) and have momentum. A filter that fell goes back and takes a
shorter step. Most of a climb are its last steps, and most climbs end where another one does: one that has come close
to a higher one, or to a maximum that is known, ends there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convcvx.budget import OutOfTime
from convcvx.oracles.metric import Array, Metric, norms, unit
from convcvx.problem import Problem

JOINED = 0.999
"""Cosine above which two climbs are on the way to the same maximum: the lower one ends where the higher one does. Not
on small problems, whose kinks part maxima that are as close."""
JOINING = 3
"""Steps from one look for such climbs to the next: most come this close in about fifteen of 24."""
IDLE = 3
"""Steps in which no filter rose after which none climbs on."""
LENGTH = 0.25
"""Length of a climb's first step, on the unit sphere."""
LONGER = 1.5
"""Factor of the length after a step that rose."""
SHORTER = 0.25
"""Factor of the length after a step that fell, which is taken back."""
MOMENTUM = 0.9
"""Share of the last rise that is added to the next step: ridges are gone along, not across."""


@dataclass(frozen=True)
class Ends:
    """Where climbs ended: `filters` (q, r), their g `values` (q,), and G / g `towards` (q, P, c)."""

    filters: Tensor
    values: Tensor
    towards: Tensor

    def __len__(self) -> int:
        return len(self.filters)

    def __getitem__(self, chosen: Tensor | slice) -> Ends:
        return Ends(self.filters[chosen], self.values[chosen], self.towards[chosen])

    def __add__(self, others: Ends) -> Ends:
        pairs = zip(vars(self).values(), vars(others).values(), strict=True)
        return Ends(*(torch.cat(pair) for pair in pairs))

    def besides(self, known: Ends | None, metric: Metric, cosine: float) -> Ends:
        """Those that are not as close as `cosine` to each other or to a higher one of those `known`, best first."""
        both, n_known = (self, 0) if known is None else (known + self, len(known))
        order = metric.distinct(both.filters, both.values, len(both), cosine)
        return both[order[order >= n_known]]


@dataclass
class Climbers:
    """Those that still climb, as rows of arrays: in numpy, where a call on small arrays costs a fraction of torch's.

    `best` (q, r) is where each has been highest, at `values` (q,); `gradients` (q, r) and `towards` (q, P, c) are those
    there. `trial` (q, r) is where it looks next; `lengths` (q, 1) are those of steps.
    """

    best: Array
    towards: Array
    values: Array = field(init=False)
    gradients: Array = field(init=False)
    trial: Array = field(init=False)
    lengths: Array = field(init=False)

    def __post_init__(self) -> None:
        self.values, self.gradients = np.zeros(len(self.best)), np.zeros_like(self.best)
        self.trial, self.lengths = self.best, np.full((len(self.best), 1), LENGTH)

    def step(self, problem: Problem, dual_point: Tensor, metric: Metric) -> bool:
        """Look at the trial points, keep what is higher, and go on from there; whether any rose by what counts."""
        ascent = problem.responses.ascent(torch.from_numpy(self.trial), dual_point, torch.from_numpy(self.towards))
        correlations, slope = (part.numpy() for part in ascent)
        values = norms(correlations)
        better = (values >= self.values)[:, None]
        rose = (values > self.values * (1 + 1e-4)).any() or values.max() > self.values.max() * (1 + 1e-7)
        moved = np.where(better, self.trial - self.best, 0.0)
        self.best, self.values = np.where(better, self.trial, self.best), np.maximum(values, self.values)
        self.gradients = np.where(better, slope, self.gradients)
        self.lengths = np.where(better, LONGER, SHORTER) * self.lengths
        self.towards = np.where(better[:, :, None], unit(correlations), self.towards)
        uphill = metric.uphill(self.best, self.gradients)
        self.trial = unit(self.best + self.lengths * uphill + MOMENTUM * moved)
        return bool(rose)

    def keep(self, chosen: npt.NDArray[np.bool_]) -> None:
        """Let the others go."""
        for name, part in vars(self).items():
            setattr(self, name, part[chosen])

    def reached(self) -> tuple[Tensor, Tensor, Tensor]:
        """What `Ends` consist of."""
        return torch.from_numpy(self.best), torch.from_numpy(self.values), torch.from_numpy(self.towards)


def climb(
    problem: Problem,
    dual_point: Tensor,
    filters: Tensor,
    towards: Tensor,
    enough: float,
    least: int,
    n_steps: int,
    known: Ends | None = None,
) -> Ends:
    """Where climbs from `filters` (q, r) end, which set out towards `towards` (q, P, c).

    Each takes `n_steps` at most, or `least` where one of them is above `enough` by then. `known` are ends of climbs
    before these.
    """
    metric, climbers, idle = Metric.of(problem.responses), Climbers(filters.numpy(), unit(towards.numpy())), 0
    starts = Ends(filters, torch.zeros(len(filters), dtype=torch.float64), towards)
    known = starts[:0] if known is None else known
    # All that a climb may end at, and whose end each is: its own, to begin with.
    ends, n_known = known + starts, len(known)
    end_of = np.arange(len(ends))
    climbing, joining = end_of[n_known:], not problem.is_small
    for step in range(n_steps):
        try:
            rose = climbers.step(problem, dual_point, metric)
        except OutOfTime:
            if step == 0:
                raise
            break
        idle = 0 if rose else idle + 1
        if idle == IDLE or (step + 1 >= least and climbers.values.max() > enough):
            break
        if joining and (step + 1) % JOINING == 0:
            places = np.concatenate([known.filters.numpy(), climbers.best])
            heights = np.concatenate([known.values.numpy(), climbers.values])
            leaders = np.concatenate([end_of[:n_known], climbing])[metric.leaders(places, heights, JOINED)[n_known:]]
            end_of[climbing] = leaders
            climbers.keep(leaders == climbing)
            climbing = climbing[leaders == climbing]
            if not len(climbing):
                break
    ends.filters[climbing], ends.values[climbing], ends.towards[climbing] = climbers.reached()
    while (end_of != end_of[end_of]).any():
        end_of = end_of[end_of]
    return ends[torch.from_numpy(end_of[n_known:])]
