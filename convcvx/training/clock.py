"""When a training began, and how long it has taken."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter, process_time


@dataclass(frozen=True)
class Clock:
    """When a training began, in seconds by the wall and of all cores, and what earlier sessions took."""

    began: float
    cores: float
    earlier: float = 0.0

    @classmethod
    def now(cls) -> Clock:
        return cls(perf_counter(), process_time())

    @property
    def seconds(self) -> float:
        return self.earlier + perf_counter() - self.began

    @property
    def core_seconds(self) -> float | None:
        """None for a training of several sessions."""
        return None if self.earlier else process_time() - self.cores
