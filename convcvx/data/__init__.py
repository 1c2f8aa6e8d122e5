"""Data sets: names, files and folders to images and targets."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # as in `convcvx` itself: `convcvx data` lists names, for which nobody should wait for torch
    from convcvx.data.datasets import KEYS as KEYS
    from convcvx.data.datasets import DataError as DataError
    from convcvx.data.datasets import Dataset as Dataset
    from convcvx.data.datasets import check_images as check_images
    from convcvx.data.datasets import check_targets as check_targets
    from convcvx.data.datasets import load as load
    from convcvx.data.datasets import spiral as spiral
    from convcvx.data.datasets import split as split
    from convcvx.data.form import ImageForm as ImageForm

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


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"convcvx.data.{'form' if name == 'ImageForm' else 'datasets'}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
