"""The certificate: how far a network is from the optimum over all networks of any width.

Everything is recomputed from weights and data alone, in float64; only a heuristic certificate beyond `LARGE` takes its
responses in the problem's own arithmetic. No solver is imported and none is believed.
Any Conv2d → ReLU → average pooling → Linear qualifies, whoever trained it. ReLU is positively homogeneous, so each
neuron is first balanced (‖u_j‖ = ‖V_j‖, which never raises the objective), and the intercept re-optimised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from convcvx.budget import NEVER, Deadline
from convcvx.errors import InputError, check_positive
from convcvx.foreign import Layers, read_network
from convcvx.images import Images
from convcvx.oracles import get_oracle
from convcvx.oracles.base import Oracle
from convcvx.oracles.local import LocalOracle
from convcvx.patches import PatchEmbedding
from convcvx.problem import Problem
from convcvx.responses import Responses
from convcvx.threads import sparing_threads

SCOPES = {
    "global": "a proof: no network of any width has an objective below the lower bound",
    "sampled": "a proof for the sampled activation patterns and the network's own only, not for all networks",
    "heuristic": "an estimate, not a proof: a multi-start local search found no better filter",
}

ROUNDING = 1e-13
"""Taken off the lower bound, as a share of the objective: more than float64 sums lose."""

LARGE = 1e11
"""Products n·K·h·m of a pass over all images from which on certifying in float64 would take minutes."""
LIGHT_STARTS = 64
"""Filters of the network, those with the largest weights, that a light search is given."""
HOPELESS = 0.5
"""Estimated gap from which on the search at the end of a training is left: it finds larger g only, and a larger gap."""
CONFIRMING = 12
"""Batches of climbs behind a gap that a solver believes: two persistent searches."""
HALF = 0.5
"""Share of the time left for the network's own dual point, where there is another one to try."""
FLOAT32_ROUNDING = 1e-4
"""Taken off the lower bound, as a share of the objective, when the responses are float32."""


@dataclass(frozen=True)
class Certificate:
    """Primal and dual value of a network, and what the difference means.

    Attributes
    ----------
    primal : float
        (1/n) Σ ℓ(f_i, y_i) + β Σ_j ‖V_j‖_F at unit filters.
    dual : float
        Lower bound on the optimum over networks of any width, within `scope`.
    rel_gap : float
        (primal - dual) / primal.
    scope : {"global", "sampled", "heuristic"}
        What was searched; see `SCOPES`.
    beta : float
    g_max : float
        What the dual point was scaled by, against β: a true upper bound on max g, over all filters if `scope` is
        global, over those of the sampled patterns if it is sampled; the largest g found if it is heuristic.
    loss : str
    intercept : bool
    n_images, n_filters, patch_rank : int
    oracle : str
    search : dict
        The oracle's own statistics: starts and basins, or cells.
    train_accuracy : float or None
        Share of the images whose largest output is at the largest target; of no meaning for real targets.
    """

    primal: float
    dual: float
    rel_gap: float
    scope: str
    beta: float
    g_max: float
    loss: str
    intercept: bool
    n_images: int
    n_filters: int
    patch_rank: int
    oracle: str
    search: dict[str, Any] = field(default_factory=dict)
    train_accuracy: float | None = None

    @property
    def meaning(self) -> str:
        """The scope in words; for a local search also how much of the landscape it saw; what cut the search short."""
        stopped = self.search.get("stopped") == "time_limit"
        if stopped and self.g_max == math.inf:
            return "no bound but zero, which no loss is below: the time limit left no time for a search"
        cut = "; the time limit cut it short" if stopped else ""
        if self.search.get("stopped") == "hopeless":
            cut = "; the search ended early: it shows a gap that is large and would only grow"
        if not {"starts", "basins", "unseen_mass"} <= set(self.search):
            return SCOPES[self.scope] + cut
        return (
            f"{SCOPES[self.scope]} ({self.search['starts']} climbs ended in {self.search['basins']} distinct maxima; "
            f"another climb would find a new one with probability about {self.search['unseen_mass']:.2f}, Good-Turing)"
            f"{cut}"
        )

    def with_bound_of(self, other: Certificate) -> Certificate:
        """The same network against the better of two lower bounds on the same problem: a proof before an estimate.

        A sampled bound holds for the patterns of the network it was computed for, and never passes to another.

        Raises
        ------
        InputError
            When `other` certifies another problem.
        """
        for name in ("beta", "loss", "intercept", "n_images", "patch_rank"):
            if getattr(self, name) != getattr(other, name):
                raise InputError(
                    f"the lower bound of another problem does not hold here: {name} is {getattr(self, name)!r}, not "
                    f"{getattr(other, name)!r}"
                )
        if other.scope == "sampled" or (self.scope == "sampled" and other.scope == "heuristic"):
            return self
        if (other.scope == "global", other.dual) <= (self.scope == "global", self.dual):
            return self
        taken = {name: getattr(other, name) for name in ("dual", "scope", "g_max", "oracle", "search")}
        return replace(self, rel_gap=(self.primal - other.dual) / max(self.primal, 1e-300), **taken)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"meaning": self.meaning}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Certificate:
        return cls(**{k: v for k, v in values.items() if k != "meaning"})

    def __str__(self) -> str:
        bound = "lower bound" if self.scope == "global" else f"lower bound ({self.scope})"
        return (
            f"objective {self.primal:.8g}, {bound} {self.dual:.8g}, relative gap {self.rel_gap:.2e}\n"
            f"scope {self.scope}: {self.meaning}"
        )


