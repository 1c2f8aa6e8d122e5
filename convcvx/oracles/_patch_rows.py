"""The distinct patch rows of a problem, gathered once: what changes from call to call are the charges alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from convcvx.activations import RELU
from convcvx.budget import NEVER
from convcvx.errors import InputError
from convcvx.machine.jit import njit
from convcvx.oracles._division import Division
from convcvx.patches import Moments
from convcvx.responses.passes import Responses
from convcvx.rounding import SMALLEST_NORMAL, UNIT

MAX_BYTES = 8 << 30
"""Bytes that patch rows and charges may take: a rigorous oracle on more would not end anyway."""
LARGE_BUCKET = 32
"""Single rows up to which a bundle of them is divided into its rows: there are many, and bundles take memory."""
MOVED = 1 << 20
"""Rows moved at once as the gaps between cells are closed."""
CHUNK = 256
"""Images whose patches are gathered at once."""
SAMPLE = 256
"""Images, the first ones, from which the share of patches that are not zero is estimated."""
ROUND_UP = 1.0 + 1e-9
"""Factor that raises a sum of rounding errors above what rounding takes off the sum itself."""


NAMES = "rows", "single rows"
"""What rows are kept by with responses: equal ones merged, and not."""


@dataclass(frozen=True)
class PatchRows:
    """Non-zero patch rows as unit vectors of the patch subspace, equal ones of a pooling cell merged if asked for.

    Sums of rectified responses to them are sums of responses: with an activation other than the ReLU, whose σ(t) is
    t₊ - slope (-t)₊, each row x of an image comes a second time, as -x of the *mirrored* image, which has -slope times
    the charge.

    Attributes
    ----------
    rows : ndarray (N, d) float64
        Sorted so that the bundles of `division` are consecutive. Positive multiples of one another are equal here.
    cells : ndarray (N,) int32
    incidence : csr_array (N, n), or (N, 2n) with mirrored images behind the others
        Σ w_pk ‖x_ik‖ over the patches of image i that are this row: charges are incidence @ Z.
    remainders : ndarray (n,) or (2n,)
        By image, how much of Σ_pk w_pk |x_ik·u| at most, over unit u, the rows do not say; rounding included.
    reach : ndarray (n,) or (2n,)
        By image, Σ_pk w_pk ‖x_ik‖ or more: no φ(x_i; u) of a unit u is longer.
    n_cells : int
    frame : Tensor (d, r) float64
        Orthonormal rows spanning the numerical row space.
    division : Division

    Notes
    -----
    *Remainders.* With ε = 2⁻⁵³, an embedded row e = B x of a patch is off by `embedding_errors`. Of the computed ê the
    coordinates v = F ê are kept; the rest ê - Fᵀv is measured, with an error of (d + 1)ε‖F‖_F‖v‖, where ‖F‖_F = √d. A
    filter u has coordinates F u, longer than u by a factor of ‖F‖₂ <= 1 + ‖FFᵀ - I‖_F. To make v a unit row and a
    weight takes 2ε, the weight w_pk itself 4ε, and m members of a row add up their charges with (m + 1)ε, each time of
    w_pk‖v‖. Products that underflow add less than `SMALLEST_NORMAL`.
    """

    rows: np.ndarray
    cells: np.ndarray
    incidence: csr_array
    remainders: np.ndarray
    reach: np.ndarray
    n_cells: int
    frame: Tensor
    division: Division

    @classmethod
    def of(cls, responses: Responses, *, merged: bool = True) -> PatchRows:
        """The rows of `responses`, gathered at the first call and kept with them: dual points come by the hundred.

        Without `merged` every patch is a row of its own, of one image: such rows need no charges of their own.

        Raises
        ------
        InputError
            When they are not finite.
        """
        name = NAMES[not merged]
        if name not in responses.kept:
            responses.kept[name] = (cls._gather if merged else cls._gather_single)(responses)
        return responses.kept[name]

    @classmethod
    def kept_bytes(cls, responses: Responses) -> int:
        """Bytes of what has been gathered of `responses`, but for the bundles."""
        return sum(
            rows.rows.nbytes + rows.cells.nbytes + rows.incidence.data.nbytes + rows.incidence.indices.nbytes
            for rows in map(responses.kept.get, NAMES)
            if rows is not None
        )

    @classmethod
    def forget(cls, responses: Responses) -> None:
        """Gather the rows anew at the next call."""
        for name in NAMES:
            responses.kept.pop(name, None)

    @classmethod
    def _gather(cls, responses: Responses) -> PatchRows:
        source = Source.of(responses)
        unit, slots, image, weight = (np.concatenate(group) for group in zip(*source.parts(), strict=True))
        first, member = merge(unit, slots)
        beside, reach = source.unsaid(image, weight, np.bincount(member)[member])
        unit, slots = unit[first], slots[first]
        division = Division.of(unit, slots)
        order = np.empty(len(unit), np.int32)
        order[division.order] = np.arange(len(unit), dtype=np.int32)
        incidence = csr_array((weight, (order[member], image)), shape=(len(unit), source.n_images))
        incidence.sum_duplicates()
        unit, slots = unit[division.order], slots[division.order]
        return cls(unit, slots, incidence, beside, reach, responses.n_cells, source.frame, division.sorted())

    @classmethod
    def _gather_single(cls, responses: Responses) -> PatchRows:
        source = Source.of(responses)
        most = torch.bincount(source.cells, minlength=responses.n_cells).numpy() * source.n_images
        unit, image, weight, counts = pack(source.parts(), most, len(source.frame))
        beside, reach = source.unsaid(image, weight, 1)
        occupied = np.flatnonzero(counts)
        division = Division.in_place(unit, (counts.cumsum() - counts)[occupied], LARGE_BUCKET)
        image, weight = image[division.order], weight[division.order]
        incidence = csr_array((weight, image, np.arange(len(unit) + 1, dtype=np.int32)), (len(unit), source.n_images))
        slots = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        return cls(unit, slots, incidence, beside, reach, responses.n_cells, source.frame, division.sorted())

    @staticmethod
    def size(responses: Responses, n_outputs: int, *, merged: bool = True) -> int:
        """Bytes that the rows and their charges take, about, judged by the first images; without `merged` the rows and
        their bundles."""
        sample = responses.to(images=responses.images[:SAMPLE]).until(NEVER)
        share = float((sample.rows(slice(0, SAMPLE)) != 0).any(dim=2).double().mean())
        pool = responses.pooling.cells(*responses.map_size)
        entries = responses.n_positions if pool is None else int(pool.count_nonzero())
        entries *= n_sides(responses)
        d, width = responses.dim, n_outputs + 4
        numbers = 4 * d + 3 * n_outputs + 8 if merged else d + 3 + 4 * (d + 1) * (width + 1) / LARGE_BUCKET
        return int(8 * share * responses.n * entries * numbers)


def n_sides(responses: Responses) -> int:
    """How many rows a patch makes: one of the ReLU, which negative responses do not count for, else two."""
    return 1 if responses.activation == RELU else 2


@dataclass(frozen=True)
class Source:
    """The non-zero patch rows of all images, and of the mirrored ones if there are any, part by part.

    Attributes
    ----------
    responses : Responses
        In float64.
    frame : Tensor (d, r)
    skew : float
        How much longer coordinates are than filters, about, as a share.
    cells, positions, weights : Tensor (E,)
        The entries of the pooling matrix that are not 0: a position may lie in several cells.
    remainders : Tensor (n,) or (2n,)
        Σ_pk w_pk times what coordinates do not say of a patch, of the images gone through by now.
    """

    responses: Responses
    frame: Tensor
    skew: float
    cells: Tensor
    positions: Tensor
    weights: Tensor
    remainders: Tensor

    @classmethod
    def of(cls, responses: Responses) -> Source:
        responses = responses.to(dtype=torch.float64)
        spec, basis, size = responses.embedding.spec, responses.embedding.basis, responses.embedding.dim
        moments = Moments.of(responses.images, spec).embedded(basis, spec)
        if not bool(moments.second.isfinite().all()):
            raise InputError("images must have finite patches of finite square; divide them by their largest value")
        frame = moments.span
        d = len(frame)
        skew = float((frame @ frame.T - torch.eye(d, dtype=torch.float64)).norm()) + (size + 2) * d * UNIT
        pool = responses.pooling.matrix(*responses.map_size)
        pool = torch.eye(responses.n_positions, dtype=torch.float64) if pool is None else pool
        cells, positions = pool.nonzero(as_tuple=True)
        remainders = torch.zeros(n_sides(responses) * responses.n, dtype=torch.float64)
        return cls(responses, frame, skew, cells, positions, pool[cells, positions], remainders)

    @property
    def n_images(self) -> int:
        """Mirrored ones included."""
        return len(self.remainders)

    def parts(self) -> Iterator[tuple[np.ndarray, ...]]:
        """Of some images after the others: unit rows, their cells, images and weights w_pk ‖x_ik‖."""
        responses, basis = self.responses, self.responses.embedding.basis
        for start in range(0, responses.n, CHUNK):
            where = slice(start, start + CHUNK)
            raw = responses.rows(where).cpu()
            rows = raw @ basis.T  # (b, K, r)
            coordinates = rows @ self.frame.T
            outside = lengths(rows - coordinates @ self.frame) + embedding_errors(responses, where, raw)
            norms = lengths(coordinates)
            unsaid = outside[:, self.positions] @ self.weights
            inside, entry = (norms[:, self.positions] > 0).nonzero(as_tuple=True)
            place = self.positions[entry]
            length = norms[inside, place]
            unit, cells, weights = coordinates[inside, place] / length[:, None], self.cells[entry], self.weights[entry]
            for sign, first in zip((1, -1), range(start, self.n_images, responses.n), strict=False):
                self.remainders[first : first + len(raw)] = unsaid
                part = unit * sign, cells.int(), (inside + first).int(), weights * length
                yield tuple(tensor.numpy() for tensor in part)

    def unsaid(self, image: np.ndarray, weight: np.ndarray, members: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        """`remainders` and `reach` of `PatchRows`, once all parts have been gone through, for patches of so many
        `members` of a row."""
        d, n = len(self.frame), self.n_images
        share = self.skew + (members + (d + 1) * d**0.5 + 8) * UNIT
        beside = ROUND_UP * (self.remainders.numpy() + np.bincount(image, weight * share, n))
        return beside, ROUND_UP * np.bincount(image, weight, n) + beside


def pack(
    parts: Iterator[tuple[np.ndarray, ...]], most: np.ndarray, d: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows, images and weights of all parts, one cell after another, and how many each cell has: `most` (P,) at most.

    Memory is what they take: arrays are made for the most there can be, of which what is not written costs nothing.
    """
    first = most.cumsum() - most
    rows, images, weights = (np.empty((most.sum(), d)), np.empty(most.sum(), np.int32), np.empty(most.sum()))
    counts = np.zeros(len(most), np.int64)
    for unit, cells, image, weight in parts:
        order, new = np.argsort(cells, kind="stable"), np.bincount(cells, minlength=len(most))
        starts = np.repeat(first + counts - (new.cumsum() - new), new) + np.arange(len(cells))
        rows[starts], images[starts], weights[starts] = unit[order], image[order], weight[order]
        counts += new
    for array in (rows, images, weights):
        filled = 0
        for low, count in zip(first.tolist(), counts.tolist(), strict=True):
            for start in range(0, count, MOVED):  # in blocks, as numpy copies what overlaps
                block = slice(start, min(count, start + MOVED))
                array[filled + block.start : filled + block.stop] = array[low + block.start : low + block.stop]
            filled += count
        array.resize((filled, *array.shape[1:]), refcheck=False)
    return rows, images, weights, counts


