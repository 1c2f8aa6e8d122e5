"""A proved bound on max g that takes no search: what patches of these lengths can do at most.

For the basis B of the embedding, in the columns of the pixels P and of the constant b, and a unit filter u,
|x·uB| <= ‖x‖ ‖P‖ + ‖b‖ for the pixels x of a patch and the largest singular value ‖P‖, so that

    g(u) = ‖Σ_i φ(x_i; u) Z_iᵀ‖  <=  Σ_i ‖φ(x_i; u)‖ ‖Z_i‖  <=  Σ_i ‖Z_i‖ Σ_pk w_pk (‖x_ik‖ ‖P‖ + ‖b‖)^d

for an activation of degree d.

A weak bound: nothing cancels. But the lengths are those by which the rounding of every objective is judged, so that it
costs nothing where a certificate is made; and any bound on max g is a lower bound above zero on the optimum.

**Rounding.** A length of h entries, its products with weights and ‖P‖, and sums over K positions and n images round
h + K + n + 16 times at most, all terms being >= 0. A patch whose contrast is normalised, q / D with D² >= ‖q‖²/s, is
not longer than √s whatever was computed. What Z itself may be off by counts like Z.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from convcvx.budget import NEVER
from convcvx.oracles.charged_rows import at_scale_one, raised
from convcvx.patches.spec import FAINT
from convcvx.problem import Problem
from convcvx.rounding import SAFE, UNIT, largest, top_eigenvalue

ORTHONORMAL = 1e-6
"""Share by which a bound on an eigenvalue may be above what that is at least, for no other to be looked for."""
NAME = "lengths"
"""By which certificates call this bound."""


def bound_by_lengths(problem: Problem, dual_point: torch.Tensor) -> float:
    """A true upper bound on max g over all filters at `dual_point` (n, c), whatever the deadline of `problem`.

    One pass over the patches where their lengths are not known yet; infinite where they are no numbers.
    """
    responses = problem.responses.until(NEVER)
    size = responses.embedding.basis.shape[1]
    pixels = size - responses.embedding.spec.constant
    basis, unit = at_scale_one(responses.embedding.basis.numpy())
    along, constant = _norm(torch.from_numpy(basis[:, :pixels])), float(np.linalg.norm(basis[:, pixels:]))
    heights = responses.reach_of(along, constant)
    scaled, exponent = at_scale_one(dual_point.numpy())
    sizes = np.linalg.norm(scaled, axis=1) + np.ldexp(problem.dual_error(dual_point).numpy(), -exponent)
    mass = float(heights.numpy() @ (sizes + problem.n_outputs**0.5 * FAINT))
    degree = responses.activation.degree
    roundings = degree * (size + responses.n_positions + problem.n + problem.n_outputs + 16)
    return raised(largest(mass * (1 + roundings * UNIT)) * SAFE, exponent + degree * unit)


def _norm(basis: torch.Tensor) -> float:
    """At least the largest singular value of a basis (r, h) with entries of one at most."""
    gram = basis @ basis.T
    rounded = (basis.shape[1] + 4) * UNIT * float(gram.diagonal().sum())
    # No eigenvalue is above the largest sum of a row: of orthonormal rows that is all but the largest of them.
    highest = float(gram.abs().sum(dim=1).max()) * (1 + len(gram) * UNIT)
    if not highest <= (1 + ORTHONORMAL) * float(gram.diagonal().max()):
        highest = top_eigenvalue(gram)
    return math.sqrt(highest + rounded) * SAFE
