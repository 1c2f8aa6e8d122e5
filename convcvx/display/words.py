"""Numbers and names as people read them, and what a certificate says as a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from convcvx.terms.scope import Scope

SLACK = 1e-9
"""Relative: what a printed share is raised by before it is rounded up, more than any rounding of its arithmetic."""
TIMES = 2.0
"""From this excess on, 200 %, "so many times" reads better than per cent."""
LEAST_WRITTEN_OUT = 1e-7
"""A share, 0.00001 %, below which the zeros of a decimal number are too many to count."""
SAME_BOUND = 1e-6
"""Relative difference up to which two bounds are called the same: sums in another order round in another way."""
LONGEST_NAME = 60
"""Characters of the name of a class, or of a phase: longer ones are cut."""
LABELS = {
    "primal": "Objective",
    "objective": "Objective",
    "dual": "Lower bound",
    "lower_bound": "Lower bound",
    "rel_gap": "Relative gap",
    "proved": "Proved lower bound",
    "proved_gap": "Proved relative gap",
    "proved_by": "Proved by",
    "scope": "Scope of the bound",
    "beta": "Weight decay β",
    "beta_max": "β from which on no filter helps",
    "loss": "Loss",
    "oracle": "Search behind the bound",
    "n_filters": "Filters",
    "train_accuracy": "Training accuracy",
    "validation_accuracy": "Validation accuracy",
    "test_accuracy": "Test accuracy",
    "test_loss": "Test loss",
    "test_r2": "Test R²",
    "test_exact_match": "Test: all labels right",
    "test_macro_f1": "Test: F1 score, mean over labels",
    "validation_loss": "Validation loss",
    "validation_r2": "Validation R²",
    "validation_exact_match": "Validation: all labels right",
    "validation_macro_f1": "Validation: F1 score, mean over labels",
    "seconds": "Time",
    "core_seconds": "Time of all cores",
    "compiling_seconds": "Time to compile functions, once on a machine",
    "tuning_seconds": "Time to choose the learning rate",
    "peak_memory_mb": "Peak memory",
    "status": "Why it ended",
    "solver": "Solver",
    "rounds": "Rounds",
    "patch_rank": "Directions that the patches span",
    "family": "Family of filters",
    "family_size": "Filters in the family",
    "family_gap": "Relative gap over the family",
    "score": "Validation score",
    "joint_objective": "Objective of the joint heads",
    "joint_rel_gap": "Gap of the joint heads, over these filters",
    "joint_beta": "Weight decay of the joint heads",
    "joint_held_out_error": "Held-out error of the joint heads",
    "cache_mb": "Features on disk",
    "n_stages": "Stages kept",
    "heads": "Heads",
    "learning_rate": "Learning rate",
    "filters_used": "Filters in use",
    "data_dir": "Folder of data sets",
    "limit": "Training images at most",
    "tol": "Relative gap to reach",
    "max_filters": "Filters at most",
    "max_rounds": "Rounds at most",
    "time_limit": "Seconds at most",
    "validation": "Share of images held out",
    "flips": "Mirror images as well",
    "shifts": "Moved images as well, pixels",
    "rank": "Rank of the filters",
    "whiten": "Whitened patches",
    "whiten_epsilon": "Added to the variances when whitening",
    "contrast": "Contrast normalised",
    "contrast_epsilon": "Added to the variance of a patch",
    "hidden_bias": "A bias in each filter",
    "intercept": "A bias in the output",
    "gates": "Activation patterns sampled",
    "dictionary": "Filters of the dictionary",
    "dictionary_source": "Source of the dictionary",
    "threshold": "What excites a filter of the dictionary",
    "tune": "Share of images that choose β",
    "slide": "Epochs of descent on the dictionary",
    "crops": "Random moves while filters slide, pixels",
    "class_weight": "Weights of the classes",
    "paired": "Channels in mirror pairs",
    "filters": "Filters allowed",
    "pool": "Pooling",
    "activation": "Activation",
    "kernel_size": "Filter size",
    "beta_ratio": "Weight decay, as a share of the largest useful",
}
"""What numbers and options are called; of others the underscores become spaces."""
SETS = {"train": "Training", "validation": "Validation", "test": "Test"}
"""What the sets of images are called."""
PROOFS = [scope for scope in Scope if scope.proved]
"""Scopes whose bound is a proof."""
COVERED = {
    Scope.GLOBAL: "every network",
    Scope.FAMILY: "networks over the filters of a family only",
    Scope.SAMPLED: "networks with the sampled activation patterns only",
}
"""What networks a proof covers."""
OPTIMIZERS = {"adam": "Adam", "sgd": "SGD"}
"""What optimisers are called."""
UNITS = {"seconds": "s", "mb": "MiB"}
"""By the last word of a name."""
SHARES = ("accuracy", "gap", "error", "match")
"""Last words of names of shares."""


def label(name: str) -> str:
    """A name of Python as people say it."""
    return LABELS.get(name) or name.replace("_", " ").capitalize()


def number(value: Any) -> str:
    """Six digits of a float; other values as they print."""
    return f"{value:.6g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def counted(count: int, noun: str) -> str:
    """1 filter, 2 filters."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def held_out_scores(step: Mapping[str, Any]) -> str:
    """What the record of a β says of held-out images; where no class is wrong, or there are none, the loss alone."""
    wrong = f"error {step['held_out_error']:.2%}, " if step["held_out_error"] else ""
    return f"held-out {wrong}loss {step['held_out_loss']:.5g}"


