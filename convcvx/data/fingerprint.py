"""By what data are known again, without keeping them."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import torch
from torch import Tensor

BYTES = 16
"""Of a fingerprint: no two data sets that anybody has share one of so many."""
AT_ONCE = 1024
"""Rows whose bytes are hashed at a time."""


def fingerprint(parts: Iterable[Tensor], words: str = "") -> str:
    """Of the bytes of all `parts`, and of `words`."""
    digest = blake2b(digest_size=BYTES)
    for part in parts:
        for rows in part.split(AT_ONCE):
            digest.update(rows.cpu().contiguous().numpy())
    digest.update(words.encode(errors="surrogateescape"))
    return digest.hexdigest()


def spread(n: int, most: int) -> Tensor:
    """Indices of `most` of `n` rows at most, evenly spread, the first and the last among them."""
    return torch.linspace(0, n - 1, min(n, most), dtype=torch.float64).round().long()
