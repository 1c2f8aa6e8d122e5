"""`convcvx.fit`: from images to a certified network in Python, as `convcvx train` does it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Sequence
from inspect import Parameter, Signature, cleandoc, signature
from typing import Any

from convcvx.callbacks import together
from convcvx.data.datasets import ARRAYS, Dataset
from convcvx.data.form import ImageForm
from convcvx.data.given import given_dataset
from convcvx.errors import check_count
from convcvx.solution import Callback, Solution
from convcvx.training.clock import Clock
from convcvx.training.fit import Fit
from convcvx.training.jobs import train_in_memory, train_into
from convcvx.training.option import as_kept, check_names, described, parameters
from convcvx.training.options import TrainConfig
from convcvx.training.origin import Origin
from convcvx.training.plan import warn_short_of
from convcvx.training.presets import fitting, leaves_open, preset_options
from convcvx.training.progress import SILENT, Report, reported
from convcvx.training.resolve import arranged
from convcvx.training.run import Run

LOG = logging.getLogger("convcvx")


class Told:
    """Passes on how a training goes: to callbacks what it found, to the log what it begins, both to `lines`."""

    def __init__(self, callback: Callback | Sequence[Callback] | None = None, lines: Report = SILENT) -> None:
        self._callback, self._lines = together(callback), lines

    def begin(self, text: str) -> None:
        LOG.info(text)
        self._lines.begin(text)

    def __call__(self, solution: Solution, beta: float, left: float = math.inf) -> object:
        self._lines(solution, beta, left)
        return self._callback is not None and self._callback(solution)


def fit(
    images: Any,
    targets: Any = None,
    *,
    sample_weight: Any = None,
    preset: str | None = None,
    callback: Callback | Sequence[Callback] | None = None,
    verbose: bool = False,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Fit:
    """Train a two-layer convolutional network to the optimum of its objective, with a certificate.

        min  (1/n) Σ_i ℓ(f(x_i), y_i) + (β/2) Σ_j (‖u_j‖² + ‖V_j‖²)

    over filters u_j and output weights V_j of any number of neurons (Sahiner et al. 2021). The same as
    `convcvx train`: same options, same defaults, same result.

    Parameters
    ----------
    images : Tensor or ndarray (n, C, H, W) or (n, H, W), torch Dataset or DataLoader, (images, targets), str or path
        uint8 pixels are divided by 255, floats taken as they are. A name ("mnist") or a path is what `--data` takes.
    targets : Tensor, ndarray or sequence (n,) of classes, or (n, c) of real values
        None where `images` hold them.
    sample_weight : Tensor, ndarray or sequence (n,), optional
        What each image counts for, in any unit: the mean loss is Σ_i w_i ℓ_i / Σ_i w_i, accuracies are means alike. A
        weight of 2 is worth the image twice, one of 0 leaves it out. Whether it is drawn into a sample or held out is
        as likely as for any other.
    preset : str, optional
        Options that go together; others given beside it win. Where neither a preset nor any option says what network
        is wanted, those that fit the images are taken: see `convcvx.training.recipes`. "plain" has the defaults below.
    callback : callable or list of them, optional
        Called with the `Solution` after every round; the training ends, with what it has, where one returns True. Ready
        ones are in `convcvx.callbacks`.
    verbose : bool
        Print a line after every round, and show between them what goes on.
    out : path, optional
        A run folder: every round is kept there, and `convcvx train --resume --out` goes on.
    overwrite : bool
        Replace the run that is there.
    {options}

    Returns
    -------
    Fit
        `.network`, an ordinary torch module; `.certificate`; `.solution`; `.history`; `.metrics`; `.save(folder)`.

    Raises
    ------
    InputError, DataError
        ValueErrors, for options out of range and data that are unfit.
    RunError
        For a folder that cannot be used.

    Warns
    -----
    ConvergenceWarning
        When the certified gap is above `tol`.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> digits = load_digits()
    >>> layer = fit(digits.images[:300] / 16, digits.target[:300], pool=2, beta_ratio=0.05, tol=0.05)
    >>> layer.certificate.rel_gap < 0.05, layer.metrics["train_accuracy"] > 0.8
    (True, True)
    """
    clock = Clock.now()
    check_names(options, [parameter.name for parameter in OPTIONS])
    given = {"data": str(images) if isinstance(images, str | os.PathLike) else ARRAYS} | as_kept(TrainConfig, options)
    train, *others = given_dataset(images, targets, sample_weight, form=image_form(given))
    config = chosen_config(given, preset, train)
    config.check()
    data = arranged(config, limited(train, config.limit), *others)
    origin = Origin.of(config, data)
    with reported(verbose, config.tol) as lines:
        told = Told(callback, lines)
        if out is None:
            found = train_in_memory(config, data, told, origin, clock)
        else:
            run = Run.new(out, overwrite=overwrite)
            found = train_into(run, config, told, data=data, origin=origin, clock=clock)
    warn_short_of(found.certificate, found.solution, config.tol)
    return found


def image_form(given: dict[str, Any]) -> ImageForm:
    """What the options `given` make of images, before the others are known."""
    return TrainConfig.from_dict({name: given[name] for name in ("resize", "channels") if name in given}).image_form


def chosen_config(given: dict[str, Any], preset: str | None, train: Dataset) -> TrainConfig:
    """The options `given`, with those of the preset, or those that fit the images where none says what is wanted."""
    if leaves_open(given, preset):
        return TrainConfig.from_dict(fitting(given, train))
    options = {} if preset is None else {k: v for k, v in preset_options(preset).items() if k != "data"}
    return TrainConfig.from_dict(options | given)


def limited(dataset: Dataset, limit: int | None) -> Dataset:
    """Its first `limit` images."""
    if limit is None:
        return dataset
    return dataset.part(slice(check_count("limit", limit)))


OPTIONS = parameters(TrainConfig)
"""The options of `fit`, as its signature has them."""


def announce(function: Any, records: Iterable[Any], options: list[Parameter]) -> None:
    """Write the options of `records` that a function takes as `**options` into its signature and docstring."""
    own = [p for p in signature(function).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    function.__signature__ = Signature([*own, *options])
    text = "\n".join(described(record, options) for record in records)
    function.__doc__ = cleandoc(function.__doc__).replace("{options}", text)


announce(fit, (TrainConfig,), OPTIONS)
