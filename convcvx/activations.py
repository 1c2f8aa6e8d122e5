"""Activations: what a hidden neuron makes of its response t.

    σ(t) = t for t >= 0, slope · t for t < 0,      -1 <= slope <= 1 :    σ(t) = t₊ - slope · (-t)₊

ReLU (slope 0), leaky ReLU, the absolute value (-1) and no activation at all (1). Each is positively homogeneous of
degree 1 and 1-Lipschitz, so that duality, the scaling of neurons, weight decay and certificates are those of the ReLU.

The square, σ(t) = t², has degree 2. In place of a kernel k, what everything else knows is the *filter* u = ‖k‖ k, in
which the response is of degree 1 as well:

    (x·k)² = (x·u)²/‖u‖,      (β/2) (‖u‖² + ‖V‖²) = (β/2) (‖k‖⁴ + ‖V‖²),  at balance β ‖k‖² ‖V‖,

the penalty under which two-layer networks of squares are a convex program: plain weight decay on k and V is none.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convcvx.errors import InputError, shown
from convcvx.terms.numbers import read_number

LEAKY = "leaky-relu"
"""What stands before the slope of a leaky ReLU, and a colon."""
USUAL_SLOPE = 0.01
"""Slope of a leaky ReLU of which none is given, as in torch."""
FAINTEST = 1e-30
"""Length of a filter that its root is divided by at least: float32 holds it, and the square of what it is divided
into."""
FAINTEST_ROOT = 1e-300
"""Norm of a balanced filter that weights are divided by at least: those of a neuron that is zero stay zero."""


class Abs(nn.Module):
    """The absolute value, as torch has no module of it."""

    def forward(self, responses: Tensor) -> Tensor:
        return responses.abs()


class Square(nn.Module):
    """The square, as torch has no module of it."""

    def forward(self, responses: Tensor) -> Tensor:
        return responses.square()


@dataclass(frozen=True)
class Activation:
    """What a hidden neuron makes of its response.

    Attributes
    ----------
    slope : float
        Of the negative side, from -1 to 1: σ(-t) = -slope · σ(t) for t >= 0.
    degree : {1, 2}
        By the how-manieth power responses grow with the kernel; 2 is the square, whose slope is -1.
    """

    slope: float = 0.0
    degree: int = 1

    def __post_init__(self) -> None:
        if not abs(self.slope) <= 1:
            raise InputError(f"the slope of an activation must lie between -1 and 1; got {self.slope!r}")
        if self.degree != 1 and (self.slope, self.degree) != (-1, 2):
            raise InputError(f"an activation of degree 2 must be quadratic, of slope -1; got {self}")

    @classmethod
    def of(cls, value: Any) -> Activation:
        """Read what users write: None or "relu", "leaky-relu", "leaky-relu:0.1", "abs", "linear" or
        "quadratic".

        >>> Activation.of("leaky-relu:0.1").slope, str(Activation.of("ABS"))
        (0.1, 'abs')
        """
        if isinstance(value, cls):
            return value
        if value is None:
            return RELU
        text = str(value).strip().lower()
        if text in NAMED:
            return NAMED[text]
        if match := re.fullmatch(f"{LEAKY}(?::(.+))?", text):
            slope = USUAL_SLOPE if match[1] is None else _slope(match[1])
            if 0 < slope < 1:
                return cls(slope)
        kinds = f"{', '.join(NAMED)} or {LEAKY}:SLOPE with a slope between 0 and 1, such as {LEAKY}:0.1"
        raise InputError(f"activation must be {kinds}; got {shown(value)}")

    def __str__(self) -> str:
        for name, activation in NAMED.items():
            if activation == self:
                return name
        return f"{LEAKY}:{self.slope!r}" if self.degree == 1 else f"degree {self.degree}, slope {self.slope!r}"

    @property
    def odd_part(self) -> float:
        """By how much σ(t), of degree 1, has t in it: σ(t) = odd_part · t + even_part · |t|."""
        return 0.5 * (1 + self.slope)

    @property
    def even_part(self) -> float:
        """By how much σ(t) has |t| in it."""
        return 0.5 * (1 - self.slope)

    def slopes_(self, responses: Tensor, out: Tensor) -> Tensor:
        """σ'(t) of responses t, 1 at a kink, written into `out`; σ(t) is t times this over the degree."""
        if self.degree == 2:
            return torch.mul(responses, 2.0, out=out)
        return out.fill_(1.0).masked_fill_(responses < 0, self.slope)

    def filters(self, kernels: Tensor) -> Tensor:
        """Filters (m, r), in which responses are of degree 1, of kernels (m, r); those themselves at degree 1."""
        return kernels if self.degree == 1 else kernels * kernels.norm(dim=1, keepdim=True)

    def kernels(self, filters: Tensor) -> Tensor:
        """Kernels (m, r) of filters (m, r): the other way round."""
        return filters if self.degree == 1 else filters / _roots(filters)

    def pulled_back(self, slopes: Tensor, filters: Tensor) -> Tensor:
        """Slopes (m, r) in the kernels to those in their `filters` (m, r), by the derivative of `kernels`."""
        if self.degree == 1:
            return slopes
        directions = filters / filters.norm(dim=1, keepdim=True).clamp_min(FAINTEST)
        along = (slopes * directions).sum(dim=1, keepdim=True)
        return (slopes - 0.5 * along * directions) / _roots(filters)

    def module(self) -> nn.Module:
        """The torch module that does the same; it may write into what it is given."""
        if self == RELU:
            return nn.ReLU(inplace=True)
        if self == LINEAR:
            return nn.Identity()
        if self == QUADRATIC:
            return Square()
        return Abs() if self == ABSOLUTE else nn.LeakyReLU(self.slope, inplace=True)

    @classmethod
    def of_module(cls, module: nn.Module) -> Activation | None:
        """What a torch module stands for; None for one that is no activation of these.

        Raises
        ------
        InputError
            For a LeakyReLU whose slope is none of an `Activation`.
        """
        if isinstance(module, nn.ReLU):
            return RELU
        if isinstance(module, Abs):
            return ABSOLUTE
        if isinstance(module, Square):
            return QUADRATIC
        if isinstance(module, nn.LeakyReLU):
            slope = float(module.negative_slope)
            if -1 < slope < 0:
                raise InputError(f"the slope of a LeakyReLU must not be negative; got {slope!r}")
            return cls(slope)
        return None


