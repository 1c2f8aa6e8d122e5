"""How far a training goes: to a tolerance, or until filters, rounds or time run out.

A `Deadline` is made once, where a call begins, and travels with its `Problem`: every pass over the images looks at it,
and so does every loop without passes that can be long. What is cut short raises `OutOfTime`; whoever can still give a
valid answer catches it: a solver keeps the network that it had, an oracle the bound that is proved by then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from time import perf_counter

from convcvx.errors import check_count, check_positive


def clock() -> float:
    """What deadlines go by, in seconds: it stands still while functions are compiled, once a machine.

    That takes up to a minute, in which a training gets nowhere: a short limit would be over before it has begun.
    """
    from convcvx.machine.jit import compiling_seconds  # here: a `Budget` is checked before numba is imported

    return perf_counter() - compiling_seconds()


class OutOfTime(Exception):
    """A deadline passed before this was done. Never leaves the package."""


@dataclass(frozen=True)
class Deadline:
    """When a call has to be over: `at`, by `clock`.

    >>> NEVER.passed, NEVER.left, Deadline.after(0.0).passed
    (False, inf, True)
    """

    at: float = math.inf

    @classmethod
    def after(cls, seconds: float | None, spent: float = 0.0) -> Deadline:
        """So many seconds from now, less those `spent`; never for None."""
        return NEVER if seconds is None else cls(clock() + seconds - spent)

    @property
    def left(self) -> float:
        """Seconds; zero once it has passed."""
        return max(0.0, self.at - clock()) if self.at < math.inf else math.inf

    @property
    def limit(self) -> float | None:
        """The same as a `time_limit`: None where there is none, and never zero."""
        return max(self.left, 1e-9) if self.at < math.inf else None

    @property
    def passed(self) -> bool:
        return self.at < math.inf and clock() >= self.at

    def check(self) -> None:
        """Raise `OutOfTime` once it has passed."""
        if self.passed:
            raise OutOfTime

    def share(self, fraction: float) -> Deadline:
        """When so much of the time left is over."""
        return Deadline(clock() + fraction * self.left) if self.at < math.inf else self

    def sooner(self, other: Deadline) -> Deadline:
        """The sooner of two."""
        return min(self, other, key=lambda deadline: deadline.at)

    def later(self, seconds: float) -> Deadline:
        """This one, or so many seconds from now if that is later."""
        return Deadline(max(self.at, clock() + seconds)) if self.at < math.inf else self


NEVER = Deadline()

LEAST = 0.05
"""Share of a time limit that a certificate gets in any case, be it late."""


@dataclass(frozen=True)
class Budget:
    """Where to stop.

    Parameters
    ----------
    tol : float
        Relative gap (primal - lower bound) / primal to reach.
    max_filters : int, optional
    max_rounds : int
    time_limit : seconds, optional
        Those of earlier sessions of a resumed training count, those in which functions are compiled do not. The
        deadline of the problem holds besides.

    Raises
    ------
    InputError
        For a tolerance or a limit that no solver can keep.
    """

    tol: float = 1e-4
    max_filters: int | None = None
    max_rounds: int = 100
    time_limit: float | None = None

    def __post_init__(self) -> None:
        check_positive("tol", self.tol)
        check_count("max_rounds", self.max_rounds, minimum=0)
        if self.max_filters is not None:
            check_count("max_filters", self.max_filters)
        if self.time_limit is not None:
            check_positive("time_limit", self.time_limit)

    def deadline(self, latest: Deadline, earlier: float = 0.0) -> Deadline:
        """When a training that begins now has to be over: by `latest`, `earlier` seconds having gone before."""
        return latest.sooner(Deadline.after(self.time_limit, spent=earlier))

    def room(self, n_filters: int, wanted: int) -> int:
        """How many of `wanted` filters may join the `n_filters` that there are."""
        return wanted if self.max_filters is None else max(0, min(wanted, self.max_filters - n_filters))
