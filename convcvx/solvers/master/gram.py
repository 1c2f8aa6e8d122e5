"""The Gram matrix of many features and a Cholesky factor of it, in one square of memory.

For D features in float32 the square takes 4 D² bytes. Products of features lie strictly below its diagonal and are
computed only there; a factor lies on and above it, so that neither costs the other's memory. Features are centred at
about their mean before they are multiplied: they are non-negative, and their mean is the one direction that would
drown the others in rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

STRIPE = {"cpu": 256, "cuda": 2048}
"""Rows of the square that are worked on at a time: enough to keep a device busy, few enough that the half of a stripe
that lies beyond the diagonal costs little."""
ROUNDING = 10.0
"""Units of rounding of the largest diagonal entry below which a ridge is lost in the products."""


class Sums:
    """Sums over images of features, targets and their products, but for the products of features: what is of size D.

    Parameters
    ----------
    size, n_outputs : int
        D features, c targets.
    device : torch.device
    centred : bool
        Minimise over an intercept: every product below is then of features and targets less their means.
    shift : Tensor (D,), optional
        What features are shifted by; the mean of the first ones, if `centred`, by default.

    Attributes
    ----------
    counted : float
        What the images so far count for: one each, unless told otherwise.
    """

    def __init__(
        self,
        size: int,
        n_outputs: int,
        device: torch.device | str = "cpu",
        *,
        centred: bool,
        shift: Tensor | None = None,
    ) -> None:
        self.counted, self.size, self.centred = 0.0, size, centred
        self._diagonal, self._sums, own = torch.zeros(3, size, dtype=torch.float64, device=device)
        self._finds_shift, self.shift = shift is None, own if shift is None else shift.to(device)
        self._moments = torch.zeros(size, n_outputs, dtype=torch.float64, device=device)
        self._target_sums = torch.zeros(n_outputs, dtype=torch.float64, device=device)
        self._target_square = 0.0

    def _count(self, features: Tensor, weighed: Tensor, targets: Tensor, counts: Tensor | None) -> None:
        """Add images with these shifted `features`, which are `weighed` by their `counts`, (b, 1) if there are some."""
        aimed = targets if counts is None else targets * counts
        self._diagonal += (weighed * features).sum(dim=0, dtype=torch.float64)
        self._sums += weighed.sum(dim=0, dtype=torch.float64)
        self._moments += weighed.T @ targets.to(features.dtype)
        self._target_sums += aimed.sum(dim=0)
        self._target_square += float((aimed * targets).sum())
        self.counted += len(features) if counts is None else float(counts.sum())

    @property
    def vectors(self) -> list[Tensor]:
        """What it has added up; sums of other images that were shifted alike may be added to these."""
        scalars = torch.tensor([self._target_square, self.counted], dtype=torch.float64)
        return [self._diagonal, self._sums, self._moments, self._target_sums, scalars]

    @vectors.setter
    def vectors(self, sums: Sequence[Tensor]) -> None:
        self._diagonal, self._sums, self._moments, self._target_sums, scalars = sums
        self._target_square, self.counted = scalars.tolist()

    @property
    def _mean(self) -> Tensor:
        """(D, 1), of the shifted features."""
        return self._sums[:, None] / self.counted * self.centred

    @property
    def mean(self) -> Tensor:
        """(D,) what features are centred at; zeros if they are not."""
        return (self._mean[:, 0] + self.shift) * self.centred

    @property
    def scales(self) -> tuple[Tensor, Tensor]:
        """(D,) each: root mean square of the features as they are, and as they are multiplied, centred perhaps."""
        variance = (self._diagonal / self.counted - (self._sums / self.counted).square()).clamp_min(0)
        mean = self._sums / self.counted + self.shift
        raw = (variance + mean.square()).sqrt()
        return raw, variance.sqrt() if self.centred else raw

    @property
    def _target_mean(self) -> Tensor:
        return self._target_sums / self.counted * self.centred

    @property
    def linear(self) -> Tensor:
        """L (D, c), the mean of feature times target."""
        return self._moments / self.counted - self._mean * self._target_mean

    @property
    def total(self) -> float:
        """The mean of ‖target‖²."""
        return self._target_square / self.counted - float(self._target_mean.square().sum())

    def intercept(self, matrix: Tensor) -> Tensor:
        """(c,) the best intercept beside the weights `matrix` (D, c)."""
        return self._target_mean - self.mean @ matrix

    def _diagonal_with(self, ridges: Tensor) -> Tensor:
        """(D,) the diagonal of H + diag(ridges)."""
        return self._diagonal / self.counted - self._mean[:, 0].square() + ridges

    def _least_ridge(self, dtype: torch.dtype) -> float:
        """The least ridge that is not lost in the rounding of products in `dtype`."""
        return ROUNDING * torch.finfo(dtype).eps * float(self._diagonal.max()) / self.counted

    def _more(self, ridges: Tensor) -> Tensor:
        """What to try after `ridges` with which there was no factor."""
        return 10 * ridges.clamp_min(1e-7 * float(self._diagonal_with(ridges).max()))


class Gram(Sums):
    """All sums over images of products of centred features and targets, one block of images after the other.

    `dtype` is that of the square; everything else is float64. Other parameters: see `Sums`.
    """

    def __init__(
        self,
        size: int,
        n_outputs: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        centred: bool,
        shift: Tensor | None = None,
    ) -> None:
        super().__init__(size, n_outputs, device, centred=centred, shift=shift)
        self._square = torch.zeros(size, size, dtype=dtype, device=device)

    def add(self, features: Tensor, targets: Tensor, counts: Tensor | None = None) -> None:
        """Add images with these `features` (b, D), which are shifted in place, and `targets` (b, c).

        Image i counts for `counts_i`; for one by default.
        """
        targets = targets.to(features.device)
        if self.counted == 0 and self.centred and self._finds_shift:
            self.shift = features.mean(dim=0, dtype=torch.float64)
        features -= self.shift.to(features)
        weighed = features
        if counts is not None:
            counts = counts.to(features.device)[:, None]
            weighed = features * counts.to(features)
        for rows, stripe in self._stripes():
            block = weighed[:, rows].T
            self._square[rows, : rows.start].addmm_(block, features[:, : rows.start])
            stripe[:, rows] += (block @ features[:, rows]).tril_(-1)
        self._count(features, weighed, targets, counts)

    @property
    def dtype(self) -> torch.dtype:
        return self._square.dtype

    def _stripes(self) -> Iterator[tuple[slice, Tensor]]:
        height = STRIPE[self._square.device.type]
        for first in range(0, self.size, height):
            rows = slice(first, min(first + height, self.size))
            yield rows, self._square[rows]

    def times(self, matrix: Tensor) -> Tensor:
        """H W (D, c) for W = `matrix` and H the mean of feature times feature; in the dtype of W."""
        wide = matrix.T.contiguous()  # products with a few long rows are the fast ones
        result = (self._diagonal / self.counted).to(wide) * wide
        for rows, stripe in self._stripes():
            left, corner = stripe[:, : rows.start].to(wide), stripe[:, rows].to(wide).tril(-1)
            result[:, rows] += (wide[:, : rows.start] @ left.T + wide[:, rows] @ (corner + corner.T)) / self.counted
            result[:, : rows.start] += wide[:, rows] @ left / self.counted
        mean = self._mean.T.to(wide)
        return (result - (wide @ mean.T) @ mean).T

    def factorise(self, ridges: Tensor) -> None:
        """Put a Cholesky factor of H + diag(ridges) into the square, with larger ridges if rounding asks for them."""
        mean = self._mean.to(self._square)
        ridges = ridges.clamp_min(self._least_ridge(self.dtype))
        while True:
            for rows, stripe in self._stripes():
                base = stripe[:, : rows.stop] / self.counted
                base.addmm_(mean[rows], mean[: rows.stop].T, alpha=-1)
                self._square[: rows.start, rows] = base[:, : rows.start].T
                stripe[:, rows].tril_(-1).add_(base[:, rows].tril(-1).T)
            self._square.diagonal().copy_(self._diagonal_with(ridges))
            if self._cholesky():
                return
            ridges = self._more(ridges)

    def _cholesky(self) -> bool:
        """Replace what lies on and above the diagonal, a matrix, by the U with UᵀU equal to it; false if there is none.

        Stripe by stripe, as the routines for the whole want the other triangle too (torch's), or crash on 27,000
        features with two threads (scipy's).
        """
        for rows, stripe in self._stripes():
            above = self._square[: rows.start]
            block = torch.addmm(stripe[:, rows.start :], above[:, rows].T, above[:, rows.start :], alpha=-1)
            width = len(stripe)
            factor, failed = torch.linalg.cholesky_ex(block[:, :width], upper=True)
            if failed:
                return False
            stripe[:, rows].tril_(-1).add_(factor)
            stripe[:, rows.stop :] = torch.linalg.solve_triangular(factor.T, block[:, width:], upper=False)
        return True

    def unfactor(self, matrix: Tensor) -> Tensor:
        """(H + diag(ridges))⁻¹ W for W = `matrix` (D, c), with the factor at hand."""
        solved = torch.linalg.solve_triangular(self._square.T, matrix.to(self._square), upper=False)
        return torch.linalg.solve_triangular(self._square, solved, upper=True).to(matrix)
