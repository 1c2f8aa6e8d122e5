"""`convcvx compare` and `convcvx report` on a copy of the shipped digits run."""

from __future__ import annotations

import base64
import json
import math
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers.commands import DIGITS, answer, cli

from convcvx.budget import Deadline
from convcvx.cli.compare import _reaches
from convcvx.comparison import compare_job, late_fall, reached
from convcvx.display.words import convergence
from convcvx.errors import InputError, RunError
from convcvx.network.two_layer import two_layer_cnn
from convcvx.report import write_report
from convcvx.training.jobs import certify_job
from convcvx.training.resolve import with_run_settings
from convcvx.training.run import Run
from convcvx.training.twin import CompareConfig


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> tuple[Path, dict, str]:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    shutil.copytree(DIGITS, folder)
    done = cli("compare", folder, "--optimizer", "sgd", "--epochs", 2, "--seeds", 2, "--finetune", "--json")
    return folder, answer(done), done.stderr


def test_compare_keeps_the_contract(compared):
    folder, result, said = compared
    assert {"convex", "twin", "objective_ratio", "time_ratio", "seconds", "peak_memory_mb"} <= set(result)
    convex, twin = result["convex"], result["twin"]
    certificate = json.loads((folder / "certificate.json").read_text())
    assert (convex["objective"], convex["dual"]) == (certificate["primal"], certificate["dual"])
    assert result["objective_ratio"] == pytest.approx(twin["objective"] / convex["objective"])
    assert result["time_ratio"] == pytest.approx(twin["seconds"] / convex["seconds"])
    assert twin["scope"] == certificate["scope"] == "heuristic"
    assert "not a proof" in said
    assert twin["rel_gap"] == pytest.approx(1 - certificate["dual"] / twin["objective"])
    assert twin["objective"] == min(seed["objective"] for seed in twin["seeds"])
    assert [seed["seed"] for seed in sorted(twin["seeds"], key=lambda s: s["seed"])] == [0, 1]
    assert 0 < twin["filters_used"] <= twin["n_filters"] == convex["n_filters"]
    assert len(twin["learning_rates"]) >= 3


def test_the_twin_is_further_from_the_optimum_and_certify_agrees(compared):
    folder, result, _ = compared
    assert result["objective_ratio"] > 1.05
    run = Run.open(folder)
    settings, soon = with_run_settings(run), Deadline.after(1e-3)  # the bound is not looked at
    certified = certify_job(
        folder / "twin-sgd.safetensors", settings, embedding=run.load_embedding(), given=set(), deadline=soon
    )
    assert certified["primal"] == pytest.approx(result["twin"]["objective"], rel=1e-6)
    assert certified["test_accuracy"] == pytest.approx(result["twin"]["test_accuracy"])


def test_fine_tuning_starts_from_the_convex_solution(compared):
    _, result, _ = compared
    tuned, convex = result["finetune"], result["convex"]
    assert tuned["seeds"][0]["history"][0]["objective"] == pytest.approx(convex["objective"], rel=1e-5)
    assert convex["dual"] < tuned["objective"] < convex["objective"] * (1 + 1e-6)


def test_the_output_says_how_long_the_twin_had_and_what_to_try_where_it_had_not_converged(compared):
    _, result, said = compared
    twin, n = result["twin"], json.loads((DIGITS / "certificate.json").read_text())["n_images"]
    assert twin["steps"] == 2 * math.ceil(n / 64)
    assert f"best of 2 seeds, each with 2 epochs, {twin['steps']} steps of 64 images" in said
    assert twin["late_fall"] == late_fall(twin["seeds"][0]["history"]) > 0.01
    assert twin["epochs_to_try"] == 8
    assert "sgd had not converged: its objective fell by" in said
    assert "try --epochs 8" in said


def test_a_twin_whose_objective_hardly_falls_any_more_counts_as_converged():
    def falls(*objectives: float) -> float:
        return late_fall([{"objective": objective} for objective in objectives])

    assert falls(4.0, 3.0) == 0.25
    assert falls(4.0, 3.0, 2.0, 1.0, 0.5) == 0.75
    assert falls(0.0, 0.0) == 0.0
    ended = {"late_fall": falls(4.0, 1.0, 0.999), "epochs_to_try": None}
    fell = "its objective fell by 0.10 % in the second half of its epochs"
    assert convergence(ended, "Adam") == f"Adam had all but converged: {fell}"
    assert convergence({}, "Adam") is None  # of an earlier version


