"""Which images to train on, and what becomes of them first."""

from __future__ import annotations

from dataclasses import dataclass

from convcvx.training.option import DATA, LARGEST_SIDE, SIZE, option, size, size_text

MOVED = "Where the data set of the run lies now. [default: where it lay when the run was trained]"
"""`--data-dir` of commands that take the data of a run."""


@dataclass(frozen=True)
class DataOptions:
    """The options of the panel "Data"."""

    data: str = option(
        "digits",
        DATA,
        "digits, mnist, cifar10 or another set of torchvision, FILE.npz (Keras or MedMNIST keys), FILE.csv of paths "
        "and labels, FILE.parquet, or a FOLDER: of train/, test/ and perhaps val/ with a folder a class; of folders a "
        "class; or of x_train.npy, y_train.npy, x_test.npy, y_test.npy, which stay on disk. `convcvx data` lists them.",
        any_model=True,
        command_only=True,
    )
    data_dir: str | None = option(
        None,
        DATA,
        "Where data sets lie or are downloaded to. [default: datasets, of the checkout if there is one]",
        may_change=True,
        any_model=True,
        command_only=True,
    )
    resize: str | None = option(
        None,
        DATA,
        "32, or 24x32 (rows x columns): what all images are resized to [default: as they are, all alike]",
        low=1,
        read=size_text,
        form=SIZE,
        means=size,
        any_model=True,
    )
    channels: int | None = option(
        None,
        DATA,
        "1 for grey images, 3 for colour [default: as they are, colour if one of them has it]",
        low=1,
        high=3,
        any_model=True,
    )
    limit: int | None = option(None, DATA, "Use the first N training images only.", low=1, any_model=True)
    validation: float = option(
        0.0,
        DATA,
        "Share of training images held out and scored, where the data have no validation set of their own.",
        low=0,
        high=1,
        any_model=True,
    )
    flips: bool = option(
        False,
        DATA,
        "With a dictionary: train on the mirror images as well.",
        per_stage="A later stage with flips needs mirror pairs of filters in the one before.",
    )
    shifts: int = option(
        0,
        DATA,
        "Train on the images moved by N pixels left, right, up and down as well.",
        low=0,
        high=LARGEST_SIDE,
        any_model=True,
    )
