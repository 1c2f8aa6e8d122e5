"""Training on given patches: `solve` at one β, `path` along several, `beta_max` where they begin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convcvx.budget import LEAST, Budget, Deadline
from convcvx.certificate import certify_parameters
from convcvx.errors import InputError
from convcvx.oracles import Oracle
from convcvx.patches import PatchSpec
from convcvx.solution import Callback, Solution
from convcvx.training import build_problem, find_beta_max, solve_problem, warn_short_of


def solve(
    patches: Tensor | np.ndarray,
    targets: Tensor | np.ndarray,
    beta: float,
    *,
    pooling: Any = None,
    loss: str = "squared",
    intercept: bool = True,
    solver: str = "auto",
    oracle: str | Oracle = "auto",
    tol: float = 1e-4,
    max_filters: int | None = None,
    max_rounds: int = 100,
    time_limit: float | None = None,
    seed: int = 0,
    start: Solution | None = None,
    callback: Callback | None = None,
    device: str = "cpu",
) -> Solution:
    """Train a two-layer ReLU network on given patches to the global optimum, with a certificate.

        min  (1/n) Σ_i ℓ(f(x_i), y_i) + β Σ_j ‖V_j‖_F    over ‖u_j‖ = 1, any number of neurons j,
        f(x_i) = Σ_j Σ_p Σ_k w_pk (x_ik·u_j)_+ V_j[p,:] + b

    which is weight decay β on the network's weights under a mean-reduced loss (Sahiner et al. 2021).

    Parameters
    ----------
    patches : array (n, d) or (n, K, d)
        One row, or K patch rows, a sample.
    targets : array (n,) of classes or (n, c) of real values
    beta : float
        Weight decay.
    pooling : array (P, K), optional
        Non-negative pooling weights; None is global average pooling.
    loss : {"squared", "cross-entropy"}
        ½‖f - y‖², or softmax cross-entropy.
    intercept : bool
        Train an unpenalised output bias.
    solver : {"auto", "sliding-fw", "frank-wolfe", "copositive", "gated", "closed-form"}
    oracle : {"auto", "exact", "branch-and-bound", "copositive", "sampled", "local"} or Oracle
    tol : float
        Relative gap (primal - dual) / primal to reach.
    max_filters, max_rounds, time_limit : int, int, float
        Budgets; the time in seconds, that of the certificate included.
    start : Solution, optional
        Warm start.

    Returns
    -------
    Solution
        `.filters` (m, d) of unit norm, `.weights` (m, P, c), `.intercept` (c,), `.certificate`, `.history`.

    Raises
    ------
    InputError
        For arrays of the wrong shape, NaN, or parameters out of range.

    Warns
    -----
    ConvergenceWarning
        When the certificate's gap is above `tol`.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(30, 2))
    >>> solution = solve(x, (x[:, 0] > abs(x[:, 1])).astype(int), beta=0.01)
    >>> solution.certificate.scope, bool(solution.certificate.rel_gap < 1e-4)
    ('global', True)
    """
    budget = Budget(tol, max_filters, max_rounds, time_limit)
    deadline = Deadline.after(time_limit)
    problem = build_problem(
        patches_to_images(patches),
        targets,
        beta,
        spec=PatchSpec((1, 1)),
        pooling=pooling,
        loss=loss,
        intercept=intercept,
        device=device,
    )
    solution = solve_problem(
        problem.until(deadline),
        budget,
        solver=solver,
        oracle=oracle,
        seed=seed,
        start=start,
        callback=callback,
    )
    certificate = certify_parameters(
        problem.until(deadline.later(LEAST * (time_limit or 0.0))),
        solution.filters,
        solution.weights,
        oracle=oracle,
        tol=tol,
        seed=seed + 1,
        dual_point=solution.dual_point,
        training=solution.history,
    )
    warn_short_of(certificate, solution, tol)
    return replace(solution, certificate=certificate)


def beta_max(
    patches: Tensor | np.ndarray,
    targets: Tensor | np.ndarray,
    *,
    pooling: Any = None,
    loss: str = "squared",
    intercept: bool = True,
    oracle: str | Oracle = "auto",
    seed: int = 0,
) -> float:
    """The β from which on the optimal network has no filters; parameters as in `solve`."""
    images = patches_to_images(patches)
    problem = build_problem(images, targets, spec=PatchSpec((1, 1)), pooling=pooling, loss=loss, intercept=intercept)
    return find_beta_max(problem, oracle, seed)


def path(
    patches: Tensor | np.ndarray,
    targets: Tensor | np.ndarray,
    betas: Sequence[float] | None = None,
    *,
    n_betas: int = 10,
    ratio: float = 1e-3,
    **options: Any,
) -> Iterator[Solution]:
    """Solutions along a decreasing sequence of β, each started from the one before.

    Parameters
    ----------
    betas : sequence of float, optional
        By default `n_betas` values from beta_max down to `ratio`·beta_max, evenly spaced in the logarithm.
    **options
        As for `solve`.

    Yields
    ------
    Solution
        One a β, in the order of `betas`; `.certificate.beta` says which.
    """
    if betas is None:
        shared = {k: options[k] for k in ("pooling", "loss", "intercept", "oracle", "seed") if k in options}
        top = beta_max(patches, targets, **shared)
        betas = [float(b) for b in np.geomspace(top, ratio * top, n_betas)]
    start = options.pop("start", None)
    for beta in betas:
        start = solve(patches, targets, beta, start=start, **options)
        yield start
        start = replace(start, history=[], rounds=0, status="running", certificate=None)


def patches_to_images(patches: Tensor | np.ndarray) -> Tensor:
    """(n, d) or (n, K, d) to the (n, d, K, 1) images whose 1x1 patches are these rows, in float64."""
    array = torch.as_tensor(patches).double()
    if array.ndim == 2:
        array = array[:, None]
    if array.ndim != 3 or 0 in array.shape:
        raise InputError(f"patches must be a non-empty (n, d) or (n, K, d) array; got shape {tuple(array.shape)}")
    if not bool(array.isfinite().all()):
        raise InputError("patches must be finite; found NaN or infinity; drop or impute those samples")
    return array.transpose(1, 2)[..., None]
