"""Data sets: names, files and folders to images and targets."""

from convcvx.data.datasets import (
    KEYS,
    DataError,
    Dataset,
    check_images,
    check_targets,
    load,
    spiral,
    split,
)
from convcvx.data.form import ImageForm

__all__ = [
    "KEYS",
    "DataError",
    "Dataset",
    "ImageForm",
    "check_images",
    "check_targets",
    "load",
    "spiral",
    "split",
]
