"""The cones of activation patterns that a finite convex program runs over: all of them, or a sample."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from convcvx.arrangements.cells import Cell, cells, count_bound, facets, sample_patterns, unpack_patterns
from convcvx.errors import InputError
from convcvx.patches import Moments
from convcvx.problem import Problem

WARN_ENTRIES = 5 * 10**6
"""Coefficients |D|·n·P·c·r of a program that takes about a minute: larger ones are warned of."""
MAX_ENTRIES = 5 * 10**7
"""Coefficients beyond which a program is refused: more than memory or patience hold."""


@dataclass(frozen=True)
class Cone:
    """One activation cone: {u : normals u ≥ 0}, and φ_p(x_i; u) = design[i, p]·u there."""

    normals: np.ndarray
    design: np.ndarray


@dataclass(frozen=True)
class Cones:
    """Activation cones of a problem, in coordinates v of the patch subspace: filter `v @ frame` (d, r)."""

    cones: list[Cone]
    frame: Tensor

    @classmethod
    def all(cls, problem: Problem) -> Cones:
        """Every cell of the arrangement: the program is the training problem itself.

        Raises
        ------
        InputError
            When the program would be hopelessly large; a warning comes before.
        """
        rows, unit, frame = _rows(problem)
        check_size(problem, count_bound(len(unit), len(frame)), len(frame))
        listed = cells(unit) if len(unit) else iter(())
        return cls(list(_cones(problem, rows, unit, listed)), frame)

    @classmethod
    def sample(cls, problem: Problem, n: int, seed: int = 0) -> Cones:
        """The cells of `n` Gaussian filters: the optimum over them is an upper bound."""
        rows, unit, frame = _rows(problem)
        packed, directions = sample_patterns(unit, n, seed)
        check_size(problem, len(directions), len(frame))
        drawn = map(Cell, unpack_patterns(packed, len(unit)), directions)
        return cls(list(_cones(problem, rows, unit, drawn)), frame)


def check_size(problem: Problem, n_cones: int, dim: int) -> None:
    """Warn before a program that takes minutes; raise `InputError` for one that would not end."""
    entries = n_cones * problem.n * problem.responses.n_cells * problem.n_outputs * dim
    size = f"{n_cones:,} activation cones times {problem.n:,} images: {float(entries):.1e} coefficients"
    if entries > MAX_ENTRIES:
        raise InputError(
            f"solver='copositive' would need {size}, above {float(MAX_ENTRIES):.0e}; use solver='sliding-fw', fewer "
            "images, larger strides or a lower rank"
        )
    if entries > WARN_ENTRIES:
        warnings.warn(f"solver='copositive' needs {size}; this takes minutes to hours", stacklevel=3)


def _rows(problem: Problem) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """Patch rows (n, K, d) in coordinates of their subspace, the distinct unit rows (N, d) among them, the frame."""
    responses = problem.responses
    raw = torch.cat([responses.rows(slice(i, i + 1024)).double().cpu() for i in range(0, responses.n, 1024)])
    rows = raw @ responses.embedding.basis.T
    frame = Moments.of_rows(rows.flatten(0, 1)).span
    coordinates = (rows @ frame.T).numpy()
    flat = coordinates.reshape(rows.shape[0] * rows.shape[1], len(frame))
    norms = np.linalg.norm(flat, axis=1)
    unit = flat[norms > 0] / norms[norms > 0, None]
    return coordinates, np.unique(unit, axis=0), frame


def _cones(problem: Problem, rows: np.ndarray, unit: np.ndarray, listed: Iterator[Cell]) -> Iterator[Cone]:
    pool = problem.responses.pooling.matrix(*problem.responses.map_size)
    weights = np.eye(rows.shape[1]) if pool is None else pool.numpy()
    for cell in listed:
        problem.deadline.check()
        active = rows * (rows @ cell.interior > 0)[:, :, None]
        yield Cone(facets(unit, cell), np.einsum("pk,nkd->npd", weights, active))
