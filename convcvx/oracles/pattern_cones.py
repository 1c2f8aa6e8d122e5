"""The cones of activation patterns, K_s = {u : (2 D_s - I) X u >= 0}: filters on which ReLU and gate s agree.

A cone has a face a patch row, n·K of them, yet a projection rests on few: they are found by cutting planes, the
most violated rows of one streamed pass at a time, and the small problem between is a least-distance program solved
by non-negative least squares (Lawson, Hanson 1974, ch. 23). Its multipliers prove the distance: with rows k_i of
(2 D_s - I) X and any λ >= 0, every unit u of K_s has  p·u <= (p + Σ λ_i k_i)·u <= ‖p + Σ λ_i k_i‖.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from convcvx.responses.gated import embedded_rows
from convcvx.responses.passes import Responses

CHUNK_BYTES = 32 << 20
"""Products of rows and points in flight."""
MARGIN = 1e-12
"""Points returned keep this distance from every face, per unit of norm: rounding cannot change their pattern."""
MAX_PASSES = 60
"""Passes over the rows after which a projection is taken as it is, and lifted into the cone."""


class PatternCones:
    """The cones of the patterns of `gates` (q, r) on the images of `responses`, float64."""

    def __init__(self, responses: Responses, gates: Tensor) -> None:
        self._responses = responses.to(dtype=torch.float64)
        self.gates = gates.double().cpu()

    def project(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest points of K_s to `points` (q, m, r), inside by `MARGIN`; and (q, m) bounds on max p·u over unit u.

        The bounds are proved by multipliers whether or not the cutting planes were finished.
        """
        nearest, off = self._nearest(points.double(), None)
        return self._lift(nearest, None), nearest.norm(dim=2) + off

    def split(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """u₊, u₋ in K_s, u₊ - u₋ = u, with ‖u₊‖² + ‖u₋‖² least: u₋ is nearest to -u/2 among v, v + u in K_s."""
        points = points.double()
        nearest, _ = self._nearest(-0.5 * points, points)
        minus = self._lift(nearest, points)
        return minus + points, minus

    def _chunks(self, width: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Unit rows (N, r), and their sides of the gates (N, q): at least eight chunks if there are rows for them."""
        responses = self._responses
        size = max(1, CHUNK_BYTES // (8 * responses.n_positions * max(width, 1)))
        size = min(size, -(-responses.n // 8))
        for start in range(0, responses.n, size):
            rows = embedded_rows(responses, slice(start, min(start + size, responses.n))).flatten(0, 1).cpu()
            norms = rows.norm(dim=1, keepdim=True)
            rows = rows[norms[:, 0] > 0]
            if len(rows):
                sides = torch.where(rows @ self.gates.T >= 0, 1.0, -1.0).double()
                yield rows / rows.norm(dim=1, keepdim=True), sides

    def _heights(self, rows: Tensor, sides: Tensor, points: Tensor, shift: Tensor | None) -> Tensor:
        """(N, q, m): how far each point, and the shifted one, lies inside each face; negative outside."""
        flat = points.flatten(0, 1)
        heights = sides[..., None] * (rows @ flat.T).view(len(rows), *points.shape[:2])
        if shift is None:
            return heights
        shifted = sides[..., None] * (rows @ shift.flatten(0, 1).T).view_as(heights)
        return heights + shifted.clamp_max_(0)

    def _nearest(self, points: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """argmin ‖v - p‖ over v with v, and v + shift, in K_s; from outside, within the rounding (q, m) that comes
        with it."""
        q, m = points.shape[:2]
        scale = points.norm(dim=2).clamp_min(1e-300)
        current, off = points.clone(), torch.zeros(q, m, dtype=torch.float64)
        normals: list[list[np.ndarray]] = [[] for _ in range(q * m)]
        offsets: list[list[float]] = [[] for _ in range(q * m)]
        for _ in range(MAX_PASSES):
            self._responses.deadline.check()
            added: set[int] = set()
            tolerance = 0.1 * MARGIN * torch.maximum(scale, current.norm(dim=2))
            for rows, sides in self._chunks(q * m):
                worst, index = self._heights(rows, sides, current, shift).min(dim=0)
                for s, j in (worst < -tolerance).nonzero().tolist():
                    normal = sides[index[s, j], s] * rows[index[s, j]]
                    offset = 0.0 if shift is None else max(0.0, -float(normal @ shift[s, j]))
                    normals[s * m + j].append(normal.numpy())
                    offsets[s * m + j].append(offset)
                    added.add(s * m + j)
            if not added:
                break
            for k in added:
                self._responses.deadline.check()
                point = points[k // m, k % m].numpy()
                nearest, error = _least_distance(point, np.array(normals[k]), np.array(offsets[k]))
                current[k // m, k % m], off[k // m, k % m] = torch.from_numpy(nearest), error
        return current, off

    def _lift(self, points: Tensor, shift: Tensor | None) -> Tensor:
        """Move along the gate, which is strictly inside, until `MARGIN` holds."""
        lift = torch.zeros(points.shape[:2], dtype=torch.float64)
        margin = MARGIN * (points.norm(dim=2) + (0.0 if shift is None else shift.norm(dim=2)))
        for rows, sides in self._chunks(points.shape[0] * points.shape[1]):
            lack = margin - self._heights(rows, sides, points, shift)
            rise = (sides * (rows @ self.gates.T))[..., None]
            needed = torch.where(rise > MARGIN, lack / rise.clamp_min(MARGIN), 0.0)
            lift = torch.maximum(lift, needed.amax(dim=0))
        return points + lift[..., None] * self.gates[:, None]


def _least_distance(point: np.ndarray, normals: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, float]:
    """argmin ‖v - point‖ over unit normals·v >= offsets, as point + Σ λ_i normal_i with λ >= 0; and the rounding of
    this sum, in which the terms may be far larger than what is left."""
    from scipy.optimize import nnls  # here: `import convcvx` does not wait for it

    scale = np.linalg.norm(point) or 1.0
    lacks = (offsets - normals @ point) / scale
    try:
        multipliers, _ = nnls(np.vstack([normals.T, lacks]), np.append(np.zeros(len(point)), 1.0))
    except RuntimeError:  # it did not converge: the point itself is a looser bound
        return point, 0.0
    multipliers = scale * (multipliers / max(1.0 - lacks @ multipliers, 1e-300))
    if not np.isfinite(multipliers).all():
        return point, 0.0
    error = (len(multipliers) + 4) * 2.0**-53 * (scale + multipliers.sum())
    return point + multipliers @ normals, float(error)
