"""The Gram matrix of many features, and a Cholesky factor of it, by blocks: each process has some of the rows.

A process has stripes of rows, of each what lies on and right of the diagonal, once as products and once as factor: all
processes together 4 D² bytes in float32, as `Gram` takes them in one. No process has more than its own at any time. So
products of features cannot be summed process by process: all get the features of all images, a few at a time, and
multiply those of their own rows. What is sent, n·D numbers to each process, is little beside what is then computed.

All processes call the same methods of their blocks in the same order; those with results give them in process 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from convcvx.machine.wire import Wire
from convcvx.solvers.master.gram import STRIPE, Sums

STRIPES = 4
"""Stripes of each process at least, if they can be `LEAST` high: long rows and short ones then come to the same."""
LEAST = 16
"""Rows of a stripe at least: fewer would cost more in messages than in arithmetic."""


class Rows(NamedTuple):
    """A stripe of the matrix: its rows, those after it, and the process that has it."""

    own: slice
    later: slice
    rank: int


def striped(size: int, n_processes: int, height: int) -> list[Rows]:
    """The stripes of `size` rows, at most `height` high: there and back through the processes, as rows get shorter."""
    height = min(height, max(LEAST, -(-size // (STRIPES * n_processes))))
    there_and_back = [*range(n_processes), *reversed(range(n_processes))]
    stripes = []
    for k, first in enumerate(range(0, size, height)):
        last = min(first + height, size)
        stripes.append(Rows(slice(first, last), slice(last, size), there_and_back[k % len(there_and_back)]))
    return stripes


class GramBlocks(Sums):
    """One process's rows of the Gram matrix. Parameters and sums: see `Sums`; `dtype` is that of the products.

    Attributes
    ----------
    dtype : torch.dtype
    """

    def __init__(
        self,
        wire: Wire,
        size: int,
        n_outputs: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        centred: bool,
        shift: Tensor,
    ) -> None:
        super().__init__(size, n_outputs, device, centred=centred, shift=shift)
        self.dtype, self._wire, self._device = dtype, wire, torch.device(device)
        self._stripes = striped(size, wire.size, STRIPE[self._device.type])
        self._products = self._zeros()
        self._factor: dict[int, Tensor] = {}

    def _zeros(self) -> dict[int, Tensor]:
        """What lies on and right of the diagonal in each stripe of this process, by its number."""
        shapes = {
            k: (own.stop - own.start, self.size - own.start)
            for k, (own, _, rank) in enumerate(self._stripes)
            if rank == self._wire.rank
        }
        return {k: torch.zeros(shape, dtype=self.dtype, device=self._device) for k, shape in shapes.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix and of the factor that this process has."""
        return sum(part.nbytes for parts in (self._products, self._factor) for part in parts.values())

    # -- sums over images -----------------------------------------------------------------------------

    def add_all(self, images: Iterable[tuple[Tensor, Tensor, Tensor | None]], batch: int) -> None:
        """Add the images of all processes: here those of which `images` yields features (b, D), targets (b, c), counts.

        `batch` images at most at a time. Features are shifted in place.

        Raises
        ------
        Agreed
            In all processes, where `images` fails in one.
        """
        before, own = self.vectors, iter(images)
        self.vectors = [torch.zeros_like(part) for part in before]
        sent = torch.zeros(batch, self.size, dtype=self.dtype, device=self._device)
        while self._wire.go_on(lambda: self._next(own, sent)):
            everyone = torch.cat(self._wire.gather(sent))
            for k, block in self._products.items():
                first = self._stripes[k].own.start
                block.addmm_(everyone[:, first : first + len(block)].T, everyone[:, first:])
        summed = [self._wire.total(part) for part in self.vectors]
        self.vectors = [ours + found.to(ours) for ours, found in zip(before, summed, strict=True)]
        for block in self._products.values():
            block.diagonal().zero_()  # that of the sums is more precise

    def _next(self, images: Iterator[tuple[Tensor, Tensor, Tensor | None]], sent: Tensor) -> bool:
        """Put the next images into `sent`, zeros if there are no more: then it is false."""
        sent.zero_()
        if (found := next(images, None)) is None:
            return False
        sent[: len(found[0])] = self._weighed(*found)
        return True

    def _weighed(self, features: Tensor, targets: Tensor, counts: Tensor | None) -> Tensor:
        """Count these images, and give their features such that products are what they count for."""
        targets = targets.to(features.device)
        features -= self.shift.to(features)
        if counts is None:
            self._count(features, features, targets, None)
            return features
        counts = counts.to(features.device)[:, None]
        self._count(features, features * counts.to(features), targets, counts)
        return features * counts.sqrt().to(features)

    # -- products and solutions -----------------------------------------------------------------------

    def times(self, matrix: Tensor) -> Tensor:
        """H W (D, c) for W = `matrix` and H the mean of feature times feature; in the dtype of W."""
        wide = matrix.to(self._device).T.contiguous()  # products with a few long rows are the fast ones
        result = torch.zeros_like(wide)
        for k, block in self._products.items():
            own, later, _ = self._stripes[k]
            block = block.to(wide)
            result[:, own] += wide[:, own.start :] @ block.T
            result[:, later] += wide[:, own] @ block[:, later.start - own.start :]
        result = self._wire.add_up(result).to(self._device) / self.counted
        mean = self._mean.T.to(wide)
        result += (self._diagonal / self.counted).to(wide) * wide
        return (result - (wide @ mean.T) @ mean).T

    def factorise(self, ridges: Tensor) -> None:
        """Have a Cholesky factor U of H + diag(ridges), with larger ridges if rounding asks for them."""
        if not self._factor:
            self._factor = self._zeros()
        ridges = ridges.to(self._device).clamp_min(self._least_ridge(self.dtype))
        while not self._cholesky(self._diagonal_with(ridges)):
            ridges = self._more(ridges)

    def _cholesky(self, diagonal: Tensor) -> bool:
        """Put U, with UᵀU the matrix that has this `diagonal` (D,), in the place of the factor; false if there is none.

        A stripe is done once those above are taken off it: its process then shows it to all, which take it off theirs.
        """
        mean = self._mean.to(self.dtype)
        for k, block in self._factor.items():
            own = self._stripes[k].own
            torch.div(self._products[k], self.counted, out=block)
            block.addmm_(mean[own], mean[own.start :].T, alpha=-1)
            block.diagonal().copy_(diagonal[own])
        for k, panel in self._shown(self._factor):
            own = self._stripes[k].own
            if not float(panel[0, 0]) > 0:
                return False
            for j, block in self._factor.items():
                if j > k:
                    right = panel[:, self._stripes[j].own.start - own.start :]
                    block.addmm_(right[:, : len(block)].T, right, alpha=-1)
        return True

    def _shown(self, blocks: dict[int, Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Yield each stripe of the factor, once it is done; where there is none its first entry is 0."""
        for k, (own, _, rank) in enumerate(self._stripes):
            width = own.stop - own.start
            if rank == self._wire.rank:
                panel = blocks[k]
                corner, failed = torch.linalg.cholesky_ex(panel[:, :width], upper=True)
                if failed:
                    corner = torch.zeros_like(corner)
                else:
                    panel[:, width:] = torch.linalg.solve_triangular(corner.T, panel[:, width:], upper=False)
                panel[:, :width] = corner
            else:
                panel = torch.empty(width, self.size - own.start, dtype=self.dtype, device=self._device)
            yield k, self._wire.show(panel, rank)

    def unfactor(self, matrix: Tensor) -> Tensor:
        """(H + diag(ridges))⁻¹ W for W = `matrix` (D, c), with the factor at hand.

        At each stripe all processes take off what their rows have to do with it.
        """
        result = matrix.to(self._device, self.dtype, copy=True)
        for k, (own, _, rank) in enumerate(self._stripes):  # Uᵀ Y = W; a process knows those rows of Y that it has
            above = torch.zeros_like(result[own])
            for j, block in self._factor.items():
                if j < k:
                    rows = self._stripes[j].own
                    above += block[:, own.start - rows.start : own.stop - rows.start].T @ result[rows]
            above = self._wire.add_up(above, rank)
            if rank == self._wire.rank:
                corner = self._factor[k][:, : len(above)]
                rest = result[own] - above.to(self._device)
                result[own] = torch.linalg.solve_triangular(corner.T, rest, upper=False)
        for k, (own, _, rank) in reversed(list(enumerate(self._stripes))):  # U X = Y
            if rank == self._wire.rank:
                corner = self._factor[k][:, : own.stop - own.start]
                result[own] = torch.linalg.solve_triangular(corner, result[own], upper=True)
            found = self._wire.show(result[own].contiguous(), rank)
            for j, block in self._factor.items():
                rows = self._stripes[j].own
                if j < k:
                    result[rows] -= block[:, own.start - rows.start : own.stop - rows.start] @ found
            result[own] = found
        return result.to(matrix)
