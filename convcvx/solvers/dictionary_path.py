"""The optimum over a dictionary of thousands of filters, at a β of a path that held-out images choose.

    min_{W, b}  (1/2n) Σ_i ‖A_i W + b - y_i‖² + β Σ_j ‖W_j‖_F,      A = Φ flattened to (n, m·P)

is the master problem of `group_lasso`, whose Newton steps weigh every filter against every other: too much for
thousands of them. Here the η form is solved by its plain iteration (Bach et al. 2012, sec. 5.2): W(η) is one ridge
regression, then η_j = ‖W_j‖, warm from one β to the next. Every image is visited once: the path needs the Gram matrix
of the images kept and the responses of the images held out, which join the Gram matrix for the last solve.

With flips each image stands for itself and its mirror image. The dictionary is closed under mirroring: then the
optimum can be taken symmetric, a mirrored filter having the mirrored weights, because the objective is convex and
mirroring does not change it. Such a network says the same of an image and of its mirror image, so that the sums of
each filter's responses and its mirror's over the images as they are carry the whole problem: twice the images for
half the features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from convcvx.errors import InputError
from convcvx.problem import Problem
from convcvx.solution import Solution

RATIOS = tuple(10 ** (-1 - k / 2) for k in range(12))
"""The path: β as shares of the largest one that gives the dictionary any weight."""
PATIENCE = 2
"""The path ends after so many β without a better held-out score."""
MAX_ITER = 10
"""Ridge regressions a β."""
FOOTHOLD = 1e-2
"""Where a filter without weight that violates dual feasibility starts, against the mean η."""
BATCH, STRIPE = 1024, 1024
"""Images whose features are multiplied at once, and the columns of the product computed at a time."""


@dataclass(frozen=True)
class DictionaryFit:
    """The optimum over a dictionary.

    Attributes
    ----------
    solution : Solution
        Without history; filters that got no weight are dropped.
    beta, beta_max : float
        β, and the largest g of the dictionary's filters at the best constant predictor.
    objective, rel_gap : float
        Primal value (with flips, of the images and their mirror images), and its relative duality gap over the
        networks on this dictionary.
    path : list of dict
        A record for each β tried: beta, objective, rel_gap, n_filters, held_out_loss, held_out_error.
    """

    solution: Solution
    beta: float
    beta_max: float
    objective: float
    rel_gap: float
    path: list[dict[str, Any]] = field(default_factory=list)


def fit_dictionary(
    problem: Problem,
    filters: Tensor,
    *,
    beta_ratio: float | None = None,
    beta: float | None = None,
    tune: float = 0.1,
    flips: bool = False,
    tol: float = 1e-2,
) -> DictionaryFit:
    """Optimal weights for a dictionary, at a given β or at the one that held-out images prefer.

    Parameters
    ----------
    problem : Problem
        With the squared loss; its own β is not used.
    filters : Tensor (m, r)
        Of unit norm; with `flips`, the second half are the mirror images of the first, as `dictionary` gives them.
    beta_ratio, beta : float, optional
        β as a share of `beta_max`, or itself. Without either, β is the one of the path with the least error on
        held-out images.
    tune : float
        Share of the images held out for that, evenly spread; the network is fitted to all of them in the end.
    flips : bool
        Train on the mirror images as well.
    tol : float
        Relative duality gap over the dictionary to reach, if `MAX_ITER` ridge regressions a β reach it.

    Raises
    ------
    InputError
        For another loss, or flips of images whose patches are not placed symmetrically.
    """
    if problem.loss.name != "squared":
        raise InputError(f"a dictionary needs the squared loss; got loss {problem.loss.name!r}")
    features = _Features(problem, filters, flips)
    tuned = beta is None and beta_ratio is None
    held = torch.zeros(problem.n, dtype=torch.bool)
    if tuned:
        held[:: max(2, round(1 / tune))] = True
    gram = _Gram(features, problem)
    held_out = []
    for where, block in features.batches():
        gram.add(block[~held[where]], problem.targets[where][~held[where]])
        held_out.append(block[held[where]])
    beta_max = gram.beta_max()
    path: list[dict[str, Any]] = []
    sizes = None
    if tuned:
        block, targets = torch.cat(held_out), problem.targets[held]
        for record, candidate in _path(gram, block, targets, beta_max, tol):
            path.append(record)
            if record is min(path, key=_error):
                beta, sizes = record["beta"], candidate
        gram.add(block, targets)
    elif beta is None:
        beta = beta_ratio * beta_max  # type: ignore[operator]
    del held_out
    assert beta is not None
    point = gram.solve(beta, sizes, tol)
    solution = Solution.empty(problem.responses.dim, problem.responses.n_cells, problem.n_outputs)
    solution = solution.with_parameters(filters, features.weights(point.matrix), gram.intercept(point.matrix))
    return DictionaryFit(solution, beta, beta_max, point.objective, point.rel_gap, path)


def _error(record: dict[str, Any]) -> tuple[float, float]:
    return record["held_out_error"], record["held_out_loss"]


def _path(
    gram: _Gram, block: Tensor, targets: Tensor, beta_max: float, tol: float
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Records of decreasing β, and the η there, until the held-out images are predicted worse."""
    sizes, best, since = None, (float("inf"), float("inf")), 0
    for ratio in RATIOS:
        point = gram.solve(ratio * beta_max, sizes, tol)
        sizes = point.sizes
        predictions = (block @ point.matrix.to(block)).double() + gram.intercept(point.matrix)
        record = {
            "beta": ratio * beta_max,
            "objective": point.objective,
            "rel_gap": point.rel_gap,
            "n_filters": int((sizes > 0).sum()) * gram.features.copies,
            "held_out_loss": 0.5 * float((predictions - targets).square().sum(dim=1).mean()),
            # The share of wrong classes; of real targets, which have none, the loss alone decides.
            "held_out_error": _wrong(predictions, targets),
        }
        yield record, sizes
        since = 0 if _error(record) < best else since + 1
        best = min(best, _error(record))
        if since == PATIENCE:
            return


