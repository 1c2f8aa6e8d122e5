"""The lower bound that an oracle shows, or proves, of a problem from dual points at hand: for a certificate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from convcvx.budget import Deadline, clock
from convcvx.oracles._patch_rows import PatchRows
from convcvx.oracles.base import Oracle, OracleResult
from convcvx.oracles.beside import Proof, best, best_proof, proofs_beside, quick_proofs
from convcvx.oracles.branch_and_bound import FIRST_LOOK, BranchAndBoundOracle
from convcvx.oracles.cylinders import CylinderOracle
from convcvx.oracles.local import LocalOracle
from convcvx.oracles.polynomial import PolynomialOracle
from convcvx.oracles.remainder import RemainderOracle
from convcvx.oracles.sampled import SampledOracle
from convcvx.oracles.table import get_oracle, meets
from convcvx.problem import Problem
from convcvx.terms.scope import Scope

HALF = 0.5
"""Share of the time left for the network's own dual point, where there is another one to try."""
PROVING = 0.3
"""Share of the time left in which something is proved before a search that proves nothing takes the rest."""
SEARCHING = 0.9
"""Share of the time left for a rigorous search: where that is too short, polynomials may prove more in the rest."""

SLOWER = ("remainder", "cylinders")
"""Oracles that prove more than polynomials the longer they have, at any rank."""
ROWS_BYTES = 1 << 30
"""Bytes of patches that a problem may have for these to be asked unless they are named."""

N_FILTERS = 16
"""Filters beside those of a network that a certificate looks for."""
ENOUGH = 0.5
"""Share of the objective from which on a bound of the training makes all others at its dual point needless."""
SPARE = 0.01
"""Share of tol that a proof leaves to rounding, and to the objective's own last digits."""
KEPT_STATISTICS = ("stopped", "family", "family_size")
"""Statistics of a search that count although something else proved more: what it searched, and what ended it."""


def target_of(oracle: Oracle, problem: Problem, dual_point: Tensor, objective: float, tol: float) -> float:
    """The g at which a search may stop that is to show a gap of `tol` to the `objective`, at this dual point.

    Above β by half of tol. Branch and bound, whose cost falls with what it may be off by, takes all that the gap leaves
    room for: the dual value falls by the part that the weights have in the objective, times what g is above β.
    """
    target = problem.beta * (1 + 0.5 * tol)
    if not isinstance(oracle, BranchAndBoundOracle):
        return target
    return max(target, problem.enough(dual_point, (1 - (1 - SPARE) * tol) * objective))


@dataclass(frozen=True)
class Shown:
    """Lower bounds on the objective of other networks.

    Attributes
    ----------
    found : OracleResult
        What the better search found, or proved.
    dual : float
        The lower bound that follows from `found.g_max`, within the scope of `found`.
    point : Tensor (n, c)
        The dual point at which that is so.
    name : str
        Of the oracle.
    proved : float
        The best lower bound that is proved of every network.
    proved_by : str
        Which bound that is, in words.
    """

    found: OracleResult
    dual: float
    point: Tensor
    name: str
    proved: float
    proved_by: str

    def beside(self, proof: Proof) -> Shown:
        """With what was proved of every network besides, instead of what was searched if that says less."""
        if (self.found.scope.for_all and proof.value > self.dual) or self.found.g_max == math.inf:
            found = replace(proof.found, stats=proof.found.stats | _kept(self.found))
            return Shown(found, proof.value, proof.point, proof.oracle, proof.value, proof.by)
        return self if self.found.scope.for_all else replace(self, proved=proof.value, proved_by=proof.by)

    def among(self, problem: Problem, filters: Tensor, searched: OracleResult | None = None) -> Shown:
        """The same with `filters` (q, r) for those found, and what ended the search that was made besides."""
        values = problem.responses.correlate(filters, self.point).flatten(1).norm(dim=1)
        stats = self.found.stats | (_kept(searched) if searched is not None else {})
        return replace(self, found=replace(self.found, filters=filters, values=values, stats=stats))


