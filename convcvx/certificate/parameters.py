"""How a certificate is made: of filters and weights alone, whoever trained them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from convcvx.activations import unit_neurons
from convcvx.budget import NEVER
from convcvx.certificate.data import data_of, space_of
from convcvx.certificate.record import FLOAT32_ROUNDING, Certificate
from convcvx.errors import InputError
from convcvx.machine.threads import sparing_threads
from convcvx.machine.watch import phase
from convcvx.optimum import optimum_of
from convcvx.oracles import get_oracle
from convcvx.oracles.base import Oracle
from convcvx.oracles.contradiction import binds, check_proof
from convcvx.oracles.local import LocalOracle
from convcvx.oracles.searched import Search
from convcvx.problem import Problem, relative_gap

LARGE = 1e11
"""Products n·K·h·m of a pass over all images from which on certifying in float64 would take minutes."""
LIGHT_STARTS = 64
"""Filters of the network, those with the largest weights, that a light search is given."""
HOPELESS = 0.5
"""Estimated gap from which on the search at the end of a training is left: it finds larger g only, and a larger gap."""
CONFIRMING = 12
"""Batches of climbs behind a gap that a solver believes: two persistent searches."""


def judged(
    problem: Problem,
    filters: Tensor,
    weights: Tensor,
    intercept: Tensor | None = None,
    outputs: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit filters, weights and predictions of a network at its best: neurons balanced, b re-optimised.

    `problem.primal` of the last two is the objective by which networks are compared. It is never above that of the
    network as it is, with its own `intercept` (c,), from which the best one is looked for. `outputs` (n, c) are its
    predictions without an intercept, where they are known.
    """
    filters, weights = unit_neurons(filters, weights)
    predictions = outputs
    if predictions is None:
        predictions = problem.responses.predict(filters, weights, torch.zeros(problem.n_outputs))
    if problem.intercept:
        own = None if intercept is None else intercept.double() - problem.offset
        predictions = predictions + problem.best_intercept(predictions, own)
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
    training: Sequence[Mapping[str, Any]] | None = None,
    rounds: Sequence[Mapping[str, Any]] = (),
    outputs: Tensor | None = None,
) -> Certificate:
    """Certify filters (m, r) of any norm with weights (m, P, c) on `problem`; b is re-optimised, from `intercept` (c,).

    `dual_point` (n, c) is a second chance for the lower bound, and `training` caps a local search, as in
    `certify_on`. `rounds` are records of a training, in this process, at this β, on these images or on samples of them,
    by a solver that asks an oracle: what the last one says was proved at `dual_point` counts where it is better than
    what is proved now, and where it shows a gap of `tol` nothing is. `outputs` (n, c), predictions without an intercept
    in the problem's own arithmetic, save a pass where that arithmetic is good enough: beyond `LARGE`.

    Everything is computed in float64, but for a local search beyond `LARGE`: that is a light one, which starts from the
    filters with the largest weights, and responses are computed in the problem's own arithmetic, their sums in float64.
    A proof has its rounding on the safe side: docs/certificates.md. At the deadline of
    `problem` the search for filters ends, with what it has by then.

    Where the search proves nothing for all networks, or its time was over, polynomials prove what a few passes can, and
    where there was no time for these the lengths of the patches: a bound above zero in any case.
    """
    deadline, problem = problem.deadline, problem.until(NEVER)  # whose passes for the objective have to be made
    search = get_oracle(oracle, problem, tol=tol, thorough=True) if isinstance(oracle, str) else oracle
    products = problem.n * problem.responses.n_positions * problem.responses.embedding.basis.shape[1] * len(filters)
    large = products > LARGE and search.name == "local"
    given, problem = problem, problem if large else problem.with_dtype(torch.float64)
    phase("objective of the network")
    filters, weights, predictions = judged(problem, filters, weights, intercept, outputs if large else None)
    primal = problem.primal(predictions, weights)
    residual = problem.dual_point(predictions)
    starts = filters
    if large:
        starts = filters[weights.flatten(1).norm(dim=1).argsort(descending=True)[:LIGHT_STARTS]]
        search = LocalOracle(n_climbers=8, n_steps=6, n_batches=1, thorough=True)
    if training is not None and isinstance(search, LocalOracle) and isinstance(oracle, str):
        hopeless = _height(problem, residual, (1 - HOPELESS) * primal)
        search = replace(search, max_batches=_fair_batches(training, problem.n, tol), hopeless=hopeless)
    points = [residual] + ([] if dual_point is None else [problem.in_domain(_checked(dual_point, problem))])
    seconds = None if training is None else _seconds(training)
    phase(f"lower bound, by oracle {search.name}")
    shown = Search(search, tol, seed, deadline, seconds, rounds, dual_point)(problem, given, starts, points, primal)
    found = shown.found
    # The network's own objective is known to rounding only, which is part of the gap.
    off = FLOAT32_ROUNDING * primal if large else problem.primal_error(predictions, weights)
    for bound in (shown.dual if binds(found.scope, search, filters) else 0.0, shown.proved):
        check_proof(problem, bound, primal, predictions, weights)
    dual = _between(shown.dual - (off if found.scope.proved or large else 0.0), primal)
    proved, name = _between(shown.proved - off, primal), shown.name
    if not found.scope.proved:
        dual = max(dual, proved)  # no estimate is below what is proved
    elif proved > dual:  # it holds for the filters of that scope as well
        dual, name = proved, shown.proved_by or name
    rel_gap = relative_gap(primal, dual)
    return Certificate(
        primal=primal,
        dual=dual,
        rel_gap=rel_gap,
        scope=found.scope,
        beta=problem.beta,
        g_max=found.g_max,
        loss=problem.loss.name,
        intercept=problem.intercept,
        n_images=problem.n,
        n_filters=len(filters),
        patch_rank=problem.responses.embedding.patch_rank,
        oracle=name,
        search=found.stats,
        train_accuracy=problem.accuracy(predictions),
        filter_rank=problem.responses.embedding.dim,
        filter_size=problem.responses.embedding.size,
        subspaces=problem.responses.embedding.spec.subspaces,
        family=found.stats.get("family"),
        family_size=found.stats.get("family_size"),
        family_gap=rel_gap if found.scope.proved and "family" in found.stats else None,
        optimum=optimum_of(problem, filters, weights, shown.point, found, primal=primal + off, rel_gap=rel_gap),
        proved=proved,
        proved_gap=relative_gap(primal, proved),
        proved_by=shown.proved_by,
        activation=str(problem.responses.activation),
        pooling=str(problem.responses.pooling),
        patches=str(problem.responses.embedding.spec),
        data=data_of(problem),
        space=space_of(problem),
    )


def _between(bound: float, primal: float) -> float:
    """The optimum is neither below zero nor above that of any network; what is no number bounds nothing."""
    return min(bound, primal) if bound > 0 else 0.0


def _seconds(training: Sequence[Mapping[str, Any]]) -> float:
    """How long a training took."""
    return float(training[-1]["seconds"]) if training else 0.0


def _fair_batches(training: Sequence[Mapping[str, Any]], n: int, tol: float) -> int:
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
