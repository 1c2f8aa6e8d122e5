"""The optimum over a dictionary of thousands of filters, at a β of a path that held-out images choose.

    min_{W, b}  Σ_i s_i ℓ(A_i W + b, y_i) + β Σ_j ‖W_j‖_F,      A = Φ flattened to (n, m·P)

One β is solved after the other, each warm from the one before. Under the squared loss every image is visited once: all
that takes is the Gram matrix of the images kept and the responses of the images held out, which join the Gram matrix
for the last solve. Other losses see the features of all images again and again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from convcvx.budget import NEVER, OutOfTime
from convcvx.errors import InputError
from convcvx.losses.shares import Shares
from convcvx.machine.threads import sparing
from convcvx.machine.watch import watched
from convcvx.problem import Problem
from convcvx.solution import Solution
from convcvx.solvers.dictionary.features import Features
from convcvx.solvers.dictionary.kept import KeptFeatures
from convcvx.solvers.dictionary.lasso import DictionaryLasso
from convcvx.solvers.dictionary.newton import DictionaryNewton
from convcvx.solvers.dictionary.products import gather
from convcvx.solvers.dictionary.weights import DictionaryWeights, Point

RATIOS = tuple(10 ** (-1 - k / 2) for k in range(12))
"""The path: β as shares of the largest one that gives the dictionary any weight."""
TUNE = 0.1
"""Share of the images that choose β, unless another is asked for."""
PATIENCE = 2
"""The path ends after so many β without a better held-out score."""
TRUSTED = 0.1
"""Share of an objective that rounding may come to at worst before it is summed anew in float64, in a pass over all
images, which takes as long as the features did; it comes to about a fortieth of its worst."""
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

        min_{W, b}  Σ_i s_i ℓ(Σ_s A_si W_s + b, y_i) + β Σ_s Σ_j ‖W_sj‖_F

    Parameters
    ----------
    problems : sequence of Problem
        On the same images, or on features of them, with the same targets, shares and loss; their β is not used.
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
        Relative duality gap over the dictionary to reach, if the most steps that there are reach it.
    score : Score
        `by_error` or `by_loss`: where the one is flat, as over decades of β it can be, the other may not be.

    Raises
    ------
    InputError
        For flips of images whose patches are not placed symmetrically, and where the folder for temporary files has no
        room for features that are visited again and again.
    """
    problem = problems[0]
    with sparing(problem.is_small):
        tuned = beta is None and beta_ratio is None
        held = held_out(problem.n, tune if tuned else 0.0, versions)
        lasso = _group_lasso(problems, filters, flips, held)
        beta_max = lasso.beta_max()
        if beta_max == 0:
            raise InputError("no filter of the dictionary tells anything of the targets; lower the threshold")
        if beta is None and beta_ratio is not None:
            beta = beta_ratio * beta_max
        tried: list[tuple[dict[str, Any], Point]] = []
        choices: list[tuple[float, Point | None]]
        if beta is None:
            tried = list(_path(lasso, problem, held, beta_max, tol, score))
            lasso.join()
            # Best first: what the images kept can just bear, all of them may not.
            choices = [(record["beta"], start) for record, start in sorted(tried, key=lambda step: score(step[0]))]
        else:
            choices = [(beta, None)]
        for chosen, start in choices:
            point = _judged(problems, filters, lasso, chosen, lasso.solve(chosen, start, tol, lasso.max_iter))
            if math.isfinite(point.objective):
                break
        else:
            wish = "fewer filters, or more images" if tuned else "a larger beta or beta_ratio, or fewer filters"
            raise InputError(f"weight decay is lost in the rounding of {lasso.features.dtype}; use {wish}")
        path = [record for record, _ in tried]
        weights, intercept = lasso.features.weights(point.matrix), point.intercept.cpu()
        return DictionaryFit(tuple(filters), weights, intercept, chosen, beta_max, point.objective, point.rel_gap, path)


