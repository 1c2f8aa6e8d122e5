"""Activation patterns 1[Xu >= 0]: the cells into which the rows of X cut the space of filters.

Enumeration is a depth-first tree (Rada and Černý 2018) that branches where a row's hyperplane cuts the cell at hand.
Instead of one linear program a branching, the cell carries its extreme rays (double description), which say at once on
which sides it lies and give its interior point, and the list of the rows that still cut it. The tree has as many leaves
as there are cells and never a dead end, so time is proportional to the output and memory to the depth; cells come in
batches, so that they need never all be held.

References
----------
Rada, Černý, SIAM J. Discrete Math. 32 (2018) 455-473; Avis, Fukuda, Discrete Appl. Math. 65 (1996) 21-46;
Fukuda, Prodon 1996 (double description); Zaslavsky 1975 (deletion and restriction, for the count);
Sahiner et al., ICLR 2021 (the patterns of the convex program).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import comb

import numpy as np

from convcvx.arrangements._rays import TOLERANCE, Bits, walk
from convcvx.errors import InputError, check_count

BATCH_BYTES = 8 << 20
"""Bytes of the patterns and interiors in one batch of cells, about: a batch stays in the cache, and calls are few."""
SAMPLED_PRODUCTS = 1 << 23
"""Products of rows and directions that `sample_patterns` holds at once: 64 MiB of float64."""


@dataclass(frozen=True)
class Cell:
    """One cell: all filters with the same activation pattern.

    Attributes
    ----------
    pattern : ndarray (N,) bool
        1[x_k·u >= 0]; a zero row is always active.
    interior : ndarray (h,) float64
        A unit vector strictly inside: x_k·u differs from zero for every non-zero row.
    """

    pattern: np.ndarray
    interior: np.ndarray


@dataclass(frozen=True)
class Cells:
    """A batch of cells.

    Attributes
    ----------
    packed : ndarray (q, ceil(N / 8)) uint8
        Bits of the patterns; `unpack_patterns` gives them back.
    interiors : ndarray (q, h) float64
    overshoot : float
        A unit vector of the row space that lies in none of the cells listed so far, but in the tree
        above them, has the signs of one of them up to rows with |x_k·u| <= overshoot·‖x_k‖. A few
        roundings, unless rows are degenerate almost but not quite.
    """

    packed: np.ndarray
    interiors: np.ndarray
    overshoot: float = 0.0


def count_bound(n_rows: int, rank: int) -> int:
    """2 Σ_{k<r} C(N-1, k): the most cells that N rows of rank r can have, attained in general position.

    >>> count_bound(5, 2), count_bound(2000, 3)
    (10, 3998002)
    """
    if n_rows == 0 or rank == 0:
        return 1
    return 2 * sum(comb(n_rows - 1, k) for k in range(rank))


def cells(rows: np.ndarray) -> Iterator[Cell]:
    """Yield every cell of the arrangement once.

    Parameters
    ----------
    rows : (N, h) array
        Zero, repeated, antipodal and linearly dependent rows are all allowed. The cost is that of their rank.

    Examples
    --------
    >>> sorted(cell.pattern.tolist() for cell in cells(np.eye(2)))
    [[False, False], [False, True], [True, False], [True, True]]
    """
    for batch in cell_batches(rows):
        yield from map(Cell, unpack_patterns(batch.packed, len(rows)), batch.interiors)


def cell_batches(rows: np.ndarray, size: int | None = None) -> Iterator[Cells]:
    """The same, at most `size` cells at a time (those that take `BATCH_BYTES`), patterns packed: about a microsecond
    a cell.

    Antipodal cells come in consecutive batches, the second of them with the opposite patterns.
    """
    lines = _Lines.of(rows)
    bits = lines.bits()
    if len(lines.normals) == 0:
        yield Cells(bits.blank[None], np.zeros((1, np.shape(rows)[1])))
        return
    if size is None:
        size = max(1, BATCH_BYTES // (len(bits.blank) + 8 * np.shape(rows)[1]))
    check_count("size", size)
    opposite = np.packbits(lines.sign != 0)
    for packed, centres, overshoot in walk(lines.normals, bits, size):
        interiors = centres @ lines.frame
        interiors /= np.linalg.norm(interiors, axis=1, keepdims=True)
        overshoot = lines.scale * (overshoot + lines.spread)
        yield Cells(packed, interiors, overshoot)
        yield Cells(packed ^ opposite, -interiors, overshoot)


def facets(rows: np.ndarray, cell: Cell) -> np.ndarray:
    """(m, h) the inward normals of a cell that bound it: signed rows F with closure {u : F u >= 0}.

    They are the extreme rays of the cone of all signed rows, hence, scaled to height 1 over an interior point, the
    vertices of their convex hull. For rows that span R^h, none of them zero.
    """
    signed = np.where(cell.pattern, 1.0, -1.0)[:, None] * rows
    dim = rows.shape[1]
    if dim == 1:
        return signed[:1]
    points = signed / (signed @ cell.interior)[:, None] @ complement(cell.interior).T
    if dim == 2:
        return signed[[int(points[:, 0].argmin()), int(points[:, 0].argmax())]]
    from scipy.spatial import ConvexHull  # here: `import convcvx` does not wait for it

    return signed[ConvexHull(points, qhull_options="QJ").vertices]


def count_cells(rows: np.ndarray) -> int:
    """The number of cells, without visiting them: O(N^(r-1) log N) time, O(N) memory a rank.

    Adding row k cuts as many cells as there are cells on its own hyperplane, cut by the rows before it.
    """
    return _count(_Lines.of(rows).normals)


def sample_patterns(rows: np.ndarray, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Patterns of `n` Gaussian directions, each pattern once.

    Returns
    -------
    packed : ndarray (q, ceil(N / 8)) uint8, q <= n
        Bits of the patterns; `unpack_patterns` gives them back.
    directions : ndarray (q, h) float64
        A unit vector with that pattern each, in the order they were drawn.
    """
    rows = _checked(rows)
    check_count("n", n)
    directions = np.random.default_rng(seed).standard_normal((n, rows.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    packed = np.empty((n, -(-len(rows) // 8)), dtype=np.uint8)
    step = max(1, SAMPLED_PRODUCTS // max(1, len(rows)))
    for i in range(0, n, step):
        packed[i : i + step] = np.packbits(directions[i : i + step] @ rows.T >= 0, axis=1)
    if packed.shape[1] == 0:
        return packed[:1], directions[:1]
    _, first = np.unique(packed.view(np.dtype((np.void, packed.shape[1]))).ravel(), return_index=True)
    first.sort()
    return packed[first], directions[first]


def unpack_patterns(packed: np.ndarray, n_rows: int) -> np.ndarray:
    """(q, ceil(N / 8)) packed bits to (q, N) bool."""
    return np.unpackbits(packed, axis=1, count=n_rows).astype(bool)


@dataclass(frozen=True)
class _Lines:
    """The distinct hyperplanes of the rows, in coordinates of their row space in which they spread evenly.

    `normals` (L, d) are unit; row k of the input is a multiple of normal `line[k]` with sign `sign[k]`
    (0 for a zero row); coordinates w stand for the vector `w @ frame` (not of the same length); `spread` is the
    largest distance of unit rows taken for parallel. A unit row is within `scale`·δ of zero on a unit vector if its
    normal is within δ of zero on the unit coordinates.
    """

    normals: np.ndarray
    line: np.ndarray
    sign: np.ndarray
    frame: np.ndarray
    spread: float = 0.0
    scale: float = 1.0

    @classmethod
    def of(cls, rows: np.ndarray) -> _Lines:
        rows = _checked(rows)
        tops = np.abs(rows).max(axis=1, initial=0.0)
        line, sign = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
        alive = np.flatnonzero(tops > 0)
        if len(alive) == 0:
            return cls(np.zeros((0, 0)), line, sign, np.zeros((0, rows.shape[1])))
        unit = rows[alive] / tops[alive, None]  # first: squares of the rows may over- or underflow
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        _, values, vectors = np.linalg.svd(unit, full_matrices=False)
        rank = int((values > TOLERANCE * values[0]).sum())
        frame = vectors[:rank] / values[:rank, None]
        unit = unit @ frame.T
        lengths = np.linalg.norm(unit, axis=1)
        unit /= lengths[:, None]
        line[alive], sign[alive], first = _group(unit)
        unit *= sign[alive][:, None]
        spread = float(np.linalg.norm(unit - unit[first][line[alive]], axis=1).max())
        return cls(unit[first], line, sign, frame, spread, float(values[0] * lengths.max()))

    def bits(self) -> Bits:
        """Where the signs of the normals stand in the packed pattern of the rows; zero rows are always active."""
        moving = np.flatnonzero(self.sign)
        moving = moving[np.argsort(self.line[moving], kind="stable")]
        start = np.searchsorted(self.line[moving], np.arange(len(self.normals) + 1))
        return Bits(start, moving, self.sign[moving] < 0, np.packbits(np.ones(len(self.line), dtype=bool)))


def _checked(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float64)
    if rows.ndim != 2:
        raise InputError(f"rows must be an (N, h) array of patch rows; got shape {rows.shape}")
    if not np.isfinite(rows).all():
        raise InputError("rows must be finite; found NaN or infinity")
    return rows


def _group(unit: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Group unit rows that are parallel within the tolerance: (group of each, sign of each, a member of
    each).

    Rows are turned to a common side of a random direction and sorted along it, so that members are
    neighbours.
    """
    probe = np.random.default_rng(0).standard_normal(unit.shape[1])
    height = unit @ probe
    sign = np.where(height < 0, -1, 1)
    turned, height = unit * sign[:, None], np.abs(height)
    group = np.full(len(unit), -1, dtype=np.int64)
    members: list[int] = []
    order = np.argsort(height, kind="stable")
    window = TOLERANCE * np.linalg.norm(probe)
    ends = np.searchsorted(height[order], height[order] + window, side="right")
    for place, k in enumerate(order):
        if group[k] < 0:
            near = order[place : ends[place]]
            near = near[(group[near] < 0) & (np.linalg.norm(turned[near] - turned[k], axis=1) <= TOLERANCE)]
            group[near] = len(members)
            members.append(int(k))
    return group, sign, np.array(members, dtype=np.int64)


def _count(normals: np.ndarray) -> int:
    """Cells of distinct hyperplanes through the origin of R^d that span it."""
    n, d = normals.shape
    if n == 0 or d == 0:
        return 1
    if d <= 2:
        return 2 * n
    total = 2
    for k in range(1, n):
        total += _count_restricted(normals[:k], normals[k])
    return total


def _count_restricted(normals: np.ndarray, normal: np.ndarray) -> int:
    """Cells that `normals` cut the hyperplane of `normal` into."""
    projected = normals @ complement(normal).T
    if projected.shape[1] == 2:  # the bulk of the work: distinct angles modulo π
        angles = np.sort(np.arctan2(projected[:, 1], projected[:, 0]) % np.pi)
        gaps = np.diff(angles, append=angles[0] + np.pi)
        return 2 * max(1, int((gaps > TOLERANCE).sum()))
    return _count(_Lines.of(projected).normals)


def complement(normal: np.ndarray) -> np.ndarray:
    """(d-1, d) orthonormal rows orthogonal to a unit vector: the other rows of its Householder reflection."""
    pivot = int(np.abs(normal).argmax())
    vector = normal.copy()
    vector[pivot] += 1.0 if normal[pivot] >= 0 else -1.0
    reflection = np.eye(len(normal)) - 2.0 * np.outer(vector, vector) / (vector @ vector)
    return np.delete(reflection, pivot, axis=0)