def why_empty(metrics: Mapping[str, Any]) -> str:
    """Why the best network has no filter, in brackets; nothing of a network that has some, or only lacks them yet."""
    beta, beta_max = metrics["beta"], metrics.get("beta_max")
    if metrics["n_filters"] or beta_max is None or beta < beta_max:
        return ""
    if beta_max == 0:
        return " (none tells anything of the targets, at any beta: images or targets are constant)"
    return f" (beta {beta:.3g} is not below beta_max, {beta_max:.3g}, from which on none helps: give a smaller one)"


def percent(share: float | None) -> str:
    """A share in per cent, to two decimals, more where small, a power of ten where it is tiny; a dash for None."""
    if share is None or not math.isfinite(share):
        return "–"
    if 0 < abs(share) < LEAST_WRITTEN_OUT:
        return f"{100 * share:.1e} %"
    return f"{100 * share:.{max(2, 1 - _exponent(100 * share))}f} %" if share else "0 %"


def percent_up(share: float) -> str:
    """A share in per cent, two digits, never less than it is."""
    if share <= 0:
        return "0 %"
    raised = 100 * share * (1 + SLACK)
    unit = _exponent(raised) - 1
    return f"{math.ceil(raised / 10.0**unit) * 10.0**unit:.{max(0, -unit)}f} %"


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value)))


def text(name: str, value: Any) -> str:
    """The value of a number or an option, with its unit."""
    last = name.rpartition("_")[2]
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float | int) and last in UNITS:
        return f"{value:,.3g} {UNITS[last]}" if value < 100 else f"{value:,.0f} {UNITS[last]}"
    if isinstance(value, float) and last in SHARES:
        return percent(value)
    return number(value)


def rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and text of all that is there."""
    return [(label(name), text(name, value)) for name, value in values.items() if value is not None]


def short(name: str) -> str:
    """A name, cut where it is long."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


@dataclass(frozen=True)
class Claim:
    """What is said of a network, and whether it is a proof."""

    text: str
    proved: bool

    @property
    def kind(self) -> str:
        return "Proof" if self.proved else "Estimate"


def claims(values: Mapping[str, Any]) -> list[Claim]:
    """What a certificate, or the metrics of a run, of this version or an earlier one, claim: the strongest first.

    The excess over the optimum p is primal / p - 1 <= primal / dual - 1, and is rounded up.
    """
    scope, restricted = values["scope"], restriction(values)
    other = f"network with filters {restricted}" if restricted else "possible network"
    if (activation := values.get("activation", "relu")) != "relu":
        other += f", of those with activation {activation}"
    size_of_family, named = values.get("family_size"), values.get("family") or "filters"
    over = f"these {size_of_family:,} {named}" if size_of_family else "the family"
    meant = {
        Scope.GLOBAL: (other, ""),
        Scope.FAMILY: (f"network over {over}", ""),
        Scope.SAMPLED: ("network with the sampled activation patterns", ""),
    }.get(scope, (other, ", if the search missed no filter"))
    said = [_claim(values["primal"], values["dual"], *meant, proved=scope in PROOFS)]
    if scope != Scope.FAMILY and (line := told(values).get("family")) is not None:
        family = Claim(f"{line[0].upper()}{line[1:].removesuffix(': a proof')}.", True)
        said = [*said, family] if scope == Scope.GLOBAL else [family, *said]
    if scope != Scope.GLOBAL and values.get("proved") is not None:
        by = f" (by {values['proved_by']})" if values.get("proved_by") else ""
        said.append(_claim(values["primal"], values["proved"], other, by, proved=True))
    return said


