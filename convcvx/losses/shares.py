"""What each image counts for: shares s_i > 0 of the mean loss Σ_i s_i ℓ_i that add up to one, 1/n each by default.

They are kept as counts w_i and their sum W, s_i = w_i / W, so that whole numbers stay whole. Without weights each
count is 1.0, and what is multiplied or divided by it keeps its last bit: there is one arithmetic for both cases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convcvx.data.arrays import aligned
from convcvx.data.weights import read_weights
from convcvx.errors import InputError


@dataclass(frozen=True)
class Shares:
    """The shares of n images.

    Attributes
    ----------
    counts : Tensor (n,) float64
        w_i > 0: 1 each, or weights over the power of two above the largest.
    total : float
        W, what they are shares of: the sum of the counts, but for `estimate`.
    """

    counts: Tensor
    total: float

    @classmethod
    def equal(cls, n: int) -> Shares:
        """1/n each."""
        return cls(torch.ones(n, dtype=torch.float64), float(n))

    @classmethod
    def of(cls, sample_weight: Any, n: int) -> Shares:
        """In proportion to positive weights (n,); 1/n each for None."""
        if sample_weight is None:
            return cls.equal(n)
        weights = read_weights(sample_weight, n)
        if not bool((weights > 0).all()):
            raise InputError("sample_weight must be positive here; leave out images of weight 0 with `counted`")
        if bool((weights == weights[0]).all()):
            return cls.equal(n)
        exponent = math.frexp(float(weights.max()))[1]
        counts = aligned(torch.from_numpy(np.ldexp(weights.numpy(), -exponent)))  # exact: the largest is not far above
        return cls(counts, math.fsum(counts.tolist()))

    @cached_property
    def are_equal(self) -> bool:
        """Whether they are 1/n each."""
        return self.total == len(self.counts) and bool((self.counts == 1).all())

    @property
    def roundings(self) -> int:
        """How often, at most, a share or a quotient by it rounds besides its one rounding where n is all there is."""
        return 0 if self.are_equal else 4

    @cached_property
    def roots(self) -> Tensor:
        """(n,) √w_i: a mean of products is one of products of rows times these, over W."""
        return self.counts.sqrt()

    def mean(self, values: Tensor) -> Tensor:
        """Σ_i s_i values_i, for values (n, ...)."""
        return self.weighed(values).sum(dim=0) / self.total

    def weighed(self, rows: Tensor) -> Tensor:
        """w_i rows_i, for rows (n, ...); `rows` themselves where each w_i is 1."""
        return rows if self.are_equal else rows * self._along(rows)

    def times(self, rows: Tensor) -> Tensor:
        """s_i rows_i, for rows (n, ...)."""
        return self.weighed(rows) / self.total

    def quotients(self, rows: Tensor) -> Tensor:
        """rows_i / s_i, for rows (n, ...)."""
        return rows / self._along(rows) * self.total

    def centred(self, rows: Tensor) -> Tensor:
        """The nearest rows (n, c) that sum to zero, in the norm Σ_i ‖rows_i‖² / s_i: s_i of the sum taken off each."""
        return rows - self._along(rows) * (rows.sum(dim=0) / self.total)

    def standard_error(self, values: Tensor) -> float:
        """Of the mean of values (n,), as an estimate of that over all images of which these were drawn."""
        n = len(values)
        if self.are_equal:
            return float(values.std()) / n**0.5
        return float(self.times(values - self.mean(values)).norm()) * (n / (n - 1)) ** 0.5

    def sample(self, images: Tensor) -> Shares:
        """Of some images (indices): their own, in the same proportion."""
        counts = self.counts[images.cpu()]
        return Shares(counts, float(len(counts)) if self.are_equal else math.fsum(counts.tolist()))

    def estimate(self, images: Tensor) -> Shares:
        """Of some images (indices) drawn alike: means with these are those over all images, on average over draws.

        They need not add up to one: an image that counts for many does so in its batch alone.
        """
        return Shares(self.counts[images.cpu()], self.total * len(images) / len(self.counts))

    def _along(self, rows: Tensor) -> Tensor:
        return self.counts.to(rows).view(-1, *[1] * (rows.ndim - 1))


def counted(sample_weight: Any, images: Any, targets: Tensor) -> tuple[Any, Tensor, Tensor | None]:
    """Images, targets and weights, those of weight 0 left out: nothing of them is to shape what is trained.

    Images and targets of different number are left to whoever puts them together.

    Raises
    ------
    InputError
        For weights that are no weights: see `read_weights`.
    """
    if sample_weight is None:
        return images, targets, None
    weights = read_weights(sample_weight, len(targets))
    kept = weights > 0
    if bool(kept.all()) or len(images) != len(targets):
        return images, targets, weights
    return images[kept], targets[kept], weights[kept]
