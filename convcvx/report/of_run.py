"""The report of a run: its certificate, what it is right and wrong about, its filters, its training, its twin."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convcvx.display import figures
from convcvx.display.words import (
    OPTIMIZERS,
    PROOFS,
    bounds,
    claims,
    convergence,
    counted,
    of_optimum,
    percent,
    text,
    told,
)
from convcvx.network.two_layer import TwoLayerCNN, two_layer_cnn
from convcvx.report.evidence import MOST_CLASSES, Evidence, seen_or_why
from convcvx.report.filters import filter_cards
from convcvx.report.page import (
    Drawn,
    Table,
    files,
    option_rows,
    optional_json,
    provenance,
    render,
    result_rows,
)
from convcvx.stack.jobs import stage_data
from convcvx.terms.scope import Scope
from convcvx.training.options import TrainConfig
from convcvx.training.resolve import Data, found_in, run_data
from convcvx.training.run import FILES, Run

ELSEWHERE = (
    *("meaning", "out", "optimum", "train_accuracy", "validation_accuracy", "test_accuracy", "proved_by"),
    *("family", "family_size", "family_gap", "family_seconds"),
)
"""Numbers of a run that its page says in other places than the table of results."""
BOUNDS = "No network has an objective on a solid line: that is proved. A dashed one is an estimate, or not for all."
"""Below the picture of the bounds."""
DECAYS_TRIED = "Weight decays tried for the dictionary, and what held-out images said of each."
"""Below the path."""
COMPARED = ("objective", "rel_gap", "test_accuracy", "train_accuracy", "seconds", "core_seconds", "n_filters")
"""Numbers of a comparison, as its table has them."""


def write_report(run: Run, data_dir: str | None = None) -> Path:
    """Write the report of a finished run to report.html in its folder; `data_dir` is where its data set lies now.

    Raises
    ------
    RunError
        For an unfinished run, or files that are not as convcvx writes them. Data that are gone are no error: what
        needs images is left out, and the page says so.

    Warns
    -----
    DataWarning
        Of that.
    """
    metrics, config, history = run.metrics, run.config, run.history
    network = two_layer_cnn(run.folder)
    seen, why = seen_or_why(network, lambda: _data(run, found_in(config, data_dir)), config.loss)
    meant = ranks(run, config, network)
    page = render(
        "run.html",
        title=run.folder.resolve().name,
        metrics=metrics,
        subtitle=f"{config.loss} loss on {Path(config.data).name}",
        claims=claims(metrics | meant),
        scope=str(metrics["scope"]),
        meaning=metrics["meaning"],
        notes=[line for name, line in told(metrics).items() if name != "family"]
        + [line for line in (of_optimum(metrics),) if line],
        bounds=Drawn.of(
            figures.bounds_figure(bounds(metrics), metrics["primal"]),
            "bounds",
            "Lower bounds and the objective",
            BOUNDS,
        ),
        cards=headline(metrics),
        scores=scores(metrics),
        results=result_rows(metrics, ELSEWHERE),
        curves=curves(history, metrics, "training"),
        filters=filter_cards(network, names_of(network, seen), None if seen is None else seen.dataset.images),
        n_filters=metrics["n_filters"],
        path=_path(run),
        comparisons=[_comparison(history, comparison, meant) for comparison in run.comparisons],
        options=option_rows(config),
        provenance=provenance(run),
        files=files(run, FILES),
        **evidence_parts(seen, why, "confusion"),
    )
    return run.save_report(page)


def _data(run: Run, config: TrainConfig) -> Data:
    """What the network of a run was given: images, or the features of a stage of a stack."""
    data = run_data(run, config, download=False)
    return stage_data(run, data) or data


def ranks(run: Run, config: TrainConfig, network: TwoLayerCNN) -> dict[str, int]:
    """Rank, size and subspaces of the filters that the certificate speaks of; earlier versions kept options alone."""
    form = {"filter_rank?": (int, None), "filter_size?": (int, None), "subspaces?": int}
    kept = optional_json(run, "certificate.json", form)
    state = network.state_dict()
    size = kept.get("filter_size") or state["0.weight"][0].numel() + ("0.bias" in state)
    subspaces = kept.get("subspaces") or config.subspaces
    rank = kept.get("filter_rank") or min((config.rank or size) * subspaces, size)
    return {"filter_rank": rank, "filter_size": size, "subspaces": subspaces}


def names_of(network: TwoLayerCNN, seen: Evidence | None) -> list[str]:
    """Names of the classes: of the data, else those that the network's file keeps."""
    if seen is not None:
        return seen.names
    kept = network.meta.get("classes")
    return list(map(str, kept)) if isinstance(kept, list) else []


