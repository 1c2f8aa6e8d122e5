"""What a master gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MasterResult:
    """Weights (m, P, c), intercept (c,), objective, its relative duality gap over these filters, iterations."""

    weights: Tensor
    intercept: Tensor
    objective: float
    rel_gap: float
    iterations: int