def certify(
    network: nn.Module,
    images: Images,
    targets: Tensor,
    beta: float,
    *,
    loss: str = "squared",
    oracle: str | Oracle = "auto",
    tol: float = 1e-4,
    embedding: PatchEmbedding | None = None,
    n_classes: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    responses: Callable[..., Responses] = Responses,
    dual_point: Tensor | None = None,
    time_limit: float | None = None,
    training: Sequence[dict[str, Any]] | None = None,
) -> Certificate:
    """Certify any two-layer convolutional ReLU network at weight decay `beta`.

    Parameters
    ----------
    network : nn.Module
        Conv2d → ReLU → average pooling (or none) → Flatten → Linear. Biases are used as they are there: one on
        the convolution counts as a regularised hidden bias, one on the linear layer as the free intercept.
    images : Tensor or StreamedImages (n, C, H, W)
        Training images, as the network takes them.
    targets : Tensor
        (n,) classes or (n, c) real values.
    beta : float
        torch's `weight_decay` under a mean-reduced loss.
    loss : {"squared", "cross-entropy"}
    oracle : {"auto", "exact", "branch-and-bound", "copositive", "sampled", "local"}
    tol : float
        Gap at which a rigorous oracle may stop refining its bound.
    embedding : PatchEmbedding, optional
        For models with whitening or a low-rank patch basis: in their space filters have their norm.
    responses : callable
        Makes the `Responses`; `Team.responses` for images that several processes share.
    dual_point : Tensor (n, c), optional
        Another dual point than the network's residual, tried where that leaves a gap above `tol` and the oracle is
        rigorous. It counts for what is proved of it here, whoever made it.
    time_limit : float, optional
        Seconds after which the bound is the one proved, or estimated, by then; `search` and `meaning` say so.
    training : sequence of dict, optional
        The history of a training that ends with this certificate: the local search of oracle "auto" or "local" then
        costs about a fifth of the training's own searches, and ends where the gap it shows is hopeless; `meaning` says
        so. Without it the search makes its full effort.

    Raises
    ------
    InputError
        For a network of another form, or data that do not fit it.
    """
    deadline = Deadline.after(None if time_limit is None else check_positive("time_limit", time_limit))
    layers = read_network(network)
    bounds = images.aminmax() if len(images) else ()
    if not all(bool(part.isfinite().all()) for part in (*bounds, *network.parameters())):
        raise InputError("images and the network's weights must be finite; found NaN or infinity")
    if embedding is None:
        embedding = PatchEmbedding.fit(images, layers.spec)
    made = responses(images, embedding, layers.pooling, device=device)
    if layers.classifier.in_features != layers.convolution.out_channels * made.n_cells:
        raise InputError(
            f"the linear layer takes {layers.classifier.in_features} features but {layers.convolution.out_channels} "
            f"filters pooled to {made.n_cells} cells give {layers.convolution.out_channels * made.n_cells}; "
            "check pool, stride and padding"
        )
    intercept = layers.classifier.bias is not None
    n_outputs = layers.classifier.out_features
    problem = Problem.build(made, targets, beta, loss, intercept, n_classes or n_outputs)
    if problem.n_outputs != n_outputs:
        raise InputError(f"the network has {n_outputs} outputs but the targets {problem.n_outputs}")
    bias = layers.convolution.bias
    filters = embedding.filters(layers.convolution.weight.detach().cpu(), None if bias is None else bias.detach().cpu())
    weights = layers.classifier.weight.detach().cpu().double().unflatten(1, (len(filters), -1)).permute(1, 2, 0)
    _check_forward(network, layers, problem, filters, weights)
    problem, options = problem.until(deadline), {"oracle": oracle, "tol": tol, "seed": seed, "dual_point": dual_point}
    return certify_parameters(problem, filters, weights, training=training, **options)


