"""The response of a unit filter as a polynomial of degree two in it, and a tail: features that know no filter.

For a row x of length l, a unit filter u in R^d and t = x·u / l, which lies between -1 and 1,

    (x·u)_+ = ½ l (t + |t|)      and      |t| = t² + 1/8 + τ,   |τ| <= 1/8,

with equality at t = 0, ±½ and ±1: no polynomial of degree two is nearer. With l t² = <x xᵀ/l, u uᵀ>, the multiple of
the identity split off, the pooled response is

    φ_p(x_i; u) = a_ip + b_ip·u + q_ip·v(u) + τ_ip m_ip/16,      |τ_ip| <= 1,   ‖u‖ = ‖v(u)‖ = 1,

    a_ip = ½ Σ_k w_pk (l_ik/8 + ‖x_ik‖²/(l_ik d)),    b_ip = ½ Σ_k w_pk x_ik,    m_ip = Σ_k w_pk l_ik,
    q_ip = ½ (1 - 1/d)^½ Σ_k w_pk svec(x_ik x_ikᵀ/l_ik - ‖x_ik‖²/(l_ik d) I),    v(u) = svec(uuᵀ - I/d) / (1 - 1/d)^½,

as ‖uuᵀ - I/d‖_F² = 1 - 1/d. All of it holds for any l_ik >= ‖x_ik‖: the computed length, rounded up.

**Another activation** of degree 1 has σ(t) = ½ (1 + slope) t + ½ (1 - slope) |t|: b counts 1 + slope times as much,
a, q and the tail 1 - slope times.

**The square** has features without a tail, φ_p(x_i; u) = a_ip + q_ip·v(u) for

    a_ip = Σ_k w_pk ‖x_ik‖²/d,    q_ip = (1 - 1/d)^½ Σ_k w_pk svec(x_ik x_ikᵀ - ‖x_ik‖²/d I),

and at degree one lies between 0 and m_ip, here and below Σ_k w_pk l_ik². A row off by e changes a square by no more
than e (2 l + e).

**The maximum** over the k positions of a cell lies above their average, with x̄ the mean row and for some l by no more
than

    |p|⁻¹ Σ_k ((x_l·u)_+ - (x_k·u)_+)  <=  |p|⁻¹ Σ_k ‖x_l - x_k‖  <=  (‖x_l - x̄‖² + |p|⁻¹ Σ_k ‖x_k - x̄‖²)^½,

and no more than (1 - 1/|p|) ‖x_l‖ where no response is negative: between 0 and `spread`, of which half is added to a,
and half to the tail.

**Rounding.** A computed row is off by `embedding_errors`, and φ by no more than these, as σ is 1-Lipschitz. A
feature is a sum over the K positions, the trace one over d entries; each term rounds at most 16 times. The moduli of
a, b and q add up to (9/16 + 1/2 + 1) m at most, so that what rounding changes of a_ip + b_ip·u + q_ip·v is at most
3 (K + d + 16) ε m_ip; of a negative slope 1 - slope times that, as which `reach` is raised.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from convcvx.activations import RELU
from convcvx.oracles._patch_rows import ROUND_UP, embedding_errors, lengths
from convcvx.responses.passes import Responses
from convcvx.rounding import SMALLEST_NORMAL, UNIT

CHUNK_BYTES = 32 << 20
"""Bytes of rows and features in flight: fewer would cost more in calls, more would leave the cache."""


@dataclass(frozen=True)
class Lifted:
    """Features of some images.

    Attributes
    ----------
    where : slice
        Which.
    features : Tensor (b, P, 1 + d + d(d+1)/2) float64
        a, b and q; those of degree one alone have no q.
    tails : Tensor (b, P)
        At least m_ip/16; m_ip/4 without q, as then |t| = 1/2 + τ with |τ| <= 1/2. Of the ReLU.
    reach : Tensor (b,)
        At least Σ_pk w_pk ‖x_ik‖, of exact rows; of squares Σ_pk w_pk ‖x_ik‖².
    errors : Tensor (b,)
        At least what the polynomial, as it is computed, is off by from that of exact rows, over all cells.
    """

    where: slice
    features: Tensor
    tails: Tensor
    reach: Tensor
    errors: Tensor


def widths(dim: int, degree: int) -> list[int]:
    """Entries of a, b and q: each is multiplied by a vector of norm one at most."""
    return [1, dim, dim * (dim + 1) // 2][: degree + 1]


def lifted(responses: Responses, degree: int = 2) -> Iterator[Lifted]:
    """The features of all images, some at a time; raises `OutOfTime` once the deadline of `responses` has passed."""
    responses = responses.to(dtype=torch.float64)
    basis, dim, positions = responses.embedding.basis, responses.dim, responses.n_positions
    pool = responses.pooling.average.matrix(*responses.map_size)
    pool = torch.eye(positions, dtype=torch.float64) if pool is None else pool
    width = sum(widths(dim, degree))
    image_bytes = 8 * (positions * (2 * basis.shape[1] + 3 * dim) + len(pool) * (width + dim * dim))
    size = max(1, CHUNK_BYTES // image_bytes)
    cells = [(weights.nonzero()[:, 0], weights[weights != 0]) for weights in pool]
    reach = responses.pooling.reach(*responses.map_size)
    share = 3 * (positions + dim + 16) * UNIT
    odd, even = 2 * responses.activation.odd_part, 2 * responses.activation.even_part
    for start in range(0, responses.n, size):
        where = slice(start, min(start + size, responses.n))
        raw = responses.rows(where).cpu()
        rows = raw @ basis.T  # (b, K, r)
        norms = lengths(rows) * (1 + (dim + 4) * UNIT)
        off = embedding_errors(responses, where, raw)
        if responses.activation.degree == 2:
            yield _squared(where, rows, norms, off, pool, cells, reach, degree)
            continue
        off = off @ reach
        mass = norms @ pool.T * (1 + (positions + 4) * UNIT)  # (b, P)
        features = _features(rows, norms, cells, dim, degree) if degree == 2 else _linear(rows, mass, pool)
        total, tails = mass.sum(dim=1) * ROUND_UP, mass / (16 if degree == 2 else 4)
        if responses.activation != RELU:
            features[..., 1 : 1 + dim] *= odd
            features[..., 1 + dim :] *= even
            features[..., 0] *= even
            total, tails = total * max(1.0, even) * ROUND_UP, tails * even * ROUND_UP
        if responses.pooling.maximum:
            half = 0.5 * _spread(rows, norms, cells, negative=responses.activation.slope > 0)
            features[..., 0] += half
            tails, total = (tails + half) * ROUND_UP, total + 2 * half.sum(dim=1) * ROUND_UP
        yield Lifted(where, features, tails, total + off, ROUND_UP * (share * total + off))


def _spread(rows: Tensor, norms: Tensor, cells: list[tuple[Tensor, Tensor]], *, negative: bool) -> Tensor:
    """(b, P): at least how far the maximum over a cell lies above its average, for any unit filter; `negative` if
    responses may be."""
    dim, spreads = rows.shape[2], []
    for positions, _ in cells:
        inside, heights, count = rows[:, positions], norms[:, positions], len(positions)
        squares = (inside - inside.mean(dim=1, keepdim=True)).square().sum(dim=2)
        apart = (squares + squares.mean(dim=1, keepdim=True)).sqrt() * (1 + (dim + count + 16) * UNIT)
        apart += (count + 8) * UNIT * heights.amax(dim=1, keepdim=True)  # what the mean row is off
        above_zero = (1 - 1 / count) * heights * (1 + 4 * UNIT)
        spreads.append((apart if negative else torch.minimum(apart, above_zero)).amax(dim=1))
    return torch.stack(spreads, dim=1) + SMALLEST_NORMAL**0.5


def _linear(rows: Tensor, mass: Tensor, pool: Tensor) -> Tensor:
    """(b, P, 1 + d): (x·u)_+ = l/4 + x·u/2 and a tail."""
    return torch.cat([mass[..., None] / 4, 0.5 * (pool @ rows)], dim=2)


def _features(rows: Tensor, norms: Tensor, cells: list[tuple[Tensor, Tensor]], dim: int, degree: int) -> Tensor:
    """(b, P, 1 + d + d(d+1)/2), a cell after the other."""
    out = rows.new_empty(len(rows), len(cells), sum(widths(dim, degree)))
    for cell, (positions, weights) in enumerate(cells):
        inside, heights = rows[:, positions], norms[:, positions]
        if len(positions) == rows.shape[1]:
            inside, heights = rows, norms
        unit = inside / torch.where(heights > 0, heights, 1.0)[..., None]
        weighed = inside * weights[:, None]
        mean, packed = _packed(weighed, unit)
        out[:, cell, 0] = 0.5 * (heights @ weights / 8 + mean)
        out[:, cell, 1 : 1 + dim] = 0.5 * weighed.sum(dim=1)
        out[:, cell, 1 + dim :] = 0.5 * packed
    return out


def _packed(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Of S = Σ_k left_k right_kᵀ, which is symmetric: tr S / d (b,), (1 - 1/d)^½ svec(S - tr S / d I) (b, d(d+1)/2)."""
    dim = left.shape[2]
    upper, lower = torch.triu_indices(dim, dim)
    scale = left.new_full((len(upper),), 2.0).masked_fill_(upper == lower, 1.0).sqrt() * (1 - 1 / dim) ** 0.5
    quadratic = left.transpose(1, 2) @ right  # (b, d, d)
    mean = quadratic.diagonal(dim1=1, dim2=2).sum(dim=1) / dim
    quadratic.diagonal(dim1=1, dim2=2).sub_(mean[:, None])
    # Symmetric but for rounding; to gather either half takes a fraction of the time of adding the transpose.
    flat, places = quadratic.flatten(1), (upper * dim + lower, lower * dim + upper)
    one, other = (flat.gather(1, place.expand(len(flat), -1)) for place in places)
    return mean, one.add_(other).mul_(0.5 * scale)


def _squared(
    where: slice,
    rows: Tensor,
    norms: Tensor,
    off: Tensor,
    pool: Tensor,
    cells: list[tuple[Tensor, Tensor]],
    reach: Tensor,
    degree: int,
) -> Lifted:
    """The features of squares, of rows (b, K, d) that are `off` (b, K) at most."""
    dim, positions = rows.shape[2], rows.shape[1]
    mass = norms.square() @ pool.T * (1 + (positions + 8) * UNIT)  # (b, P)
    features, tails = rows.new_zeros(len(rows), len(cells), sum(widths(dim, degree))), torch.zeros_like(mass)
    if degree == 1:
        features[..., 0], tails = 0.5 * mass, 0.5 * mass
    else:
        for cell, (inside, weights) in enumerate(cells):
            found = _packed(rows[:, inside] * weights[:, None], rows[:, inside])
            features[:, cell, 0], features[:, cell, 1 + dim :] = found
    wrong = (off * (2 * norms + off)) @ reach
    total = mass.sum(dim=1) * ROUND_UP
    errors = ROUND_UP * (3 * (positions + dim + 16) * UNIT * total + wrong)
    return Lifted(where, features, tails, total + wrong, errors)