def _wrong(predictions: Tensor, targets: Tensor) -> float:
    one_hot = bool(((targets == 0) | (targets == 1)).all()) and bool((targets.sum(dim=1) == 1).all())
    return float((predictions.argmax(dim=1) != targets.argmax(dim=1)).double().mean()) if one_hot else 0.0


class _Features:
    """The columns of the regression: responses to the filters or, with flips, their sums with those to the mirrors."""

    def __init__(self, problem: Problem, filters: Tensor, flips: bool) -> None:
        responses = problem.responses
        self.responses, self.filters, self.flips = responses, filters, flips
        self.copies = 2 if flips else 1
        """Filters that share a group of weights."""
        self.n_groups, self.n_cells = len(filters) // self.copies, responses.n_cells
        if flips:
            self._check_symmetry()
            self._map = responses.pooling.output_size(*responses.map_size)

    def _check_symmetry(self) -> None:
        spec, width = self.responses.embedding.spec, self.responses.images.shape[3]
        left = (width + 2 * spec.padding[1] - spec.kernel_size[1]) % spec.stride[1]
        pool = self.responses.pooling.matrix(*self.responses.map_size)
        grid = self.responses.map_size
        cells = self.responses.pooling.output_size(*grid)
        mirrored = pool is None or pool.view(*cells, *grid).flip(1, 3)
        if left or not (pool is None or torch.allclose(mirrored.reshape(pool.shape), pool)):  # type: ignore[union-attr]
            raise InputError(
                "flips need patches and pooling cells that lie symmetrically in the image; change stride, padding or "
                "pool, or train without flips"
            )

    def batches(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (images, features (b, n_groups·P)) until all images are through, about `BATCH` at a time."""
        start, parts = 0, []
        for where, block in self.responses.blocks(self.filters):
            parts.append(self._fold(block).flatten(1).cpu())
            if where.stop - start >= BATCH or where.stop == self.responses.n:
                yield slice(start, where.stop), torch.cat(parts)
                start, parts = where.stop, []

    def _fold(self, block: Tensor) -> Tensor:
        if not self.flips:
            return block
        first, second = block.split(self.n_groups, dim=1)
        return first + self._mirror(second, 2)

    def _mirror(self, pooled: Tensor, cells: int) -> Tensor:
        """Flip the axis `cells` of P pooling cells left to right."""
        return pooled.unflatten(cells, self._map).flip(cells + 1).flatten(cells, cells + 1)

    def weights(self, matrix: Tensor) -> Tensor:
        """(n_groups·P, c) to the weights (m, P, c) of all filters."""
        weights = matrix.unflatten(0, (self.n_groups, self.n_cells))
        return torch.cat([weights, self._mirror(weights, 1)]) if self.flips else weights


@dataclass(frozen=True)
class _Point:
    """W, η and what they are worth."""

    matrix: Tensor
    sizes: Tensor
    objective: float
    rel_gap: float


class _Gram:
    """Sums over images of products of [features, 1] and targets, in float64, and the group lasso that they define."""

    def __init__(self, features: _Features, problem: Problem) -> None:
        self.features, self.centred = features, problem.intercept
        self.n, size = 0, features.n_groups * features.n_cells
        self.products = torch.zeros(size, size, dtype=torch.float64)
        self.sums = torch.zeros(size, dtype=torch.float64)
        self.moments = torch.zeros(size, problem.n_outputs, dtype=torch.float64)
        self.target_sums = torch.zeros(problem.n_outputs, dtype=torch.float64)
        self.square = 0.0

    def add(self, block: Tensor, targets: Tensor) -> None:
        """Add images with these features and targets."""
        for first in range(0, block.shape[1], STRIPE):
            stripe = slice(first, first + STRIPE)
            product = block[:, stripe].T @ block[:, first:]
            self.products[stripe, first:] += product
            if (rest := product[:, STRIPE:]).numel():
                self.products[first + STRIPE :, stripe] += rest.T
        self.n += len(block)
        self.sums += block.sum(dim=0)
        self.moments += block.T @ targets.to(block)
        self.target_sums += targets.sum(dim=0)
        self.square += float(targets.square().sum())

    # With an intercept everything is centred: that is minimising over it.

    @property
    def mean(self) -> Tensor:
        return self.sums[:, None] / self.n * self.centred

    @property
    def target_mean(self) -> Tensor:
        return self.target_sums / self.n * self.centred

    @property
    def linear(self) -> Tensor:
        return self.moments / self.n - self.mean * self.target_mean

    def intercept(self, matrix: Tensor) -> Tensor:
        return self.target_mean - (self.mean.T @ matrix)[0]

    def norms(self, matrix: Tensor) -> Tensor:
        """Frobenius norm of each group (n_groups,)."""
        return matrix.reshape(self.features.n_groups, -1).norm(dim=1)

    def beta_max(self) -> float:
        return float(self.norms(self.linear).max()) / self.features.copies

    def solve(self, beta: float, sizes: Tensor | None, tol: float) -> _Point:
        """Alternate W = W(η), η = ‖W‖ from η = `sizes` until the duality gap over the dictionary is `tol`."""
        penalty = beta * self.features.copies
        linear, total = self.linear, self.square / self.n - float(self.target_mean.square().sum())
        if sizes is None:  # the mean η cannot be larger: zero weights would be better
            sizes = torch.full((self.features.n_groups,), 0.5 * total / (penalty * self.features.n_groups)).double()
        best: _Point | None = None
        for _ in range(MAX_ITER):
            matrix = self._ridge(sizes, penalty, linear)
            pull = linear - self._apply(matrix)
            norms, pulls = self.norms(matrix), self.norms(pull)
            loss = 0.5 * (total - float((matrix * (linear + pull)).sum()))
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
        assert best is not None
        return best

    def _apply(self, matrix: Tensor) -> Tensor:
        """The centred Gram matrix times W."""
        return self.products @ matrix / self.n - self.mean @ (self.mean.T @ matrix)

    def _ridge(self, sizes: Tensor, penalty: float, linear: Tensor) -> Tensor:
        """W(η), through S = √η: W = S Z with (S H S + β I) Z = S L, which η = 0 does not disturb."""
        roots = sizes.sqrt().repeat_interleave(self.features.n_cells)
        alive = roots.nonzero()[:, 0]
        roots, mean = roots[alive, None], self.mean[alive]
        base = self.products[alive][:, alive] if len(alive) < len(sizes) * self.features.n_cells else self.products + 0
        base.div_(self.n).addmm_(mean, mean.T, alpha=-1).mul_(roots).mul_(roots.T)
        base.diagonal().add_(penalty)
        factor = torch.linalg.cholesky(base, out=base)
        matrix = torch.zeros_like(linear)
        matrix[alive] = roots * torch.cholesky_solve(roots * linear[alive], factor)
        return matrix
