"""The report of a stack: its stages one after the other, why one was dropped, and the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from convcvx.display.words import claims, percent
from convcvx.network.two_layer import two_layer_cnn
from convcvx.report.evidence import Evidence, seen_or_why
from convcvx.report.filters import filter_cards
from convcvx.report.of_run import curves, evidence_parts, names_of, ranks, scores
from convcvx.report.page import Table, files, option_rows, provenance, render, result_rows
from convcvx.stack.network import StackedCNN, stacked_cnn
from convcvx.stack.run import StackRun
from convcvx.storage.places import MODEL, RESULT
from convcvx.training.resolve import found_in, run_data
from convcvx.training.run import FILES

STAGED = (
    *("primal", "dual", "rel_gap", "n_filters", "train_accuracy", "validation_accuracy", "test_accuracy", "seconds"),
    *("score", "joint_objective", "joint_rel_gap", "joint_beta", "joint_held_out_error", "status"),
)
"""Numbers of the stages, as their table has them."""
ELSEWHERE = ("stages", "out", "train_accuracy", "validation_accuracy", "test_accuracy", "n_stages", "status")
"""Numbers of a stack that its page says in other places."""


def write_stack_report(stack: StackRun, data_dir: str | None = None) -> Path:
    """Write the report of a finished stack to report.html in its folder; `data_dir` is where its data set lies now.

    Raises
    ------
    RunError
        As `write_report`.
    """
    metrics, config = stack.metrics, stack.config
    model, first = stacked_cnn(stack.folder), config.stages[0]
    seen, why = seen_or_why(model, lambda: run_data(stack, found_in(first, data_dir), download=False), first.loss)
    records = metrics["stages"]
    kept = [record for record in records if record["kept"]]
    page = render(
        "stack.html",
        title=stack.folder.resolve().name,
        subtitle=f"{len(kept)} of {len(records)} stages kept, {first.loss} loss on {Path(first.data).name}",
        scores=scores(metrics),
        cards=[(f"{name} accuracy", share) for name, share in scores(metrics)],
        table=Table.of("Numbers of the stages", {f"Stage {record['stage']}": record for record in records}, STAGED),
        stages=[_stage(stack, model, record, records, seen) for record in records],
        results=result_rows(metrics, ELSEWHERE),
        options=[(f"Stage {number}", option_rows(stage)) for number, stage in enumerate(config.stages, start=1)],
        provenance=provenance(stack),
        files=[
            *files(stack, {RESULT: "what `convcvx stack --json` prints", "stack.json": "the options"}),
            *files(stack, {MODEL: "the trained network", "environment.json": "versions and machine"}),
            *(file for record in records for file in _files(stack, record["stage"])),
        ],
        **evidence_parts(seen, why, "confusion"),
    )
    return stack.save_report(page)


def _files(stack: StackRun, number: int) -> list[tuple[str, str]]:
    run = stack.stage(number)
    return files(run, {name: f"stage {number}: {what}" for name, what in FILES.items()}, f"{run.folder.name}/")


def _stage(
    stack: StackRun, model: StackedCNN, record: Mapping[str, Any], records: list[dict[str, Any]], seen: Evidence | None
) -> dict[str, Any]:
    """A stage as the page has it."""
    number = record["stage"]
    run = stack.stage(number)
    network = two_layer_cnn(run.folder)
    within = number <= len(model.stages)  # what a stage sees that was dropped is not kept

    def features(images: Tensor) -> Tensor:
        return model.features(images, number - 1)

    return {
        "number": number,
        "kept": record["kept"],
        "why": "" if record["kept"] else dropped(record, records),
        "claims": claims(dict(record) | ranks(run, run.config, network)),
        "scope": str(record["scope"]),
        "meaning": record["meaning"],
        "n_filters": record["n_filters"],
        "curves": curves(run.history, record, f"stage{number}"),
        "filters": filter_cards(
            network, names_of(network, seen), seen.dataset.images if seen is not None and within else None, features
        ),
    }


def dropped(record: Mapping[str, Any], records: list[dict[str, Any]]) -> str:
    """Why a stage was dropped, in a sentence."""
    score = record.get("score")
    best = max((other["score"] for other in records if other["kept"] and other.get("score") is not None), default=None)
    if score is None or best is None:
        return "Dropped: it did not raise the validation score."
    if score == best:
        return "Dropped: its validation score is that of the stages before; of equal stacks the smaller one is kept."
    if score < 0 or best < 0:  # minus a loss
        return f"Dropped: its validation loss of {-score:.4g} is not below the {-best:.4g} of the stages before."
    return (
        f"Dropped: its validation accuracy of {percent(score)} is not above the {percent(best)} of the stages before."
    )
