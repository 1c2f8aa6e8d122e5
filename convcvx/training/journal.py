"""What a training keeps as it goes, and what one that was interrupted goes on with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:  # torch: who only lists run folders does not wait for it
    from convcvx.patches import PatchEmbedding
    from convcvx.solution import Solution
    from convcvx.solvers.slide.descent import State

Descent: TypeAlias = "tuple[Solution, float, State]"
"""The optimum over a dictionary, its β, and where the descent of its filters is."""


class Journal:
    """What is worth keeping of a training, told as soon as it is known. This one lets it go; a run folder writes it."""

    def save_embedding(self, embedding: PatchEmbedding) -> None:
        """The space of the filters."""

    def save_beta_max(self, beta_max: float) -> None:
        """The β from which on no filter helps, or none of the dictionary."""

    def save_chosen_beta(self, beta: float) -> None:
        """The β of a dictionary, which held-out images may have chosen."""

    def save_path(self, path: list[dict[str, Any]]) -> None:
        """What held-out images said of each β tried for a dictionary."""

    def save_state(self, solution: Solution) -> None:
        """The solution after a round."""

    def save_descent(self, start: Solution, beta: float, state: State) -> None:
        """Where a descent from the optimum `start` over a dictionary is, at weight decay `beta`."""


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a training that goes on; all None where it begins.

    Attributes
    ----------
    embedding : PatchEmbedding
        Checked against the data: a file vouches for nothing.
    solution : Solution
    beta_max, chosen_beta : float
    descent : Descent
        That of a dictionary before its first solution.
    """

    embedding: PatchEmbedding | None = None
    solution: Solution | None = None
    beta_max: float | None = None
    chosen_beta: float | None = None
    descent: Descent | None = None

    @property
    def seconds(self) -> float:
        """Those spent before."""
        return self.solution.history[-1]["seconds"] if self.solution and self.solution.history else 0.0
