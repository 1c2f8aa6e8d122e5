"""Greedy layerwise training (Belilovsky et al. 2019) with convex stages.

Stage s is a two-layer network trained to its certified optimum on frozen features, those of stage s-1; its filters
are kept, its maps averaged down and projected on their principal channels: the features of stage s+1. A stage that
does not improve the validation score is dropped, and the stack ends. Each certificate speaks of its own stage on
the features it was given: it says nothing about networks that train all layers together.
"""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from convcvx.data.augment import VERSIONS
from convcvx.data.datasets import Dataset
from convcvx.display.words import held_out_scores
from convcvx.errors import InputError, RunError
from convcvx.machine.watch import phase
from convcvx.network.evaluate import accuracy, mean_loss, predict
from convcvx.network.two_layer import TwoLayerCNN, two_layer_cnn
from convcvx.problem import Problem
from convcvx.responses.team import Team
from convcvx.solvers.dictionary.path import TUNE
from convcvx.stack.features import cache_features, feature_shape, fit_link, share_features, stream_features
from convcvx.stack.joint_heads import fit_joint_heads
from convcvx.stack.network import Link, StackedCNN, stacked_cnn
from convcvx.stack.options import StackConfig
from convcvx.stack.run import StackRun
from convcvx.terms.status import Status
from convcvx.training.clock import Clock
from convcvx.training.dictionary_start import DICTIONARY_TOL
from convcvx.training.jobs import train_into
from convcvx.training.options import TrainConfig
from convcvx.training.origin import PARTS, Origin
from convcvx.training.progress import Report, peak_memory_mb
from convcvx.training.resolve import (
    Data,
    image_shape,
    load_data,
    pick_device,
    run_data,
    training_images,
    training_problem,
)
from convcvx.training.run import Run


def stack_job(
    config: StackConfig,
    run: StackRun,
    report: Report,
    team: Team | None = None,
    *,
    resume: bool = False,
    data: Data | None = None,
    origin: Origin | None = None,
) -> dict[str, Any]:
    """Train stage after stage into `run`, with `resume` from where it was; returns what `--json` prints.

    A resumed stack keeps the stages that it finished. `data` stand in for those that `config` names, and come from
    `origin`. The processes of `team` share the images, and the features of every stage.
    """
    with run.held():
        return _train(config, run, report, team or Team(), resume, data, origin)


def _train(
    config: StackConfig,
    run: StackRun,
    report: Report,
    team: Team,
    resume: bool,
    data: Data | None,
    origin: Origin | None,
) -> dict[str, Any]:
    clock = Clock.now()
    first = config.stages[0]
    source = run.located(first) if resume else first
    if data is None or origin is None:
        data = load_data(source)
        origin = Origin.of(source, data)
    if resume:
        run.check_data(origin)
    if data[2] is None:
        raise InputError("validation must be above 0: it decides whether a stage is kept")
    config.check_shapes(image_shape(data[0]))
    device = pick_device(first.device)
    team.share_out(data[0].images, training_images, source)
    with run.started(config, origin, resume=resume):
        alone = "" if team.size == 1 else f", {team.size} processes"
        report.begin(f"stacking into {run.place}{alone}")
        model, records = _train_stages(config, run, data, origin, report, team, device)
    model.meta = {"data": first.data, "classes": list(data[0].classes), "loss": first.loss}
    done = str(Status.CONVERGED)
    result = {
        "stages": records,
        "n_stages": len(model.stages),
        "heads": config.heads,
        **_accuracies(model.to(device), data),
        # Of a resumed stack this session is not all.
        "seconds": max(clock.seconds, sum(record["seconds"] for record in records)),
        "compiling_seconds": clock.compiling_seconds,
        "peak_memory_mb": peak_memory_mb(),
        "status": next((r["status"] for r in records if r["kept"] and r["status"] != done), done),
        "out": str(run.out),
    }
    run.save_result(model.cpu(), result)
    return result


def _train_stages(
    config: StackConfig, run: StackRun, data: Data, origin: Origin, report: Report, team: Team, device: str
) -> tuple[StackedCNN, list[dict[str, Any]]]:
    """The stack of the stages that are kept, and what to record of each stage."""
    first, validation = config.stages[0], data[2]
    stages: list[TwoLayerCNN] = []
    links: list[Link] = []
    records: list[dict[str, Any]] = []
    problems: list[Problem] = []
    features, cached, best = data, 0.0, -math.inf
    model = None
    for number, stage_config in enumerate(config.stages, start=1):
        if number > 1:
            channels, downsample = config.channels[number - 2], config.downsample[number - 2]
            link = fit_link(stages[-1], features[0].images, channels, downsample, device, paired=stage_config.paired)
            features, cached = _cache(run, features, stages[-1], link, report, team, device)
            links.append(link)
        metrics = _train_stage(run.stage(number), stage_config, features, origin, report, team)
        stages.append(two_layer_cnn(run.stage(number).folder))
        if config.heads == "joint":
            problems.append(training_problem(stage_config, features[0], run.stage(number).load_embedding(), team))
        if config.heads == "joint" and number > 1:
            candidate, joint = _join(config, stages, links, problems, report)
            metrics |= joint
            score = _score(candidate.to(device), validation, first.loss)
        else:
            candidate = StackedCNN(stages, links, ensemble=config.heads != "last")
            score = _score(stages[-1].to(device), features[2], first.loss)
        kept = score > best
        records.append({"stage": number, "kept": kept, "score": score, "cache_mb": cached} | metrics)
        if not kept:
            is_loss = score < 0
            value = f"validation loss {-score:.4g}" if is_loss else f"validation {score:.4f}"
            less = f"not below {-best:.4g}" if is_loss else f"not above {best:.4f}"
            less = "the same as that" if score == best else less
            change = "lower" if is_loss else "raise"
            report.begin(f"stage {number} is dropped: {value}, {less} of the stage before; a stage has to {change} it")
            break
        best, model = score, candidate
    assert model is not None
    return model, records


