"""The optimum over a dictionary of thousands of filters, at a β of a path that held-out images choose.

    min_{W, b}  (1/2n) Σ_i ‖A_i W + b - y_i‖² + β Σ_j ‖W_j‖_F,      A = Φ flattened to (n, m·P)

is the master problem of `group_lasso`, whose Newton steps weigh every filter against every other: too much for
thousands of them. Here the η form is solved by its plain iteration (Bach et al. 2012, sec. 5.2): W(η) is one ridge
regression, then η_j = ‖W_j‖, warm from one β to the next. A ridge regression is a few conjugate gradient steps on the
Gram matrix, with the Cholesky factor of an earlier one as preconditioner: the path takes two or three factors. Whatever
a W was found by, its objective and its duality gap are what is reported. Every image is visited once: the path needs
the Gram matrix of the images kept and the responses of the images held out, which join the Gram matrix for the last
solve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from convcvx.errors import InputError
from convcvx.problem import Problem
from convcvx.solution import Solution
from convcvx.solvers.dictionary_features import Features
from convcvx.solvers.gram import Gram

RATIOS = tuple(10 ** (-1 - k / 2) for k in range(12))
"""The path: β as shares of the largest one that gives the dictionary any weight."""
TUNE = 0.1
"""Share of the images that choose β, unless another is asked for."""
PATIENCE = 2
"""The path ends after so many β without a better held-out score."""
PATH_ITER, MAX_ITER = 2, 10
"""Ridge regressions a β, on the path and at the β chosen."""
FOOTHOLD = 1e-2
"""Where a filter without weight that violates dual feasibility starts, against the mean η."""
CG_STEPS, CG_REDUCTION, WORN = 40, 1e-2, 25
"""Conjugate gradient steps of a ridge regression at most, what they reduce its residual to, and how many of them call
for a fresh factor."""
TINY = 1e-37


Score = Callable[[dict[str, Any]], tuple[float, float]]
"""What the β that is chosen has least of, read off its record in the path."""


def by_error(record: dict[str, Any]) -> tuple[float, float]:
    return record["held_out_error"], record["held_out_loss"]


def by_loss(record: dict[str, Any]) -> tuple[float, float]:
    return record["held_out_loss"], record["held_out_error"]


@dataclass(frozen=True)
class DictionaryFit:
    """The optimum over a dictionary, or over several that look at the same images or at features of them.

    Attributes
    ----------
    filters, weights : tuple of Tensor
        (m, r) and (m, P, c) of each dictionary.
    intercept : Tensor (c,)
    beta, beta_max : float
        β, and the largest g of the dictionary's filters at the best constant predictor.
    objective, rel_gap : float
        Primal value (with flips, of the images and their mirror images), and its relative duality gap over the
        networks on this dictionary.
    path : list of dict
        A record for each β tried: beta, objective, rel_gap, n_filters, held_out_loss, held_out_error.
    """

    filters: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    intercept: Tensor
    beta: float
    beta_max: float
    objective: float
    rel_gap: float
    path: list[dict[str, Any]] = field(default_factory=list)

    @property
    def solution(self) -> Solution:
        """That on the first dictionary, without history; filters that got no weight are dropped."""
        (filters, weights), c = (self.filters[0], self.weights[0]), len(self.intercept)
        return Solution.empty(filters.shape[1], weights.shape[1], c).with_parameters(filters, weights, self.intercept)


def fit_dictionary(problem: Problem, filters: Tensor, **options: Any) -> DictionaryFit:
    """`fit_dictionaries` for one dictionary on one problem."""
    return fit_dictionaries([problem], [filters], **options)


def fit_dictionaries(
    problems: Sequence[Problem],
    filters: Sequence[Tensor],
    *,
    beta_ratio: float | None = None,
    beta: float | None = None,
    tune: float = TUNE,
    versions: int = 1,
    flips: bool = False,
    tol: float = 1e-2,
    score: Score = by_error,
) -> DictionaryFit:
    """Optimal weights for dictionaries, at a given β or at the one that held-out images prefer.

        min_{W, b}  (1/2n) Σ_i ‖Σ_s A_si W_s + b - y_i‖² + β Σ_s Σ_j ‖W_sj‖_F

    Parameters
    ----------
    problems : sequence of Problem
        On the same images, or on features of them, with the same targets and the squared loss; their β is not used.
    filters : sequence of Tensor (m, r)
        The dictionary on each, of unit norm; with `flips`, the second half are the mirror images of the first, as
        `dictionary` gives them.
    beta_ratio, beta : float, optional
        β as a share of `beta_max`, or itself. Without either, β is the one of the path with the least `score` on
        held-out images.
    tune : float
        Share of the images held out for that, evenly spread; the network is fitted to all of them in the end.
    versions : int
        The images are so many versions of the same ones, one version after the other: an image is held out in all.
    flips : bool
        Train on the mirror images as well.
    tol : float
        Relative duality gap over the dictionary to reach, if `MAX_ITER` ridge regressions a β reach it.
    score : Score
        `by_error` or `by_loss`: where the one is flat, as over decades of β it can be, the other may not be.

    Raises
    ------
    InputError
        For another loss, or flips of images whose patches are not placed symmetrically.
    """
    problem = problems[0]
    if problem.loss.name != "squared":
        raise InputError(f"a dictionary needs the squared loss; got loss {problem.loss.name!r}")
    features = Features([p.responses for p in problems], filters, flips)
    tuned = beta is None and beta_ratio is None
    held = held_out(problem.n, tune if tuned else 0.0, versions)
    gram = Gram(features.size, problem.n_outputs, features.dtype, centred=problem.intercept)
    lasso = _GroupLasso(gram, features)
    unseen = torch.empty(int(held.sum()), features.size, dtype=features.dtype)
    filled = 0
    for where, block in features.batches():
        out = held[where]
        gram.add(block[~out], problem.targets[where][~out])
        unseen[filled : filled + int(out.sum())] = block[out]
        filled += int(out.sum())
    beta_max = lasso.beta_max()
    if beta is None and beta_ratio is not None:
        beta = beta_ratio * beta_max
    tried: list[tuple[dict[str, Any], _Point]] = []
    choices: list[tuple[float, _Point | None]]
    if beta is None:
        targets = problem.targets[held]
        tried = list(_path(lasso, unseen, targets, beta_max, tol, score))
        gram.add(unseen, targets)
        # Best first: what the images kept can just bear, all of them may not.
        choices = [(record["beta"], start) for record, start in sorted(tried, key=lambda step: score(step[0]))]
    else:
        choices = [(beta, None)]
    del unseen
    for chosen, start in choices:
        point = lasso.solve(chosen, start, tol, MAX_ITER)
        if math.isfinite(point.objective):
            break
    else:
        wish = "fewer filters, or more images" if tuned else "a larger beta or beta_ratio, or fewer filters"
        raise InputError(f"weight decay is lost in the rounding of {features.dtype}; use {wish}")
    path = [record for record, _ in tried]
    weights, intercept = features.weights(point.matrix), gram.intercept(point.matrix)
    return DictionaryFit(tuple(filters), weights, intercept, chosen, beta_max, point.objective, point.rel_gap, path)


def held_out(n: int, tune: float, versions: int = 1) -> Tensor:
    """(n,) bool: the images that choose β, evenly spread over each of the `versions` of them; none for `tune` 0."""
    held = torch.zeros(n // versions, dtype=torch.bool)
    if tune:
        held[:: max(2, round(1 / tune))] = True
    return held.repeat(versions)


def _path(
    lasso: _GroupLasso, block: Tensor, targets: Tensor, beta_max: float, tol: float, score: Score
) -> Iterator[tuple[dict[str, Any], _Point]]:
    """Records of decreasing β, and the weights there, until the held-out images are predicted worse."""
    point, best, since = None, (float("inf"), float("inf")), 0
    for ratio in RATIOS:
        point = lasso.solve(ratio * beta_max, point, tol, PATH_ITER)
        if math.isinf(point.objective):
            return
        predictions = (block @ point.matrix.to(block)).double() + lasso.gram.intercept(point.matrix)
        record = {
            "beta": ratio * beta_max,
            "objective": point.objective,
            "rel_gap": point.rel_gap,
            "n_filters": int((lasso.norms(point.matrix) > 0).sum()) * lasso.features.copies,
            "held_out_loss": 0.5 * float((predictions - targets).square().sum(dim=1).mean()),
            # The share of wrong classes; of real targets, which have none, the loss alone decides.
            "held_out_error": _wrong(predictions, targets),
        }
        yield record, point
        since = 0 if score(record) < best else since + 1
        best = min(best, score(record))
        if since == PATIENCE:
            return


def _wrong(predictions: Tensor, targets: Tensor) -> float:
    one_hot = bool(((targets == 0) | (targets == 1)).all()) and bool((targets.sum(dim=1) == 1).all())
    return float((predictions.argmax(dim=1) != targets.argmax(dim=1)).double().mean()) if one_hot else 0.0


@dataclass(frozen=True)
class _Point:
    """W, the η after it, and what W is worth."""

    matrix: Tensor
    sizes: Tensor
    objective: float
    rel_gap: float


class _GroupLasso:
    """The group lasso that a Gram matrix defines; a group is what the features of one filter, or of a pair, weigh."""

    def __init__(self, gram: Gram, features: Features) -> None:
        self.gram, self.features = gram, features
        self._worn = True

    def norms(self, matrix: Tensor) -> Tensor:
        """Frobenius norm of each group (n_groups,)."""
        squares = matrix.double().square().sum(dim=1)
        return squares.new_zeros(self.features.n_groups).index_add_(0, self.features.group, squares).sqrt()

    def beta_max(self) -> float:
        return float(self.norms(self.gram.linear).max()) / self.features.copies

    def solve(self, beta: float, start: _Point | None, tol: float, max_iter: int) -> _Point:
        """Alternate W = W(η), η = ‖W‖ from `start` until the duality gap over the dictionary is `tol`.

        The objective is infinite for a β that is lost in rounding.
        """
        penalty = beta * self.features.copies
        linear, total = self.gram.linear, self.gram.total
        if start is None:  # the mean η cannot be larger: zero weights would be better
            mean = 0.5 * total / (penalty * self.features.n_groups)
            start = _Point(torch.zeros_like(linear), torch.full((self.features.n_groups,), mean).double(), 0.0, 1.0)
        matrix, sizes, best = start.matrix, start.sizes, None
        pull = linear - self.gram.times(matrix)
        for _ in range(max_iter):
            matrix = self._ridge(matrix, pull, sizes, penalty)
            pull = linear - self.gram.times(matrix)
            norms, pulls = self.norms(matrix), self.norms(pull)
            loss = 0.5 * (total - float((matrix * (linear + pull)).sum()))
            if not loss >= -1e-12 * total:  # rounding of the Gram matrix outweighs the penalty: W means nothing
                self._worn = True
                break
            objective = loss + penalty * float(norms.sum())
            overlap, limit = total - float((matrix * linear).sum()), penalty / float(pulls.max())
            scale = min(max(0.5 * overlap / loss, -limit), limit) if loss > 0 else 0.0
            dual = scale * overlap - scale**2 * loss
            norms = torch.where(norms > 1e-6 * norms.max(), norms, 0)
            entering = (pulls > penalty) * FOOTHOLD * norms.mean()
            sizes = torch.maximum(norms, entering)
            if best is None or objective < best.objective:
                best = _Point(matrix, sizes, objective, (objective - dual) / max(objective, 1e-300))
            if (objective - dual) <= tol * objective:
                break
        return best or replace(start, objective=math.inf)

    def _ridge(self, matrix: Tensor, pull: Tensor, sizes: Tensor, penalty: float) -> Tensor:
        """W(η), nearly: (H + β/η) W = L by conjugate gradients from W = `matrix`, of which L - H W is the `pull`.

        The weights of a filter with η = 0 are zero.
        """
        alive = (sizes > 0)[self.features.group, None]
        ridges = (penalty / sizes.clamp_min(1e-4 * float(sizes.mean())))[self.features.group]
        if self._worn:
            self.gram.factorise(ridges)
        if not bool(alive.all()):
            matrix = matrix * alive
            pull = self.gram.linear - self.gram.times(matrix)
        ridges = ridges[:, None]
        step, steps = self._conjugate_gradients((pull - ridges * matrix) * alive, ridges, alive)
        self._worn = steps >= WORN
        return matrix + step

    def _conjugate_gradients(self, residual: Tensor, ridges: Tensor, alive: Tensor) -> tuple[Tensor, int]:
        """(H + ridges)⁻¹ `residual`, nearly, column by column, and the steps taken; in the arithmetic of the factor."""
        residual, ridges = residual.to(self.gram.dtype), ridges.to(self.gram.dtype)
        solution = torch.zeros_like(residual)
        direction = towards = self.gram.unfactor(residual) * alive
        size = first = (residual * towards).sum(dim=0)
        steps = 0
        while steps < CG_STEPS and bool((size > CG_REDUCTION**2 * first).any()):
            product = (self.gram.times(direction) + ridges * direction) * alive
            curvature = (direction * product).sum(dim=0)
            # Not positive: rounding of the Gram matrix outweighs the ridge along this direction, and it is left alone.
            length = torch.where(curvature > 0, size / curvature, 0.0)
            solution += length * direction
            residual = residual - length * product
            towards = self.gram.unfactor(residual) * alive
            last, size = size, (residual * towards).sum(dim=0)
            direction = towards + size / last.clamp_min(TINY) * direction
            steps += 1
        return solution, steps
