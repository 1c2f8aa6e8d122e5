"""Pooled ReLU responses of filters and their adjoints, streamed over the images."""

from convcvx.responses.passes import (
    CHUNK_BYTES,
    LARGEST_SPAN,
    SPAN,
    Residual,
    Responses,
)

__all__ = [
    "CHUNK_BYTES",
    "LARGEST_SPAN",
    "SPAN",
    "Residual",
    "Responses",
]
