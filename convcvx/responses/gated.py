"""Gated responses: the ReLU's own switching, frozen. For a fixed *gate* g they are linear in the filter u,

    φ^g_p(x_i; u) = Σ_k w_pk 1[x_ik·g >= 0] (x_ik·u),

and equal the ReLU response wherever u has the activation pattern of g. A pattern over all n·K patch rows is never
stored: its gate determines it, and it is computed again on every pass, a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from convcvx.arrangements.cells import sample_patterns
from convcvx.errors import check_count
from convcvx.losses.shares import Shares
from convcvx.responses.passes import Responses

CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 1 << 28}
"""Gated features in flight."""
CACHE_BYTES = 1 << 30
"""Gated features kept between passes; beyond this they are recomputed on every pass."""
DISTINCT_BITS = 1e9
"""Pattern bits up to which sampled gates are told apart; repeated patterns cost time but do no harm."""


def sample_gates(responses: Responses, n_gates: int, seed: int = 0) -> Tensor:
    """(q, r) unit Gaussian gates; q < `n_gates` where patterns coincide and the data are small enough to tell."""
    check_count("n_gates", n_gates)
    if responses.n * responses.n_positions * n_gates <= DISTINCT_BITS:
        rows = torch.cat([embedded_rows(responses, part) for part in _slices(responses, 1024)]).flatten(0, 1)
        return torch.from_numpy(sample_patterns(rows.double().cpu().numpy(), n_gates, seed)[1])
    directions = np.random.default_rng(seed).standard_normal((n_gates, responses.dim))
    return torch.from_numpy(directions / np.linalg.norm(directions, axis=1, keepdims=True))


def embedded_rows(responses: Responses, where: slice) -> Tensor:
    """(b, K, r) patch rows of some images, in the space that filters and gates live in."""
    return responses.rows(where) @ responses.embedding.basis.T.to(responses.device, responses.dtype)


def _slices(responses: Responses, size: int) -> Iterator[slice]:
    for start in range(0, responses.n, size):
        yield slice(start, min(start + size, responses.n))


class GatedResponses:
    """The linear map W ↦ f of the gated network: f_i = Σ_s Σ_p φ^s_p(x_i; ·) applied to W_s.

    Parameters
    ----------
    responses : Responses
        Images, patches, pooling, device and arithmetic; with K = 1 the features are never formed.
    gates : Tensor (q, r)
    axes : Tensor (a, r), optional
        Orthonormal rows: W is given in these coordinates, and restricted to their span.

    Attributes
    ----------
    shape : (int, int, int)
        q, a, P: W is (q, a, P, c), a = r without `axes`. A neuron with filter u and output weights V (P, c) behind
        gate s adds u ⊗ V to W_s.
    """

    def __init__(self, responses: Responses, gates: Tensor, axes: Tensor | None = None) -> None:
        self.responses = responses
        self.gates = gates.to(responses.device, responses.dtype)
        self._axes = None if axes is None else axes.to(self.gates)
        pool = responses.pooling.matrix(*responses.map_size)
        pool = torch.eye(responses.n_positions, dtype=torch.float64) if pool is None else pool
        self._cells = [
            (positions.to(responses.device), weights[positions].to(responses.device, responses.dtype)[:, None])
            for weights in pool
            for positions in [weights.nonzero()[:, 0]]
        ]
        self.shape = len(gates), responses.dim if axes is None else len(axes), responses.n_cells
        self._flat = responses.n_positions == responses.n_cells == 1
        width = self.shape[1] + len(gates) if self._flat else int(np.prod(self.shape))
        self._chunk = max(1, CHUNK_BYTES[responses.device.type] // (width * responses.dtype.itemsize))
        fits = responses.n * width * responses.dtype.itemsize <= CACHE_BYTES
        self._cache = [(where, self._features(where)) for where in _slices(responses, self._chunk)] if fits else None

    def _features(self, where: slice) -> tuple[Tensor, ...]:
        """(b, q·a·P) features, the cell last; for single patches the rows (b, a) and the open gates (b, q)."""
        rows = embedded_rows(self.responses, where)
        gates_open = (rows @ self.gates.T >= 0).to(rows)
        rows = rows if self._axes is None else rows @ self._axes.T
        if self._flat:
            return rows[:, 0] * self._cells[0][1].sum(), gates_open[:, 0]
        features = rows.new_empty(len(rows), *self.shape)
        for cell, (positions, weights) in enumerate(self._cells):
            features[..., cell] = gates_open[:, positions].transpose(1, 2) @ (rows[:, positions] * weights)
        return (features.flatten(1),)

    def _blocks(self) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        if self._cache is not None:
            return iter(self._cache)
        return ((where, self._features(where)) for where in _slices(self.responses, self._chunk))

    def apply(self, weights: Tensor) -> Tensor:
        """f (n, c) float64 on the CPU, without intercept, for weights (q, a, P, c)."""
        q, c = len(weights), weights.shape[3]
        out = torch.empty(self.responses.n, c, dtype=torch.float64)
        matrix = weights.to(self.gates)
        matrix = matrix[:, :, 0].permute(1, 0, 2).flatten(1) if self._flat else matrix.flatten(0, 2)
        for where, (features, *gates_open) in self._blocks():
            product = features @ matrix
            if gates_open:
                product = (gates_open[0][:, None] @ product.view(-1, q, c))[:, 0]
            out[where] = product.double().cpu()
        return out

    def adjoint(self, dual_point: Tensor) -> Tensor:
        """G (q, a, P, c) float64 on the CPU: G_s = Σ_i Φ^s(x_i) ⊗ Z_i for Z = `dual_point` (n, c)."""
        q, c = self.shape[0], dual_point.shape[1]
        dual_point = dual_point.to(self.gates)
        size = (self.shape[1], q * c) if self._flat else (int(np.prod(self.shape)), c)
        total = torch.zeros(size, dtype=torch.float64, device=self.gates.device)
        for where, (features, *gates_open) in self._blocks():
            rows = dual_point[where]
            if gates_open:
                rows = (gates_open[0][:, :, None] * rows[:, None]).flatten(1)
            total += features.T @ rows
        if self._flat:
            return total.view(-1, q, c).permute(1, 0, 2)[:, :, None].contiguous().cpu()
        return total.view(*self.shape, c).cpu()

    def matrix(self) -> Tensor:
        """All features (n, q·a·P) at once: for small problems, samples and tests."""
        return torch.cat([self._expanded(*block).cpu() for _, block in self._blocks()])

    @staticmethod
    def _expanded(features: Tensor, gates_open: Tensor | None = None) -> Tensor:
        return features if gates_open is None else (gates_open[:, :, None] * features[:, None]).flatten(1)

    def gram(self, targets: Tensor, shares: Shares | None = None) -> tuple[Tensor, Tensor]:
        """Means of A_iᵀA_i and A_iᵀY_i in float64 for A = [features, 1], over images that count for their `shares`.

        One pass, after which n disappears.
        """
        shares = shares or Shares.equal(self.responses.n)
        size = int(np.prod(self.shape)) + 1
        gram = torch.zeros(size, size, dtype=torch.float64, device=self.gates.device)
        moments = torch.zeros(size, targets.shape[1], dtype=torch.float64, device=self.gates.device)
        for where, parts in self._blocks():
            block = self._expanded(*parts)
            block = torch.cat([block, block.new_ones(len(block), 1)], dim=1)
            weighed = block if shares.are_equal else block * shares.counts[where, None].to(block)
            gram += weighed.T @ block
            moments += weighed.T @ targets[where].to(block)
        return gram.cpu().div_(shares.total), moments.cpu().div_(shares.total)
