"""Training on given patches: `solve` at one β, `path` along several, `beta_max` where they begin."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from einops import rearrange
from torch import Tensor

from convcvx.activations import Activation
from convcvx.budget import LEAST, Deadline
from convcvx.callbacks import together
from convcvx.certificate import Certificate, certify_parameters
from convcvx.data.arrays import as_tensor
from convcvx.data.checks import warn_of_lost_digits
from convcvx.errors import InputError, check_choice, check_count, check_positive, shown
from convcvx.oracles import ORACLES, LocalOracle, Oracle
from convcvx.patches import PatchSpec
from convcvx.problem import Problem
from convcvx.solution import Callback, Solution
from convcvx.solvers import SOLVERS
from convcvx.terms.status import Status
from convcvx.training.dictionary_gap import with_dictionary_gap
from convcvx.training.journal import Checkpoint
from convcvx.training.optimise import named_oracle, optimise
from convcvx.training.option import check_names
from convcvx.training.options import TrainConfig
from convcvx.training.path import SolutionPath
from convcvx.training.plan import beta_at, build_problem, find_beta_max, status_of, warn_short_of
from convcvx.training.progress import SILENT, Report
from convcvx.units import Units


def solve(
    patches: Tensor | np.ndarray,
    targets: Tensor | np.ndarray,
    beta: float,
    *,
    pooling: Any = None,
    activation: Any = "relu",
    loss: str = "squared",
    intercept: bool = True,
    solver: str = "auto",
    oracle: str | Oracle = "auto",
    tol: float = 1e-4,
    max_filters: int | None = None,
    max_rounds: int = 100,
    time_limit: float | None = None,
    seed: int = 0,
    start: Solution | None = None,
    callback: Callback | Sequence[Callback] | None = None,
    device: str = "cpu",
    sample_weight: Any = None,
) -> Solution:
    """Train a two-layer network on given patches to the global optimum, with a certificate.

        min  (1/n) Σ_i ℓ(f(x_i), y_i) + β Σ_j ‖V_j‖_F    over ‖u_j‖ = 1, any number of neurons j,
        f(x_i) = Σ_j Σ_p Σ_k w_pk σ(x_ik·u_j) V_j[p,:] + b,      σ(t) = t_+ unless another activation is asked for

    which is weight decay β on the network's weights under a mean-reduced loss (Sahiner et al. 2021); `sample_weight`
    makes the mean a weighted one.

    Parameters
    ----------
    patches : array (n, d) or (n, K, d)
        One row, or K patch rows, a sample.
    targets : array (n,) of classes or (n, c) of real values
        Any whole numbers are classes: output k is for the k-th smallest of them.
    beta : float
        Weight decay.
    pooling : array (P, K), optional
        Non-negative pooling weights; None is global average pooling.
    activation : {"relu", "leaky-relu:SLOPE", "abs", "linear", "quadratic"} or Activation
        σ; a SLOPE lies between 0 and 1. Of squares ‖u_j‖² stands for ‖u_j‖.
    loss : {"squared", "cross-entropy", "bce", "squared-hinge", "huber", "huber:DELTA"}
        ½‖f - y‖²; softmax cross-entropy; or, summed over outputs, binary cross-entropy and squared hinge (1 - t f)²₊,
        t = ±1, both also for labels (n, c) of 0 and 1; or Huber's loss, squared up to DELTA (1) and linear beyond.
    intercept : bool
        Train an unpenalised output bias.
    solver : {"auto", "sliding-fw", "column-generation", "frank-wolfe", "copositive", "gated", "closed-form"}
    oracle : Oracle, or "auto", "spectral", "exact", "branch-and-bound", "copositive", "polynomial", "remainder",
        "cylinders", "sampled", "local"
    tol : float
        Relative gap (primal - dual) / primal to reach.
    max_filters, max_rounds, time_limit : int, int, float
        Budgets; the time in seconds, that of the certificate included.
    start : Solution, optional
        Warm start.
    callback : callable or list of them, optional
        As in `convcvx.fit`.
    sample_weight : array (n,), optional
        What each sample counts for, in any unit: the mean loss is Σ_i w_i ℓ_i / Σ_i w_i, so that a weight of 2 is worth
        the sample twice, and one of 0 leaves it out (also of `dual_point`, whose rows are those of the others).

    Returns
    -------
    Solution
        `.filters` (m, d) of unit norm, `.weights` (m, P, c), `.intercept` (c,), `.certificate`, `.history`.

    Raises
    ------
    InputError
        For arrays of the wrong shape, NaN, or parameters out of range; for data so far from size one that float64
        does not hold the objective or the weights.

    Warns
    -----
    ConvergenceWarning
        When the certificate's gap is above `tol`.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(30, 2))
    >>> solution = solve(x, (x[:, 0] > abs(x[:, 1])).astype(int), beta=0.01)
    >>> solution.certificate.scope, bool(solution.certificate.rel_gap < 1e-4)
    ('global', True)
    """
    options: dict[str, Any] = {"loss": loss, "intercept": intercept, "solver": solver, "seed": seed}
    limits: dict[str, Any] = {"max_filters": max_filters, "max_rounds": max_rounds, "time_limit": time_limit}
    config = TrainConfig(**options, tol=tol, **limits)
    deadline = Deadline.after(config.budget.time_limit)
    given: dict[str, Any] = {"pooling": pooling, "loss": loss, "intercept": intercept, "device": device}
    given |= {"activation": activation, "sample_weight": sample_weight}
    problem, units = _in_units(patches, targets, **given)
    config = replace(config, beta=units.reduced_beta(beta))
    solution, certificate = train(problem.until(deadline), units, config, oracle, start, callback)
    warn_short_of(certificate, solution, tol)
    return solution


def train(
    problem: Problem,
    units: Units,
    config: TrainConfig,
    oracle: str | Oracle = "auto",
    start: Solution | None = None,
    callback: Callback | Sequence[Callback] | None = None,
    report: Report = SILENT,
) -> tuple[Solution, Certificate]:
    """Solve and certify a `problem` in `units`, as the β of `config` is, by its deadline.

    `start`, and what `callback` is told and what comes back, are out of them; `report` is told what is in them.
    """
    oracle = named_oracle(oracle, config)
    begun = Checkpoint(solution=None if start is None else units.inverse.solution(start).shifted(-problem.offset))
    optimised = optimise(
        problem, config, _OutOfUnits(report, callback, units), checkpoint=begun, oracle=oracle, beta_max=False
    )
    problem, solution = optimised.problem, optimised.solution.shifted(problem.offset)
    certificate = certify_parameters(
        problem.until(problem.deadline.later(LEAST * (config.time_limit or 0.0))),
        solution.filters,
        solution.weights,
        solution.intercept,
        oracle=oracle,
        tol=config.tol,
        seed=config.seed,
        dual_point=solution.dual_point,
        training=solution.history,
    )
    if oracle != LocalOracle.name:  # which is asked for where nothing is to be proved
        own = solution.filters, solution.weights, solution.intercept
        certificate = with_dictionary_gap(certificate, config, problem, *own)
    status = status_of(certificate, config.tol, solution.status)
    solution = units.solution(replace(solution, certificate=certificate, status=status))
    return solution, units.certificate(certificate)


class _OutOfUnits:
    """A report that tells a callback what the solution is out of `units`."""

    def __init__(self, report: Report, callback: Callback | Sequence[Callback] | None, units: Units) -> None:
        self.begin, self._report, self._callback, self._units = report.begin, report, together(callback), units

    def __call__(self, solution: Solution, beta: float, left: float = math.inf) -> object:
        self._report(solution, beta, left)
        return self._callback is not None and self._callback(self._units.solution(solution))


def _in_units(patches: Any, targets: Any, **options: Any) -> tuple[Problem, Units]:
    """The problem of these data, its β still open, in units in which they are of size one."""
    images = patches_to_images(patches)
    warn_of_lost_digits("patches", images, as_tensor("patches", patches).dtype)
    activation = Activation.of(options.get("activation"))
    units = Units.of(images, targets, options.get("loss", "squared"), activation=activation)
    images, targets = units.reduced("images", images), units.reduced("targets", targets)
    return build_problem(images, targets, spec=PatchSpec((1, 1)), **options), units


def beta_max(
    patches: Tensor | np.ndarray,
    targets: Tensor | np.ndarray,
    *,
    pooling: Any = None,
    activation: Any = "relu",
    loss: str = "squared",
    intercept: bool = True,
    oracle: str | Oracle = "auto",
    seed: int = 0,
    sample_weight: Any = None,
) -> float:
    """The β from which on the optimal network has no filters; parameters as in `solve`.

    0 for constant patches (with an intercept) or targets: no filter helps at any β.
    """
    given: dict[str, Any] = {"pooling": pooling, "loss": loss, "intercept": intercept, "sample_weight": sample_weight}
    given["activation"] = activation
    problem, units = _in_units(patches, targets, **given)
    return units.of_g(find_beta_max(problem, oracle, seed))


def path(
    patches: Tensor | np.ndarray,
    targets: Tensor | np.ndarray,
    betas: Sequence[float] | None = None,
    *,
    n_betas: int = 10,
    ratio: float = 1e-3,
    **options: Any,
) -> SolutionPath:
    """Solutions along a decreasing sequence of β, each started from the one before.

    Parameters
    ----------
    betas : sequence of float, optional
        By default `n_betas` values from beta_max down to `ratio`·beta_max, evenly spaced in the logarithm; just one,
        `ratio`, where beta_max is 0.
    **options
        As for `solve`.

    Returns
    -------
    SolutionPath
        An iterator of a `Solution` a β, in the order of `betas`, each trained when it is asked for; its
        `.certificate.beta` says which. `.plot()` draws what was trained so far.

    Raises
    ------
    InputError
        As `solve`, for arrays and options at once.
    """
    own = "pooling", "activation", "loss", "intercept", "device", "sample_weight"
    given = {name: options.pop(name) for name in own if name in options}
    run = {name: options.pop(name) for name in ("oracle", "start", "callback") if name in options}
    check_names(options, ("solver", "tol", "max_filters", "max_rounds", "time_limit", "seed"))
    config = TrainConfig(**options)
    config.check()
    check_choice("solver", config.solver, ("auto", *SOLVERS))
    if isinstance(run.get("oracle"), str):
        check_choice("oracle", run["oracle"], ("auto", *ORACLES))
    together(run.get("callback"))
    if betas is None:
        check_count("n_betas", n_betas)
        check_positive("ratio", ratio)
    else:
        betas = checked_betas(betas)
    # of their own: whoever takes one solution after another may change his arrays in between
    problem, units = _in_units(as_tensor("patches", patches).clone(), as_tensor("targets", targets).clone(), **given)

    def along(betas: Sequence[float]) -> list[TrainConfig]:
        return [replace(config, beta=units.reduced_beta(beta)) for beta in betas]

    chosen = None if betas is None else along(betas)

    def solutions() -> Iterator[Solution]:
        top_down = (problem, units, run.get("oracle", "auto"), config.seed, n_betas, ratio)
        for at_beta in along(path_betas(*top_down)) if chosen is None else chosen:
            in_time = problem.until(Deadline.after(config.budget.time_limit))
            solution, certificate = train(in_time, units, at_beta, **run)
            warn_short_of(certificate, solution, config.tol)
            yield solution
            run["start"] = replace(solution, history=[], rounds=0, status=Status.RUNNING, certificate=None)

    return SolutionPath(solutions())


def path_betas(
    problem: Problem, units: Units, oracle: str | Oracle, seed: int, n_betas: int, ratio: float
) -> list[float]:
    """`n_betas` values from beta_max down to `ratio` times that, out of `units`; see `path`."""
    check_count("n_betas", n_betas)
    check_positive("ratio", ratio)
    top = units.of_g(find_beta_max(problem, oracle, seed))
    first, last = top or ratio, beta_at(ratio, top)  # where no filter helps, one β will do
    return [float(beta) for beta in np.geomspace(first, last, n_betas if top else 1)]


def checked_betas(betas: Any) -> list[float]:
    """A sequence of positive numbers, one at least; raise `InputError` for anything else."""
    if not isinstance(betas, Iterable) or isinstance(betas, str) or getattr(betas, "ndim", 1) != 1:
        raise InputError(f"betas must be a sequence of positive numbers; got {shown(betas)}")
    found = [check_positive("betas", beta) for beta in betas]
    if not found:
        raise InputError("betas must be a sequence of positive numbers; got none: leave it out for a path of its own")
    return found


def patches_to_images(patches: Tensor | np.ndarray) -> Tensor:
    """(n, d) or (n, K, d) to the (n, d, K, 1) images whose 1x1 patches are these rows, in float64."""
    array = as_tensor("patches", patches).double()
    if array.ndim == 2:
        array = array[:, None]
    if array.ndim != 3 or 0 in array.shape:
        raise InputError(f"patches must be a non-empty (n, d) or (n, K, d) array; got shape {tuple(array.shape)}")
    if not bool(array.isfinite().all()):
        raise InputError("patches must be finite; found NaN or infinity; drop or impute those samples")
    return rearrange(array, "n k d -> n d k 1")
