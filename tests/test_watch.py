"""Long loops say how far they are, and a terminal shows it."""

import threading
from io import StringIO

import pytest
from rich.console import Console

import convcvx
from convcvx.data.datasets import load
from convcvx.machine.watch import Waiting, tell, watched


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
def test_a_terminal_shows_a_bar_where_the_length_is_known_and_a_pipe_nothing(terminal):
    shown = StringIO()
    with Waiting(console(shown, terminal)) as waiting:
        for _ in watched("k-means", range(4), 4):
            waiting._display.refresh()
        waiting.begin("round 2, for")
        waiting._display.refresh()
    before, _, after = shown.getvalue().partition("round 2, for")
    assert ("k-means" in before and "━" in before) == terminal
    assert bool(after) == terminal
    assert "━" not in after


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
    monkeypatch.setattr(Waiting, "_show", lambda self, what, done, total: told.add((what, 0 <= done <= total)))
    train, _ = load("digits", limit=120)
    with Waiting(console(StringIO())):
        options = {"kernel_size": 3, "pool": 2, "dictionary": 8, "dictionary_source": "kmeans", "tune": 0.2}
        fit = convcvx.fit(train.images, train.targets, **options, slide=1, max_rounds=0, tol=1.0)
        assert fit.certificate.dual > 0
    names = {what for what, _ in told}
    assert {"k-means", "features of the images", "a path of beta", "steps of the descent"} <= names
    assert "local search of the certificate" in names
    assert all(right for _, right in told)
