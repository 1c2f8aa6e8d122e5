"""Features that are gone through again and again: computed once, then read from a file that ends with them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from io import BufferedRandom
from tempfile import TemporaryFile, gettempdir

import torch
from torch import Tensor

from convcvx.budget import NEVER
from convcvx.errors import InputError
from convcvx.losses.base import Loss
from convcvx.responses.passes import Responses
from convcvx.responses.team import Together
from convcvx.solvers.dictionary.features import BATCH, Features


class KeptFeatures(Features):
    """`Features` that all but the first visit read from a file; a GPU computes them again, which takes less there.

    The file has no name, and is 4·n·D bytes in single precision. What of it the memory has room for stays there.
    """

    def __init__(self, responses: Sequence[Responses], filters: Sequence[Tensor], flips: bool) -> None:
        super().__init__(responses, filters, flips)
        # Time may end the first visit, but no other one.
        self._again = Features([part.until(NEVER) for part in responses], filters, flips)
        self._blocks: list[slice] = []
        self._file: BufferedRandom

    def batches(self, batch: int = BATCH) -> Iterator[tuple[slice, Tensor]]:
        """As in `Features`; a block is good until the next one. `batch` is that of the first visit.

        Raises
        ------
        InputError
            Where the folder for temporary files has no room for the file.
        """
        if not self._blocks:
            return self._first(batch)
        return self._read() if self.device.type == "cpu" else self._again.batches(batch)

    def _first(self, batch: int) -> Iterator[tuple[slice, Tensor]]:
        kept = self.device.type == "cpu"
        if kept:
            self._file = self._new_file()
        blocks = []
        for where, block in super().batches(batch):
            if kept:
                self._write(block)
            blocks.append(where)
            yield where, block
        self._blocks = blocks

    def _write(self, block: Tensor) -> None:
        try:
            self._file.write(block.contiguous().numpy().data)
            self._file.flush()
        except OSError as error:
            raise self._no_room(str(error)) from None

    def _new_file(self) -> BufferedRandom:
        size, free = self.responses[0].n * self.size * self.dtype.itemsize, shutil.disk_usage(gettempdir()).free
        if size > free:
            raise self._no_room(f"they take {size / 2**30:.3g} GiB, {free / 2**30:.3g} GiB are free")
        return TemporaryFile()

    def _no_room(self, why: str) -> InputError:
        return InputError(
            f"features of {self.responses[0].n:,} images cannot be kept in {gettempdir()}: {why}; set TMPDIR to a "
            "folder with more room, or use fewer filters"
        )

    def _read(self) -> Iterator[tuple[slice, Tensor]]:
        self._file.seek(0)
        buffer = torch.empty(max(where.stop - where.start for where in self._blocks), self.size, dtype=self.dtype)
        for where in self._blocks:
            block = buffer[: where.stop - where.start]
            if self._file.readinto(block.numpy().data) != block.nbytes:
                raise self._no_room("the file lost some of them")
            yield where, block


class Visits:
    """Products with the features A (n, D) of the images of one process, each a visit to all of them.

    Parameters
    ----------
    features : KeptFeatures
    targets : Tensor (q, c)
        Those of the process's own images.
    images : Tensor (q,) int64
        Which of all images these are, one after the other.
    """

    def __init__(self, features: KeptFeatures, targets: Tensor, images: Tensor) -> None:
        self._features, self._targets, self._images = features, targets, images
        self._bend: Callable[[slice, Tensor], Tensor]

    def _zeros(self, n_outputs: int) -> Tensor:
        """(c, D)."""
        return torch.zeros(n_outputs, self._features.size, dtype=torch.float64, device=self._features.device)

    def apply(self, matrix: Tensor) -> Tensor:
        """A W (q, c) float64 for W = `matrix` (D, c)."""
        out = torch.zeros(len(self._images), matrix.shape[1], dtype=torch.float64)
        for where, block in self._features.batches():
            out[where] = (block @ matrix.to(block)).double().cpu()
        return out

    def adjoint(self, rows: Tensor) -> Tensor:
        """Aᵀ R (D, c) float64 for the `rows` (n, c) of all images."""
        own = rows[self._images]
        total = self._zeros(rows.shape[1])
        for where, block in self._features.batches():
            total += own[where].to(block).T @ block  # products with a few long rows are the fast ones
        return total.T

    def bend(self, loss: Loss, predictions: Tensor, shares: Tensor) -> None:
        """Make `curved` that at these `predictions` (n, c) of all images, which count for `shares` (n,)."""
        predictions, shares, targets = predictions[self._images], shares[self._images, None], self._targets

        def bend(where: slice, rows: Tensor) -> Tensor:
            # Of nothing that has it: the file would outlive the last visit.
            return shares[where] * loss.hessian(predictions[where], targets[where])(rows)

        self._bend = bend

    def curved(self, direction: Tensor, mean: Tensor) -> Tensor:
        """The mean loss's Hessian times a `direction` (D + 1, c): of weights, and of the prediction at the `mean` (D,).

        That is Cᵀ S C, with C = (A - 1 meanᵀ, 1) and S the Hessians image by image.
        """
        weights, mean = direction[:-1], mean.to(direction)
        shift = (direction[-1:] - mean @ weights).double().cpu()
        total, sums = self._zeros(direction.shape[1]), torch.zeros_like(shift)
        for where, block in self._features.batches():
            rows = self._bend(where, (block @ weights.to(block)).double().cpu() + shift)
            total += rows.to(block).T @ block
            sums += rows.sum(dim=0, keepdim=True)
        sums = sums.to(total)
        return torch.cat([total.T - mean.to(total)[:, None] * sums, sums])


class SharedVisits:
    """`Visits` of several processes, as the leader sees them."""

    def __init__(self, parts: Together) -> None:
        self._parts = parts

    def apply(self, matrix: Tensor) -> Tensor:
        return torch.cat(self._parts.all("apply", matrix.cpu()))

    def adjoint(self, rows: Tensor) -> Tensor:
        return self._parts("adjoint", rows)

    def bend(self, loss: Loss, predictions: Tensor, shares: Tensor) -> None:
        self._parts("bend", loss, predictions, shares)

    def curved(self, direction: Tensor, mean: Tensor) -> Tensor:
        return self._parts("curved", direction.cpu(), mean.cpu())
