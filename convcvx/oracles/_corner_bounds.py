"""Bounds on small maps in batches: the largest ‖g + L ζ + Q v(ζ) + tail‖ over unit ζ, and of a plane over corners.

As in `convcvx.oracles.polynomial`: for any λ_b > 0, ‖Σ_b C_b y_b‖² <= λ_max(Σ_b C_b C_bᵀ/λ_b) Σ_b λ_b ‖y_b‖², with a
tail Σ_k τ_k ε_k s_k in each cell p, |τ_k| <= 1, given by T_p = Σ ε s sᵀ/‖s‖ and M_p = Σ ε ‖s‖: with λ_k = l_p ε_k ‖s_k‖
its columns add T_p/l_p to the matrix and l_p M_p to the sum. Good λ are found by R <- E R E, λ_b² = tr(R C_b C_bᵀ).
"""

from __future__ import annotations

import torch
from torch import Tensor

from convcvx.rounding import SAFE, UNIT, top_eigenvalues

STEPS = 8
"""Steps towards the best λ: more gained 0.1 % on patches of MNIST, and whatever λ is met the bound is valid."""
FAINT = 1e-9
"""Share of the mean of R that is added to its diagonal: no λ is zero then."""
SWEEPS = 24
"""Sweeps over the corners in search of the plane closest to zero: whatever plane they end at is made to hold."""


def longest(constant: Tensor, linear: Tensor, square: Tensor, tails: Tensor, masses: Tensor, terms: Tensor) -> Tensor:
    """(B,) bounds, rounding of what is done here and of the sums of `terms` in tails and masses included.

    Parameters
    ----------
    constant : Tensor (B, q)
        g, q = P·c.
    linear, square : Tensor (B, q, ·)
        L and Q, multiplied by vectors of norm one at most.
    tails : Tensor (B, P, c, c)
    masses : Tensor (B, P)
    terms : Tensor (B,)
        How many were added up in each tail, or more.
    """
    n_cells, c = tails.shape[1:3]
    n_blocks, columns = constant.shape[1], 1 + linear.shape[2] + square.shape[2]
    own = torch.stack([constant[:, :, None] @ constant[:, None], linear @ linear.mT, square @ square.mT], dim=1)
    spread = own.new_zeros(len(own), n_cells, n_blocks, n_blocks)
    for p in range(n_cells):
        spread[:, p, p * c : (p + 1) * c, p * c : (p + 1) * c] = tails[:, p]
    blocks = torch.cat([own, spread], dim=1)  # (B, 3 + P, q, q)
    weights = torch.cat([torch.ones_like(own[:, :, 0, 0]), masses], dim=1)  # ‖y‖², or what stands for it
    eye = torch.eye(n_blocks, dtype=own.dtype)
    root, matrix, multipliers = eye.expand(len(own), -1, -1), own[:, 0], weights
    for _ in range(STEPS):
        damped = root + FAINT * root.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None] * eye
        shares = (damped[:, None] * blocks).sum(dim=(2, 3)).clamp_min(0)
        multipliers = torch.where(weights > 0, shares / weights.clamp_min(1e-300), 0.0).sqrt()
        inverse = torch.where(multipliers > 0, 1 / multipliers.clamp_min(1e-300), 0.0)
        matrix = (inverse[:, :, None, None] * blocks).sum(dim=1)
        root = matrix @ root @ matrix
        root = root / root.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-300)[:, None, None]
    traces = blocks.diagonal(dim1=2, dim2=3).sum(dim=2)
    share = (terms + columns + 8 * len(blocks[0]) + 32) * UNIT
    top = top_eigenvalues(matrix) + share * matrix.diagonal(dim1=1, dim2=2).sum(dim=1)
    total = (multipliers * weights).sum(dim=1) * (1 + share)
    # A block whose λ underflowed is not in the matrix: its length is added.
    lost = (torch.where(multipliers > 0, 0.0, traces * weights).clamp_min(0) * (1 + share)[:, None]).sqrt().sum(dim=1)
    return _proved(((top * total).sqrt() + lost) * SAFE)


def above(corners: Tensor, values: Tensor) -> Tensor:
    """(B,): at least Σ λ_i values_i over all λ >= 0 with ‖Σ λ_i corners_i‖ = 1, for `corners` (B, V, V) with entries of
    one sign in each column, and `values` (B, V) >= 0.

    Where n·corners_i >= values_i for all i, that is at most ‖n‖.
    """
    gram = corners @ corners.mT
    size = corners.shape[2]
    shares = torch.zeros_like(values)
    for _ in range(SWEEPS):
        for i in range(values.shape[1]):
            left = values[:, i] - (gram[:, i] * shares).sum(dim=1) + gram[:, i, i] * shares[:, i]
            shares[:, i] = (left / gram[:, i, i]).clamp_min(0)
    signs = torch.where(corners.sum(dim=1) < 0, -1.0, 1.0).to(corners.dtype)
    found = torch.stack([(shares[:, :, None] * corners).sum(dim=1), signs], dim=1)  # (B, 2, V)
    heights = found @ corners.mT
    idle = (values <= 0)[:, None]  # not so of a NaN, which is to stay one
    ratios = torch.where(idle, 0.0, torch.where(heights > 0, values[:, None] / heights, torch.inf)).amax(dim=2)
    return _proved(ratios * found.norm(dim=2) * (1 + (8 * size + 32) * UNIT)).amin(dim=1)


def _proved(bounds: Tensor) -> Tensor:
    """The same, infinite for what is no number."""
    return torch.where(bounds.isnan(), torch.inf, bounds)
