"""The certificate: how far a network is from the optimum over all networks of any width.

Everything is recomputed from weights and data alone, in float64; only a heuristic certificate beyond `LARGE` takes its
responses in the problem's own arithmetic. No solver is imported and none is believed.
Any Conv2d → ReLU → average pooling → Linear qualifies, whoever trained it. ReLU is positively homogeneous, so each
neuron is first balanced (‖u_j‖ = ‖V_j‖, which never raises the objective), and the intercept re-optimised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convcvx.arrays import as_tensor
from convcvx.budget import NEVER, Deadline
from convcvx.errors import InputError, check_positive
from convcvx.evaluate import outputs_of
from convcvx.foreign import Layers, read_network
from convcvx.images import Images, read_images
from convcvx.oracles import get_oracle
from convcvx.oracles.base import Oracle
from convcvx.oracles.local import LocalOracle
from convcvx.patches import PatchEmbedding
from convcvx.problem import Problem, relative_gap
from convcvx.responses import Responses
from convcvx.threads import sparing_threads
from convcvx.units import Units, times

SCOPES = {
    "global": "a proof: no network of any width has an objective below the lower bound",
    "sampled": "a proof for the sampled activation patterns and the network's own only, not for all networks",
    "heuristic": "an estimate, not a proof: a multi-start local search found no better filter",
}

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

FORWARD = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far a network's outputs may lie from those of its layers in exact arithmetic, as a share of the largest of them,
by the arithmetic of the network: many times what rounding makes of them, and little beside a layer too many."""


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
    filter_rank, filter_size : int or None
        r and h: filters lie in r principal directions of the patches, of h, and networks with others are not spoken of.
        None in files of earlier versions.
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
    filter_rank: int | None = None
    filter_size: int | None = None

    @property
    def meaning(self) -> str:
        """The scope in words, and the filters meant; of a local search also what it saw; what cut the search short."""
        said = SCOPES[self.scope]
        if self.filter_rank != self.filter_size:
            said += f"; among networks whose filters are of rank {self.filter_rank} of {self.filter_size}"
        stopped = self.search.get("stopped") == "time_limit"
        if stopped and self.g_max == math.inf:
            return "no bound but zero, which no loss is below: the time limit left no time for a search"
        cut = "; the time limit cut it short" if stopped else ""
        if self.search.get("stopped") == "hopeless":
            cut = "; the search ended early: it shows a gap that is large and would only grow"
        if not {"starts", "basins", "unseen_mass"} <= set(self.search):
            return said + cut
        return (
            f"{said} ({self.search['starts']} climbs ended in {self.search['basins']} distinct maxima; "
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
        for name in ("beta", "loss", "intercept", "n_images", "patch_rank", "filter_rank"):
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
        return replace(self, rel_gap=relative_gap(self.primal, other.dual), **taken)

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
    images: Images | np.ndarray,
    targets: Tensor | np.ndarray,
    beta: float,
    *,
    loss: str = "squared",
    oracle: str | Oracle = "auto",
    tol: float = 1e-4,
    embedding: PatchEmbedding | None = None,
    n_classes: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dual_point: Tensor | None = None,
    time_limit: float | None = None,
) -> Certificate:
    """Certify any two-layer convolutional ReLU network at weight decay `beta`.

    Parameters
    ----------
    network : nn.Module
        Conv2d → ReLU → average pooling (or none) → Flatten → Linear. Biases are used as they are there: one on
        the convolution counts as a regularised hidden bias, one on the linear layer as the free intercept.
    images : Tensor, ndarray or StreamedImages (n, C, H, W), or (n, H, W) with one channel
        Training images, as the network takes them.
    targets : Tensor or ndarray
        (n,) classes or (n, c) real values.
    beta : float
        torch's `weight_decay` under a mean-reduced loss.
    loss : {"squared", "cross-entropy"}
    oracle : {"auto", "exact", "branch-and-bound", "copositive", "sampled", "local"}
    tol : float
        Gap at which a rigorous oracle may stop refining its bound.
    embedding : PatchEmbedding, optional
        For models with whitening or a low-rank patch basis: in their space filters have their norm.
    dual_point : Tensor (n, c), optional
        Another dual point than the network's residual, tried where that leaves a gap above `tol` and the oracle is
        rigorous. It counts for what is proved of it here, whoever made it.
    time_limit : float, optional
        Seconds after which the bound is the one proved, or estimated, by then; `search` and `meaning` say so.

    Raises
    ------
    InputError
        For a network of another form, one that computes anything else than its layers in their order, or data that do
        not fit it.
    """
    deadline = Deadline.after(None if time_limit is None else check_positive("time_limit", time_limit))
    layers = read_network(network)
    read, classes = read_images(images), as_tensor("targets", targets)
    if not all(bool(part.isfinite().all()) for part in network.parameters()):
        raise InputError("the network's weights must be finite; found NaN or infinity")
    units = Units.of(read, classes, loss, embedding.spec if embedding else layers.spec)
    read, classes, beta = units.reduced("images", read), units.reduced("targets", classes), units.reduced_beta(beta)
    network, dual_point = _in_units(network, units), units.inverse.dual_point(dual_point)
    if embedding is None:
        embedding = PatchEmbedding.fit(read, layers.spec)
    made = Responses(read, embedding, layers.pooling, device=device)
    intercept = layers.classifier.bias is not None
    problem = Problem.build(made, classes, beta, loss, intercept, n_classes or layers.classifier.out_features)
    problem = problem.until(deadline)
    certificate = certify_on(problem, network, oracle=oracle, tol=tol, seed=seed, dual_point=dual_point)
    return units.certificate(certificate)