def _roots(filters: Tensor) -> Tensor:
    """(m, 1) ‖u‖^½, and next to nothing of a filter that is zero."""
    return filters.norm(dim=1, keepdim=True).clamp_min(FAINTEST).sqrt()


def unit_neurons(filters: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The same network with filters (m, r) of norm 1, whose norms its weights (m, P, c) take; without dead neurons."""
    norms = filters.norm(dim=1)
    weights = weights * norms[:, None, None]
    alive = weights.flatten(1).norm(dim=1) > 0
    return filters[alive] / norms[alive, None], weights[alive]


def balanced_neurons(filters: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The same network, of unit filters (m, r) and weights (m, P, c), with ‖u_j‖ = ‖V_j‖.

    Then torch's weight decay is the convex penalty.
    """
    scale = weights.flatten(1).norm(dim=1).sqrt()
    return filters * scale[:, None], weights / scale.clamp_min(FAINTEST_ROOT)[:, None, None]


def _slope(text: str) -> float:
    """What `text` says; NaN, which is none, for what is no number."""
    try:
        return read_number(text)
    except ValueError:
        return math.nan


RELU = Activation()
ABSOLUTE = Activation(-1.0)
LINEAR = Activation(1.0)
QUADRATIC = Activation(-1.0, 2)
NAMED = {"relu": RELU, "abs": ABSOLUTE, "linear": LINEAR, "quadratic": QUADRATIC}
"""Those that take no number."""
