"""From the options to what they stand for: the data, the device, the problem, its β."""

from __future__ import annotations

from dataclasses import replace

import torch

from convcvx.config import DEFAULT_BETA_RATIO, TrainConfig
from convcvx.data import Dataset, load, split
from convcvx.errors import InputError, RunError
from convcvx.images import Images
from convcvx.patches import PatchEmbedding
from convcvx.problem import Problem
from convcvx.responses import Responses
from convcvx.runs import Run
from convcvx.sharding import Team
from convcvx.shifts import shifted
from convcvx.training import beta_at, build_problem

Data = tuple[Dataset, Dataset, Dataset | None]
"""Training set, test set, and the validation set if one is split off."""


def load_data(config: TrainConfig) -> Data:
    """The data that `config` names."""
    train, test = load(config.data, config.data_dir, config.limit)
    validation = None
    if config.validation:
        train, validation = split(train, config.validation, config.seed)
    return shifted(train, config.shifts) if config.shifts else train, test, validation


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
    spec = config.patch_spec()
    if any(padding >= size for padding, size in zip(spec.padding, spec.kernel_size, strict=True)):
        raise InputError(
            f"padding must be smaller than kernel_size {config.kernel_size}, lest patches see nothing but it; got "
            f"{config.padding}"
        )
    if config.crops >= min(image_shape(train)[1:]):
        raise InputError(f"crops must be smaller than the images, {image_shape(train)[1:]}; got {config.crops}")
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


def run_beta(run: Run, config: TrainConfig) -> float:
    """The weight decay of `run`: the one chosen for its dictionary, or what its options say."""
    if (chosen := run.chosen_beta) is not None:
        return chosen
    if config.beta is not None:
        return config.beta
    if (beta_max := run.beta_max) is None:
        raise RunError(f"{run.folder} has not got as far as its beta: finish it with --resume")
    return beta_at(DEFAULT_BETA_RATIO if config.beta_ratio is None else config.beta_ratio, beta_max)


def with_run_settings(run: Run) -> TrainConfig:
    """The options of a finished run, its resolved beta among them."""
    config = run.config
    return replace(config, beta=run_beta(run, config), beta_ratio=None)
