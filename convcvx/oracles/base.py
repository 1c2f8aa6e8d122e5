"""What every oracle takes and gives: max g(u) over the unit ball, for the dual point at hand.

    g(u) = ‖Σ_i φ(x_i; u) Z_iᵀ‖_F = ‖Σ_k (x_k·u)_+ s_k‖,

the second form summing over all patch rows, with `s_k` the *charge* of a row: w_pk Z_i in the slot of cell p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import Tensor

from convcvx.budget import OutOfTime
from convcvx.machine.threads import one_core_blas
from convcvx.oracles._patch_rows import PatchRows
from convcvx.problem import Problem
from convcvx.rounding import largest
from convcvx.terms.scope import Scope
from convcvx.terms.stop import Stop

PROVING_SECONDS = 120.0
"""Time limit of a search whose bound goes on getting better for hours; the best one proved by then is used."""
VALUES_OF_G = ("bound_without_cones", "searched_bound", "remainder")
"""Statistics of oracles that are in the unit of g, targets times images: the others are counts, shares and seconds."""
COUNTS = ("seconds", "starts", "basins", "cones", "entries", "cells", "cylinders", "family_size")
"""Those of which several searches have the sum."""
KEPT_BYTES = 1 << 30
"""Bytes of patch rows that are kept for the next dual point, of all subspaces together; more are gathered each time."""


@dataclass(frozen=True)
class OracleResult:
    """Filters with a large g, and what is known about the maximum.

    Attributes
    ----------
    filters : Tensor (q, r) float64
        Unit norm, best first.
    values : Tensor (q,) float64
        g of each.
    upper_bound : float
        A true upper bound on max g over what `scope` says, rounding included; infinite if none was proved.
    scope : Scope
        Or its text: `global` if and only if `upper_bound` was proved for all filters; `sampled` if for those whose
        activation pattern is one of a sample; else nothing was proved.
    stats : dict
        What the oracle did: starts, basins, cells, seconds; what is a g is named in `VALUES_OF_G`.
    """

    filters: Tensor
    values: Tensor
    upper_bound: float
    scope: Scope
    stats: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scope", Scope(self.scope))

    @property
    def g_max(self) -> float:
        """What the dual point is scaled by: the proved bound, or the best value found when there is none."""
        best = float(self.values.max()) if len(self.values) else math.inf  # a search that saw nothing bounds nothing
        return self.upper_bound if self.scope.proved else best

    @property
    def cut_short(self) -> bool:
        """Whether a deadline ended the search."""
        return self.stats.get("stopped") == Stop.TIME_LIMIT

    @classmethod
    def unfinished(cls, problem: Problem, scope: Scope, seconds: float, bound: float = math.inf) -> OracleResult:
        """What is left of a search that the deadline ended before it had found anything."""
        filters = torch.zeros(0, problem.responses.dim, dtype=torch.float64)
        return cls(filters, filters.sum(dim=1), bound, scope, {"stopped": Stop.TIME_LIMIT, "seconds": seconds})


@dataclass(frozen=True)
class Wanted:
    """What is wanted of an oracle beside the maximum at a dual point.

    Attributes
    ----------
    starts : Tensor (q, r), optional
        Filters worth starting from (the current ones).
    n_filters : int
        Distinct filters to return at most.
    seed : int
    target : float
        A rigorous oracle may stop as soon as it has proved a bound <= `target`, a heuristic one as soon as it has
        found a filter above it.
    """

    starts: Tensor | None = None
    n_filters: int = 1
    seed: int = 0
    target: float = 0.0


class Oracle:
    """Searches for filters with g(u) > β."""

    name: ClassVar[str]
    """What `oracle=` and `--oracle` take."""
    scope: ClassVar[Scope] = Scope.GLOBAL
    """The scope of an answer that time cut short before it had begun."""

    @property
    def scout(self) -> Oracle:
        """What is asked in its place where filters are wanted and no proof: on samples, and far from the optimum."""
        return self

    def __call__(self, problem: Problem, dual_point: Tensor, wanted: Wanted = Wanted(), **changes: Any) -> OracleResult:
        """What `answer` gives for what is `wanted`, with some `changes`, such as `n_filters=4`.

        Once the deadline of `problem` has passed: the filters found by then, and the bound proved by then, though it be
        infinite; `stats` then says that it `stopped` by `Stop.TIME_LIMIT`.
        """
        began, wanted = perf_counter(), replace(wanted, **changes)
        try:
            if problem.responses.embedding.spec.subspaces > 1:
                return in_each_subspace(self, problem, dual_point, wanted)
            with one_core_blas:  # what oracles do in numpy are products of few filters with many patches
                return self.answer(problem, dual_point, wanted)
        except OutOfTime:
            return OracleResult.unfinished(problem, self.scope, perf_counter() - began)

    def answer(self, problem: Problem, dual_point: Tensor, wanted: Wanted) -> OracleResult:
        """Up to `wanted.n_filters` distinct filters, best first, and what is proved of g(u) at Z = `dual_point` (n, c).

        Raises
        ------
        OutOfTime
            If nothing is known when the deadline of `problem` passes.
        """
        raise NotImplementedError


def in_each_subspace(oracle: Oracle, problem: Problem, dual_point: Tensor, wanted: Wanted) -> OracleResult:
    """The answers of `oracle` on one subspace after the other, as one: g is largest where it is largest in any."""
    embedding, asked = problem.responses.embedding, wanted
    answers: list[OracleResult] = []
    kept = 0
    for number, responses in enumerate(problem.responses.subspaces):
        own = embedding.coordinates(number)
        if wanted.starts is not None:
            asked = replace(asked, starts=wanted.starts[embedding.mask(wanted.starts)[:, own].any(dim=1), own])
        if oracle.scope.proved:  # a bound below one that is proved elsewhere is of no use
            asked = replace(asked, target=largest(wanted.target, *(answer.upper_bound for answer in answers)))
        part = replace(problem, responses=responses)
        part = part.until(problem.deadline.share(1 / (embedding.spec.subspaces - number)))
        found = oracle(part, dual_point, asked)
        filters = torch.zeros(len(found.filters), embedding.dim, dtype=torch.float64)
        filters[:, own] = found.filters
        answers.append(replace(found, filters=filters))
        kept += PatchRows.kept_bytes(responses)
        if kept > KEPT_BYTES:
            PatchRows.forget(responses)
    return _united(answers, wanted.n_filters)


def _united(answers: list[OracleResult], n_filters: int) -> OracleResult:
    """What is known of filters in all subspaces: the bound is the largest, and proved where all are."""
    values = torch.cat([answer.values for answer in answers])
    best = values.argsort(descending=True, stable=True)[:n_filters]
    highest = max(answers, key=lambda answer: answer.g_max)
    stats = dict(highest.stats)
    for name in COUNTS:
        if name in stats:
            stats[name] = sum(answer.stats.get(name, 0) for answer in answers)
    if "unseen_mass" in stats:
        seen_once = (answer.stats["unseen_mass"] * answer.stats["starts"] for answer in answers)
        stats["unseen_mass"] = sum(seen_once) / stats["starts"]
    if any(answer.cut_short for answer in answers):
        stats["stopped"] = Stop.TIME_LIMIT
    unproved = [answer.scope for answer in answers if not answer.scope.proved]
    return OracleResult(
        filters=torch.cat([answer.filters for answer in answers])[best],
        values=values[best],
        upper_bound=largest(*(answer.upper_bound for answer in answers)),
        scope=unproved[0] if unproved else highest.scope,
        stats=stats,
    )