def evidence_parts(seen: Evidence | None, why: str, name: str) -> dict[str, Any]:
    """What a page says of the images; the confusion matrix as a picture called `name` where it is too large to read."""
    large = seen is not None and seen.counts is not None and len(seen.counts) > MOST_CLASSES
    drawn = None
    if large and seen is not None and seen.counts is not None:
        figure = figures.confusion_figure(seen.counts, seen.names)
        drawn = Drawn.of(figure, name, "Confusion matrix", "Darker: a larger share of the row, the true class.")
    return {"seen": seen, "why": why, "confusion": drawn, "most_classes": MOST_CLASSES}


def headline(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The few numbers to begin with."""
    first = [("Objective", _brief(metrics["primal"]))]
    if metrics.get("test_accuracy") is not None:
        first.insert(0, ("Test accuracy", percent(metrics["test_accuracy"])))
    elif metrics.get("test_r2") is not None:
        first.insert(0, ("Test R²", _brief(metrics["test_r2"])))
    proved = metrics["scope"] == Scope.GLOBAL
    first.append(("Proved lower bound" if proved else "Lower bound, estimated", _brief(metrics["dual"])))
    if metrics["scope"] in PROOFS and not proved:
        first[-1] = (f"Lower bound ({metrics['scope']})", first[-1][1])
    if not proved and metrics.get("proved") is not None:
        first.append(("Proved lower bound", _brief(metrics["proved"])))
    return [*first, ("Filters", text("n_filters", metrics["n_filters"])), ("Time", text("seconds", metrics["seconds"]))]


def _brief(value: float) -> str:
    return f"{value:.4g}"


def scores(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Accuracies by set."""
    sets = ("train", "Training"), ("validation", "Validation"), ("test", "Test")
    found = [(name, metrics.get(f"{key}_accuracy")) for key, name in sets]
    return [(name, percent(share)) for name, share in found if share is not None]


def curves(history: list[dict[str, Any]], metrics: Mapping[str, Any], name: str) -> list[Drawn]:
    """Objective and gap of every round."""
    if not history:
        return []
    scope = str(metrics["scope"])
    objective = figures.objective_figure(history, metrics["dual"], scope)
    gap = figures.gap_figure(history, scope)
    return [
        Drawn.of(objective, f"{name}objective", "Objective against seconds"),
        Drawn.of(gap, f"{name}gap", "Relative gap against seconds"),
    ]


def _path(run: Run) -> Drawn | None:
    path = run.path
    if not path:
        return None
    figure = figures.path_figure(path, run.chosen_beta)
    return Drawn.of(figure, "path", "Weight decays tried for the dictionary", DECAYS_TRIED)


def _comparison(
    history: list[dict[str, Any]], comparison: Mapping[str, Any], meant: Mapping[str, Any]
) -> dict[str, Any]:
    """A comparison as the page has it; the bound is that of the run, and speaks of the filters `meant`."""
    convex, twin, tune = comparison["convex"], comparison["twin"], comparison["finetune"]
    optimizer, scope = twin["optimizer"], convex["scope"]
    called = OPTIMIZERS.get(optimizer, optimizer)
    columns = {"Convex": convex, called: twin} | ({"Fine-tuned": tune} if tune else {})
    histories = [part["history"] for part in twin["seeds"]]
    figure = figures.comparison_figure(history, histories, convex["dual"], scope, optimizer)
    caption = "The time axis is logarithmic."
    if twin.get("epochs"):
        steps = f", {counted(twin['steps'], 'step')}," if twin.get("steps") else ""
        caption += f" {called}: {counted(twin['epochs'], 'epoch')}{steps} at the best learning rate."
    if (told_of_end := convergence(twin, called)) is not None:
        caption += f" {told_of_end}."
    name = "".join(filter(str.isalnum, f"race{optimizer}"))
    ratio = comparison.get("objective_ratio")
    return {
        "name": name,
        "optimizer": called,
        "ratio": None if ratio is None else f"{ratio:.4g}",
        "table": Table.of(f"Convex training and {called}", columns, COMPARED),
        "race": Drawn.of(figure, name, f"The race: convex training and {called}", caption),
        "claims": claims({"primal": twin["objective"], "dual": convex["dual"], "scope": scope} | dict(meant))
        if isinstance(twin.get("objective"), float)
        else [],
    }
