"""The main path: images → patch embedding → problem → solver ⇄ oracle → certificate."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convcvx.activations import Activation
from convcvx.budget import NEVER, Budget, Deadline
from convcvx.certificate import Certificate
from convcvx.data.arrays import as_tensor
from convcvx.data.images import Images
from convcvx.errors import ConvergenceWarning, check_count
from convcvx.losses.shares import counted
from convcvx.losses.targets import encode_targets
from convcvx.machine.threads import sparing_threads
from convcvx.machine.watch import phase
from convcvx.oracles import (
    CylinderOracle,
    LocalOracle,
    Oracle,
    PolynomialOracle,
    RemainderOracle,
    get_oracle,
    pick_oracle,
)
from convcvx.oracles.branch_and_bound import FIRST_LOOK
from convcvx.oracles.local import SAMPLE_SIZE
from convcvx.patches import PatchEmbedding, PatchSpec
from convcvx.pooling import Pooling
from convcvx.problem import Problem
from convcvx.responses.passes import Responses
from convcvx.solution import Callback, Solution
from convcvx.solvers import SOLVERS, pick_solver
from convcvx.terms.names import N_GATES
from convcvx.terms.status import Status
from convcvx.training.options import TrainConfig

BEGINNING = 0.15
"""Share of the time left that the search for beta_max may take: it is one call of the oracle, a training many."""
TRAINING = 0.75
"""Share of the time left that the training may take: what remains is for the certificate, one thorough search."""
LAST_PASSES = 1.75
"""What certificate and scores take in any case, in passes over all images in float64."""
TIMED_IMAGES = 1024
"""Images on which such a pass is timed."""
TIMED_FILTERS = 32
"""Filters of a timed pass at most: a time so short that these passes matter leads to few that are wider."""

LOOSE = (PolynomialOracle.name, RemainderOracle.name, CylinderOracle.name)
"""Oracles whose bounds hold at any rank and are tight nowhere: beta_max is what a search finds instead."""
ROUNDINGS = 8.0
"""Units of rounding that a response is off by, and a target."""
ROUNDING_SAMPLE = 1024
"""Images by which rounding is judged: it need not be known to a digit."""


def build_problem(
    images: Images,
    targets: Tensor | np.ndarray,
    beta: float = 1.0,
    *,
    spec: PatchSpec | None = None,
    embedding: PatchEmbedding | None = None,
    pooling: Any = None,
    activation: Any = None,
    loss: str = "squared",
    intercept: bool = True,
    n_classes: int | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    responses: Callable[..., Responses] = Responses,
    flips: bool = False,
    sample_weight: Any = None,
) -> Problem:
    """The `Problem` of (n, C, H, W) images: fit the embedding (unless given) and put the parts together.

    `responses` makes its `Responses`; `Team.responses` for images that several processes share. With `flips` the
    embedding is that of the images and their mirror images.
    """
    encoded = encode_targets(targets, loss, n_classes, intercept=intercept)  # fails before the pass over the images
    images, encoded, weights = counted(sample_weight, images, encoded)
    embedding = embedding or PatchEmbedding.fit(images, spec or PatchSpec(), flips=flips, weights=weights)
    how: dict[str, Any] = {"dtype": dtype, "device": device, "activation": Activation.of(activation)}
    made = responses(images, embedding, Pooling.of(pooling), **how)
    targets = as_tensor("targets", targets) if len(encoded) == len(targets) else encoded
    return Problem.build(made, targets, beta, loss, intercept, n_classes, weights)


@sparing_threads
def find_beta_max(problem: Problem, oracle: str | Oracle = "auto", seed: int = 0) -> float:
    """max g at the best constant predictor: at or above this β the network without filters is optimal.

    With the local oracle, or one whose bound is not tight, it is the largest g found; another
    rigorous one gives an upper bound within 0.1 %. Where a deadline
    cuts the search short it is the largest g found by either. What rounding alone can make of constant images or
    targets counts as 0: no filter helps then, at any β.
    """
    phase("beta_max, from which on no filter helps")
    dual_point = problem.dual_point(problem.constant_predictions())
    if getattr(oracle, "name", oracle) in LOOSE:
        oracle = LocalOracle.name
    search = get_oracle(oracle, problem, tol=4e-3, thorough=True) if isinstance(oracle, str) else oracle
    found = search(problem.until(problem.deadline.share(BEGINNING)), dual_point, seed=seed)
    values = found.values if len(found.values) else _first_values(problem.until(NEVER), dual_point, seed)
    attained = float(values.max()) if len(values) else 0.0  # a bound has its own allowance for rounding
    g_max = attained if found.cut_short else found.g_max
    return g_max if attained > _rounding_of_g(problem.until(NEVER), dual_point) else 0.0


def _first_values(problem: Problem, dual_point: Tensor, seed: int) -> Tensor:
    """g of the filters to which a few climbs on a sample of the images lead: one pass over all of them."""
    size = max(1, min(SAMPLE_SIZE, problem.largest_sample) // 2)
    random = torch.randperm(problem.n, generator=torch.Generator().manual_seed(seed))[:size]
    weightiest = dual_point.norm(dim=1).topk(min(size, problem.n)).indices  # few may be all that count
    images = torch.cat([random, weightiest]).unique()
    found = FIRST_LOOK(problem.sample(images), dual_point[images], seed=seed)
    return problem.responses.correlate(found.filters, dual_point).flatten(1).norm(dim=1)


def time_for_training(problem: Problem, n_filters: int | None = None) -> Deadline:
    """When a training that ends with `n_filters` at most has to be over, for certificate and scores to be in time.

    These go over all images whatever the time: how long that takes is told from passes over a sample. A training has
    half of its share in any case: a network late is better than none.
    """
    deadline, n_processes = problem.deadline, problem.responses.n_processes
    if deadline == NEVER:
        return deadline
    step = -(-problem.n // min(TIMED_IMAGES, problem.largest_sample))
    double = problem.until(NEVER).with_dtype(torch.float64)
    few = (double if step == 1 else double.sample(torch.arange(0, problem.n, step))).responses
    filters = torch.ones(min(n_filters or TIMED_FILTERS, TIMED_FILTERS), few.dim, dtype=torch.float64)
    weights = filters.new_zeros(len(filters), few.n_cells, problem.n_outputs)
    few.predict(filters, weights, weights[0, 0])  # what is made or compiled once
    before = deadline.left
    few.predict(filters, weights, weights[0, 0])
    few.lengths()
    seconds = LAST_PASSES * step / n_processes * (before - deadline.left)
    least, most = deadline.share(TRAINING / 2), deadline.share(TRAINING)
    return most.sooner(Deadline(max(least.at, deadline.at - seconds)))


def _rounding_of_g(problem: Problem, dual_point: Tensor) -> float:
    """How far rounding alone may take g, or a bound on it, from 0; by a sample of the images.

    g sums φ(x_i) Z_i. Responses are rounded in their own arithmetic, sums over all N patches in float64, and Z_i is
    itself a difference of rounded targets. A patch x has (x·u)_+ <= Σ (x·e)_+ over the axes e, both ways; and
    (x·u)² <= ‖x‖².
    """
    step = -(-problem.n // ROUNDING_SAMPLE)
    sample = problem if step == 1 else problem.sample(torch.arange(0, problem.n, step))
    single, double = torch.finfo(problem.responses.dtype).eps, torch.finfo(torch.float64).eps
    share = ROUNDINGS * single + 2 * problem.n * problem.responses.n_positions * double
    sizes = share * dual_point.norm(dim=1) + ROUNDINGS * double * problem.shares.times(problem.targets.norm(dim=1))
    if problem.responses.activation.degree == 2:
        return step * float(sizes[::step] @ sample.responses.reach())
    axes = torch.eye(problem.responses.dim, dtype=torch.float64)
    sums = sample.responses.rectified().correlate(torch.cat([axes, -axes]), sizes[::step, None])
    return step * float(sums.sum(dim=0).norm())


def beta_at(ratio: float, beta_max: float) -> float:
    """The β at this share of beta_max; the share itself where that is 0: the zero network is optimal at every β."""
    return ratio * beta_max or ratio


@dataclass(frozen=True)
class Plan:
    """The solver and the oracle for a problem, and why these."""

    solver: str
    oracle: str
    reasons: tuple[str, str]

    @classmethod
    def of(cls, problem: Problem, solver: str = "auto", oracle: str = "auto") -> Plan:
        """What `solver` and `oracle`, "auto" perhaps, stand for on `problem`."""
        picked, why = pick_solver(solver, problem)
        searched, because = pick_oracle(oracle, problem)
        return cls(picked, searched, (why, because))

    def applied(self, config: TrainConfig) -> TrainConfig:
        """`config` with these."""
        return replace(config, solver=self.solver, oracle=self.oracle)

    def __str__(self) -> str:
        return f"solver {self.solver} ({self.reasons[0]}), oracle {self.oracle} ({self.reasons[1]})"


@sparing_threads
def solve_problem(
    problem: Problem,
    budget: Budget = Budget(),
    *,
    solver: str = "auto",
    oracle: str | Oracle = "auto",
    seed: int = 0,
    start: Solution | None = None,
    callback: Callback | None = None,
    gates: int = N_GATES,
) -> Solution:
    """Train on `problem`; the certificate is left to the caller, as is some of the time until the deadline.

    `gates` are for solver gated and oracle sampled.
    """
    problem = problem.until(time_for_training(problem, budget.max_filters))
    check_count("gates", gates)
    solver, _ = pick_solver(solver, problem)
    extra: dict[str, Any] = {"n_gates": gates} if solver == "gated" else {}
    phase(f"round {start.rounds if start else 0}, by solver {solver}")
    solution = SOLVERS[solver](
        problem,
        get_oracle(oracle, problem, tol=budget.tol, gates=gates) if isinstance(oracle, str) else oracle,
        budget,
        seed=seed,
        start=start,
        callback=callback,
        **extra,
    )
    responses = problem.responses
    space = {name: getattr(responses, name) for name in ("embedding", "pooling", "activation")}
    return replace(solution, **space)


def status_of(certificate: Certificate, tol: float, trained: Status = Status.CONVERGED) -> Status:
    """The status of a network by its certificate.

    Where that does not reach `tol`, the status is what ended the training, `trained`; but if the training took itself
    for converged, or there was none, the certificate alone says what is short.
    """
    if certificate.reaches(tol):
        return Status.CONVERGED
    if trained != Status.CONVERGED:
        return trained
    return Status.TIME_LIMIT if certificate.rel_gap <= tol else Status.GAP_ABOVE_TOL


def warn_short_of(certificate: Certificate, solution: Solution, tol: float) -> None:
    """Warn when the certified gap is above `tol`, saying why and what to try."""
    if certificate.rel_gap <= tol:
        return
    status = status_of(certificate, tol, solution.status)
    warnings.warn(
        f"relative gap {certificate.rel_gap:.2e} ({certificate.scope}) is above tol {tol:.2e} after "
        f"{solution.rounds} rounds, stopped by {status}: {status.remedy}",
        ConvergenceWarning,
        stacklevel=3,
    )
