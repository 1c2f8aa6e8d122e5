"""What commands print for people: the strongest statement first, nothing twice, nothing that tells nothing."""

from __future__ import annotations

from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console

from convcvx.cli.output import explain_short, print_summary
from convcvx.cli.stacking import _print_table
from convcvx.display.words import claims, of_optimum, told
from convcvx.training.card import _certified
from convcvx.training.progress import HEADER, Progress

FAR = {"slope": 71.6, "slope_low": 0.0, "slope_high": 1290.0, "proved": False, "active": None, "active_used": None}
METRICS = {
    **{"test_accuracy": 0.9, "train_accuracy": 0.93, "primal": 0.18, "dual": 0.006, "rel_gap": 0.97, "beta": 1e-4},
    **{"loss": "squared", "scope": "heuristic", "meaning": "an estimate", "optimum": FAR, "n_filters": 60},
    **{"family": "filters of the dictionary", "family_size": 60, "family_gap": 0.00861},
    **{"proved": 0.001, "proved_gap": 0.994, "proved_by": "polynomials"},
    **{"status": "gap_above_tol", "seconds": 9.0, "peak_memory_mb": None},
}
"""Of a dictionary."""


def printed(work) -> list[str]:
    console = Console(file=StringIO(), soft_wrap=True, highlight=False)
    work(console)
    return console.file.getvalue().splitlines()


def summary(**changed) -> dict[str, str]:
    """The lines of a summary, by their names."""
    lines = printed(lambda console: print_summary(console, METRICS | changed))
    return {line[:12].strip(): line[13:] for line in lines}


def test_a_proof_over_a_family_comes_before_what_is_not_known():
    said = summary()
    assert list(said) == ["accuracy", "objective", "family", "others", "filters", "status"]
    assert said["family"].endswith("60 filters of the dictionary is more than 0.87 % better: a proof")
    assert "not known: gap 9.70e-01 by a search (scope heuristic, an estimate), 9.94e-01 proved" in said["others"]


@pytest.mark.parametrize("changed", [{"rel_gap": 0.2}, {"family_gap": None}, {"scope": "family"}])
def test_a_gap_that_tells_something_or_stands_alone_has_its_lines(changed):
    said = summary(**changed)
    assert {"lower bound", "gap", "scope", "proved"} <= set(said)
    assert ("family" in said) == (changed.get("family_gap", 0) is not None)
    assert "others" not in said


def test_a_proof_for_all_networks_comes_before_one_over_a_family():
    said = list(summary(scope="global"))
    assert said.index("gap") < said.index("family")
    of_all, of_family = claims(METRICS | {"scope": "global"})
    assert "best possible network" in of_all.text
    assert of_family.text.startswith("No network over these 60 filters")


def test_a_share_is_never_less_than_was_proved():
    assert "more than 0.87 % better" in told(METRICS)["family"]
    assert "more than 0.00000031 % better" in told(METRICS | {"family_gap": 3.01e-9})["family"]


@pytest.mark.parametrize(
    ("now", "stored", "said"),
    [
        (("global", 0.9), ("global", 0.9 + 1e-9), "computed now: 0.9, the same"),
        (("global", 0.9), ("global", 0.8), "computed now: 0.9, which is better"),
        (("global", 0.8), ("global", 0.9), "which is weaker than what is stored"),
        (
            ("heuristic", 0.8),
            ("heuristic", 0.9),
            "computed now: 0.8, the safer estimate, as its search found a better filter",
        ),
        (("heuristic", 0.9), ("heuristic", 0.8), "found no better filter: the stored one is the safer estimate"),
        (("global", 0.5), ("heuristic", 0.9), "a proof for every network where the stored one is an estimate"),
        (
            ("heuristic", 0.9),
            ("family", 0.5),
            "an estimate where the stored one is a proof for networks over the filters of a family only",
        ),
        (
            ("family", 0.9),
            ("global", 0.5),
            "a proof for networks over the filters of a family only, the stored one for every network",
        ),
        (
            ("global", 0.5),
            ("family", 0.9),
            "a proof for every network, the stored one for networks over the filters of a family only",
        ),
        (
            ("global", 0.5),
            ("sampled", 0.9),
            "for every network, the stored one for networks with the sampled activation patterns only",
        ),
    ],
)
def test_a_bound_computed_now_is_told_from_the_stored_one(now, stored, said):
    (scope, dual), (kept, before) = now, stored
    line = summary(scope=scope, dual=dual, stored={"scope": kept, "dual": before})["stored"]
    assert line.startswith(f"bound {before:.8g} ({kept}); computed now: {dual:.8g}")
    assert line.endswith(said)
    assert "stored" not in summary()


