"""What commands print of a result, and what exit status 3 means."""

from __future__ import annotations

import re
import sys
from typing import Any

from rich.console import Console

from convcvx.cli.ending import percent
from convcvx.display.words import beside_stored, told, why_empty
from convcvx.terms.scope import Scope
from convcvx.terms.status import SHORT, Status

VAGUE = 0.5
"""Relative gap from which on an estimate beside a proof over a family is a half-sentence: it tells nothing."""
TOLD_COMPILING = 3.0
"""Seconds of compiling from which on a summary tells of them: a call may take so much longer than its time limit."""
SCORES = {"loss": "loss", "R2": "r2", "exact match": "exact_match", "macro F1": "macro_f1"}
"""Scores for targets that are no classes, by what they are called."""


def print_summary(console: Console, metrics: dict[str, Any]) -> None:
    """What a reader wants to know, in a few lines."""
    lines = {
        "accuracy": f"{percent(metrics['test_accuracy'])} test, {percent(metrics['train_accuracy'])} train",
        **{name: f"{metrics[f'test_{key}']:.4g} test" for name, key in SCORES.items() if f"test_{key}" in metrics},
        "objective": f"{metrics['primal']:.8g} at beta {metrics['beta']:.6g} ({metrics['loss']} loss)",
        **_bounds(metrics),
        **({"stored": beside_stored(metrics, metrics["stored"])} if "stored" in metrics else {}),
        "filters": f"{metrics['n_filters']}{why_empty(metrics)}",
        "status": f"{metrics['status']} after {cost(metrics)}",
    }
    console.print("\n".join(f"{name:12} {text}" for name, text in lines.items()))


def _bounds(metrics: dict[str, Any]) -> dict[str, str]:
    """Lines on how far the network is from the best one, the strongest statement first."""
    scope, further = Scope(metrics["scope"]), told(metrics)
    weaker = not scope.for_all and metrics["proved"] is not None
    lines = {}
    if not scope.for_all and scope is not Scope.FAMILY and "family" in further:
        lines["family"] = further.pop("family")
        if not scope.proved and metrics["rel_gap"] >= VAGUE:
            known = f", {metrics['proved_gap']:.2e} proved by {metrics['proved_by']}" if weaker else ""
            gap = f"gap {metrics['rel_gap']:.2e} by a search (scope {scope}, an estimate){known}"
            return lines | {"others": f"what other filters would bring is not known: {gap}"}
    lines |= {
        "lower bound": f"{metrics['dual']:.8g}",
        "gap": f"{metrics['rel_gap']:.2e} relative",
        "scope": f"{scope}: {metrics['meaning']}",
        **further,
    }
    if weaker:
        by = metrics["proved_by"]
        lines["proved"] = f"lower bound {metrics['proved']:.8g}, gap {metrics['proved_gap']:.2e}, by {by}"
    return lines


def cost(metrics: dict[str, Any]) -> str:
    """Time, what of it was spent on compiling, and memory, where the system tells it."""
    peak, compiling = metrics["peak_memory_mb"], metrics.get("compiling_seconds", 0.0)
    parts = [f"{metrics['seconds']:.1f} s"]
    if compiling >= TOLD_COMPILING:
        parts[0] += (
            f" ({compiling:.0f} s of them to compile functions, once on a machine, which no --time-limit counts)"
        )
    return ", ".join(parts if peak is None else [*parts, f"{peak:.0f} MiB"])


def explain_short(console: Console, metrics: dict[str, Any], remedy: str, further: str = "") -> None:
    """Say what exit status 3 means, if that is how a command with the status of `metrics` ends.

    What is to be done about it has a line of its own, `further`. A quiet command says the first line alone, on standard
    error: whoever reads the log of a job that has failed wants to know why.
    """
    reached = Status(metrics["status"])
    if reached.exit_code == SHORT:
        why = "" if reached is Status.GAP_ABOVE_TOL else f", as {reached.meaning}"
        over = " over all filters" if metrics.get("family_gap") is not None and metrics["scope"] != Scope.FAMILY else ""
        # A search that time cut short may have found nothing above tol, which it is not known to be the end of.
        short = "not known to be within" if reached is Status.TIME_LIMIT else "above"
        line = f"exit status {SHORT}: the gap{over} is {short} --tol{why}; {remedy}"
        if console.quiet:
            print(line, file=sys.stderr)
        else:
            console.print("\n".join(filter(None, (line, further))))


def as_flags(remedy: str) -> str:
    """The remedy of a `Status`, which names options as Python does, with those of the command line."""
    named = re.sub(r"(\w+)='([^']+)'", r"--\1 \2", remedy)
    return re.sub(r"\b(tol|max_filters|max_rounds|time_limit)\b", lambda name: f"--{name[0].replace('_', '-')}", named)
