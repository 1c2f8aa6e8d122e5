"""When a training began, and how long it has taken."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter, process_time

from convcvx.machine.jit import compiling_seconds


@dataclass(frozen=True)
class Clock:
    """When a training began, in seconds by the wall, of all cores and of compiling, and what earlier sessions took."""

    began: float
    cores: float
    compiled: float
    earlier: float = 0.0

    @classmethod
    def now(cls) -> Clock:
        return cls(perf_counter(), process_time(), compiling_seconds())

    @property
    def seconds(self) -> float:
        return self.earlier + perf_counter() - self.began

    @property
    def compiling_seconds(self) -> float:
        """Those of this session in which functions were compiled: no time limit counts them, see `budget.clock`."""
        return compiling_seconds() - self.compiled

    @property
    def core_seconds(self) -> float | None:
        """None for a training of several sessions."""
        return None if self.earlier else process_time() - self.cores
