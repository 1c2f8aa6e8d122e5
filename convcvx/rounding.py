"""Rounding of float64: the unit roundoff, and sums that come with a bound on their own error.

Every allowance of the package is built from two facts (Higham, *Accuracy and Stability of Numerical Algorithms*, 2002,
chapters 2 and 4). One operation: fl(a ∘ b) = (a ∘ b)(1 + δ) + η with |δ| ≤ `UNIT` and |η| ≤ `TINY`. A sum of m terms,
added in whatever order: off by at most (m - 1) `UNIT` Σ|terms|, to first order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

UNIT = 2.0**-53
"""Unit roundoff of float64."""
TINY = 2.0**-1074
"""Smallest positive float64: what an operation can lose to underflow."""
BLOCK = 64
"""Terms that `total` adds in float64; the sums of these blocks are added exactly. Larger blocks take less time and
leave a larger error."""
SAFE = 1 + 8 * UNIT
"""Factor on a bound of the kind "at most": outweighs the few roundings that computing the bound took off it."""


def total(terms: Tensor) -> tuple[float, float]:
    """The sum of float64 terms of any shape, and a bound on its error: about `BLOCK` roundings, however many terms.

    >>> total(torch.full((1000,), 0.1, dtype=torch.float64))[0]
    100.0
    """
    terms = terms.detach().double().cpu().flatten()
    blocks = torch.nn.functional.pad(terms, (0, -len(terms) % BLOCK)).view(-1, BLOCK)
    error = BLOCK * UNIT * math.fsum(blocks.abs().sum(dim=1).tolist()) * (1 + BLOCK * UNIT)
    return math.fsum(blocks.sum(dim=1).tolist()), error
