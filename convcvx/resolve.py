"""From the options to what they stand for: the data, the device, the problem, its β."""

from __future__ import annotations

from dataclasses import replace

import torch

from convcvx.config import DEFAULT_BETA_RATIO, TrainConfig
from convcvx.data import Dataset, load, split
from convcvx.errors import InputError, RunError, check_positive
from convcvx.images import Images
from convcvx.origin import Origin
from convcvx.patches import PatchEmbedding
from convcvx.problem import Problem
from convcvx.responses import Responses
from convcvx.runs import Run
from convcvx.sharding import Team
from convcvx.shifts import shifted
from convcvx.training import build_problem

Data = tuple[Dataset, Dataset, Dataset | None]
"""Training set, test set, and the validation set if one is split off."""


def load_data(config: TrainConfig) -> Data:
    """The data that `config` names."""
    train, test = load(config.data, config.data_dir, config.limit)
    validation = None
    if config.validation:
        train, validation = split(train, config.validation, config.seed)
    return shifted(train, config.shifts) if config.shifts else train, test, validation


def run_data(run: Run, config: TrainConfig, *, check: bool = True) -> Data:
    """The images that `run` was trained on, found by its options `config`; with `check` a `DataError` if others are."""
    source = run.located(config)
    data = load_data(source)
    if check:
        run.check_data(Origin.of(source, data))
    return data


def training_images(config: TrainConfig) -> Images:
    """What a worker of a `Team` reads."""
    return load_data(config)[0].images


def image_shape(dataset: Dataset) -> tuple[int, int, int]:
    channels, height, width = dataset.images.shape[1:]
    return channels, height, width


def pick_device(name: str) -> str:
    """Resolve "auto"; raise `InputError` for a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise InputError(f"device must be auto, cpu or cuda; got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for but torch sees none; use --device cpu")
    return name


def training_problem(
    config: TrainConfig, train: Dataset, embedding: PatchEmbedding | None = None, team: Team | None = None
) -> Problem:
    """The training problem, its beta still open; a resumed run goes on with the embedding that it has."""
    _check_beta(config)
    return build_problem(
        train.images,
        train.targets,
        spec=config.patch_spec(),
        embedding=embedding
        or (team.fit(train.images, config.patch_spec()) if team and config.dictionary is None else None),
        pooling=config.pool,
        loss=config.loss,
        intercept=config.intercept,
        n_classes=train.n_classes or None,
        device=pick_device(config.device),
        responses=team.responses if team else Responses,
        flips=config.flips,
    )


def _check_beta(config: TrainConfig) -> None:
    if config.beta is not None and config.beta_ratio is not None:
        raise InputError("give --beta or --beta-ratio, not both")
    for name in ("beta", "beta_ratio"):
        if getattr(config, name) is not None:
            check_positive(name, getattr(config, name))


def run_beta(run: Run, config: TrainConfig) -> float:
    """The weight decay of `run`: the one chosen for its dictionary, or what its options say."""
    if (chosen := run.chosen_beta) is not None:
        return chosen
    if config.beta is not None:
        return config.beta
    if (beta_max := run.beta_max) is None:
        raise RunError(f"{run.folder} has not got as far as its beta: finish it with --resume")
    return beta_max * (DEFAULT_BETA_RATIO if config.beta_ratio is None else config.beta_ratio)


def with_run_settings(run: Run) -> TrainConfig:
    """The options of a finished run, its resolved beta among them."""
    config = run.config
    return replace(config, beta=run_beta(run, config), beta_ratio=None)