@torch.no_grad()
def _check_forward(network: nn.Module, layers: Layers, problem: Problem, filters: Tensor, weights: Tensor) -> None:
    """Raise `InputError` unless the network computes what its layers, read in order, stand for."""
    sample = problem.responses.to(images=problem.responses.images[:8])
    bias = layers.classifier.bias
    shift = torch.zeros(problem.n_outputs) if bias is None else bias.detach()
    expected = sample.predict(filters, weights, shift)
    outputs = network(sample.images[:].to(layers.classifier.weight)).double().cpu()
    scale = float(expected.abs().max())
    if outputs.shape != expected.shape or not torch.allclose(outputs, expected, rtol=0, atol=1e-2 * scale + 1e-6):
        raise InputError(
            "the network's outputs are not those of its Conv2d → ReLU → average pooling → Linear applied in this "
            "order; certify a plain nn.Sequential of them"
        )


def judged(problem: Problem, filters: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit filters, weights and predictions of a network at its best: neurons balanced, b re-optimised.

    `problem.primal` of the last two is the objective by which networks are compared.
    """
    norms = filters.norm(dim=1)
    weights = weights * norms[:, None, None]
    alive = weights.flatten(1).norm(dim=1) > 0
    filters, weights = filters[alive] / norms[alive, None], weights[alive]
    predictions = problem.responses.predict(filters, weights, torch.zeros(problem.n_outputs))
    if problem.intercept:
        predictions = predictions + problem.loss.best_intercept(predictions, problem.targets)
    return filters, weights, predictions


@sparing_threads
def certify_parameters(
    problem: Problem,
    filters: Tensor,
    weights: Tensor,
    *,
    oracle: str | Oracle = "auto",
    tol: float = 1e-4,
    seed: int = 0,
    dual_point: Tensor | None = None,
    training: Sequence[dict[str, Any]] | None = None,
) -> Certificate:
    """Certify filters (m, r) of any norm with weights (m, P, c) on `problem`; b is re-optimised.

    `dual_point` (n, c) is a second chance for the lower bound, and `training` caps a local search, as in `certify`.

    Everything is computed in float64, but for a local search beyond `LARGE`: that is a light one, which starts from the
    filters with the largest weights, and responses are computed in the problem's own arithmetic, their sums in float64.
    A proof is always in float64. At the deadline of `problem` the search for filters ends, with what it has by then.
    """
    deadline, problem = problem.deadline, problem.until(NEVER)  # whose passes for the objective have to be made
    search = get_oracle(oracle, problem, tol=tol, thorough=True) if isinstance(oracle, str) else oracle
    products = problem.n * problem.responses.n_positions * problem.responses.embedding.basis.shape[1] * len(filters)
    large = products > LARGE and search.name == "local"
    given, problem = problem, problem if large else problem.with_dtype(torch.float64)
    filters, weights, predictions = judged(problem, filters, weights)
    primal = problem.primal(predictions, weights)
    residual = problem.dual_point(predictions)
    starts, rounding = filters, ROUNDING
    if large:
        starts = filters[weights.flatten(1).norm(dim=1).argsort(descending=True)[:LIGHT_STARTS]]
        search = LocalOracle(n_climbers=8, n_steps=6, n_batches=1, thorough=True)
        rounding = FLOAT32_ROUNDING
    if training is not None and isinstance(search, LocalOracle) and isinstance(oracle, str):
        hopeless = _height(problem, residual, (1 - HOPELESS) * primal)
        search = replace(search, max_batches=_fair_batches(training, problem.n, tol), hopeless=hopeless)
    target = problem.beta * (1 + 0.5 * tol)
    # A heuristic may search in the arithmetic at hand: what it finds is measured in float64 below.
    found = search(
        (given if search.name == "local" else problem).until(deadline if dual_point is None else deadline.share(HALF)),
        residual,
        starts=starts,
        n_filters=16,
        seed=seed,
        target=target,
    )
    if found.scope == "heuristic" and len(found.values):
        candidates = torch.cat([found.filters, starts])
        values = problem.responses.correlate(candidates, residual).flatten(1).norm(dim=1)
        found = replace(found, filters=candidates, values=values)
    dual = problem.dual(residual, found.g_max)
    if found.scope == "global" and found.g_max <= target and primal - dual > tol * primal:
        # The proof stopped where Z is feasible; where g stays below β a longer Z would be too, and bound better.
        found = search(problem.until(deadline), residual, starts=starts, n_filters=16, seed=seed, target=0.0)
        dual = problem.dual(residual, found.g_max)
    if dual_point is not None and found.scope == "global" and primal - dual > tol * primal:
        other = problem.in_domain(_checked(dual_point, problem))
        again = search(problem.until(deadline), other, starts=starts, n_filters=1, seed=seed, target=target)
        if again.scope == "global" and problem.dual(other, again.g_max) > dual:
            found, dual = again, problem.dual(other, again.g_max)
    dual = max(dual - rounding * primal, 0.0)  # no loss is negative, whatever rounding takes off
    return Certificate(
        primal=primal,
        dual=dual,
        rel_gap=(primal - dual) / max(primal, 1e-300),
        scope=found.scope,
        beta=problem.beta,
        g_max=found.g_max,
        loss=problem.loss.name,
        intercept=problem.intercept,
        n_images=problem.n,
        n_filters=len(filters),
        patch_rank=problem.responses.embedding.patch_rank,
        oracle=search.name,
        search=found.stats,
        train_accuracy=float((predictions.argmax(dim=1) == problem.targets.argmax(dim=1)).double().mean()),
    )


def _fair_batches(training: Sequence[dict[str, Any]], n: int, tol: float) -> int:
    """Batches of climbs that cost a fifth of those that a training on `n` images went through, counted, not timed."""
    batches = sum(record.get("images", n) / n for record in training)
    if training and training[-1]["rel_gap"] <= tol:
        batches += CONFIRMING
    return max(1, math.ceil(batches / 5))


def _height(problem: Problem, dual_point: Tensor, value: float) -> float:
    """The g, nearly, from which on the dual value is below `value`; infinite beyond a hundred times β."""
    low, high = problem.beta, 100 * problem.beta
    if problem.dual(dual_point, high) >= value:
        return math.inf
    for _ in range(6):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if problem.dual(dual_point, middle) >= value else (low, middle)
    return high


def _checked(dual_point: Tensor, problem: Problem) -> Tensor:
    if dual_point.shape != problem.targets.shape or not bool(dual_point.isfinite().all()):
        raise InputError(
            f"dual_point must be finite and of shape {tuple(problem.targets.shape)}, one row an image; got "
            f"{tuple(dual_point.shape)}"
        )
    return dual_point.double()