def lengths(rows: Tensor) -> Tensor:
    """Norms along the last dimension, on the CPU; rows whose squares may under- or overflow are brought to scale 1
    before, by a power of two each."""
    rows = rows.cpu()
    norms = rows.norm(dim=-1)
    extreme = ~((norms > 1e-140) & (norms < 1e140)) & (rows.abs() @ rows.new_ones(rows.shape[-1]) != 0)
    if bool(extreme.any()):
        part = rows[extreme].numpy()
        exponents = np.frexp(np.abs(part).max(axis=-1, initial=0.0))[1]
        scaled = np.linalg.norm(np.ldexp(part, -exponents[:, None]), axis=-1)
        norms[extreme] = torch.from_numpy(np.ldexp(scaled, exponents))
    return norms


def embedding_errors(responses: Responses, where: slice, raw: Tensor) -> Tensor:
    """(b, K): how far the embedded rows B x may be off, computed in float64 from `raw` patch rows x (b, K, h).

    The terms b_rj x_j of a coordinate may be far larger than their sum, as where whitening takes a mean off; in
    whatever order they are added, it is off by (h + 1)ε Σ_j |b_rj||x_j|, the row by no more than all coordinates are.

    Contrast normalisation q / D(q), D² = ‖q‖²/s + contrast, of a centred patch of s pixels, |pixel| <= M, is rounded
    before. Differences from the first pixel, up to 2M, are off by 2εM, their mean by 2sεM, and taking it off rounds by
    2εM: q is off by (2s + 4)εM√s; the map has a derivative of at most 1/D <= 1/√contrast; and D and the quotient are
    off by (s/2 + 7)ε of the result.
    """
    spec, basis = responses.embedding.spec, responses.embedding.basis
    errors = raw.abs() @ ((basis.shape[1] + 1) * UNIT * basis.abs().sum(dim=0))
    if spec.contrast is not None:
        s = basis.shape[1] - spec.constant
        largest = responses.images[where].double().abs().flatten(1).amax(dim=1).cpu()[:, None]
        off = (2 * s + 4) * (s / spec.contrast) ** 0.5 * largest + (s / 2 + 7) * lengths(raw[..., :s])
        errors = errors + UNIT * float(basis[:, :s].norm()) * off
    return torch.where(errors > 0, ROUND_UP * errors + SMALLEST_NORMAL, 0.0)


def merge(rows: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Groups of equal rows of one cell: a member of each, and the group of each row."""
    rows += 0.0  # -0 becomes 0
    order = np.argsort(_hashes(rows.view(np.uint64), cells), kind="stable")
    new = np.ones(len(rows), dtype=bool)
    new[1:] = cells[order[1:]] != cells[order[:-1]]
    for column in rows.T:
        new[1:] |= column[order[1:]] != column[order[:-1]]
    member = np.empty(len(rows), np.int64)
    member[order] = np.cumsum(new) - 1
    return order[new], member


@njit(cache=True)
def _hashes(bits, cells):
    """(N,) uint64: equal for equal rows of one cell, and hardly ever otherwise (then they are not merged)."""
    out = np.empty(len(bits), np.uint64)
    for k in range(len(bits)):
        value = np.uint64(cells[k]) + np.uint64(0x9E3779B97F4A7C15)
        for j in range(bits.shape[1]):
            value = (value ^ bits[k, j]) * np.uint64(0xFF51AFD7ED558CCD)
            value ^= value >> np.uint64(33)
        out[k] = value
    return out