def test_data_that_have_moved_are_named(tmp_path):
    """A run knows where its data lay, as given or by --data-dir; where they are now, --data-dir says."""
    random, folder, arrays = np.random.default_rng(0), tmp_path / "sets", {}
    for part, n in (("train", 40), ("test", 10)):
        arrays[f"x_{part}"] = random.integers(0, 255, (n, 32, 32, 3), np.uint8)
        arrays[f"y_{part}"] = np.arange(n, dtype=np.uint8) % 10
    folder.mkdir()
    np.savez(folder / "cifar10.npz", **arrays)
    run = tmp_path / "run"
    train = "train --data cifar10 --kernel-size 3 --rank 1 --pool 2 --tol 1 --max-rounds 1 --max-filters 2"
    cli(train, "--data-dir", folder, "--out", run)
    quick = ["--epochs", 1, "--seeds", 1, "--json"]
    assert answer(cli("compare", run, *quick))["status"] == "done"
    folder.rename(tmp_path / "moved")
    assert answer(cli("compare", run, *quick, "--data-dir", tmp_path / "moved"))["status"] == "done"
    cli("report", run, "--data-dir", tmp_path / "moved")
    assert "What needs images is left out" not in (run / "report.html").read_text()
    cli("report", run)
    assert "What needs images is left out" in (run / "report.html").read_text()


def test_what_is_never_reached_is_said_so():
    assert _reaches("it", None) == "does not reach it as it was trained"
    assert _reaches("it", 1.64) == "reaches it after 1.6 s"


def test_reached_is_the_first_time_at_or_below():
    history = [{"seconds": s, "objective": o} for s, o in ((0, 3.0), (1, 2.0), (2, 1.0))]
    assert (reached(history, 2.0), reached(history, 1.5), reached(history, 0.5)) == (1, 2, None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optimizer": "lbfgs"}, "optimizer must be one of sgd, adam"),
        ({"epochs": 0}, "epochs must be a whole number >= 1"),
        ({"seeds": 0}, "seeds"),
        ({"filters": 0}, "filters"),
    ],
)
def test_bad_options_name_themselves(options, said):
    with pytest.raises(InputError, match=said):
        CompareConfig(**options).check()


def test_an_unfinished_run_has_no_comparison_and_no_report(tmp_path):
    shutil.copytree(DIGITS, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    run = Run.open(tmp_path / "run")
    for job in (write_report, lambda run: compare_job(run, CompareConfig())):
        with pytest.raises(RunError, match="--resume"):
            job(run)


class Tags(HTMLParser):
    """The attributes of every start tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_the_report_is_well_formed_self_contained_and_says_what_the_run_says(compared):
    folder, result, _ = compared
    path = Path(answer(cli("report", folder, "--json"))["report"])
    text = path.read_text()
    ElementTree.fromstring(text)  # raises on any tag that is left open
    with pytest.raises(ElementTree.ParseError):
        ElementTree.fromstring(text.replace("</table>", "", 1))
    tags = Tags(text).found
    plots = [attributes["aria-label"] for tag, attributes in tags if tag == "div" and attributes.get("role") == "img"]
    assert len(plots) == 4  # bounds, objective, gap, the comparison
    pictures = [attributes["src"] for tag, attributes in tags if tag == "img"]
    assert len(pictures) > 40  # filters, and images that are taken for others
    head = "data:image/png;base64,"
    assert all(base64.b64decode(p.removeprefix(head), validate=True).startswith(b"\x89PNG") for p in pictures)
    # No address of another machine; its colon cannot occur in base64 by chance.
    assert not any("://" in str(value) for _, attributes in Tags(text).found for value in attributes.values())
    metrics = json.loads((folder / "metrics.json").read_text())
    for number in (f"{metrics['primal']:.6g}", f"{metrics['dual']:.6g}", f"{result['twin']['objective']:.6g}"):
        assert number in text
    assert metrics["meaning"] in text
    assert "Beside SGD" in text


def test_the_plot_and_the_twin_are_left_in_the_run(compared):
    folder, result, _ = compared
    assert (folder / "compare-sgd.png").read_bytes().startswith(b"\x89PNG")
    assert two_layer_cnn(folder / "twin-sgd.safetensors").architecture.n_filters == result["twin"]["n_filters"]
