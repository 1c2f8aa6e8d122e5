"""The patches of a small problem as one array: for searches and slides to which a call costs more than its arithmetic.

A small problem keeps its patches anyway (see `Stream`); everything here is float64 and on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from convcvx.responses.passes import Responses

Array = npt.NDArray[np.float64]
FEW = 2
"""Patch rows n·K an entry of a filter up to which they are few: maxima of g then lie at the kinks of many of them, and
whoever steps along gradients zigzags."""


@dataclass(frozen=True)
class SmallRows:
    """What a response is made of: φ_p(x_i; u) = Σ_k pool_pk (rows_ik·u)_+.

    Attributes
    ----------
    rows : array (n, K, r)
        Embedded patches.
    pool : array (P, K)
    """

    rows: Array
    pool: Array

    @classmethod
    def of(cls, responses: Responses) -> SmallRows:
        """Those of a small problem, worked out once."""
        if "small_rows" not in responses.kept:
            basis = responses.embedding.basis.double()
            rows = responses.rows(slice(0, responses.n)).double().cpu() @ basis.T
            pool = responses.pooling.matrix(*responses.map_size)
            pool = np.eye(responses.n_positions) if pool is None else pool.double().numpy()
            responses.kept["small_rows"] = cls(np.ascontiguousarray(rows.numpy()), np.ascontiguousarray(pool))
        return responses.kept["small_rows"]

    @property
    def flat(self) -> Array:
        """(n·K, r)."""
        return self.rows.reshape(-1, self.rows.shape[2])

    @cached_property
    def gram(self) -> Array:
        """(n·K, n·K) products of rows; for few of them."""
        return self.flat @ self.flat.T

    @property
    def are_few(self) -> bool:
        """Whether kinks are what shapes g."""
        n, n_positions, size = self.rows.shape
        return n * n_positions <= FEW * size