def certify_on(
    problem: Problem,
    network: nn.Module,
    *,
    oracle: str | Oracle = "auto",
    tol: float = 1e-4,
    seed: int = 0,
    dual_point: Tensor | None = None,
    training: Sequence[dict[str, Any]] | None = None,
) -> Certificate:
    """As `certify`, on a `problem` that is there already: its images, embedding, pooling and β are believed.

    `training` is the history of a training that ends with this certificate: the local search of oracle "auto" or
    "local" then costs about a fifth of the training's own searches, and ends where the gap it shows is hopeless;
    `meaning` says so. Without it the search makes its full effort.
    """
    deadline, problem = problem.deadline, problem.until(NEVER)  # what is read and checked has to be
    layers, embedding = read_network(network), problem.responses.embedding
    for name in ("kernel_size", "stride", "padding"):  # of a network whose weights are 0 outputs would not tell
        theirs, ours = getattr(layers.spec, name), getattr(embedding.spec, name)
        if theirs != ours:
            raise InputError(f"the network's {name} is {theirs}, that of the embedding {ours}; fit it to the network's")
    features = layers.convolution.out_channels * problem.responses.n_cells
    if layers.classifier.in_features != features:
        raise InputError(
            f"the linear layer takes {layers.classifier.in_features} features but {layers.convolution.out_channels} "
            f"filters pooled to {problem.responses.n_cells} cells give {features}; check pool, stride and padding"
        )
    if problem.n_outputs != layers.classifier.out_features:
        raise InputError(
            f"the network has {layers.classifier.out_features} outputs but the targets {problem.n_outputs}"
        )
    bias = layers.convolution.bias
    filters = embedding.filters(layers.convolution.weight.detach().cpu(), None if bias is None else bias.detach().cpu())
    weights = layers.classifier.weight.detach().cpu().double().unflatten(1, (len(filters), -1)).permute(1, 2, 0)
    _check_forward(network, layers, problem, filters, weights)
    own = None if layers.classifier.bias is None else layers.classifier.bias.detach().cpu()
    options: dict[str, Any] = {"oracle": oracle, "tol": tol, "seed": seed, "dual_point": dual_point}
    return certify_parameters(problem.until(deadline), filters, weights, own, training=training, **options)


def _in_units(network: nn.Module, units: Units) -> nn.Module:
    """The network for images and targets in `units`; in float64 if these are not the usual ones."""
    if units.ordinary:
        return network
    network = deepcopy(network).double()
    classifier = read_network(network).classifier
    with torch.no_grad():
        classifier.weight.copy_(times(classifier.weight.cpu(), units.images - units.targets))
        if classifier.bias is not None:
            classifier.bias.copy_(times(classifier.bias.cpu(), -units.targets))
    return network