@dataclass(frozen=True)
class Search:
    """How lower bounds are looked for.

    Attributes
    ----------
    oracle : Oracle
    tol : float
        The gap at which a proof may stop.
    seed : int
    deadline : Deadline
    training_seconds : float, optional
        How long the training before it took, of which a proof beside an estimate takes a small share; None without.
    rounds : sequence of Mapping
        Records of that training, as in `certify_parameters`.
    trained_at : Tensor (n, c), optional
        The dual point that it ended with, to the last bit: that of the `proved_g` of the last record.
    """

    oracle: Oracle
    tol: float
    seed: int
    deadline: Deadline
    training_seconds: float | None = None
    rounds: Sequence[Mapping[str, Any]] = ()
    trained_at: Tensor | None = None

    def __call__(
        self, problem: Problem, given: Problem, starts: Tensor, points: Sequence[Tensor], primal: float
    ) -> Shown:
        """The bounds for a network with this `primal` and filters `starts` (q, r): above zero at any deadline.

        `points` are dual points, the network's residual first; `given` is the problem in the arithmetic that a
        heuristic may search in.
        """
        if isinstance(self.oracle, PolynomialOracle | RemainderOracle | CylinderOracle):
            return self._at_any_rank(problem, points)
        began = clock()
        guesses, beside = isinstance(self.oracle, LocalOracle | SampledOracle), list[Proof]()
        trained = None if guesses else self._proved_in_training(problem)
        if trained is not None and primal - trained.dual <= self.tol * primal:
            return self._as_trained(trained, problem, given, starts)
        if trained is not None and trained.dual >= ENOUGH * primal:
            points = points[:1]  # at the other one g has been bounded, and better than by polynomials
        elif guesses:  # before a search that takes what time there is
            beside = self._beside(problem, points, self.deadline.share(PROVING), self.training_seconds)
        elif self.deadline.at < math.inf:  # in case that the search has nothing when its time is over
            soon = self.deadline.share(PROVING)
            beside = quick_proofs(problem.until(soon), points[:1], soon.left)
        spent = clock() - began
        missed = bool(beside) and best(beside).found.cut_short
        slower = () if missed else self._slower(problem)
        share = 1.0 if guesses else SEARCHING
        if slower or (guesses and missed):
            share = HALF
        found, dual, point = self._searched(problem, given, starts, points, primal, self.deadline.share(share))
        shown = Shown(found, dual, point, self.oracle.name, dual, self.oracle.name)
        if found.cut_short or not found.scope.for_all:
            if not beside or missed or not guesses:
                beside = [*beside, *self._beside(problem, points, self.deadline, self.training_seconds)]
            shown = shown.beside(best(beside))
        for name in slower:
            # What a search gathers first takes longer than the passes of polynomials.
            if self.deadline.left < spent or primal - shown.proved <= self.tol * primal:
                break
            in_time = problem.until(self.deadline if name == slower[-1] else self.deadline.share(HALF))
            proof = best_proof(in_time, points, get_oracle(name, problem, thorough=True), beside)
            shown = shown.beside(proof) if proof.value > shown.proved else shown
        if trained is not None and trained.dual > shown.dual:
            return trained.among(problem, torch.cat([found.filters, starts]), found)
        return shown

    def _as_trained(self, trained: Shown, problem: Problem, given: Problem, starts: Tensor) -> Shown:
        """What the training proved, where another proof would take as long and say as much."""
        wanted: dict[str, Any] = {"starts": starts, "n_filters": N_FILTERS, "seed": self.seed}
        seen = FIRST_LOOK(given.until(self.deadline), trained.point, **wanted)
        return trained.among(problem, torch.cat([seen.filters, starts]))

    def _proved_in_training(self, problem: Problem) -> Shown | None:
        """The proof that the training ended with."""
        last, point = self.rounds[-1] if self.rounds else None, self.trained_at
        if last is None or point is None or "images" in last:  # a sample is another problem
            return None
        if "proved_g" not in last or not Scope(last["scope"]).for_all:
            return None
        g = last["proved_g"]
        number = next(record["round"] for record in self.rounds if record.get("proved_g") == g)
        none = OracleResult.unfinished(problem, Scope(last["scope"]), 0.0, g)
        found, dual = replace(none, stats={"proved_in_round": number}), problem.dual(point, g)
        return Shown(found, dual, point, self.oracle.name, dual, self.oracle.name)

    def _slower(self, problem: Problem) -> tuple[str, ...]:
        """What is to prove more in the time that is left, where a limit was set for a certificate alone."""
        alone = self.training_seconds is None and isinstance(self.oracle, LocalOracle)
        if not alone or self.deadline.at == math.inf:
            return ()
        few = PatchRows.size(problem.responses, problem.n_outputs, merged=True) <= ROWS_BYTES
        return tuple(name for name in SLOWER if few and meets(name, problem))

    @staticmethod
    def _beside(problem: Problem, points: Sequence[Tensor], deadline: Deadline, seconds: float | None) -> list[Proof]:
        return proofs_beside(problem.until(deadline), points, seconds)

    def _at_any_rank(self, problem: Problem, points: Sequence[Tensor]) -> Shown:
        """By the oracle, or by polynomials alone where these prove more."""
        proof = best_proof(problem.until(self.deadline), points, self.oracle)
        return Shown(proof.found, proof.value, proof.point, proof.oracle, proof.value, proof.by)

    def _searched(
        self,
        problem: Problem,
        given: Problem,
        starts: Tensor,
        points: Sequence[Tensor],
        primal: float,
        deadline: Deadline,
    ) -> tuple[OracleResult, float, Tensor]:
        """What the oracle finds at the residual, or proves at another point; its lower bound; which point."""
        residual, target = points[0], target_of(self.oracle, problem, points[0], primal, self.tol)
        wide: dict[str, Any] = {"starts": starts, "n_filters": N_FILTERS, "seed": self.seed}
        if self.oracle.name == "family":  # whose scan knows all that are active
            wide["n_filters"] = N_FILTERS + len(starts)
        # A heuristic may search in the arithmetic at hand: what it finds is measured in float64 below.
        guesses = self.oracle.name == LocalOracle.name
        own = deadline if len(points) == 1 or guesses else deadline.share(HALF)
        found = self.oracle((given if guesses else problem).until(own), residual, **wide, target=target)
        if not found.scope.proved and len(found.values):
            candidates = torch.cat([found.filters, starts])
            values = problem.responses.correlate(candidates, residual).flatten(1).norm(dim=1)
            found = replace(found, filters=candidates, values=values)
        dual, point = problem.dual(residual, found.g_max), residual
        if found.scope.for_all and found.g_max <= target and primal - dual > self.tol * primal:
            # The proof stopped where Z is feasible; where g stays below β a longer Z would be too, and bound better.
            again = self.oracle(problem.until(deadline), residual, **wide, target=0.0)
            if again.scope.for_all and again.g_max < found.g_max:
                found, dual = again, problem.dual(residual, again.g_max)
        for other in points[1:]:
            if found.scope.lasting and primal - dual > self.tol * primal:
                target = target_of(self.oracle, problem, other, primal, self.tol)
                again = self.oracle(
                    problem.until(deadline), other, starts=starts, n_filters=1, seed=self.seed, target=target
                )
                if again.scope is found.scope and problem.dual(other, again.g_max) > dual:
                    found, dual, point = again, problem.dual(other, again.g_max), other
        return found, dual, point


def _kept(found: OracleResult) -> dict[str, Any]:
    return {name: found.stats[name] for name in KEPT_STATISTICS if name in found.stats}
