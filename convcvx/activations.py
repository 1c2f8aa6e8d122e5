"""Activations: what a hidden neuron makes of its response t.

    σ(t) = t for t >= 0, slope · t for t < 0,      -1 <= slope <= 1 :    σ(t) = t₊ - slope · (-t)₊

ReLU (slope 0), leaky ReLU, the absolute value (-1) and no activation at all (1). Each is positively homogeneous of
degree 1 and 1-Lipschitz, so that duality, the scaling of neurons, weight decay and certificates are those of the ReLU.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from convcvx.errors import InputError, shown

LEAKY = "leaky-relu"
"""What stands before the slope of a leaky ReLU, and a colon."""
USUAL_SLOPE = 0.01
"""Slope of a leaky ReLU of which none is given, as in torch."""


class Abs(nn.Module):
    """The absolute value, as torch has no module of it."""

    def forward(self, responses: Tensor) -> Tensor:
        return responses.abs()


@dataclass(frozen=True)
class Activation:
    """What a hidden neuron makes of its response.

    Attributes
    ----------
    slope : float
        Of the negative side, from -1 to 1.
    """

    slope: float = 0.0

    def __post_init__(self) -> None:
        if not abs(self.slope) <= 1:
            raise InputError(f"the slope of an activation must lie between -1 and 1; got {self.slope!r}")

    @classmethod
    def of(cls, value: Any) -> Activation:
        """Read what users write: None or "relu", "leaky-relu", "leaky-relu:0.1", "abs" or "linear".

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
            slope = USUAL_SLOPE if match[1] is None else _number(match[1])
            if 0 < slope < 1:
                return cls(slope)
        kinds = f"{', '.join(NAMED)} or {LEAKY}:SLOPE with a slope between 0 and 1, such as {LEAKY}:0.1"
        raise InputError(f"activation must be {kinds}; got {shown(value)}")

    def __str__(self) -> str:
        for name, activation in NAMED.items():
            if activation == self:
                return name
        return f"{LEAKY}:{self.slope!r}"

    @property
    def odd_part(self) -> float:
        """By how much σ(t) has t in it: σ(t) = odd_part · t + even_part · |t|."""
        return 0.5 * (1 + self.slope)

    @property
    def even_part(self) -> float:
        """By how much σ(t) has |t| in it."""
        return 0.5 * (1 - self.slope)

    def slopes_(self, responses: Tensor, out: Tensor) -> Tensor:
        """σ'(t), and 1 at 0, of responses t, written into `out`; σ(t) is t times this."""
        return out.fill_(1.0).masked_fill_(responses < 0, self.slope)

    def module(self) -> nn.Module:
        """The torch module that does the same; it may write into what it is given."""
        if self == RELU:
            return nn.ReLU(inplace=True)
        if self == LINEAR:
            return nn.Identity()
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
        if isinstance(module, nn.LeakyReLU):
            slope = float(module.negative_slope)
            if -1 < slope < 0:
                raise InputError(f"the slope of a LeakyReLU must not be negative; got {slope!r}")
            return cls(slope)
        return None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


RELU = Activation()
ABSOLUTE = Activation(-1.0)
LINEAR = Activation(1.0)
NAMED = {"relu": RELU, "abs": ABSOLUTE, "linear": LINEAR}
"""Those that take no number."""
