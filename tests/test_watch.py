"""Long loops say how far they are, and a terminal shows it."""

import shutil
import threading
from io import StringIO

import pytest
from helpers.commands import DIGITS, NO_SEARCH, cli
from rich.console import Console

import convcvx
from convcvx.data.datasets import load
from convcvx.machine.watch import EARLY, SILENCE, Waiting, phase, tell, watched


def console(shown: StringIO, terminal: bool = True) -> Console:
    return Console(file=shown, force_terminal=terminal, markup=False, width=80)


def test_the_parts_are_what_they_were_and_their_sizes_are_told(monkeypatch):
    told = []
    monkeypatch.setattr(Waiting, "_show", lambda self, *what: told.append(what))
    with Waiting(console(StringIO())):
        assert list(watched("letters", ["ab", "c"], 3, size=len)) == ["ab", "c"]
        tell("steps", 1, 2)
    assert told == [("letters", 0, 3), ("letters", 2, 3), ("steps", 1, 2)]
    tell("nobody hears this", 0, 1)
    assert len(told) == 3


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_a_bar_where_the_length_is_known_and_a_pipe_names(terminal, capsys, monkeypatch):
    monkeypatch.setattr("convcvx.machine.watch.EARLY", 0.0)
    shown = StringIO()
    with Waiting(console(shown, terminal)) as waiting:
        for _ in watched("k-means", range(4), 4):
            waiting._display.refresh()
        waiting.begin("round 2")
        waiting._display.refresh()
    assert capsys.readouterr().err == ("" if terminal else "k-means ...\n")
    before, _, after = shown.getvalue().partition("round 2, for")
    assert ("k-means" in before and "━" in before) == terminal
    assert bool(after) == terminal
    assert "━" not in after


def test_a_pipe_has_each_phase_once_and_again_after_a_silence_and_nothing_where_it_is_quiet(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr("convcvx.machine.watch.perf_counter", lambda: now)
    with Waiting(Console(file=StringIO())):
        phase("over at once")
        assert capsys.readouterr().err == ""
        now = EARLY
        for _ in range(3):
            phase("reading")
            tell("search", 0, 2)
            tell("search", 1, 2)
        assert capsys.readouterr().err == "reading ...\nsearch ...\n"
        now = EARLY + SILENCE
        phase("reading")
        tell("search", 0, 2)
        assert capsys.readouterr().err == "reading ...\n"
    with Waiting(Console(file=StringIO(), quiet=True)):
        phase("reading")
    assert capsys.readouterr().err == ""


def test_a_phase_of_unknown_length_takes_the_bar_away():
    shown = StringIO()
    with Waiting(console(shown)) as waiting:
        tell("search", 1, 2)
        waiting._display.refresh()
        assert "━" in shown.getvalue()
        shown.truncate(0)
        phase("reading")
        waiting._display.refresh()
    assert "reading, for" in shown.getvalue()
    assert "━" not in shown.getvalue().partition("reading, for")[2]


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("certify", ("reading the data", "directions of the patches", "lower bound, by oracle local")),
        ("compare", ("reading the data", "sgd at rate 0.1, seed 0", "sgd at rate 0.0316, seed 0")),
    ],
)
def test_commands_name_their_phases_in_a_pipe(command, names, tmp_path, monkeypatch):
    monkeypatch.setattr("convcvx.machine.watch.EARLY", 0.0)
    run = shutil.copytree(DIGITS, tmp_path / "run")
    options = NO_SEARCH if command == "certify" else ("--optimizer", "sgd", "--epochs", 1, "--seeds", 1)
    lines = cli(command, run, *options).stderr.splitlines()
    assert {f"{name} ..." for name in names} <= set(lines)
    assert len(lines) == len(set(lines)) < 20
    assert cli(command, run, *options, "--quiet").output == ""


def test_another_thread_and_another_console_do_not_mix():
    inner, outer = StringIO(), StringIO()
    with Waiting(console(outer)):
        with Waiting(console(inner)):
            tell("inner", 0, 1)
        thread = threading.Thread(target=tell, args=("elsewhere", 0, 1))
        thread.start()
        thread.join()
        tell("outer", 0, 1)
    assert "inner" in inner.getvalue()
    assert "outer" in outer.getvalue()
    assert not any(word in outer.getvalue() for word in ("inner", "elsewhere"))


def test_a_training_from_a_dictionary_is_never_silent(monkeypatch):
    told = set()

    def show(_, what, done, total):
        told.add((what, total is None or 0 <= done <= total))

    monkeypatch.setattr(Waiting, "_show", show)
    train, _ = load("digits", limit=120)
    with Waiting(console(StringIO())):
        options = {"kernel_size": 3, "pool": 2, "dictionary": 8, "dictionary_source": "kmeans", "tune": 0.2}
        fit = convcvx.fit(train.images, train.targets, **options, slide=1, max_rounds=0, tol=1.0)
        assert fit.certificate.dual > 0
    names = {what for what, _ in told}
    assert {"k-means", "features of the images", "a path of beta", "steps of the descent"} <= names
    assert "local search of the certificate" in names
    assert all(right for _, right in told)
