"""Options that go together, by name: partial records of `TrainConfig`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from convcvx.errors import check_choice
from convcvx.training.options import OPTIONS, TrainConfig
from convcvx.training.recipes import recipe

if TYPE_CHECKING:
    from convcvx.data.datasets import Dataset

ACCURACY: dict[str, Any] = {
    "contrast": True,
    "whiten": True,
    "hidden_bias": True,
    "dictionary_source": "kmeans",
    "threshold": 0.25,
    "tune": 0.1,
    "max_rounds": 0,
    "tol": 1.0,  # any gap: what these presets are after is accuracy, and β is chosen for it
}
"""What the presets for whole data sets share."""

CIFAR10: dict[str, Any] = {
    "data": "cifar10",
    **ACCURACY,
    "kernel_size": "5",
    "pool": "3",
    "contrast_epsilon": 1e-2,
    "flips": True,
}

PROOF: dict[str, Any] = {
    "contrast": True,
    "rank": 2,
    "oracle": "branch-and-bound",
}
"""What the presets share whose gap is a proof on a whole data set: a rank that is searched in minutes there."""

PRESETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "demo": {
        "data": "digits",
        "kernel_size": "3",
        "padding": "1",
        "rank": 2,
        "subspaces": 4,
        "pool": "4",
        "beta_ratio": 5e-3,
        "tol": 3e-2,
        "oracle": "branch-and-bound",
    },
    "mnist": {
        "data": "mnist",
        **ACCURACY,
        "contrast": False,
        "threshold": 0.0,
        "whiten_epsilon": 0.3,
        "kernel_size": "14",
        "padding": "5",
        "pool": "4",
        "dictionary": 1000,
    },
    "mnist-proof": {
        "data": "mnist",
        **PROOF,
        "kernel_size": "7",
        "stride": "2",
        "padding": "1",
        "subspaces": 4,
        "pool": "6",
        "loss": "cross-entropy",
        "beta_ratio": 3e-3,
        "tol": 1e-2,
    },
    "cifar10-proof": {
        "data": "cifar10",
        **PROOF,
        "kernel_size": "4",
        "stride": "3",
        "subspaces": 8,
        "pool": "5",
        "beta_ratio": 3e-3,
        "tol": 2e-2,
    },
    "cifar10-fast": {**CIFAR10, "dictionary": 1200},
    "cifar10": {**CIFAR10, "dictionary": 6000},
}
"""`--preset NAME`: a flag or a config file given beside it wins. `plain` has nothing: the defaults of the options."""


def preset_options(name: str) -> dict[str, Any]:
    """The options of the preset called `name`."""
    return PRESETS[check_choice("preset", name, PRESETS)]


def leaves_open(given: Iterable[str], preset: str | None) -> bool:
    """Whether nothing that was asked for says what network is wanted, or how it is searched for."""
    return preset is None and all(name in OPTIONS and OPTIONS[name].option.any_model for name in given)


def fitting(given: dict[str, Any], train: Dataset) -> dict[str, Any]:
    """`given`, which leaves the network open, with the options that fit these images."""
    channels, height, width = train.images.shape[1:]
    loss = given.get("loss", OPTIONS["loss"].default)
    return recipe((channels, height, width), len(train), loss, bool(train.n_classes)) | given


def in_flags(options: dict[str, Any]) -> str:
    """Options as one writes them on the command line."""
    flags = {name.replace("_", "-"): value for name, value in options.items()}
    return " ".join(
        f"--{name}" if value is True else f"--no-{name}" if value is False else f"--{name} {value}"
        for name, value in flags.items()
    )


def next_steps(config: TrainConfig) -> str:
    """What to try after a training by options that fit the data."""
    if config.dictionary is not None:
        return (
            f"more accurate: --dictionary {2 * config.dictionary}, or --slide 3, or `convcvx stack`; "
            "a certificate that says something: --preset plain --rank 2 --subspaces 4 --pool 4 --beta-ratio 0.01 "
            "--tol 0.05"
        )
    return "more accurate: a smaller --beta-ratio; a smaller gap: a smaller --tol; a proof: --rank 2 --subspaces 4"