def restriction(values: Mapping[str, Any]) -> str:
    """Which filters a certificate, or the metrics of a run, speak of; empty where of all."""
    rank, size, subspaces = values.get("filter_rank"), values.get("filter_size"), values.get("subspaces") or 1
    if rank is not None and subspaces > 1:
        return f"each in one of {subspaces} subspaces of rank {rank // subspaces} of {size}"
    return "" if rank == size else f"of rank {rank} of {size}"


def told(values: Mapping[str, Any]) -> dict[str, str]:
    """What a certificate, or the metrics of a run, say beside the gap: lines for people, by name.

    Nothing of what files of earlier versions lack.
    """
    lines = {}
    gap, size = values.get("family_gap"), values.get("family_size")
    if gap is not None and size is not None:
        name = values.get("family") or "filters"
        lines["family"] = f"no network over these {size:,} {name} is more than {percent_up(gap)} better: a proof"
    elif (seconds := values.get("family_seconds")) is not None:
        lines["left out"] = (
            "no gap over the filters of the dictionary was proved, as that takes longer than the training, about "
            f"{math.ceil(seconds):,} s; `convcvx certify` proves it"
        )
    return lines


def beside_stored(now: Mapping[str, Any], stored: Mapping[str, Any]) -> str:
    """What was `stored` of the bound of a network, and how the one computed `now` stands to it.

    Of two estimates the lower bound is the safer one: its search found the better filter.
    """
    mine, kept = Scope(now["scope"]), Scope(stored["scope"])
    said = f"bound {stored['dual']:.8g} ({kept}); computed now: {now['dual']:.8g}"
    if mine != kept:
        if mine.proved and kept.proved:
            return f"{said}: this one is a proof for {COVERED[mine]}, the stored one for {COVERED[kept]}"
        one, other = (f"a proof for {COVERED[scope]}" if scope.proved else "an estimate" for scope in (mine, kept))
        return f"{said}, {one} where the stored one is {other}"
    if math.isclose(now["dual"], stored["dual"], rel_tol=SAME_BOUND):
        return f"{said}, the same"
    higher = now["dual"] > stored["dual"]
    if mine.proved:
        return f"{said}, which is {'better' if higher else 'weaker than what is stored'}"
    if higher:
        return f"{said}, by a search that found no better filter: the stored one is the safer estimate"
    return f"{said}, the safer estimate, as its search found a better filter"


def of_optimum(values: Mapping[str, Any]) -> str | None:
    """What a certificate, or the metrics of a run, tell of the optimum; None where that is too far to say which filters
    it needs, and of files of earlier versions.
    """
    optimum = values.get("optimum")
    if optimum is None or optimum["active"] is None:
        return None
    kind = "proved" if optimum.get("proved") else "estimated"
    said = (
        f"the optimal objective rises by {optimum['slope']:.4g} per unit of beta "
        f"({kind}: {optimum['slope_low']:.4g} to {optimum['slope_high']:.4g})"
    )
    active, used = optimum["active"], optimum["active_used"]
    others = "all of them in this network" if used == active else f"{used} of them in this one: other filters may do"
    return f"{said}; {counted(active, 'direction')} found in which an optimal network can have filters, {others}"


def convergence(twin: Mapping[str, Any], called: str) -> str | None:
    """Whether a twin, as a comparison has it, had converged, in a sentence; None for one of an earlier version."""
    if (fall := twin.get("late_fall")) is None:
        return None
    said = f"its objective fell by {percent(max(fall, 0.0))} in the second half of its epochs"
    if (longer := twin.get("epochs_to_try")) is None:
        return f"{called} had all but converged: {said}"
    return f"{called} had not converged: {said}, so that part of the difference is time; try --epochs {longer}"


def bounds(values: Mapping[str, Any]) -> list[tuple[str, float, bool]]:
    """The lower bounds of a certificate, or of the metrics of a run: name, value, and whether no network is below."""
    scope = values["scope"]
    proof = scope == Scope.GLOBAL
    found = [("proved bound" if proof else f"bound ({scope})", values["dual"], proof)]
    if not proof and values.get("proved") is not None:
        found.append(("proved for all", values["proved"], True))
    return found


def _claim(primal: float, bound: float, other: str, condition: str, *, proved: bool) -> Claim:
    if not (bound > 0 and primal / bound < math.inf):
        return Claim("No lower bound but zero is known: the network may be far from the best one.", proved)
    excess = primal / bound - 1
    if excess < TIMES:
        return Claim(f"At most {percent_up(excess)} above the best {other}{condition}.", proved)
    times = math.ceil(10 * (1 + excess) * (1 + SLACK)) / 10
    return Claim(f"At most {times:,} times the objective of the best {other}{condition}.", proved)
