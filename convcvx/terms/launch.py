"""Whether torchrun has started this process, and as what."""

from __future__ import annotations

import os

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables by which torchrun tells a process of its team."""


def launched() -> bool:
    """Whether this process is one of a team.

    It works alone where some of `LAUNCHED` are missing: a variable that is left over from other work starts nothing.
    """
    return all(name in os.environ for name in LAUNCHED)


def leads() -> bool:
    """Whether this process reads options: it works alone, or leads those that torchrun started.

    The others do as they are told. Of what is bad one of them has to speak, and the files may be on its machine alone.
    """
    rank = os.environ.get("RANK", "")
    return not (launched() and rank.isdecimal() and int(rank) > 0)
