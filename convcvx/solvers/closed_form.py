"""Closed form: the soft-thresholded SVD of the targets, when it is the optimum, and which bound it is when not.

Squared loss; C = I - 11ᵀ/n centres if there is an intercept, else C = I; Ỹ = CY = Σ_k σ_k a_k b_kᵀ; φ(u) (n, P) are
the pooled responses of a filter. (Images that count for w_i are rows of X, Y and 1 times √w_i, and n is Σ w_i: ReLU is
positively homogeneous, and what follows holds for these.) With any ρ >= max {‖Cφ(u)‖_F : ‖u‖ <= 1} and τ = nβ/ρ let

    value = min_M (1/2n) ‖M - Ỹ‖² + (β/ρ) ‖M‖_*  =  (1/2n) Σ_k {σ_k² if σ_k <= τ else 2τσ_k - τ²},
    M* = Σ_k (σ_k - τ)_+ a_k b_kᵀ.

*Lower bound, always.* A network predicts M = Σ_j Cφ(u_j) V_j, and by Hölder's inequality for Schatten norms
‖M‖_* <= Σ_j ‖Cφ(u_j)‖_F ‖V_j‖_F <= ρ Σ_j ‖V_j‖_F: its objective is no less than that of M, so no less than `value`.
For one patch a sample ρ = σ_max(CX), since (·)₊ is 1-Lipschitz: ‖C(Xu)₊‖² = Σ_{i<l} ((x_i·u)₊ - (x_l·u)₊)²/n
<= ‖CXu‖²; without C, ‖(Xu)₊‖ <= ‖Xu‖. For several, (w₁(x₁·u)₊ + …)² <= (Σ_k w_k) Σ_k w_k (x_k·u)², so that
ρ² = λ_max(Σ_i Σ_p (Σ_k w_pk) Σ_k w_pk x_ik x_ikᵀ).

*The linear network* f = XW + b with weight decay has the optimum p_lin = min_W (1/2n) ‖CXW - Ỹ‖² + β‖W‖_*. If all
non-zero singular values of CX equal s (XXᵀ ∝ I, or XᵀX ∝ I), it is the value above with ρ = s and Ỹ projected to the
range of CX, plus (1/2n) times the square of what the projection drops. Then:

- data are *spike-free* if {C(Xu)₊ : ‖u‖ <= 1} ⊆ {CXu : ‖u‖ <= 1} (Ergen, Pilanci 2021): a ReLU neuron is a linear one
  of no larger norm, so p_lin is a LOWER bound of the ReLU optimum;
- the *sign condition* Xu_k >= 0, CXu_k = s a_k, for each k with σ_k > τ (a_k up to sign): the linear optimum is a
  ReLU network, so p_lin is an UPPER bound;
- both: it is the optimum (the soft-thresholded SVD of Sahiner et al. 2021; there XXᵀ = I with one-hot targets,
  whose a_k >= 0);
- neither: it bounds nothing. A linear neuron is two ReLU neurons, hence p_lin at 2β is still an upper bound.

*Without activation* the linear network is all there is: p_lin is the optimum, also of several patches in one cell, with
the pooled patches Σ_k w_k x_ik for rows.

XXᵀ ∝ I implies spike-free: ‖(CX)^†C(Xu)₊‖ = ‖C(Xu)₊‖/s <= ‖CXu‖/s <= ‖u‖, and every vector is in the range.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from convcvx.activations import LINEAR
from convcvx.budget import OutOfTime
from convcvx.errors import InputError
from convcvx.oracles.base import Oracle
from convcvx.oracles.contradiction import check_proof
from convcvx.oracles.needs import AVERAGES, ONE_PATCH, ONE_SPACE, RECTIFIED_OR_LINEAR, SQUARED_LOSS, Need, require
from convcvx.problem import Problem, relative_gap
from convcvx.responses.gated import embedded_rows
from convcvx.rounding import UNIT
from convcvx.solution import Solution
from convcvx.solvers.loop import Level, Look, Solver
from convcvx.solvers.master.table import solve_master
from convcvx.solvers.rounds import predicted, record_of
from convcvx.solvers.spike_free import EXACT, centred, roots, spike_free
from convcvx.terms.scope import Scope
from convcvx.terms.status import Status

ROUNDING = 1e-10
"""Share of the value by which singular values and the sums over them can be off."""


@dataclass(frozen=True)
class ClosedForm:
    """What the soft-thresholded SVD says about a problem.

    Attributes
    ----------
    value : float
        Proved lower bound on the objective of every network.
    linear : float or None
        Optimum of the linear network; None where it has no closed form (`isotropic` is False).
    linear_is : {"optimum", "lower bound", "upper bound", "no bound"}
        What `linear` is to the optimum of the ReLU network.
    isotropic : bool
        Whether all non-zero singular values of CX are equal.
    whitened : bool
        Whether, besides, CX has full row rank: XXᵀ ∝ I, up to centring.
    spike_free : bool or None
        Proved, refuted by a filter, or neither.
    spike_ratio : float
        Largest ‖(CX)^†C(Xu)₊‖ found; above 1, or infinite for a response outside the range, it refutes.
    signs : bool
        The sign condition.
    """

    value: float
    linear: float | None
    linear_is: str
    isotropic: bool
    whitened: bool
    spike_free: bool | None
    spike_ratio: float
    signs: bool
    filters: Tensor
    """(k, r) unit filters u_k of the components above the threshold."""

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "filters"}


@dataclass(frozen=True)
class BySoftThresholding(Solver):
    """The network of the closed form: its optimum where the conditions hold, else a network with a proved bound.

    A single round: the filters are ±u_k, their weights optimal. Its record holds the network's own objective, the
    proved lower bound, and the conditions under `closed_form`. Status "conditions" means that the two differ by more
    than the budget's `tol`. The `oracle` helps to decide whether the data are spike-free; `start` plays no part. Where
    the time ends before the analysis does, the bound is zero and there are no conditions.
    """

    name: ClassVar[str] = "closed-form"
    needs: ClassVar[tuple[Need, ...]] = (AVERAGES, RECTIFIED_OR_LINEAR, SQUARED_LOSS, ONE_SPACE)
    asks_oracle: ClassVar[bool] = False
    resumes: ClassVar[bool] = False

    exact: float = 0.01
    """Share of tol to which the weights are solved: they leave no gap of their own."""
    coarsest: float = 1e-8
    """Gap of the weights at most: they cost next to nothing."""

    def suits(self, problem: Problem) -> str | None:
        """Where it is the optimum."""
        if not closed_form_holds(problem):
            return None
        return "XXᵀ ∝ I and the signs fit: the soft-thresholded SVD is the optimum of these data"

    def look(self, level: Level, oracle: Oracle, solution: Solution, predictions: Tensor, seed: int) -> Look:
        """Analyse the data; the record is of the network that follows from it."""
        problem, budget, form, short = level.problem, level.budget, None, Status.CONDITIONS
        try:
            form = analyse(problem, oracle, seed)
            both = form.filters if problem.responses.symmetric else torch.cat([form.filters, -form.filters])
            filters = both[: budget.max_filters]
            if len(filters):
                result = solve_master(problem, filters, tol=min(self.exact * budget.tol, self.coarsest))
                solution = solution.with_parameters(filters, result.weights, result.intercept)
                predictions = predicted(problem, solution)
        except OutOfTime:
            short = Status.TIME_LIMIT
        objective = problem.primal(predictions, solution.weights)
        value = 0.0 if form is None else form.value
        # What is proved is less than the value by what the tests of the conditions let pass.
        proved = value * (1 - (4 * EXACT if form is not None and form.spike_free else ROUNDING))
        check_proof(problem, proved, objective, predictions, solution.weights)
        record = record_of(solution, objective, proved, problem.beta, Scope.GLOBAL)
        if form is not None:
            record["closed_form"] = form.to_dict()
        # Of what was allowed for rounding nobody need know: where the conditions hold the network is the optimum.
        short = Status.CONVERGED if relative_gap(objective, value) <= budget.tol else short
        return Look(solution, predictions, record, None, solution.filters[:0], short)

    def ended(self, level: Level, look: Look) -> Status | None:
        """The first round is the last."""
        return look.short


def closed_form_holds(problem: Problem) -> bool:
    """Whether the closed form is the optimum at every β, as far as XXᵀ ∝ I and signs tell without a search."""
    responses = problem.responses
    unmet = any(need.lacking(problem) is not None for need in BySoftThresholding.needs)
    if unmet or not _one_row(problem) or problem.n > responses.dim + problem.intercept:
        return False
    try:
        scale = float((problem.targets * roots(problem)).norm() * _linear_rows(problem).norm()) / problem.shares.total
        # Signs that fit for all components that are more than rounding fit for those above any threshold.
        form = analyse(problem.with_beta(max(EXACT * scale, 1e-300)))
    except OutOfTime:
        return False
    return form.whitened and form.linear_is == "optimum"


def analyse(problem: Problem, oracle: Oracle | None = None, seed: int = 0) -> ClosedForm:
    """Test the conditions on the data and evaluate the closed form."""
    require("solver closed-form", BySoftThresholding.needs, problem)
    problem = problem.with_dtype(torch.float64)
    single, linear_network = _one_row(problem), problem.responses.activation == LINEAR
    rows = _linear_rows(problem)  # X
    targets, total = centred(problem, problem.targets * roots(problem)), problem.shares.total
    left, sizes, right = torch.linalg.svd(centred(problem, rows), full_matrices=False)
    rank = int((sizes > 1e-10 * sizes[0].clamp_min(1e-300)).sum()) if len(sizes) else 0
    noise = 8 * sum(rows.shape) * UNIT * float(sizes[0]) if len(sizes) else 0.0  # of the decomposition itself
    cut = noise + (float(sizes[rank]) if rank < len(sizes) else 0.0)
    left, sizes, right = left[:, :rank], sizes[:rank], right[:rank]
    isotropic = single and (rank == 0 or float(sizes[0] / sizes[-1]) <= 1 + EXACT)
    whitened = isotropic and rank == problem.n - problem.intercept
    is_spike_free, ratio = None, 0.0
    if single and linear_network:
        is_spike_free, ratio = True, 1.0
    elif single:
        is_spike_free, ratio = spike_free(problem, rows, (left, sizes, right), whitened, oracle, seed)

    inside = left.T @ targets
    radius = float(sizes[0]) if single and rank else _radius(problem)
    dropped = float((targets - left @ inside).square().sum())  # a difference of squares would be their rounding
    # Along what was cut off as rounding a network of norm Σ_j ‖V_j‖ predicts no more than `cut` times that, and a
    # better one than the constant has no more than the constant's objective over β.
    within = cut * float(targets.square().sum()) / (2 * total * problem.beta)
    lost = max(0.0, dropped**0.5 - within) ** 2 / (2 * total)
    fitted = inside if is_spike_free else targets
    value = _thresholded(problem, _spectrum(fitted)[0], radius) + (lost if is_spike_free else 0.0)

    spectrum, outputs = _spectrum(inside)
    above = spectrum * radius > total * problem.beta
    directions = (inside @ outputs[:, above] / spectrum[above]).T  # a_k in the basis of the range
    filters = torch.nn.functional.normalize(directions / sizes @ right if rank else rows.new_zeros(0, rows.shape[1]))
    heights = rows @ filters.T
    lowest = torch.minimum(-heights.amin(dim=0), heights.amax(dim=0)) if len(filters) else heights.new_zeros(0)
    signs = single and (linear_network or bool((lowest <= EXACT * heights.abs().amax(dim=0)).all()))
    linear = _thresholded(problem, spectrum, radius) + dropped / (2 * total) if isotropic else None
    meaning = {
        (True, True): "optimum",
        (True, False): "lower bound",
        (False, True): "upper bound",
        (False, False): "no bound",
    }[bool(is_spike_free), signs]
    if linear is None:
        meaning = "no bound"
    return ClosedForm(value, linear, meaning, isotropic, whitened, is_spike_free, ratio, signs, filters)


def whitened(problem: Problem) -> Problem:
    """The same problem with filters in the space where XXᵀ ∝ I: there the closed form is the linear optimum.

    One patch a sample, linearly independent rows X (n <= r). Filters are then penalised in whitened space, as with
    ZCA whitening; the embedding carries the map to raw kernels.

    Raises
    ------
    InputError
        When the rows are dependent or a sample has several patches.
    """
    responses = problem.responses
    require("whitening of the rows", (ONE_PATCH,), problem)
    rows = _linear_rows(problem.with_dtype(torch.float64))
    _, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    if len(sizes) < problem.n or float(sizes[-1]) <= 1e-10 * float(sizes[0]):
        raise InputError(
            f"whitening of the rows needs {problem.n} linearly independent ones; they have {rows.shape[1]} entries; "
            "use fewer samples"
        )
    scaling = right * (sizes.square().mean().sqrt() / sizes)[:, None]
    embedding = replace(responses.embedding, basis=scaling @ responses.embedding.basis, patch_rank=problem.n)
    moved = type(responses)(responses.images, embedding, responses.pooling, **responses.options)
    return replace(problem, responses=moved)


def _one_row(problem: Problem) -> bool:
    """Whether a sample is one row: its patch, or without activation the sum of its pooled patches."""
    responses = problem.responses
    return responses.n_cells == 1 and (responses.n_positions == 1 or responses.activation == LINEAR)


def _linear_rows(problem: Problem) -> Tensor:
    """(n, r) patch rows pooled without the ReLU, over all cells, times √w_i: X where a sample has one patch."""
    responses = problem.responses
    pool = responses.pooling.matrix(*responses.map_size)
    reach = torch.ones(responses.n_positions).double() if pool is None else pool.sum(dim=0)
    parts = [embedded_rows(responses, slice(i, i + 1024)).cpu() for i in range(0, problem.n, 1024)]
    rows = torch.cat([torch.einsum("bkr,k->br", part, reach) for part in parts])
    return rows * roots(problem).to(rows)


def _radius(problem: Problem) -> float:
    """A bound on ‖φ(u)‖_F over unit u, for any number of patches."""
    responses = problem.responses
    pool = responses.pooling.matrix(*responses.map_size)
    pool = torch.eye(responses.n_positions).double() if pool is None else pool
    reach = (pool.sum(dim=1, keepdim=True) * pool).sum(dim=0)
    moment = torch.zeros(responses.dim, responses.dim, dtype=torch.float64)
    for start in range(0, problem.n, 256):
        where = slice(start, min(start + 256, problem.n))
        rows = embedded_rows(responses, where).cpu() * roots(problem)[where, None]
        moment += torch.einsum("bkr,k,bks->rs", rows, reach, rows)
    return float(torch.linalg.eigvalsh(moment)[-1].clamp_min(0).sqrt())


def _spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values and right singular vectors (c, k); unit vectors where columns are orthogonal, ties or not.

    Not by the eigenvalues of the Gram matrix: the roots of those that are rounding are 1e-8 of the largest.
    """
    gram = matrix.T @ matrix
    squares = gram.diagonal()
    if float((gram - torch.diag(squares)).norm()) <= 1e-12 * float(squares.sum()):
        return squares.sqrt(), torch.eye(len(gram), dtype=gram.dtype)
    _, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    return sizes, right.T


def _thresholded(problem: Problem, spectrum: Tensor, radius: float) -> float:
    """min_M (1/2n) ‖M - Ỹ‖² + (β/ρ) ‖M‖_* for the singular values of Ỹ."""
    threshold = problem.shares.total * problem.beta / max(radius, 1e-300)
    terms = torch.where(spectrum <= threshold, spectrum.square(), 2 * threshold * spectrum - threshold * threshold)
    return float(terms.sum()) / (2 * problem.shares.total)


closed_form = BySoftThresholding()
