"""What watches a training: files of its rounds, curves, data frames, lines; and callbacks that end it."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from helpers.commands import invoke
from sklearn.datasets import load_digits

import convcvx
from convcvx.callbacks import CSVLogger, TensorBoard, together
from convcvx.errors import ConvergenceWarning, InputError, RunError
from convcvx.solution import Round

SMALL = {"kernel_size": 3, "rank": 2, "pool": 2, "beta_ratio": 0.05, "tol": 1e-4}


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    return (data.images[:60] / 16).astype(np.float32), data.target[:60] % 3


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rounds_are_kept_as_a_file_that_is_whole_after_each(digits, tmp_path):
    path, lengths = tmp_path / "rounds.csv", []
    fit = convcvx.fit(*digits, **SMALL, callback=[CSVLogger(path), lambda _: lengths.append(len(table(path)))])
    rows = table(path)
    assert lengths == list(range(1, len(fit.history) + 1))
    assert set(rows[0]) <= set(Round.__annotations__)
    assert [float(row["objective"]) for row in rows] == [record["objective"] for record in fit.history]
    assert [row["scope"] for row in rows] == ["global"] * len(rows)


def test_the_rounds_of_several_trainings_stand_one_after_the_other(tmp_path):
    x, log = np.linspace(-1, 1, 20)[:, None], CSVLogger(tmp_path / "rounds.csv")
    first, second = (convcvx.solve(x, abs(x[:, 0] - shift), 0.01, callback=log) for shift in (0, 0.5))
    rounds = [record["round"] for record in (*first.history, *second.history)]
    assert [int(row["round"]) for row in table(tmp_path / "rounds.csv")] == rounds
    assert len(rounds) > 2


def test_a_file_that_cannot_be_written_is_an_error(digits, tmp_path):
    with pytest.raises(RunError, match=r"cannot write .*none/rounds.csv"):
        convcvx.fit(*digits, **SMALL, callback=CSVLogger(tmp_path / "none" / "rounds.csv"))


def test_what_returns_true_ends_the_training_with_what_it_has(digits, tmp_path):
    seen = []

    def stop(solution) -> bool:
        seen.append(solution)
        return len(seen) == 2

    few = SMALL | {"limit": 60}
    with pytest.warns(ConvergenceWarning, match="stopped by callback: have it let the training go on"):
        fit = convcvx.fit("digits", **few, callback=stop, out=tmp_path / "run")
    assert len(seen) == len(fit.history) == 2
    assert fit.metrics["status"] == fit.solution.status == "callback"
    assert 0 < fit.certificate.dual < fit.certificate.primal
    whole = convcvx.fit("digits", **few)
    assert len(whole.history) > 2
    assert invoke("train", "--resume", "--out", tmp_path / "run").exit_code == 0
    resumed = convcvx.load(tmp_path / "run")
    assert resumed.certificate.primal == whole.certificate.primal
    # True at the end of a training changes nothing, and neither does what is merely true.
    assert convcvx.fit(*digits, **SMALL, callback=lambda s: s.status == "converged").metrics["status"] == "converged"
    assert convcvx.fit(*digits, **SMALL, callback=lambda _: "yes").metrics["status"] == "converged"


def test_a_start_from_a_dictionary_may_be_the_end(digits):
    options = SMALL | {"dictionary": 10, "rank": None}
    with pytest.warns(ConvergenceWarning):
        fit = convcvx.fit(*digits, **options, callback=lambda _: True)
    assert (len(fit.history), fit.metrics["status"]) == (1, "callback")


def test_all_callbacks_are_called_and_any_may_stop():
    called = []
    both = together([lambda _: called.append(1) or np.bool_(True), lambda _: called.append(2)])
    assert both is not None
    assert both(None) is True
    assert called == [1, 2]
    assert together([]) is together(None) is None
    for wrong in (3, [print, "print"], {"a": print}):
        with pytest.raises(InputError, match="callback must be a function of the solution, or a list of them; got"):
            together(wrong)


class Writer:
    """What tensorboard has."""

    def __init__(self, folder: str) -> None:
        self.folder, self.told = folder, []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.told.append((name, value, step))

    def flush(self) -> None:
        self.told.append("flushed")


def test_tensorboard_gets_the_numbers_of_every_round(digits, monkeypatch):
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    board = TensorBoard("curves")
    fit = convcvx.fit(*digits, **SMALL, callback=board)
    told = board._writer.told
    assert told.count("flushed") == len(fit.history)
    curve = [entry[1:] for entry in told if entry[0] == "objective"]
    assert curve == [(record["objective"], step) for step, record in enumerate(fit.history)]
    assert {entry[0] for entry in told if entry != "flushed"} >= {"rel_gap", "lower_bound", "n_filters", "seconds"}


def test_what_is_not_installed_is_named(monkeypatch):
    for name in ("torch.utils.tensorboard", "pandas"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"pip install 'convcvx\[tensorboard\]'"):
        TensorBoard("curves")
    x = np.linspace(-1, 1, 9)[:, None]
    with pytest.raises(InputError, match=r"pip install 'convcvx\[pandas\]'"):
        convcvx.solve(x, abs(x[:, 0]), 0.01).to_frame()


def test_a_history_is_a_data_frame(digits):
    pandas = pytest.importorskip("pandas")
    fit = convcvx.fit(*digits, **SMALL)
    frame = fit.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["objective"].tolist() == [record["objective"] for record in fit.history]
    assert frame["scope"].tolist() == ["global"] * len(frame)


def test_a_line_a_round_is_printed_where_it_is_asked_for(digits, capsys):
    convcvx.fit(*digits, **SMALL)
    assert capsys.readouterr().out == ""
    fit = convcvx.fit(*digits, **SMALL, verbose=True)
    firsts = [line.split()[:1] for line in capsys.readouterr().out.splitlines()]
    assert [record["round"] for record in fit.history if [str(record["round"])] not in firsts] == []


def test_what_goes_on_is_shown_where_it_is_asked_for(digits, capsys, monkeypatch):
    monkeypatch.setattr("convcvx.machine.watch.EARLY", 0.0)  # phases of short calls are named too
    fit = convcvx.fit(*digits, **SMALL)
    images, beta = digits[0][:, None], fit.certificate.beta
    for call in (
        lambda verbose: convcvx.fit(*digits, **SMALL, verbose=verbose),
        lambda verbose: convcvx.certify(fit.network, images, digits[1], beta, oracle="local", verbose=verbose),
        lambda verbose: convcvx.compare(fit, *digits, epochs=1, seeds=1, verbose=verbose),
    ):
        call(False)
        assert capsys.readouterr().err == ""
        call(True)
        assert " ...\n" in capsys.readouterr().err
