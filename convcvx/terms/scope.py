"""What a bound speaks of: the filters that were searched, and whether the bound was proved."""

from __future__ import annotations

from convcvx.errors import Word


class Scope(Word):
    """What was searched for the filter that violates dual feasibility most.

    Attributes
    ----------
    meaning : str
        In words, of a lower bound with this scope.
    proved : bool
        Whether the bound was proved, rounding included, for all filters that were to be searched; else it is the best
        that was seen.
    shared : bool
        Whether the bound speaks of the problem, hence of other networks too, not only of the one at hand.
    """

    GLOBAL = "global", "a proof: no network of any width has an objective below the lower bound", True, True
    FAMILY = (
        "family",
        "a proof for the filters of a family: no network over them has an objective below the lower bound",
        True,
        False,
    )
    SAMPLED = (
        "sampled",
        "a proof for the sampled activation patterns and the network's own only, not for all networks",
        True,
        False,
    )
    HEURISTIC = "heuristic", "an estimate, not a proof: a multi-start local search found no better filter", False, True

    def __init__(self, text: str, meaning: str = "", proved: bool = False, shared: bool = False) -> None:
        self.meaning, self.proved, self.shared = meaning, proved, shared

    @property
    def for_all(self) -> bool:
        """Whether it is a proof for every network of the problem: one that may be kept, and handed on to others."""
        return self.proved and self.shared

    @property
    def lasting(self) -> bool:
        """Whether what one round of a training proved holds in its later rounds: the same filters are meant."""
        return self.proved and self is not Scope.SAMPLED
