"""Why a search for filters ended."""

from __future__ import annotations

from convcvx.errors import Word


class Stop(Word):
    """What ended a search: the statistic `stopped` of an oracle, as certificates keep it. None where it is done.

    Attributes
    ----------
    told : str
        What a certificate says of it, behind the meaning of its scope; empty where that is no news.
    """

    BOUND = "bound"
    """The bound is as low as was asked for."""
    TIME_LIMIT = "time_limit", "the time limit cut it short"
    """The deadline of the problem has passed."""
    SECONDS = "seconds"
    """The time limit of the oracle itself is over, that of the problem is not."""
    MAX_CONES = "max_cones"
    """As many cones have been looked at as were allowed."""
    MAX_CYLINDERS = "max_cylinders"
    """As many cylinders."""
    HOPELESS = "hopeless", "the search ended early: it shows a gap that is large and would only grow"
    """What else there is to find changes nothing any more."""

    def __init__(self, text: str, told: str = "") -> None:
        self.told = told
