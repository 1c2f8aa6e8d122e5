"""Networks of squares: their g as quadratic forms in the filter, and what eigenvalues say of its maximum.

With σ(t) = t² the pooled responses of a unit filter are quadratic forms, φ_p(x_i; u) = uᵀ (Σ_k w_pk x_ik x_ikᵀ) u, so

    G(u)_pc = uᵀ A_pc u,   A_pc = Σ_ik w_pk Z_ic x_ik x_ikᵀ (r, r) symmetric,     g(u)² = Σ_pc (uᵀ A_pc u)².

*One form*: g(u) = |uᵀ A u|, and max g is the largest modulus of an eigenvalue of A, at any rank. So it is for one cell
and one output, and for one cell and two classes, whose Z are each other's negatives.

*Several forms*: max g is the spectral norm of the tensor A (P·c, r, r), NP-hard to compute (Hillar & Lim, *J. ACM*
2013). Each of its two unfoldings bounds it by a singular value:

    g(u)² = Σ_pc (uᵀ A_pc u)²  <=  Σ_pc ‖A_pc u‖²  <=  λ_max(Σ_pc A_pc²)                     (P·c·r, r),
    g(u)  = ‖Σ_rs A_rs u_r u_s‖  <=  the largest singular value on symmetric matrices uuᵀ     (P·c, r(r+1)/2),

the second with the multiple of the identity in uuᵀ split off: the bound of `convcvx.oracles.polynomial`, which has no
tail here. The first is an equality for one form, the second where one matrix of rank one responds most.

**Rounding.** A_pc is put together from the blocks a and q of `convcvx.oracles.lifted`, A = a I + mat(q) / (1 - 1/r)^½:
each entry rounds eight times at most, of moduli that add up to √r |a| + √2 ‖q‖ for r >= 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convcvx.oracles.lifted import lifted, widths
from convcvx.problem import Problem
from convcvx.rounding import UNIT


def is_one_form(problem: Problem) -> bool:
    """Whether g(u) = |uᵀ A u| for some A, at the residuals of networks and at points near the best."""
    if problem.responses.n_cells > 1:
        return False
    classes = problem.loss.name in ("squared", "cross-entropy") and problem.intercept
    two = problem.n_outputs == 2 and bool((problem.targets.sum(dim=1) == 1).all())
    return problem.n_outputs == 1 or (classes and two)


def forms(problem: Problem, dual_point: Tensor) -> Tensor:
    """A (P, c, r, r) float64 at Z = `dual_point` (n, c): one pass over all patches."""
    dim, n_cells = problem.responses.dim, problem.responses.n_cells
    total = torch.zeros(dual_point.shape[1], n_cells * sum(widths(dim, 2)), dtype=torch.float64)
    for part in lifted(problem.responses):
        total += dual_point[part.where].double().T @ part.features.flatten(1)
    constant, _, quadratic = total.unflatten(1, (n_cells, -1)).transpose(0, 1).split(widths(dim, 2), dim=2)
    return put_together(constant, quadratic)


def put_together(constant: Tensor, quadratic: Tensor) -> Tensor:
    """A (P, c, r, r) of the blocks a (P, c, 1) and q (P, c, r(r+1)/2)."""
    dim = int((2 * quadratic.shape[2]) ** 0.5)  # r² <= r(r+1) < (r+1)²
    upper, lower = torch.triu_indices(dim, dim)
    made = torch.diag_embed(constant.expand(-1, -1, dim)).contiguous()
    if dim > 1:  # else q is empty of meaning, and zero
        scale = quadratic.new_full((len(upper),), 2.0).masked_fill_(upper == lower, 1.0).sqrt() * (1 - 1 / dim) ** 0.5
        entries = quadratic / scale
        made[..., upper, lower] += entries
        off = upper != lower
        made[..., lower[off], upper[off]] += entries[..., off]
    return made


def rounded_by(constant: Tensor, quadratic: Tensor) -> float:
    """At least the Frobenius norm of what rounding changed of `put_together`."""
    dim = int((2 * quadratic.shape[2]) ** 0.5)
    return 16 * UNIT * (dim**0.5 * float(constant.norm()) + 2**0.5 * float(quadratic.norm()))
