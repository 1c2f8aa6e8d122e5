"""How the optimum is searched for, how far, and from where."""

from __future__ import annotations

from dataclasses import dataclass

from convcvx.budget import Budget
from convcvx.terms.names import DICTIONARY_SOURCES, N_GATES, ORACLES, SOLVERS
from convcvx.training.option import LARGEST_SIDE, SOLVER, option

MOST_FILTERS = 100_000
"""Filters and patterns that can be asked for at once: beyond, their weights alone fill a large machine's memory."""


@dataclass(frozen=True)
class SearchOptions:
    """The options of the panel "Solver"."""

    solver: str = option(
        "auto",
        SOLVER,
        f"auto, {', '.join(SOLVERS)}. sliding-fw reaches the optimum at any size; column-generation lets no "
        "filter slide, as --filters asks for; the others are the paper's own: frank-wolfe slow, copositive for small "
        "problems, gated for sampled patterns, closed-form for spike-free data.",
        choices=("auto", *SOLVERS),
    )
    oracle: str = option(
        "auto",
        SOLVER,
        f"auto, {', '.join(ORACLES)}. exact is a proof for patches of low rank or few; branch-and-bound a proof for "
        "rank 3 and up; polynomial, remainder and cylinders proofs at any rank, good at large beta; family a proof for "
        "networks over --filters; spectral one at any rank for --activation linear, and quadratic with one output; "
        "sampled a proof for sampled patterns only; local scales and proves nothing, not even over the filters of a "
        "dictionary, which may take longer than the training.",
        choices=("auto", *ORACLES),
    )
    gates: int = option(
        N_GATES,
        SOLVER,
        "Activation patterns to sample, for solver gated and oracle sampled, besides the network's own.",
        low=1,
        high=MOST_FILTERS,
    )
    tol: float = option(
        Budget.tol,
        SOLVER,
        "Relative gap (primal - dual) / primal to reach; else exit status 3.",
        may_change=True,
    )
    max_filters: int | None = option(
        Budget.max_filters, SOLVER, "Budget of filters; none by default.", per_stage="", may_change=True
    )
    max_rounds: int = option(Budget.max_rounds, SOLVER, "Budget of rounds.", may_change=True)
    time_limit: float | None = option(
        Budget.time_limit,
        SOLVER,
        "Seconds for the whole call, its certificate included; of a stack, for each stage. Compiling functions, which "
        "is done once on a machine, does not count.",
        may_change=True,
        any_model=True,
    )
    seed: int = option(0, SOLVER, "Equal seeds give equal results.", low=0, high=2**32 - 1, any_model=True)
    device: str = option("auto", SOLVER, "auto, cpu or cuda.", may_change=True, any_model=True)
    dictionary: int | None = option(
        None,
        SOLVER,
        "Start from the optimum over N filters taken from the patches before any training.",
        low=1,
        high=MOST_FILTERS,
        per_stage="None for a stage without.",
    )
    dictionary_source: str = option(
        "patches",
        SOLVER,
        "Which filters: patches, drawn at random, or kmeans, the centres of clusters of patches.",
        choices=DICTIONARY_SOURCES,
    )
    threshold: float = option(
        0.0, SOLVER, "What a patch must exceed to excite a filter of the dictionary.", low=0, high=1e6, per_stage=""
    )
    tune: float = option(
        0.0,
        SOLVER,
        "With a dictionary: choose beta on this share of the training images, then train on all of them.",
        low=0,
        high=0.5,
    )
    slide: float = option(
        0.0,
        SOLVER,
        "With a dictionary: epochs of descent on its filters, before their weights are optimal again.",
        low=0,
        high=1e6,
        per_stage="",
    )
    crops: int = option(
        0,
        SOLVER,
        "While filters slide, move each image by up to N pixels at random whenever it is seen.",
        low=0,
        high=LARGEST_SIDE,
        per_stage="Pixels of what the stage sees.",
    )
