"""Options that go together, by name: partial records of `TrainConfig`."""

from __future__ import annotations

from typing import Any

from convcvx.errors import check_choice

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

PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "data": "digits",
        "kernel_size": "3",
        "padding": "1",
        "pool": "4",
        "beta_ratio": 0.01,
        "tol": 3e-2,
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
    "cifar10-fast": {**CIFAR10, "dictionary": 1200},
    "cifar10": {**CIFAR10, "dictionary": 6000},
}
"""`--preset NAME`: a flag or a config file given beside it wins."""


def preset_options(name: str) -> dict[str, Any]:
    """The options of the preset called `name`."""
    return PRESETS[check_choice("preset", name, PRESETS)]
