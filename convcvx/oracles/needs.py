"""What oracles and solvers need of a problem, and the one message about a problem that lacks it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from convcvx.activations import LINEAR, RELU
from convcvx.errors import InputError
from convcvx.oracles._patch_rows import MAX_BYTES, PatchRows
from convcvx.oracles.forms import is_one_form
from convcvx.problem import Problem


@dataclass(frozen=True)
class Need:
    """Something that not every problem has.

    Attributes
    ----------
    what : str
        In words, behind "needs".
    lacking : callable
        What a problem has instead, in words; None where it has what is needed.
    remedy : str
        What to do about it.
    """

    what: str
    lacking: Callable[[Problem], str | None]
    remedy: str

    def refusal(self, who: str, instead: str) -> InputError:
        """The error of whoever has to do with something else."""
        return InputError(f"{who} needs {self.what}; got {instead}; {self.remedy}")


def require(who: str, needs: Iterable[Need], problem: Problem) -> None:
    """Raise `InputError` for the first of the `needs` of `who` that the problem does not meet."""
    for need in needs:
        if (instead := need.lacking(problem)) is not None:
            raise need.refusal(who, instead)


def _other_loss(problem: Problem) -> str | None:
    return None if problem.loss.name == "squared" else repr(problem.loss.name)


def _no_cone(problem: Problem) -> str | None:
    return None if problem.loss.name in ("squared", "cross-entropy") else repr(problem.loss.name)


def _several_patches(problem: Problem) -> str | None:
    return None if problem.responses.n_positions == 1 else str(problem.responses.n_positions)


def _maximum(problem: Problem) -> str | None:
    return f"pool {problem.responses.pooling}" if problem.responses.pooling.maximum else None


def _maximum_beyond_sweeps(problem: Problem) -> str | None:
    rank, activation = problem.responses.embedding.patch_rank, problem.responses.activation
    if _maximum(problem) is None or (rank <= 2 and activation == RELU):
        return None
    return f"pool {problem.responses.pooling} of rank {rank} with activation {activation}"


def _other_activation(problem: Problem) -> str | None:
    activation = problem.responses.activation
    return None if activation == RELU else f"activation {activation}"


def _several_forms(problem: Problem) -> str | None:
    responses = problem.responses
    if responses.activation.degree == 2:
        several = f"activation quadratic with pool {responses.pooling} and {problem.n_outputs} outputs"
        return None if is_one_form(problem) else several
    return None if responses.activation == LINEAR else f"activation {responses.activation}"


def _higher_degree(problem: Problem) -> str | None:
    activation = problem.responses.activation
    return None if activation.degree == 1 else f"activation {activation}"


def _bent(problem: Problem) -> str | None:
    return None if problem.responses.activation == LINEAR else _other_activation(problem)


def _several_subspaces(problem: Problem) -> str | None:
    subspaces = problem.responses.embedding.spec.subspaces
    return None if subspaces == 1 else f"subspaces {subspaces}"


def _all_rows(merged: bool) -> Need:
    def too_many(problem: Problem) -> str | None:
        size = PatchRows.size(problem.responses, problem.n_outputs, merged=merged)
        return None if size <= MAX_BYTES else f"{size / 2**30:.3g} GiB of them"

    what = f"all patches at once, {MAX_BYTES >> 30} GiB of them at most"
    return Need(what, too_many, "use fewer images, a coarser stride, or oracle='local'")


AVERAGES = Need("average pooling", _maximum, "pool without max:, or leave solver and oracle to auto")
"""What is made for sums over patch rows, as pooled responses are unless cells take the maximum."""
AVERAGES_OR_PLANE = Need(
    "average pooling, or the ReLU on patches of rank 2 at most",
    _maximum_beyond_sweeps,
    "use oracle='local' or 'polynomial', or rank 2",
)
"""What the exact oracle needs: where cells take the maximum it sweeps the plane, and knows no way in space."""
RECTIFIED = Need("the ReLU", _other_activation, "use solver='sliding-fw', or activation relu")
"""What is made for rows that count on one side only."""
ONE_MATRIX = Need(
    "activation linear, or quadratic with pool global and one output or two classes",
    _several_forms,
    "leave oracle to auto",
)
"""What is made for a g that is told by one matrix: ‖M u‖, or |uᵀ A u|."""
DEGREE_ONE = Need("an activation of degree 1", _higher_degree, "leave oracle to auto")
"""What is made for responses that are linear in the filter, row by row, within a cone."""
RECTIFIED_OR_LINEAR = Need("activation relu or linear", _bent, "use solver='sliding-fw'")
"""What the closed form needs, which is that of the linear network."""
SQUARED_LOSS = Need("loss 'squared'", _other_loss, "use solver='sliding-fw'")
CONIC_LOSS = Need("loss 'squared' or 'cross-entropy'", _no_cone, "use solver='sliding-fw'")
ONE_PATCH = Need("one patch a sample", _several_patches, "take images that are one patch each")
ONE_SPACE = Need("filters of one space", _several_subspaces, "use solver='sliding-fw', or subspaces 1")
"""What solvers need that make filters of their own: those of an oracle lie in one of the subspaces."""
ROWS_IN_BUNDLES = _all_rows(merged=False)
"""What branch and bound needs, which sees many rows in bundles."""
ROWS_IN_MEMORY = _all_rows(merged=True)
"""What oracles need that give each row a charge of its own: about three times as much."""
