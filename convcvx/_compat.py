"""Make `import torchvision` work where its compiled operators do not match the installed torch.

torchvision registers abstract implementations of `nms` and `qnms` at import time and fails when the
compiled library that defines these operators is absent (a CPU-only torch beside a CUDA torchvision).
convcvx uses its data sets only, so the bare schemas are enough. A matching build never gets here.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

_SCHEMAS = tuple(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms"))
_libraries: list[Any] = []  # a Library undefines its operators when collected


def import_torchvision() -> ModuleType:
    """Import torchvision, defining its missing operator schemas first if, and only if, that is what fails."""
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        import torch

        library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            library.define(schema)
        _libraries.append(library)
        import torchvision
    return torchvision
