"""`convcvx.fit_stack`: a stack of certified layers from Python, as `convcvx stack` trains it; and `convcvx.load`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from convcvx.data.datasets import ARRAYS
from convcvx.data.given import given_dataset
from convcvx.display.words import counted, label, rows, text
from convcvx.network.pretrained import save_pretrained
from convcvx.solution import Callback
from convcvx.stack.jobs import stack_job
from convcvx.stack.network import StackedCNN, stacked_cnn
from convcvx.stack.options import (
    STAGE_OPTIONS,
    VALIDATION,
    StackConfig,
    StackShape,
    as_kept_by_stage,
    fitting_stack,
    settings_of,
    stack_left_open,
)
from convcvx.stack.run import StackRun
from convcvx.training.card import model_card
from convcvx.training.entry import Told, announce, limited
from convcvx.training.fit import Fit, load_fit
from convcvx.training.option import check_names, parameters
from convcvx.training.options import TrainConfig
from convcvx.training.origin import Origin
from convcvx.training.presets import in_flags, preset_options
from convcvx.training.progress import reported
from convcvx.training.resolve import arranged
from convcvx.training.run import Run


@dataclass(frozen=True, eq=False)
class StackFit:
    """A trained stack.

    Attributes
    ----------
    network : StackedCNN
        One torch module of the stages that were kept: images (n, C, H, W) to (n, c).
    stages : list of Fit
        All that were trained, the dropped one included; each certificate speaks of its stage on the features it saw.
    config : StackConfig
    metrics : dict
        What `convcvx stack --json` prints.
    origin : Origin, optional
        By what to know the data again.
    """

    network: StackedCNN
    stages: list[Fit]
    config: StackConfig
    metrics: dict[str, Any]
    origin: Origin | None = None

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the folder of a stack, as `convcvx stack --out` does.

        Raises
        ------
        RunError
            Where one is already, unless `overwrite`, or other files are.
        """
        run = StackRun.new(folder, overwrite=overwrite)
        with run.held(), run.started(self.config, self.origin, resume=False):
            for number, stage in enumerate(self.stages, start=1):
                stage.write(run.stage(number))
            run.save_result(self.network, self.metrics | {"out": str(run.out)})
        return run.out

    def _repr_html_(self) -> str:
        from convcvx.display.html import notebook  # Jinja: on use

        shown = ("primal", "dual", "rel_gap", "scope", "n_filters", "validation_accuracy", "test_accuracy")
        records = self.metrics["stages"]
        return notebook(
            title=f"Stack: {self.metrics['n_stages']} of {len(records)} stages kept",
            rows=rows({name: self.metrics.get(name) for name in ("train_accuracy", "test_accuracy", "seconds")}),
            columns=["Stage", *map(label, shown)],
            table=[
                [f"{record['stage']}{'' if record['kept'] else ' (dropped)'}"]
                + [text(name, record.get(name)) for name in shown]
                for record in records
            ],
            note="Each gap is that of its stage on the features it was given.",
        )

    def save_pretrained(self, folder: str | os.PathLike[str], *, push_to: str | None = None) -> Path:
        """As `Fit.save_pretrained`, for `StackedCNN.from_pretrained`."""
        kept = [stage for stage in self.metrics["stages"] if stage["kept"]]
        flags = in_flags(self.config.stages[0].chosen)
        card = model_card("StackedCNN", self.network, self.metrics, kept, flags)
        return save_pretrained(folder, self.network.to_bytes(), card, push_to)

    def __str__(self) -> str:
        kept = [record["kept"] for record in self.metrics["stages"]]
        stages = [
            f"stage {number}{'' if kept[number - 1] else ', dropped'}: {stage}"
            for number, stage in enumerate(self.stages, start=1)
        ]
        return "\n".join([f"{counted(self.metrics['n_stages'], 'stage')}, status {self.metrics['status']}", *stages])

    __repr__ = __str__  # a prompt would show every tensor


def fit_stack(
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
) -> StackFit:
    """Train layer after layer, each to the optimum of its objective on the frozen features of those before.

    A stage that does not raise the validation score is dropped. The same as `convcvx stack`: same options, same
    defaults, same result.

    Parameters
    ----------
    images, targets, sample_weight, preset, callback, verbose, out, overwrite
        As in `convcvx.fit`; a callback that returns True ends the stage under way.
    {options}

    What `convcvx stack --help` calls a value a stage is a list here, or text with commas: `kernel_size=[5, 3]`. One
    kernel for all stages of 5 rows and 3 columns is a tuple, `(5, 3)`.

    Returns
    -------
    StackFit
        `.network`, one torch module; `.stages`, a `Fit` each; `.metrics`; `.save(folder)`.

    Raises
    ------
    InputError, DataError, RunError
        As in `convcvx.fit`.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> digits = load_digits()
    >>> options = {"padding": 1, "pool": 2, "beta_ratio": 0.05, "tol": 0.1, "max_filters": 8}
    >>> stack = fit_stack(digits.images[:150] / 16, digits.target[:150], stages=2, channels=4, **options)
    >>> len(stack.stages), stack.metrics["n_stages"] <= 2
    (2, True)
    """
    check_names(options, [parameter.name for parameter in OPTIONS])
    form = TrainConfig.of({"resize": options.get("resize")}).image_form
    train, *others = given_dataset(images, targets, sample_weight, form=form)
    name = str(images) if isinstance(images, str | os.PathLike) else ARRAYS
    given = {"data": name} | as_kept_by_stage(options)
    if stack_left_open(given, preset):
        given = fitting_stack(given, train)
    elif preset is not None:
        given = {k: v for k, v in preset_options(preset).items() if k != "data"} | given
    config = settings_of(given)
    first = config.stages[0]
    data = arranged(first, limited(train, first.limit), *others)
    origin = Origin.of(first, data)
    with TemporaryDirectory(prefix="convcvx-") if out is None else nullcontext(out) as folder:
        place = Path(folder) / "stack" if out is None else Path(folder)
        run = StackRun.new(place, overwrite=overwrite)
        with reported(verbose, first.tol) as lines:
            stack_job(config, run, Told(callback, lines), data=data, origin=origin)
        return load_stack(run)


def load_stack(run: StackRun) -> StackFit:
    """A finished stack as a `StackFit`."""
    metrics = run.metrics
    stages = [load_fit(run.stage(record["stage"])) for record in metrics["stages"]]
    return StackFit(stacked_cnn(run.folder), stages, run.config, metrics, run.origin)


def load(folder: str | os.PathLike[str]) -> Fit | StackFit:
    """What `fit`, `fit_stack` or a command left in a folder; certificates as they were saved.

    `convcvx.certify` proves a certificate anew.

    Raises
    ------
    RunError
        For a folder that holds no finished run or stack, or a damaged one.
    """
    stack = StackRun(folder)
    return load_stack(stack) if stack.begun else load_fit(Run.open(folder))


OPTIONS = [
    *parameters(StackShape),
    *(p for p in parameters(TrainConfig, validation=VALIDATION) if p.name in STAGE_OPTIONS),
]
"""The options of `fit_stack`, as its signature has them."""

announce(fit_stack, (StackShape, TrainConfig), OPTIONS)
