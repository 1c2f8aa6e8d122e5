"""Rounding of float64: the unit roundoff, and sums that come with a bound on their own error.

Every allowance of the package is built from two facts (Higham, *Accuracy and Stability of Numerical Algorithms*, 2002,
chapters 2 and 4). One operation: fl(a ∘ b) = (a ∘ b)(1 + δ) + η with |δ| ≤ `UNIT` and |η| ≤ `TINY`. A sum of m terms,
added in whatever order: off by at most (m - 1) `UNIT` Σ|terms|, to first order.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

UNIT = 2.0**-53
"""Unit roundoff of float64."""
TINY = 2.0**-1074
"""Smallest positive float64: what an operation can lose to underflow."""
SMALLEST_NORMAL = 2.0**-1022
"""Smallest positive float64 with all its digits. Added to a bound it makes up for products in it that underflow: a few
billion of them lose less."""
BLOCK = 64
"""Terms that `total` adds in float64; the sums of these blocks are added exactly. Larger blocks take less time and
leave a larger error."""
SAFE = 1 + 8 * UNIT
"""Factor on a bound of the kind "at most": outweighs the few roundings that computing the bound took off it."""


def total(terms: Tensor) -> tuple[float, float]:
    """The sum of float64 terms of any shape, and a bound on its error: `BLOCK` roundings of each, however many terms.

    >>> total(torch.full((1000,), 0.1, dtype=torch.float64))[0]
    100.0
    """
    return totals(terms.reshape(-1, 1))[0]


def totals(rows: Tensor) -> list[tuple[float, float]]:
    """The same for each column of rows (n, c); NaN where partial sums leave float64, which proves nothing."""
    terms = rows.detach().double().cpu().numpy()  # whose calls cost small problems less than those of torch
    with np.errstate(over="ignore", invalid="ignore"):
        blocks = np.add.reduceat(terms, range(0, len(terms), BLOCK))
        sizes = np.abs(terms).sum(axis=0) * (1 + (len(terms) + BLOCK) * UNIT)
    pairs = zip(blocks.T.tolist(), sizes.tolist(), strict=True)
    return [(_exact_sum(column), BLOCK * UNIT * size) for column, size in pairs]


def _exact_sum(values: list[float]) -> float:
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # beyond float64 on the way, or infinities of both signs
        return math.nan


def top_eigenvalue(matrix: Tensor) -> float:
    """At least the largest eigenvalue of a positive semidefinite float64 matrix (m, m); nearly that.

    For σ a little above the computed one, that σI - matrix has no eigenvalue below -α is proved by a Cholesky
    factorisation that runs to its end: α = γ Σ_k a_kk, γ = (m + 1)ε / (1 - 2(m + 1)ε) (Rump, *Verification of positive
    definiteness*, BIT 2006, theorem 2.3). Where it does not, the trace is a bound. Infinite for what is no number.
    """
    return float(top_eigenvalues(matrix[None])[0])


def top_eigenvalues(matrices: Tensor) -> Tensor:
    """`top_eigenvalue` of each of many (B, m, m): (B,)."""
    size = matrices.shape[1]
    traces = matrices.diagonal(dim1=1, dim2=2).sum(dim=1) * (1 + size * UNIT)
    finite = traces.isfinite() & matrices.isfinite().flatten(1).all(dim=1)
    positive = finite & (traces > 0)
    # Powers of two: squares neither over- nor underflow.
    mantissas, exponents = np.frexp(torch.where(positive, traces, 1.0).numpy())
    shares = torch.from_numpy(mantissas)
    safe = torch.where(positive[:, None, None], matrices, 0.0).numpy()
    scaled = torch.from_numpy(np.ldexp(safe, -exponents[:, None, None]))
    tops = torch.linalg.eigvalsh(scaled)[:, -1] + 4 * size * UNIT * shares
    shifted = tops[:, None, None] * torch.eye(size, dtype=matrices.dtype) - scaled
    failed = torch.linalg.cholesky_ex(shifted).info != 0
    share = 2 * (size + 4) * UNIT  # that of Rump's theorem, and of the roundings of the diagonal of `shifted`
    proved = (tops + share * size * tops + size * size * TINY) * (1 + 8 * UNIT)
    bounds = torch.where(failed | ~(tops < shares), shares, proved)
    with np.errstate(over="ignore"):
        bounds = torch.from_numpy(np.ldexp(bounds.numpy(), exponents))
    return torch.where(positive, bounds, torch.where(finite, traces.clamp_min(0), torch.inf))


def largest(*bounds: float) -> float:
    """The largest of some bounds; infinite if one is NaN, which `max` might pass over."""
    top = float(np.max(bounds))
    return math.inf if math.isnan(top) else top
