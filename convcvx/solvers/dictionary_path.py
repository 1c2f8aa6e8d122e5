"""The optimum over a dictionary of thousands of filters, at a β of a path that held-out images choose.

    min_{W, b}  (1/2n) Σ_i ‖A_i W + b - y_i‖² + β Σ_j ‖W_j‖_F,      A = Φ flattened to (n, m·P)

is the master problem of `group_lasso`, whose Newton steps weigh every filter against every other: too much for
thousands of them. Here the η form is solved by its plain iteration (Bach et al. 2012, sec. 5.2): W(η) is one ridge
regression, then η_j = ‖W_j‖, warm from one β to the next. A ridge regression is a few conjugate gradient steps on the
Gram matrix, with the Cholesky factor of an earlier one as preconditioner: the path takes two or three factors. Whatever
a W was found by, its objective and its duality gap are what is reported. Every image is visited once: the path needs
the Gram matrix of the images kept and the responses of the images held out, which join the Gram matrix for the last
solve.

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
from convcvx.solvers.gram import Gram

RATIOS = tuple(10 ** (-1 - k / 2) for k in range(12))
"""The path: β as shares of the largest one that gives the dictionary any weight."""
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
BATCH = 1024
"""Images whose features are multiplied at once."""


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
    versions: int = 1,
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
    versions : int
        The images are so many versions of the same ones, one version after the other: an image is held out in all.
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
    held = torch.zeros(problem.n // versions, dtype=torch.bool)
    if tuned:
        held[:: max(2, round(1 / tune))] = True
    held = held.repeat(versions)
    gram = Gram(features.size, problem.n_outputs, problem.responses.dtype, centred=problem.intercept)
    lasso = _GroupLasso(gram, features)
    held_out = torch.empty(int(held.sum()), features.size, dtype=problem.responses.dtype)
    filled = 0
    for where, block in features.batches():
        out = held[where]
        gram.add(block[~out], problem.targets[where][~out])
        held_out[filled : filled + int(out.sum())] = block[out]
        filled += int(out.sum())
    beta_max = lasso.beta_max()
    path: list[dict[str, Any]] = []
    point = None
    if tuned:
        targets = problem.targets[held]
        for record, candidate in _path(lasso, held_out, targets, beta_max, tol):
            path.append(record)
            if record is min(path, key=_error):
                beta, point = record["beta"], candidate
        gram.add(held_out, targets)
    elif beta is None:
        beta = beta_ratio * beta_max  # type: ignore[operator]
    del held_out
    assert beta is not None
    point = lasso.solve(beta, point, tol, MAX_ITER)
    solution = Solution.empty(problem.responses.dim, problem.responses.n_cells, problem.n_outputs)
    solution = solution.with_parameters(filters, features.weights(point.matrix), gram.intercept(point.matrix))
    return DictionaryFit(solution, beta, beta_max, point.objective, point.rel_gap, path)


def _error(record: dict[str, Any]) -> tuple[float, float]:
    return record["held_out_error"], record["held_out_loss"]


def _path(
    lasso: _GroupLasso, block: Tensor, targets: Tensor, beta_max: float, tol: float
) -> Iterator[tuple[dict[str, Any], _Point]]:
    """Records of decreasing β, and the weights there, until the held-out images are predicted worse."""
    point, best, since = None, (float("inf"), float("inf")), 0
    for ratio in RATIOS:
        point = lasso.solve(ratio * beta_max, point, tol, PATH_ITER)
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
        self.size = self.n_groups * self.n_cells
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
        """Yield (images, features (b, n_groups·P)) until all images are through, `BATCH` at a time."""
        width = len(self.filters) * self.n_cells * self.responses.dtype.itemsize
        for where, block in self.responses.blocks(self.filters, BATCH * width):
            yield where, self._fold(block).flatten(1).cpu()

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
    """W, the η after it, and what W is worth."""

    matrix: Tensor
    sizes: Tensor
    objective: float
    rel_gap: float


class _GroupLasso:
    """The group lasso that a Gram matrix defines; a group is what the features of one filter, or of a pair, weigh."""

    def __init__(self, gram: Gram, features: _Features) -> None:
        self.gram, self.features = gram, features
        self._worn = True

    def norms(self, matrix: Tensor) -> Tensor:
        """Frobenius norm of each group (n_groups,)."""
        return matrix.reshape(self.features.n_groups, -1).norm(dim=1)

    def beta_max(self) -> float:
        return float(self.norms(self.gram.linear).max()) / self.features.copies

    def solve(self, beta: float, start: _Point | None, tol: float, max_iter: int) -> _Point:
        """Alternate W = W(η), η = ‖W‖ from `start` until the duality gap over the dictionary is `tol`."""
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

    def _ridge(self, matrix: Tensor, pull: Tensor, sizes: Tensor, penalty: float) -> Tensor:
        """W(η), nearly: (H + β/η) W = L by conjugate gradients from W = `matrix`, of which L - H W is the `pull`.

        The weights of a filter with η = 0 are zero.
        """
        alive = (sizes > 0).repeat_interleave(self.features.n_cells)[:, None]
        ridges = (penalty / sizes.clamp_min(1e-4 * float(sizes.mean()))).repeat_interleave(self.features.n_cells)
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
            length = size / (direction * product).sum(dim=0).clamp_min(TINY)
            solution += length * direction
            residual = residual - length * product
            towards = self.gram.unfactor(residual) * alive
            last, size = size, (residual * towards).sum(dim=0)
            direction = towards + size / last.clamp_min(TINY) * direction
            steps += 1
        return solution, steps
