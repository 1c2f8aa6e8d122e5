"""Pooled responses of filters and their adjoints, streamed over the images."""

from convcvx.responses.passes import Responses
from convcvx.responses.streams import CHUNK_BYTES, LARGEST_SPAN, SPAN
from convcvx.responses.table import Residual

__all__ = [
    "CHUNK_BYTES",
    "LARGEST_SPAN",
    "SPAN",
    "Residual",
    "Responses",
]
