"""From the options to what they stand for: the data, the device, the problem, its β."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace

from torch import Tensor

from convcvx.data.augment import shifted
from convcvx.data.checks import check_two_classes, distance_from_zero
from convcvx.data.datasets import Dataset, load_sets, split
from convcvx.data.images import Images
from convcvx.data.weights import with_class_weight
from convcvx.errors import InputError, RunError
from convcvx.losses.targets import encode_targets
from convcvx.machine.devices import pick_device
from convcvx.machine.watch import phase
from convcvx.network.two_layer import read_weights
from convcvx.patches import PatchEmbedding
from convcvx.problem import Problem
from convcvx.responses.passes import Responses
from convcvx.responses.team import Team
from convcvx.storage.places import MODEL
from convcvx.training.folder import Folder
from convcvx.training.options import TrainConfig
from convcvx.training.origin import Origin
from convcvx.training.panels.model import DEFAULT_BETA_RATIO
from convcvx.training.plan import beta_at, build_problem
from convcvx.training.run import Run

SAME_BETA = 1e-6
"""Relative difference up to which two β are the same: a file may have been written by another version."""
LARGEST_CANCELLATION = 1000.0
"""`PatchEmbedding.cancellation` up to which a float32 network is right to 1e-4, which is what its check asks for."""
LARGEST_DISTANCE = 1e4
"""Times their spread that images may lie from zero: further off, a float32 network is wrong by a thousandth or more."""

Data = tuple[Dataset, Dataset | None, Dataset | None]
"""Training set, test set, and the validation set if there is one; no test set where Python gave none."""


def load_data(config: TrainConfig, *, download: bool = True) -> Data:
    """The data that `config` names."""
    phase("reading the data")
    sets = load_sets(config.data, config.data_dir, config.limit, form=config.image_form, download=download)
    return arranged(config, *sets)


def arranged(config: TrainConfig, train: Dataset, test: Dataset | None, validation: Dataset | None = None) -> Data:
    """The sets as `config` has them: some images held out, unless the data have a validation set of their own; the
    others shifted as well, none of weight 0 among them.

    Raises
    ------
    DataError
        Where the images that count, or those that a limit left, are of a single class.
    """
    train = train.counting()
    check_two_classes(train.targets, "targets")
    if config.validation and validation is None:
        train, validation = split(train, config.validation, config.seed)
    return shifted(train, config.shifts) if config.shifts else train, test, validation


def run_data(run: Folder, config: TrainConfig, *, check: bool = True, download: bool = True) -> Data:
    """The images that `run` was trained on, found by its options `config`; with `check` a `DataError` if others are."""
    source = run.located(config)
    data = load_data(source, download=download)
    if check:
        phase("fingerprint of the data")
        run.check_data(Origin.of(source, data))
    return data


def found_in(config: TrainConfig, data_dir: str | None) -> TrainConfig:
    """`config` with its data set in `data_dir`, where that is given: data move, and a run knows where they lay."""
    return config if data_dir is None else replace(config, data_dir=data_dir)


def training_images(config: TrainConfig) -> Images:
    """What a worker of a `Team` reads."""
    return load_data(config)[0].images


def training_weights(config: TrainConfig, train: Dataset) -> Tensor | None:
    """(n,): what each image counts for in training, that of its class included; None: all alike."""
    return with_class_weight(train.weights, config.class_weight, train.targets, train.classes)


def image_shape(dataset: Dataset) -> tuple[int, int, int]:
    channels, height, width = dataset.images.shape[1:]
    return channels, height, width


def training_problem(
    config: TrainConfig, train: Dataset, embedding: PatchEmbedding | None = None, team: Team | None = None
) -> Problem:
    """The training problem, its beta still open; a resumed run goes on with the `embedding` that it has."""
    spec = config.patch_spec()
    if any(padding >= size for padding, size in zip(spec.padding, spec.span, strict=True)):
        raise InputError(
            f"padding must be smaller than patches, {spec.span[0]}x{spec.span[1]} pixels, lest these see nothing but "
            f"it; got {config.padding}"
        )
    if config.crops >= min(image_shape(train)[1:]):
        raise InputError(f"crops must be smaller than the images, {image_shape(train)[1:]}; got {config.crops}")
    encode_targets(
        train.targets, config.loss, train.n_classes or None, intercept=config.intercept
    )  # before the pass over the images
    if (distance := distance_from_zero(train.images)) > LARGEST_DISTANCE:
        raise InputError(
            f"images lie {distance:.1g} times their spread from zero, above {LARGEST_DISTANCE:g}: no float32 network, "
            "as is exported, can tell them apart; rescale each channel before, in float64: (x - x.min()) / (x.max() - "
            "x.min())"
        )
    weights = training_weights(config, train)
    fitted = fitted_embedding(config, train.images, embedding, team, weights)
    if fitted.cancellation > LARGEST_CANCELLATION:
        raise InputError(
            f"whiten_epsilon {config.whiten_epsilon:g} leaves patches {fitted.cancellation:.0f} times their spread "
            "from zero: no float32 network, as is exported, can tell them apart; raise it, or subtract the mean image"
        )
    return problem_over(fitted, config, train, responses=team.responses if team else Responses)


def problem_over(
    embedding: PatchEmbedding, config: TrainConfig, train: Dataset, *, responses: Callable[..., Responses] = Responses
) -> Problem:
    """The training problem of `config` over the patches of an `embedding` at hand, its β still open."""
    return build_problem(
        train.images,
        train.targets,
        embedding=embedding,
        pooling=config.pool,
        activation=config.activation,
        loss=config.loss,
        intercept=config.intercept,
        n_classes=train.n_classes or None,
        device=pick_device(config.device),
        responses=responses,
        sample_weight=training_weights(config, train),
    )


def fitted_embedding(
    config: TrainConfig,
    images: Images,
    stored: PatchEmbedding | None = None,
    team: Team | None = None,
    weights: Tensor | None = None,
) -> PatchEmbedding:
    """The space of filters that `config` stands for on the training images; `stored`, of a run, if it is that one.

    `weights` (n,) say what each image counts for.

    The basis says how long a filter is, and so what the objective is: one that only a file vouches for proves nothing.

    Raises
    ------
    RunError
        When `stored` is another space.
    """
    spec = config.patch_spec()
    phase("directions of the patches")
    if config.dictionary is not None:
        fresh = PatchEmbedding.fit(images, spec, flips=config.flips, weights=weights)
    elif team is not None:
        fresh = team.fit(images, spec, weights)
    else:
        alone = Team()
        alone.share_out(images, training_images, config)
        fresh = alone.fit(images, spec, weights)
    if stored is None:
        return fresh
    if not stored.same_space(fresh):
        pairs = zip(asdict(stored.spec).items(), asdict(spec).values(), strict=True)
        other = [f"{name} {theirs}, not {ours}" for (name, theirs), ours in pairs if theirs != ours]
        raise RunError(
            "embedding.safetensors holds another filter space than these options on these images give "
            f"({', '.join(other) or 'the options are the same: other training images, or a damaged file'}); use the "
            "run's own data and options"
        )
    return replace(fresh, basis=stored.basis)  # in which the run's filters are written


def run_beta(run: Run, config: TrainConfig) -> float:
    """The weight decay of `run`: the one chosen for its dictionary, or what its options say.

    Raises
    ------
    RunError
        Where there is none yet, or the network of the run says that it was trained at another: a file has changed.
    """
    chosen, beta_max = run.chosen_beta, run.beta_max
    if chosen is None and config.beta is None and beta_max is None:
        raise RunError(f"{run.folder} has not got as far as its beta: finish it with {run.go_on}")
    beta = beta_of(config, beta_max, chosen)
    if (run.folder / MODEL).exists():
        _, _, meta = read_weights(run.folder / MODEL)
        trained = meta.get("beta", beta)  # networks of earlier versions do not say
        if not (isinstance(trained, int | float) and math.isclose(trained, beta, rel_tol=SAME_BETA)):
            source = "beta.json" if chosen is not None else f"{run.CONTENTS.options} and beta_max.json"
            raise RunError(
                f"{source} in {run.folder} give beta {beta:g}, its network was trained at {trained}: one of these "
                "files is damaged or not of this run; put it back, or train again"
            )
    return beta


def check_beta(run: Run, config: TrainConfig) -> None:
    """Raise `RunError` where a training that goes on in `run` would have another weight decay than its network.

    What is gone or cannot be read the training makes anew, from its checkpoint: a network, a beta_max, a chosen β.
    """
    if run.chosen_beta is None and (config.dictionary is not None or (config.beta is None and run.beta_max is None)):
        return
    try:
        read_weights(run.folder / MODEL)
    except RunError:
        return
    run_beta(run, config)


def beta_of(config: TrainConfig, beta_max: float | None, chosen: float | None = None) -> float:
    """The weight decay that `config` asks for: the one `chosen` for a dictionary, a number, or a share of beta_max."""
    if chosen is not None:
        return chosen
    if config.beta is not None:
        return config.beta
    assert beta_max is not None
    return beta_at(DEFAULT_BETA_RATIO if config.beta_ratio is None else config.beta_ratio, beta_max)


def with_run_settings(run: Run) -> TrainConfig:
    """The options of a finished run, its resolved beta among them."""
    config = run.config
    return replace(config, beta=run_beta(run, config), beta_ratio=None)
