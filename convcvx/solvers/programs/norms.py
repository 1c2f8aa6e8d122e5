"""Norms of the gated program's matrices W_s (r, P·c), summed over its gates, with their proximal points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GateNorm:
    """A norm summed over gates; its dual norm (q,); its proximal points.

    `proximal` takes a diagonal metric on the rows; `shrink` only a multiple of the identity.
    """

    value: Callable[[Tensor], float]
    dual: Callable[[Tensor], Tensor]
    shrink: Callable[[Tensor, float], Tensor] | None = None
    proximal: Callable[[Tensor, Tensor, float], Tensor] | None = None

    def step(self, point: Tensor, metric: Tensor, beta: float) -> Tensor:
        """argmin_W ½ Σ metric·(W - point)² + β Σ_s ‖W_s‖."""
        if self.proximal is not None:
            return self.proximal(point, metric, beta)
        assert self.shrink is not None
        return self.shrink(point, beta / float(metric[0]))


def singular_values(matrices: Tensor) -> Tensor:
    """(q, k) singular values of (q, r, w) matrices, through the smaller Gram matrix."""
    tall = matrices if matrices.shape[1] >= matrices.shape[2] else matrices.transpose(1, 2)
    return torch.linalg.eigvalsh(tall.transpose(1, 2) @ tall).clamp_min(0).sqrt()


def _shrink_singular_values(matrices: Tensor, threshold: float) -> Tensor:
    wide = matrices.shape[1] < matrices.shape[2]
    tall = matrices.transpose(1, 2) if wide else matrices
    squares, vectors = torch.linalg.eigh(tall.transpose(1, 2) @ tall)
    sizes = squares.clamp_min(0).sqrt()
    kept = (1 - threshold / sizes.clamp_min(1e-300)).clamp_min(0)
    shrunk = tall @ (vectors * kept[:, None]) @ vectors.transpose(1, 2)
    return shrunk.transpose(1, 2) if wide else shrunk


def _shrink_groups(point: Tensor, metric: Tensor, beta: float, dim: int | tuple[int, ...]) -> Tensor:
    """min_w ½ Σ m (w - v)² + β‖w‖ a group: w = m v t / (m t + β) where t = ‖w‖ solves Σ (m v / (m t + β))² = 1.

    The inverse square root of the left side is concave and increasing in t: Newton from below is monotone.
    """
    force = metric * point
    pulls = force.square().sum(dim=dim, keepdim=True).sqrt()
    size = ((pulls - beta) / metric.max()).clamp_min(0)
    for _ in range(30):
        denominator = metric * size + beta
        ratios = (force / denominator).square()
        total = ratios.sum(dim=dim, keepdim=True).clamp_min(1e-300)
        slope = (ratios * metric / denominator).sum(dim=dim, keepdim=True).clamp_min(1e-300)
        change = (total.sqrt() - 1) * total / slope
        size = (size + change).clamp_min(0)
        if float((change.abs() - 1e-14 * size).max()) <= 0:
            break
    return torch.where(pulls > beta, force * size / (metric * size + beta), 0.0)


NORMS = {
    "nuclear": GateNorm(
        value=lambda w: float(singular_values(w).sum()),
        dual=lambda g: singular_values(g).amax(dim=1),
        shrink=_shrink_singular_values,
    ),
    "columns": GateNorm(
        value=lambda w: float(w.norm(dim=1).sum()),
        dual=lambda g: g.norm(dim=1).amax(dim=1),
        proximal=lambda point, metric, beta: _shrink_groups(point, metric, beta, 1),
    ),
    "frobenius": GateNorm(
        value=lambda w: float(w.flatten(1).norm(dim=1).sum()),
        dual=lambda g: g.flatten(1).norm(dim=1),
        proximal=lambda point, metric, beta: _shrink_groups(point, metric, beta, (1, 2)),
    ),
}
"""‖·‖ of the gated program, by name."""
