"""How far a training goes: to a tolerance, or until filters, rounds or time run out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from convcvx.errors import check_count, check_positive


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
        Looked at between rounds.

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

    def ends(self, record: dict[str, Any]) -> str | None:
        """The status of a training that ends with the round of `record`; None if it goes on."""
        return "converged" if record["rel_gap"] <= self.tol else self.exhausted(record)

    def exhausted(self, record: dict[str, Any]) -> str | None:
        """The same, whatever the gap."""
        if self.time_limit is not None and record["seconds"] >= self.time_limit:
            return "time_limit"
        return "max_rounds" if record["round"] >= self.max_rounds else None

    def room(self, n_filters: int, wanted: int) -> int:
        """How many of `wanted` filters may join the `n_filters` that there are."""
        return wanted if self.max_filters is None else max(0, min(wanted, self.max_filters - n_filters))
