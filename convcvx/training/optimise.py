"""One training, top to bottom: a problem and its options to the β, the solution, and how far β can go.

`fit`, the commands, the stages of a stack, `solve` and the estimators all train by `optimise`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from time import perf_counter

from convcvx.oracles import FAMILIES, Family, FamilyOracle, Oracle, SampledOracle
from convcvx.problem import Problem
from convcvx.solution import Solution
from convcvx.terms.status import Status
from convcvx.training.dictionary_start import start_from_dictionary
from convcvx.training.journal import Checkpoint, Journal
from convcvx.training.options import TrainConfig
from convcvx.training.panels.model import EVERY
from convcvx.training.plan import TRAINING, find_beta_max, solve_problem
from convcvx.training.progress import Report
from convcvx.training.resolve import beta_of


@dataclass(frozen=True)
class Optimised:
    """A problem with its β, the solution of it, and beta_max where that was looked for."""

    problem: Problem
    solution: Solution
    beta_max: float | None


def optimise(
    problem: Problem,
    config: TrainConfig,
    report: Report,
    journal: Journal = Journal(),
    checkpoint: Checkpoint = Checkpoint(),
    *,
    oracle: str | Oracle | None = None,
    began: float | None = None,
    beta_max: bool = True,
) -> Optimised:
    """Train on `problem`, whose β is still open, by its deadline; the certificate is left to the caller.

    Parameters
    ----------
    problem : Problem
    config : TrainConfig
        Checked before.
    report, journal
        Are told how it goes, and what to keep.
    checkpoint : Checkpoint
        What to go on with.
    oracle : Oracle, optional
        Instead of the one that `config` names.
    began : float, optional
        The `perf_counter` from which the seconds of the history count.
    beta_max : bool
        Look for it even where β is given: runs record it.
    """
    searching = named_oracle(config.oracle if oracle is None else oracle, config)
    solution, top, chosen = checkpoint.solution, checkpoint.beta_max, checkpoint.chosen_beta
    if config.dictionary is not None and solution is None:
        in_time = problem.until(problem.deadline.share(TRAINING))  # without its filters there is no network
        since = perf_counter() if began is None else began
        started = start_from_dictionary(config, in_time, journal, report, checkpoint.descent, since)
        solution, top, chosen = started.solution, started.beta_max, started.beta
    if top is None and (beta_max or (chosen is None and config.beta is None)):
        top = find_beta_max(problem, searching, config.seed)
        journal.save_beta_max(top)
    problem = problem.with_beta(beta_of(config, top, chosen))
    if config.filters != EVERY and solution is not None:
        solution = _within(solution, FAMILIES[config.filters])

    def after_round(reached: Solution) -> object:
        journal.save_state(reached)
        return report(reached.shifted(problem.offset), problem.beta, problem.deadline.left)

    over = solution is not None and solution.status == Status.CALLBACK
    if config.dictionary is not None and solution is not None and (config.max_rounds == 0 or over):
        # The dictionary alone, without the solver's passes over all images.
        responses = problem.responses
        space = {name: getattr(responses, name) for name in ("embedding", "pooling", "activation")}
        solution = replace(solution, **space)
        return Optimised(problem, solution, top)
    solution = solve_problem(
        problem,
        config.budget,
        solver=config.search[0],
        oracle=searching,
        gates=config.gates,
        seed=config.seed,
        start=solution,
        callback=after_round,
    )
    return Optimised(problem, solution, top)


def named_oracle(name: str | Oracle, config: TrainConfig) -> str | Oracle:
    """The oracle called `name`, with the gates of `config` where those matter; that of its family if it has one."""
    if config.filters != EVERY:
        return FamilyOracle(FAMILIES[config.filters])
    return SampledOracle(config.gates) if name == "sampled" else name


def _within(solution: Solution, family: Family) -> Solution:
    """A start without what it has beside a family: a warm start may come from anywhere."""
    inside = family.contains(solution.filters)
    return (
        solution
        if bool(inside.all())
        else replace(
            solution, filters=solution.filters[inside], weights=solution.weights[inside], history=[], dual_point=None
        )
    )
