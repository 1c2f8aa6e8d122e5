"""How a training, or a command, stands, and with what exit status it ends."""

from __future__ import annotations

from convcvx.errors import Word

REACHED = 0
"""Exit code of a command that did what it was asked to."""
SHORT = 3
"""Exit code of a command that stopped short of the tolerance."""


class Status(Word):
    """How a training, or a command, stands, or why it stopped.

    Attributes
    ----------
    meaning : str
        In words.
    remedy : str
        What to try where that is short of what was asked for; a command's own words say more where there is none.
    exit_code : int
        That of a command that ends with it.
    """

    CONVERGED = (
        "converged",
        "the gap is within tol",
        "",
        REACHED,
    )
    DONE = "done", "what was asked for is done; there was no gap to close", "", REACHED
    RUNNING = "running", "the training goes on", "go on with it, or raise tol"
    MAX_FILTERS = "max_filters", "there is no room for another filter, or none that is worth it", "raise max_filters"
    MAX_ROUNDS = "max_rounds", "all rounds are used up", "raise max_rounds"
    TIME_LIMIT = "time_limit", "the time is over", "raise time_limit"
    CALLBACK = "callback", "a callback ended the training", "have it let the training go on, or raise tol"
    STALLED = "stalled", "further rounds no longer lower the objective", "raise tol, or name an exact oracle"
    RELAXATION_GAP = (
        "relaxation_gap",
        "the relaxation is solved, but not tight",
        "the relaxation is not tight here; use solver='sliding-fw', or raise tol",
    )
    SAMPLED = (
        "sampled",
        "the program over sampled activation patterns is solved, the network is not optimal",
        "the sampled program is solved, the network is not: sample more gates, or use solver='sliding-fw'",
    )
    CONDITIONS = (
        "conditions",
        "the conditions under which the closed form is the optimum do not hold",
        "the closed form is a bound on these data, no optimum: use solver='sliding-fw'",
    )
    GAP_ABOVE_TOL = (
        "gap_above_tol",
        "the certified gap is above tol, whatever the training saw",
        "a second, longer search found more than the solver's; train to a smaller tol, put up with a larger one, or "
        "name an exact oracle",
    )

    def __init__(self, text: str, meaning: str = "", remedy: str = "", exit_code: int = SHORT) -> None:
        self.meaning, self.remedy, self.exit_code = meaning, remedy, exit_code
