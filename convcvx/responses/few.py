"""The patches of a problem that has few of them, as one array: kinks shape it, and calls cost more than arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from convcvx.activations import RELU
from convcvx.responses.passes import Responses

Array = npt.NDArray[np.float64]
FEW = 2
"""Patch rows n·K an entry of a filter up to which they are few. Each maximum of g then lies at the kinks of a good part
of them, and whoever steps along gradients zigzags; of more rows a sum over them is nearly smooth."""


@dataclass(frozen=True)
class FewRows:
    """What responses are made of: φ_p(x_i; u) = Σ_k pool_pk (rows_ik·u)_+.

    Attributes
    ----------
    rows : array (n, K, r)
        Embedded patches.
    pool : array (P, K)
    """

    rows: Array
    pool: Array

    @classmethod
    def of(cls, responses: Responses) -> FewRows | None:
        """Those of a small problem in float64 on a CPU, worked out once; None where they are more than few,
        or far from zero."""
        here = responses.device.type == "cpu" and responses.dtype == torch.float64
        if responses.pooling.maximum or responses.activation != RELU:  # no sums of rectified rows
            return None
        if not (here and responses.small and responses.n * responses.n_positions <= FEW * responses.dim):
            return None
        if responses.embedding.spec.subspaces > 1:  # which a filter would leave along the kinks of whole rows
            return None
        if responses.patch_moments().far:  # nearly parallel rows: coordinate descent on their products would crawl
            return None
        if "few_rows" not in responses.kept:
            rows = responses.rows(slice(0, responses.n)) @ responses.embedding.basis.T
            pool = responses.pooling.matrix(*responses.map_size)
            pool = torch.eye(responses.n_positions) if pool is None else pool
            responses.kept["few_rows"] = cls(rows.contiguous().numpy(), pool.double().contiguous().numpy())
        return responses.kept["few_rows"]

    @property
    def flat(self) -> Array:
        """(n·K, r)."""
        return self.rows.reshape(-1, self.rows.shape[2])

    @cached_property
    def gram(self) -> Array:
        """(n·K, n·K) products of rows."""
        return self.flat @ self.flat.T