def test_what_an_optimum_tells_is_for_the_report_and_the_model_card():
    near = FAR | {"active": 7, "active_used": 5}
    assert "optimum" not in summary(scope="global", optimum=near)
    told_there = of_optimum(METRICS | {"optimum": near})
    assert "rises by 71.6 per unit of beta (estimated: 0 to 1290)" in told_there
    assert "7 directions found" in told_there
    assert "5 of them in this one" in told_there
    assert f"- optimum: {told_there}" in _certified(METRICS | {"optimum": near}, 1, 1)
    assert of_optimum(METRICS) is None
    assert not any("optimum:" in line for line in _certified(METRICS, 1, 1))


@pytest.mark.parametrize(("seconds", "told"), [(2.9, False), (34.0, True)])
def test_time_that_a_limit_leaves_out_is_told_where_it_is_long(seconds, told):
    status = summary(seconds=64.0, compiling_seconds=seconds, peak_memory_mb=800.0)["status"]
    assert status.startswith("gap_above_tol after 64.0 s")
    assert status.endswith(", 800 MiB")
    assert ("34 s of them to compile functions" in status) == told
    assert ("--time-limit" in status) == told


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("gap_above_tol", "exit status 3: the gap over all filters is above --tol; train further"),
        (
            "max_rounds",
            "exit status 3: the gap over all filters is above --tol, as all rounds are used up; train further",
        ),
        (
            "time_limit",
            "exit status 3: the gap over all filters is not known to be within --tol, as the time is over; "
            "train further",
        ),
    ],
)
def test_exit_status_3_says_the_gap_once(status, said):
    assert printed(lambda console: explain_short(console, METRICS | {"status": status}, "train further")) == [said]


ROUND = {
    "round": 0,
    "objective": 1.0,
    "lower_bound": 0.5,
    "rel_gap": 0.5,
    "g_max": 1.0,
    "scope": "heuristic",
    "n_filters": 0,
    "seconds": 0.0,
}


@pytest.mark.parametrize(
    ("scope", "gap", "status", "shown"),
    [
        ("heuristic", 0.5, "running", ["~5.0e-01", "?"]),
        ("heuristic", 0.01, "running", ["~1.0e-02", "?"]),  # a proof is still to come
        ("heuristic", 0.01, "converged", ["~1.0e-02", "0s"]),
        ("global", 0.01, "converged", ["1.0e-02", "0s"]),
    ],
)
def test_a_round_tells_an_estimate_from_a_proof(scope, gap, status, shown):
    solution = SimpleNamespace(history=[ROUND | {"scope": scope, "rel_gap": gap}], status=status)
    cells = printed(lambda console: Progress(console, 0.1)(solution, 1.0))[-1].split()
    assert [cells[3], cells[-1]] == shown


def test_no_more_time_is_foretold_than_is_left():
    """Data were read, and beta_max was looked for, before the first round: its seconds do not tell."""
    falls = [ROUND | {"rel_gap": gap, "seconds": at, "scope": "global"} for gap, at in ((0.8, 0.0), (0.7, 10.0))]
    solution = SimpleNamespace(history=falls, status="running")
    for left, shown in ((3.0, "3s"), (0.0, "0s"), (float("inf"), "2m26")):
        lines = printed(lambda console, left=left: Progress(console, 0.1)(solution, 1.0, left))
        assert lines[-1].split()[-1] == shown


def test_each_training_of_a_stack_has_a_heading_of_its_own():
    solution = SimpleNamespace(history=[ROUND | {"images": 50}], status="running")

    def two_stages(console):
        progress = Progress(console, 0.1)
        for _ in range(2):
            progress.begin("training")
            progress(solution, 1.0)
            progress(solution, 1.0)

    lines = printed(two_stages)
    assert [line.rstrip() for line in lines].count(HEADER) == 2
    assert lines.count("on a sample of 50 images") == 2


@pytest.mark.parametrize(("count", "said"), [(1, "1 stage, "), (2, "2 stages, ")])
def test_one_stage_is_no_stages(count, said):
    record = METRICS | {"stage": 1, "validation_accuracy": 0.9, "kept": True}
    stacked = METRICS | {"stages": [record], "n_stages": count}
    assert said in printed(lambda console: _print_table(console, stacked))[2]
