"""How the commands that train open: the folder that they work in, and what they say before the first round."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from convcvx.cli import flags as f
from convcvx.cli.ending import resumable
from convcvx.responses.team import Team
from convcvx.training.folder import Folder
from convcvx.training.presets import in_flags
from convcvx.training.progress import Progress


@contextmanager
def entered(run: Folder, asked: f.Asked, team: Team) -> Iterator[bool]:
    """Own the folder of `run`; whether what has begun there goes on. An interrupt tells how it would."""
    with run.held(), resumable(run):
        yield run.enter(resume=asked.resume or team.restarted, overwrite=asked.overwrite)


def say_first(progress: Progress, asked: f.Asked, goes_on: bool, chosen: dict[str, Any] | None) -> None:
    """Say that nothing has begun where --resume was asked for, and which options were `chosen` by the data."""
    if asked.resume and not goes_on:
        progress.begin(f"nothing has begun in {asked.out}: it begins now, by these options")
    if chosen is not None:
        progress.begin(f"options that fit the data: {in_flags(chosen)}\n(--preset plain: the defaults instead of them)")
