"""What `callback=` takes ready-made: the rounds of a training as a CSV file, or as curves in TensorBoard.

A callback is called with the `Solution` after every round; one that returns True ends the training there.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convcvx.errors import InputError, shown
from convcvx.solution import Callback, Round, Solution
from convcvx.storage.files import Files, explained


def together(callback: Callback | Sequence[Callback] | None) -> Callback | None:
    """Several callbacks as one, which returns True where any of them does; None for none.

    Raises
    ------
    InputError
        For what cannot be called.
    """
    callbacks: Any = callback if isinstance(callback, list | tuple) else [] if callback is None else [callback]
    for each in callbacks:
        if not callable(each):
            raise InputError(f"callback must be a function of the solution, or a list of them; got {shown(each)}")
    if not callbacks:
        return None

    def all_of_them(solution: Solution) -> bool:
        answers = [each(solution) for each in callbacks]
        return any(answer is True or answer is np.True_ for answer in answers)

    return all_of_them


class Rounds:
    """The rounds of all trainings that a callback has seen, one after the other.

    A history that is no longer than before is one of another training, or of the next of its levels: a larger sample,
    all images, the next stage of a stack.
    """

    def __init__(self) -> None:
        self._before: list[Round] = []
        self._history: list[Round] = []

    def of(self, solution: Solution) -> list[Round]:
        """All rounds up to the last one of `solution`."""
        if len(solution.history) <= len(self._history):
            self._before += self._history
        self._history = solution.history
        return [*self._before, *self._history]


class CSVLogger(Files):
    """Keeps a CSV file of all rounds, a row each, which is whole whenever it is read.

    Its columns are the entries of `Round`; those of a resumed training begin with the rounds of earlier sessions.

    Parameters
    ----------
    path : path
        A file that is there is replaced after the first round.

    Raises
    ------
    RunError
        When it is called and the file cannot be written.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from convcvx import solve
    >>> folder = tempfile.TemporaryDirectory()
    >>> x = np.linspace(-1, 1, 20)[:, None]
    >>> _ = solve(x, abs(x[:, 0]), beta=0.01, callback=CSVLogger(f"{folder.name}/rounds.csv"))
    >>> open(f"{folder.name}/rounds.csv").readline()
    'round,objective,lower_bound,rel_gap,g_max,scope,n_filters,seconds\\n'
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(Path(path).parent)
        self._name, self._rounds = Path(path).name, Rounds()

    def __call__(self, solution: Solution) -> None:
        rounds = self._rounds.of(solution)
        text = io.StringIO()
        table = csv.DictWriter(text, list(dict.fromkeys(name for row in rounds for name in row)), lineterminator="\n")
        table.writeheader()
        table.writerows(rounds)
        self._write(self._name, text.getvalue().encode())


class TensorBoard:
    """Writes the numbers of every round for `tensorboard --logdir FOLDER`, which shows them while training goes on.

    Parameters
    ----------
    folder : path
        Event files of earlier trainings in it are kept; a folder a training keeps their curves apart.

    Raises
    ------
    InputError
        Without tensorboard: `pip install 'convcvx[tensorboard]'`.
    RunError
        For a folder that cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError("TensorBoard needs tensorboard: pip install 'convcvx[tensorboard]'") from None
        with explained(f"cannot write to {folder}", "name another folder"):
            self._writer = SummaryWriter(os.fspath(folder))
        self._rounds = Rounds()

    def __call__(self, solution: Solution) -> None:
        rounds = self._rounds.of(solution)
        for name, value in rounds[-1].items():
            if isinstance(value, int | float) and name != "round":
                self._writer.add_scalar(name, value, len(rounds) - 1)
        self._writer.flush()
