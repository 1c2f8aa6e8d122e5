"""Best intercepts. That of the cross-entropy: min over b of Σ_i s_i ℓ(f_i + b, y_i), convex and smooth, from any start.

Newton's method is quick near the optimum and lost where all probabilities are 0 or 1, where the curvature vanishes in
floating point. There the step of iterative scaling, b_k += log(mean y_k / mean p_k), falls all the same (Darroch and
Ratcliff 1972), however small the p_k, as it is taken in logarithms. Where logits lie hundreds apart even these steps
are too short: then the problem is solved at a temperature T first, with T ℓ((f + b)/T, y) in place of ℓ, whose optimum
is within T log c of the next one's; T halves until it is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from convcvx.losses.shares import Shares

MAX_STEPS = 60
"""Newton steps at one temperature."""
STATIONARY = 1e-9
"""Slope, in probability, below which no lower temperature is needed."""
SPREAD = 8.0
"""Logits up to so far from each other, in units of the temperature, leave Newton's method enough curvature."""
FALL = 1e-15
"""A step that lowers the loss by no more than this share of it has met rounding."""
NEAR = 0.1
"""Logits that move by no more than this keep their curvature, about: so short a step falls, or has met rounding."""
SHORTEST = 1e-3
"""Share of a step to which it is shortened in any case."""
OFF = 100.0
"""How far below all others the logits of a class without targets go: it weighs exp(-100), nothing in float64."""


class _Loss(Protocol):
    def value(self, predictions: Tensor, targets: Tensor) -> Tensor: ...


def best_shift(
    loss: _Loss, predictions: Tensor, targets: Tensor, shares: Shares, start: Tensor | None = None
) -> Tensor:
    """The (c,) shift b of `predictions` (n, c) with the least mean loss, which is never above that at `start` (c,).

    A class that no target has any of gets a shift that makes it vanish: the infimum is at minus infinity.
    """
    start = predictions.new_zeros(predictions.shape[1]) if start is None else start.to(predictions)
    present = shares.mean(targets) > 0
    shift = start.clone()
    shift[present] = _anneal(loss, predictions[:, present], targets[:, present], shares, start[present])
    if not bool(present.all()):
        top = (predictions + shift)[:, present].amax(dim=1, keepdim=True)
        shift[~present] = (top - predictions[:, ~present]).amin(dim=0) - OFF
    shift = shift - shift.mean()  # before the comparison, as it rounds
    values = [shares.mean(loss.value(predictions + b, targets)) for b in (shift, start)]
    return shift if values[0] <= values[1] else start


def _anneal(loss: _Loss, predictions: Tensor, targets: Tensor, shares: Shares, shift: Tensor) -> Tensor:
    """Newton's method at temperature 1, and at falling ones where that does not arrive."""
    direct, slope = _newton(loss, predictions, targets, shares, shift)
    if slope <= STATIONARY:
        return direct
    logits = predictions + direct
    temperature = max(1.0, float(logits.amax() - logits.amin()) / SPREAD)
    shift = direct
    while temperature > 1:
        shift = _newton(loss, predictions / temperature, targets, shares, shift / temperature)[0] * temperature
        temperature /= 2
    annealed, _ = _newton(loss, predictions, targets, shares, shift)
    values = [float(shares.mean(loss.value(predictions + b, targets))) for b in (direct, annealed)]
    return annealed if values[1] <= values[0] else direct


def _newton(loss: _Loss, predictions: Tensor, targets: Tensor, shares: Shares, shift: Tensor) -> tuple[Tensor, float]:
    """The shift where steps of Newton or of iterative scaling no longer lower the loss, and the slope that is left."""
    frequencies = shares.mean(targets)
    value = shares.mean(loss.value(predictions + shift, targets))
    slope = torch.inf
    for _ in range(MAX_STEPS):
        logs = torch.log_softmax(predictions + shift, dim=1)
        probabilities = logs.exp()
        mean = shares.mean(probabilities)
        gradient = mean - frequencies
        slope = float(gradient.abs().max())
        hessian = torch.diag(mean) - shares.weighed(probabilities).T @ probabilities / shares.total
        newton = -torch.linalg.lstsq(hessian, gradient, driver="gelsd").solution  # singular along 1
        if slope <= STATIONARY and not -float(gradient @ newton) > FALL * float(value):
            return shift, slope
        trial, lowest = _along(loss, predictions, targets, shares, shift, newton, value)
        if trial is None or slope > 0.1:  # far out: either step may be the better one
            log_sums = torch.logsumexp(logs + shares.counts.log()[:, None], dim=0)
            scaling = frequencies.log() - (log_sums - torch.tensor(shares.total).log())
            other, least = _along(loss, predictions, targets, shares, shift, scaling, lowest)
            trial, lowest = (other, least) if other is not None else (trial, lowest)
        if trial is None or not value - lowest > FALL * value:
            return (shift if trial is None else trial), slope
        shift, value = trial, lowest
    return shift, slope


def _along(
    loss: _Loss, predictions: Tensor, targets: Tensor, shares: Shares, shift: Tensor, step: Tensor, value: Tensor
) -> tuple[Tensor | None, Tensor]:
    """The first of shift + step, + step/4, ... with a mean loss below `value`, doubled while that falls; its loss.

    A logit that decides for an image of next to no weight bends the loss by next to nothing, and Newton's step in it is
    thousands of times too long, or 1e200 times: one that would carry logits past each other, and `OFF` beyond, is cut
    to that.
    """
    longest = float(step.abs().max())
    if not 0 < longest < math.inf:
        return None, value
    size = 1.0
    if longest > OFF:
        logits = predictions + shift
        size = min(1.0, (2 * float(logits.amax() - logits.amin()) + OFF) / longest)
    while True:
        trial = shift + size * step
        reached = shares.mean(loss.value(predictions + trial, targets))
        if reached < value:
            break
        if size * longest <= NEAR and size <= SHORTEST:
            return None, value
        size /= 4
    while size >= 1:
        further = shift + 2 * size * step
        beyond = shares.mean(loss.value(predictions + further, targets))
        if not beyond < reached:
            break
        trial, reached, size = further, beyond, 2 * size
    return trial, reached


def best_shifts(slopes: Callable[[Tensor], tuple[Tensor, Tensor]], low: Tensor, high: Tensor, start: Tensor) -> Tensor:
    """(c,): for each output the shift in [low, high] at which a mean loss of its own is least, by Newton's method.

    `slopes` gives first and second derivatives (c,) at shifts (c,), the first not above 0 at `low` nor below at `high`.
    Steps that leave what is known to hold the least, or gain little, give way to its middle.
    """
    shift = torch.minimum(torch.maximum(start, low), high)
    for _ in range(MAX_STEPS):
        slope, curvature = slopes(shift)
        low, high = torch.where(slope < 0, shift, low), torch.where(slope > 0, shift, high)
        step = shift - slope / curvature.clamp_min(1e-300)
        inside = (step > low) & (step < high)
        new = torch.where(inside, step, 0.5 * (low + high))
        if bool(((new == shift) | (slope == 0)).all()):
            break
        shift = torch.where(slope == 0, shift, new)
    return shift
