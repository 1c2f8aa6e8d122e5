"""The pooled responses of all images as one linear operator."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from convcvx.problem import Problem

CACHE_BYTES = 1 << 30
"""Pooled responses kept between passes; beyond this they are recomputed on every pass."""


class Design:
    """A = Φ flattened to (n, m·P) as a linear operator, from cached responses when they fit."""

    def __init__(self, problem: Problem, filters: Tensor) -> None:
        responses = problem.responses
        self._responses, self._filters = responses, filters
        size = responses.n * len(filters) * responses.n_cells * responses.dtype.itemsize
        self._cache = list(responses.blocks(filters)) if size <= CACHE_BYTES else None
        shift = responses.shift(filters) if problem.intercept else torch.zeros(len(filters) * responses.n_cells)
        gram, _ = responses.gram(filters, problem.targets, problem.shares, shift)
        mean = gram[:-1, -1:] * problem.intercept
        self.gram = gram[:-1, :-1] - mean @ mean.T
        self.mean = mean + shift[:, None]
        # About how far below zero an eigenvalue may lie, by the rounding of the responses' products.
        self.noise = torch.finfo(responses.dtype).eps * float(self.gram.norm())

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        return iter(self._cache) if self._cache is not None else self._responses.blocks(self._filters)

    def apply(self, matrix: Tensor) -> Tensor:
        """A W (n, c) in float64."""
        out = torch.empty(self._responses.n, matrix.shape[1], dtype=torch.float64)
        for where, block in self._blocks():
            out[where] = (block.flatten(1) @ matrix.to(block)).double().cpu()
        return out

    def adjoint(self, rows: Tensor) -> Tensor:
        """Aᵀ R (m·P, c) in float64."""
        total = torch.zeros(len(self.gram), rows.shape[1], dtype=torch.float64)
        for where, block in self._blocks():
            # Products with a few long rows are the fast ones.
            total += (rows[where].to(block).T @ block.flatten(1)).T.double().cpu()
        return total

    def centred(self, matrix: Tensor) -> Tensor:
        """(A - 1 meanᵀ) W: what W changes when the intercept takes up the mean."""
        return self.apply(matrix) - self.mean.T @ matrix

    def centred_adjoint(self, rows: Tensor) -> Tensor:
        return self.adjoint(rows) - self.mean @ rows.sum(dim=0, keepdim=True)
