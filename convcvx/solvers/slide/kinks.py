"""Kinks at which filters stay while they slide.

Where x·u = 0 the objective is not smooth. A row x whose response could only raise the loss, Z_i·V < 0, keeps a filter
on its kink, and at an optimum over few rows each filter is on the kinks of about r of them: a descent along gradients
crosses one kink after the other, back and forth, and its line searches fail. So a filter that has come to a kink of
that kind slides along it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from convcvx.problem import Problem
from convcvx.responses.few import FewRows
from convcvx.solution import Solution

NEAR = 1e-2
"""Cosine of filter and row below which the filter is at the kink: where the last descent has left it, by its zigzags.
Between random directions such a cosine is rare, and a kink held in vain is free again in the next slide."""
RIDGE = 1e-12
"""Share of the rows' mean square by which their Gram matrix is made regular: rows may be alike."""


class Kinks:
    """The rows at whose kinks each filter stays.

    Parameters
    ----------
    problem : Problem
    few : FewRows
        Its rows.
    solution : Solution
        Whose filters slide.
    seen : Tensor (n·K, r)
        The rows in the coordinates of the slide.
    """

    def __init__(self, problem: Problem, few: FewRows, solution: Solution, seen: Tensor) -> None:
        held = torch.from_numpy(_held(problem, few, solution))
        most = max(1, int(held.sum(dim=1).max()))
        order = held.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        chosen = held.gather(1, order)
        rows = seen[order] * chosen[:, :, None]  # (m, k, r), zeros where a filter is at fewer kinks than others
        gram = rows @ rows.transpose(1, 2)
        scale = gram.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True)
        gram.diagonal(dim1=1, dim2=2).add_(RIDGE * scale + ~chosen)
        # In numpy: torch takes several times as long for products of many matrices with a vector each.
        self._rows = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), rows, upper=False).contiguous().numpy()

    def along(self, filters: np.ndarray) -> np.ndarray:
        """Filters (m, r) in the coordinates of the slide, or steps of them, less what would leave a kink."""
        across = self._rows @ filters[:, :, None]
        return filters - (self._rows.transpose(0, 2, 1) @ across)[:, :, 0]


def _held(problem: Problem, few: FewRows, solution: Solution) -> np.ndarray:
    """(m, n·K): whether a row keeps a filter at its kink."""
    towards = few.pool.T @ solution.weights.numpy()  # (m, K, c)
    products = solution.filters.numpy() @ few.flat.T
    active = np.maximum(products, 0.0).reshape(len(products), problem.n, -1)
    outputs = active.transpose(1, 0, 2).reshape(problem.n, -1) @ towards.reshape(-1, problem.n_outputs)
    predictions = torch.from_numpy(outputs) + solution.intercept
    slopes = np.einsum("mkc,ic->mik", towards, problem.dual_point(predictions).numpy()).reshape(len(towards), -1)
    lengths = np.linalg.norm(few.flat, axis=1)
    return (np.abs(products) <= NEAR * lengths) & (slopes < 0) & (lengths > 0)