def _judged(
    problems: Sequence[Problem], filters: Sequence[Tensor], lasso: DictionaryWeights, beta: float, point: Point
) -> Point:
    """`point` with its true objective where rounding may hide that, and never one that is worse than no weights.

    Where it is rounding that made it worse, the objective is infinite: the weights mean nothing. Else they are on
    their way still, as by few steps at a large `beta`, and none are the better ones.
    """
    if not math.isfinite(point.objective):
        return point
    lower = point.objective * (1 - point.rel_gap)
    doubtful = lasso.rounding(point) > TRUSTED * point.objective
    nothing = lasso.nothing()
    if doubtful:
        weights, intercept = lasso.features.weights(point.matrix), point.intercept.cpu()
        predictions = intercept + sum(
            problem.until(NEVER).with_dtype(torch.float64).responses.predict(part, weight, torch.zeros_like(intercept))
            for problem, part, weight in zip(problems, filters, weights, strict=True)
        )
        decay = sum(float(weight.flatten(1).norm(dim=1).sum()) for weight in weights)
        objective = problems[0].mean_loss(predictions) + beta * decay
        # A bound that was found in the same arithmetic is as far off as what it was found beside.
        lower -= abs(objective - point.objective)
        point = replace(point, objective=objective if objective <= nothing.loss else math.inf)
    elif point.objective > nothing.loss:
        point = Point(nothing.matrix, nothing.intercept, point.carried, nothing.loss, 1.0)
    return replace(point, rel_gap=min(1.0, (point.objective - lower) / max(point.objective, 1e-300)))


def _group_lasso(
    problems: Sequence[Problem], filters: Sequence[Tensor], flips: bool, held: Tensor
) -> DictionaryWeights:
    """The problem over the features of the images that are not `held` (n,) out, all images gone through once."""
    problem, parts = problems[0], [p.responses for p in problems]
    squared = problem.loss.name == "squared"
    features = Features(parts, filters, flips) if squared else KeptFeatures(parts, filters, flips)
    try:
        gram = gather(problem, features, held if squared else torch.zeros_like(held))
    except OutOfTime:
        raise InputError(
            f"time_limit ended before {features.size:,} features of {problem.n:,} images were known; raise it, or use "
            "a smaller dictionary or fewer images"
        ) from None
    return DictionaryLasso(gram, features) if squared else DictionaryNewton(gram, features, problem, held)


def held_out(n: int, tune: float, versions: int = 1) -> Tensor:
    """(n,) bool: the images that choose β, evenly spread over each of the `versions` of them; none for `tune` 0."""
    held = torch.zeros(n // versions, dtype=torch.bool)
    if tune:
        held[:: max(2, round(1 / tune))] = True
    return held.repeat(versions)


def _path(
    lasso: DictionaryWeights, problem: Problem, held: Tensor, beta_max: float, tol: float, score: Score
) -> Iterator[tuple[dict[str, Any], Point]]:
    """Records of decreasing β, and the weights there, until held-out images are predicted worse or the time is over."""
    targets, shares, deadline = problem.targets[held], problem.shares.sample(held), problem.deadline
    point, best, since = None, (float("inf"), float("inf")), 0
    for ratio in watched("a path of beta", RATIOS, len(RATIOS)):
        if point is not None and deadline.passed:
            return
        point = lasso.solve(ratio * beta_max, point, tol, lasso.path_iter)
        if math.isinf(point.objective):
            return
        predictions = lasso.held_out(point).cpu()
        record = {
            "beta": ratio * beta_max,
            "objective": point.objective,
            "rel_gap": point.rel_gap,
            "n_filters": int((lasso.features.groups.norms(point.matrix) > 0).sum()) * lasso.features.copies,
            "held_out_loss": float(shares.mean(problem.loss.value(predictions, targets))),
            # The share of wrong classes; of real targets, which have none, the loss alone decides.
            "held_out_error": _wrong(predictions, targets, shares),
        }
        yield record, point
        since = 0 if score(record) < best else since + 1
        best = min(best, score(record))
        if since == PATIENCE:
            return


def _wrong(predictions: Tensor, targets: Tensor, shares: Shares) -> float:
    one_hot = bool(((targets == 0) | (targets == 1)).all()) and bool((targets.sum(dim=1) == 1).all())
    return float(shares.mean((predictions.argmax(dim=1) != targets.argmax(dim=1)).double())) if one_hot else 0.0
