"""Arrangements of hyperplanes x_k·u = 0: cells, rays and exact predicates."""

from convcvx.arrangements.cells import (
    Cell,
    cell_batches,
    cells,
    complement,
    count_bound,
    count_cells,
    facets,
    sample_patterns,
    unpack_patterns,
)

__all__ = [
    "Cell",
    "cell_batches",
    "cells",
    "complement",
    "count_bound",
    "count_cells",
    "facets",
    "sample_patterns",
    "unpack_patterns",
]