@torch.no_grad()
def _check_forward(network: nn.Module, layers: Layers, problem: Problem, filters: Tensor, weights: Tensor) -> None:
    """Raise `InputError` unless the network computes what its layers, read in order, stand for: on every image."""
    bias = layers.classifier.bias
    shift = torch.zeros(problem.n_outputs) if bias is None else bias.detach().cpu()
    expected = problem.responses.predict(filters, weights, shift)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # whose ten bits would hide what is looked for
        outputs = outputs_of(network, problem.responses.images).double()
    dtype = layers.classifier.weight.dtype
    # An intercept far from zero is rounded once, and says nothing about the layers before it.
    rounding = 8 * torch.finfo(dtype).eps * float(shift.abs().max())
    allowed = FORWARD.get(dtype, FORWARD[torch.float32]) * float((expected - shift).abs().max()) + rounding
    if outputs.shape != expected.shape:
        raise InputError(f"the network's outputs must be {tuple(expected.shape)}; got {tuple(outputs.shape)}")
    difference = float((outputs - expected).abs().max())
    if not difference <= allowed:  # nor is NaN anything that layers stand for
        raise InputError(
            "the network's outputs are not those of its Conv2d → ReLU → average pooling → Linear applied in this "
            f"order: they differ by {difference:.1e}, more than rounding, {allowed:.1e}; certify a plain nn.Sequential "
            "of them, or network.double() if its arithmetic is too coarse for these images"
        )


def judged(
    problem: Problem, filters: Tensor, weights: Tensor, intercept: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit filters, weights and predictions of a network at its best: neurons balanced, b re-optimised.

    `problem.primal` of the last two is the objective by which networks are compared. It is never above that of the
    network as it is, with its own `intercept` (c,), from which the best one is looked for.
    """
    norms = filters.norm(dim=1)
    weights = weights * norms[:, None, None]
    alive = weights.flatten(1).norm(dim=1) > 0
    filters, weights = filters[alive] / norms[alive, None], weights[alive]
    predictions = problem.responses.predict(filters, weights, torch.zeros(problem.n_outputs))
    if problem.intercept:
        own = None if intercept is None else intercept.double() - problem.offset
        predictions = predictions + problem.loss.best_intercept(predictions, problem.targets, own)
    return filters, weights, predictions


@sparing_threads
def certify_parameters(
    problem: Problem,
    filters: Tensor,
    weights: Tensor,
    intercept: Tensor | None = None,
    *,
    oracle: str | Oracle = "auto",
    tol: float = 1e-4,
    seed: int = 0,
    dual_point: Tensor | None = None,
    training: Sequence[dict[str, Any]] | None = None,
) -> Certificate:
    """Certify filters (m, r) of any norm with weights (m, P, c) on `problem`; b is re-optimised, from `intercept` (c,).

    `dual_point` (n, c) is a second chance for the lower bound, and `training` caps a local search, as in
    `certify_on`.

    Everything is computed in float64, but for a local search beyond `LARGE`: that is a light one, which starts from the
    filters with the largest weights, and responses are computed in the problem's own arithmetic, their sums in float64.
    A proof is always in float64, and rounding is on the safe side of it: docs/certificates.md. At the deadline of
    `problem` the search for filters ends, with what it has by then.
    """
    deadline, problem = problem.deadline, problem.until(NEVER)  # whose passes for the objective have to be made
    search = get_oracle(oracle, problem, tol=tol, thorough=True) if isinstance(oracle, str) else oracle
    products = problem.n * problem.responses.n_positions * problem.responses.embedding.basis.shape[1] * len(filters)
    large = products > LARGE and search.name == "local"
    given, problem = problem, problem if large else problem.with_dtype(torch.float64)
    filters, weights, predictions = judged(problem, filters, weights, intercept)
    primal = problem.primal(predictions, weights)
    residual = problem.dual_point(predictions)
    starts = filters
    if large:
        starts = filters[weights.flatten(1).norm(dim=1).argsort(descending=True)[:LIGHT_STARTS]]
        search = LocalOracle(n_climbers=8, n_steps=6, n_batches=1, thorough=True)
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
        again = search(problem.until(deadline), residual, starts=starts, n_filters=16, seed=seed, target=0.0)
        if again.g_max < found.g_max:
            found, dual = again, problem.dual(residual, again.g_max)
    if dual_point is not None and found.scope == "global" and primal - dual > tol * primal:
        other = problem.in_domain(_checked(dual_point, problem))
        again = search(problem.until(deadline), other, starts=starts, n_filters=1, seed=seed, target=target)
        if again.scope == "global" and problem.dual(other, again.g_max) > dual:
            found, dual = again, problem.dual(other, again.g_max)
    if found.scope != "heuristic":  # the network's own objective is known to rounding only, which is part of the gap
        dual -= problem.primal_error(predictions, weights)
    elif large:
        dual -= FLOAT32_ROUNDING * primal
    dual = min(max(dual, 0.0), primal)  # the optimum is neither below zero nor above that of any network
    return Certificate(
        primal=primal,
        dual=dual,
        rel_gap=relative_gap(primal, dual),
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
        filter_rank=problem.responses.embedding.dim,
        filter_size=problem.responses.embedding.size,
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