def _join(
    config: StackConfig, stages: list[TwoLayerCNN], links: list[Link], problems: list[Problem], report: Report
) -> tuple[StackedCNN, dict[str, Any]]:
    """The stack with joint heads, and what to record of their fit."""
    first = config.stages[0]
    versions, tune = VERSIONS if first.shifts else 1, max(stage.tune for stage in config.stages) or TUNE
    model, fit = fit_joint_heads(
        stages, links, problems, tune=tune, versions=versions, flips=first.flips, tol=DICTIONARY_TOL
    )
    step = next(step for step in fit.path if step["beta"] == fit.beta)
    report.begin(
        f"joint heads of {len(stages)} stages: beta {fit.beta:.3g}, {held_out_scores(step)}, objective "
        f"{fit.objective:.5g}, optimal over these filters to {fit.rel_gap:.1e}"
    )
    record = {f"joint_{name}": getattr(fit, name) for name in ("beta", "objective", "rel_gap")}
    return model, record | {"joint_held_out_error": step["held_out_error"]}


def _train_stage(
    run: Run, config: TrainConfig, data: Data, origin: Origin, report: Report, team: Team
) -> dict[str, Any]:
    """Train, go on with, or just read one stage."""
    with run.held():
        if run.begun and run.finished:
            report.begin(f"{run.folder.name} is finished, and kept as it is: no budget changes it any more")
            return run.metrics
        return train_into(run, config, report, team, resume=run.begun, data=data, origin=origin).metrics


def _score(network: nn.Module, dataset: Dataset | None, loss: str) -> float:
    """What must rise from stage to stage: accuracy, or minus the loss for real targets."""
    assert dataset is not None
    outputs = predict(network, dataset.images)
    if dataset.n_classes:
        return accuracy(outputs, dataset.targets, dataset.weights)
    return -mean_loss(outputs, dataset.targets, loss, dataset.weights)


def _accuracies(model: StackedCNN, data: Data) -> dict[str, float | None]:
    """Of the whole model on the images themselves."""
    names = ("train_accuracy", "test_accuracy", "validation_accuracy")
    return {
        name: accuracy(predict(model, part.images), part.targets, part.weights) if part and part.n_classes else None
        for name, part in zip(names, data, strict=True)
    }


def _cache(
    run: StackRun, data: Data, stage: TwoLayerCNN, link: Link, report: Report, team: Team, device: str
) -> tuple[Data, float]:
    """The data with their features for images, in half precision on disk; and the size in MB."""
    parts = {name: part for name, part in zip(PARTS, data, strict=True) if part is not None}
    shape = feature_shape(stage, link, data[0].images)
    size = sum(map(len, parts.values())) * math.prod(shape) * 2
    report.begin(f"features {'x'.join(map(str, shape))}, {size / 1e6:.0f} MB in half precision on disk")
    if size > (free := shutil.disk_usage(run.folder).free):
        raise RunError(f"{run.folder} has {free / 1e6:.0f} MB free for {size / 1e6:.0f} MB of features; lower channels")
    cached = {
        name: replace(
            part,
            images=share_features(team, run.cache(name), stage, link, part.images, device)
            if name == "train"
            else cache_features(run.cache(name), stage, link, part.images, device),
        )
        for name, part in parts.items()
    }
    return (cached["train"], cached.get("test"), cached.get("validation")), size / 1e6


def stage_data(run: Run, images: Data | None = None) -> Data | None:
    """The features that a stage of a stack was trained on, from the images anew; None for a run that is no stage.

    The images are those of the run, or `images`.
    """
    stack, name = StackRun(run.folder.parent), re.fullmatch(r"stage-(\d+)", run.folder.name)
    if not stack.begun or name is None:
        return None
    model, number = stacked_cnn(stack.folder), int(name[1])
    if number > len(model.stages):
        raise RunError(f"stage {number} was dropped: its features are not kept")
    train, test, validation = images or run_data(run, run.config)
    phase("features of the stages before")

    def seen(part: Dataset) -> Dataset:
        images = part.images
        for k in range(number - 1):
            stage, link = cast(TwoLayerCNN, model.stages[k]), cast(Link, model.links[k])
            images = torch.cat(list(stream_features(stage, link, images)))
        return replace(part, images=images)

    return seen(train), None if test is None else seen(test), None if validation is None else seen(validation)
