"""A launcher for many small processes: `python crew.py SIZE SEGMENT COMMAND...` runs `convcvx COMMAND...` in SIZE.

It imports convcvx once and forks, which torchrun does not: eight processes start in the time of one. SEGMENT is how
many images are worth a segment of their own, so that a few hundred are shared out as a million would be. With
CREW_BREAKS=CLASS.METHOD one of `BREAKABLE` fails in process 1.
"""

from __future__ import annotations

import os
import socket
import sys

import sklearn.datasets  # noqa: F401  (before the fork: it is slow to import, as is the next)
import torch.distributed  # noqa: F401

from convcvx.cli import main
from convcvx.responses import portions
from convcvx.solvers.dictionary.features import Features
from convcvx.solvers.master.blocks import GramBlocks

BREAKABLE = {"Features.batches": (Features, "batches"), "GramBlocks.times": (GramBlocks, "times")}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def broken(*_: object) -> None:
    raise OSError("disk gone")


if __name__ == "__main__":
    size, portions.SEGMENT = int(sys.argv[1]), int(sys.argv[2])
    sys.argv = ["convcvx", *sys.argv[3:]]
    os.environ |= {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ["RANK"] = "0"
    for rank in range(1, size):
        if os.fork() == 0:
            os.environ["RANK"] = str(rank)
            if rank == 1 and (name := os.environ.get("CREW_BREAKS")):
                setattr(*BREAKABLE[name], broken)
            break
    main()
