"""The distinct patch rows of a problem, gathered once: what changes from call to call are the charges alone."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from scipy.sparse import csr_array
from torch import Tensor

from convcvx.budget import NEVER
from convcvx.errors import InputError
from convcvx.oracles._row_tree import Division
from convcvx.patches import RANK_TOLERANCE
from convcvx.responses import Responses

MAX_BYTES = 8 << 30
"""What a rigorous oracle may take for patch rows and charges."""
UNIT = 2.0**-53
"""Unit roundoff of float64."""
CHUNK = 256
"""Images unrolled at once."""
SAMPLE = 256
"""Images from which the share of patches that are not zero is estimated."""


@dataclass(frozen=True)
class PatchRows:
    """Non-zero patch rows as unit vectors of the patch subspace, equal ones of a pooling cell merged.

    Attributes
    ----------
    rows : ndarray (N, d) float64
        Sorted so that the bundles of `division` are consecutive. Positive multiples of one another are equal here.
    cells : ndarray (N,) int32
    incidence : csr_array (N, n)
        Σ w_pk ‖x_ik‖ over the patches of image i that are this row: charges are incidence @ Z.
    remainders : ndarray (n,)
        By image, Σ w_pk ‖what x_ik has outside the subspace‖ plus what rounding can change, a share of w_pk ‖x_ik‖:
        ε for each term of the sums that make the row's coordinates, and its charge out of those of its members.
    n_cells : int
    frame : Tensor (d, r) float64
        Orthonormal rows spanning the numerical row space.
    division : Division
    """

    rows: np.ndarray
    cells: np.ndarray
    incidence: csr_array
    remainders: np.ndarray
    n_cells: int
    frame: Tensor
    division: Division

    @classmethod
    def of(cls, responses: Responses) -> PatchRows:
        """Gather the rows; the latest are kept, for the many dual points of one training run.

        Raises
        ------
        InputError
            When they and their charges would not fit in `MAX_BYTES`.
        """
        global _latest
        images = responses.images
        version = getattr(images, "_version", 0)  # those in a file do not change
        if _latest is not None:
            known, known_version, embedding, pooling, rows = _latest
            same = embedding is responses.embedding and pooling == responses.pooling
            if known() is images and known_version == version and same:
                return rows
        _latest = None  # before as much again is gathered
        rows = cls._gather(responses)
        _latest = weakref.ref(images), version, responses.embedding, responses.pooling, rows
        return rows

    @classmethod
    def _gather(cls, responses: Responses) -> PatchRows:
        responses = responses.to(dtype=torch.float64)
        basis, size = responses.embedding.basis, responses.embedding.dim
        moment, chunks = torch.zeros(size, size, dtype=torch.float64), range(0, responses.n, CHUNK)
        for start in chunks:
            rows = responses.rows(slice(start, start + CHUNK)).cpu().flatten(0, 1) @ basis.T
            moment += rows.T @ rows
        frame = span(moment)

        pool = responses.pooling.matrix(*responses.map_size)
        pool = torch.eye(responses.n_positions, dtype=torch.float64) if pool is None else pool
        cells, positions = pool.nonzero(as_tuple=True)  # a position may lie in several cells
        weights = pool[cells, positions]
        remainders, parts = torch.zeros(responses.n, dtype=torch.float64), []
        for start in chunks:
            rows = responses.rows(slice(start, start + CHUNK)).cpu() @ basis.T  # (b, K, r)
            coordinates = rows @ frame.T
            outside = (rows - coordinates @ frame).norm(dim=2)
            norms = coordinates.norm(dim=2)
            remainders[start : start + CHUNK] = outside[:, positions] @ weights
            inside, entry = (norms[:, positions] > 0).nonzero(as_tuple=True)
            where = positions[entry]
            length = norms[inside, where]
            part = coordinates[inside, where] / length[:, None], cells[entry].int(), (inside + start).int()
            parts.append([tensor.numpy() for tensor in (*part, weights[entry] * length)])
        unit, slots, image, weight = (np.concatenate(group) for group in zip(*parts, strict=True))
        del parts
        first, member = merge(unit, slots)
        terms = np.bincount(member)[member] + (basis.shape[1] + 2 * size + 8)
        remainders += torch.as_tensor(np.bincount(image, UNIT * weight * terms, responses.n))
        unit, slots = unit[first], slots[first]
        division = Division.of(unit, slots)
        place = np.empty(len(unit), np.int32)
        place[division.order] = np.arange(len(unit), dtype=np.int32)
        incidence = csr_array((weight, (place[member], image)), shape=(len(unit), responses.n))
        incidence.sum_duplicates()
        unit, slots = unit[division.order], slots[division.order]
        return cls(unit, slots, incidence, remainders.numpy(), responses.n_cells, frame, division.sorted())

    @staticmethod
    def size(responses: Responses, n_outputs: int) -> int:
        """Bytes that the rows and their charges take, about, judged by the first images."""
        sample = responses.to(images=responses.images[:SAMPLE]).until(NEVER)
        share = float((sample.rows(slice(0, SAMPLE)) != 0).any(dim=2).double().mean())
        pool = responses.pooling.matrix(*responses.map_size)
        entries = responses.n_positions if pool is None else int(pool.count_nonzero())
        return int(8 * share * responses.n * entries * (4 * responses.dim + 3 * n_outputs + 8))


def span(moment: Tensor) -> Tensor:
    """(d, r) orthonormal rows spanning the numerical row space of rows with second `moment` (r, r)."""
    eigenvalues, vectors = torch.linalg.eigh(moment)
    kept = eigenvalues > RANK_TOLERANCE * eigenvalues[-1].clamp_min(1e-300)
    return vectors[:, kept].T.flip(0).contiguous()


_latest: tuple | None = None
"""What was gathered last: images (a weak reference), their version, embedding, pooling, rows."""


def check_size(responses: Responses, n_outputs: int) -> None:
    """Raise `InputError` for more patch rows than a rigorous oracle may gather."""
    if (size := PatchRows.size(responses, n_outputs)) > MAX_BYTES:
        raise InputError(
            f"oracle needs all patches at once, {size / 2**30:.0f} GiB of them; use fewer images, a coarser "
            "stride, or oracle='local'"
        )


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
