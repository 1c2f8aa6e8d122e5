"""The report: what it says of all kinds of runs, and how a browser shows it."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from helpers.browser import CHROMIUM, Browser
from helpers.commands import DIGITS, cli
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from convcvx.data.datasets import load
from convcvx.data.given import given_dataset
from convcvx.display.html import environment
from convcvx.display.words import claims, percent, percent_up
from convcvx.errors import DataWarning
from convcvx.network.architecture import Architecture
from convcvx.network.two_layer import TwoLayerCNN, two_layer_cnn
from convcvx.report import write_report
from convcvx.report.evidence import MOST_CLASSES, seen_or_why
from convcvx.report.filters import FILTERS_SHOWN, filter_cards
from convcvx.report.of_run import evidence_parts
from convcvx.report.of_stack import dropped
from convcvx.report.page import TEMPLATES
from convcvx.training.run import Run

HOSTILE = ("<img src=x onerror=alert(1)>", "$\\frac{", "a\"b'c&amp;\x01", "n" * 200)
"""Names of classes that are no markup, no formula, no character of a page, and long."""
SMALL = "--kernel-size 3 --pool 2 --tol 0.01 --max-rounds 2 --max-filters 3 --beta-ratio 0.05 --oracle local"
"""Options of a training that ends short of its tolerance, in a second, with a few filters."""
CHECKS = (Path(__file__).parent / "helpers" / "page_checks.js").read_text()


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """The shipped run of an earlier version, with its report."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    shutil.copytree(DIGITS, folder)
    write_report(Run.open(folder))
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A run on a folder of colour images whose classes have the names `HOSTILE`, with its report."""
    data, pixels = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for part, count in (("train", 5), ("test", 3)):
        for k, name in enumerate(HOSTILE):
            (data / part / name).mkdir(parents=True)
            for i in range(count):
                image = pixels.integers(0, 120, size=(8, 8, 3), dtype=np.uint8)
                image[k : k + 4] += 100
                Image.fromarray(image).save(data / part / name / f"{i}.png")
    run = tmp_path_factory.mktemp("runs") / "hostile"
    cli(f"train {SMALL}", "--data", data, "--out", run, code=3)
    write_report(Run.open(run))
    return run


def metrics(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.json").read_text())


def page(run: Path) -> str:
    return (run / "report.html").read_text()


def test_a_run_of_an_earlier_version_has_all_that_is_known_of_it(digits):
    text, told = page(digits), metrics(digits)
    excess = percent_up(told["primal"] / told["dual"] - 1)
    versions = json.loads((digits / "environment.json").read_text())["versions"]
    ElementTree.fromstring(text)
    for said in (
        f"At most {excess} above the best possible network, if the search missed no filter.",
        *(f"{100 * told['test_accuracy']:.2f} %", f"On {len(load('digits')[1])} test images.", "Taken for"),
        *("taken for ", f"{FILTERS_SHOWN} heaviest of {told['n_filters']}", "against"),
        *("Python", f"scikit-learn {versions['scikit-learn']}", 'href="certificate.json"', "the gap is within tol"),
    ):
        assert said in text, said
    assert "Proof</span>" not in text  # nothing of it is proved
    assert "onerror" not in text


def test_names_of_classes_are_text(hostile):
    text = page(hostile)
    ElementTree.fromstring(text)
    assert "<img src=x" not in text
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert "\x01" not in text
    assert "n" * 61 not in text
    assert "12 test images" in text


def test_without_its_data_a_report_leaves_out_what_needs_images_and_says_so(hostile, tmp_path):
    shutil.copytree(hostile, tmp_path / "run")
    origin = json.loads((hostile / "data.json").read_text())
    shutil.move(origin["paths"]["data"], tmp_path / "elsewhere")
    try:
        with pytest.warns(DataWarning, match="the report leaves out what needs the images: data .* is no set"):
            cli("report", tmp_path / "run")
    finally:
        shutil.move(tmp_path / "elsewhere", origin["paths"]["data"])
    text = page(tmp_path / "run")
    assert "What needs images is left out" in text
    assert "Most mistaken" not in text
    assert text.count('alt="Filter') == page(hostile).count('alt="Filter') > 0
    assert "Where filter" in page(hostile)
    assert "Where filter" not in text


def test_other_images_than_those_of_the_run_are_not_shown(hostile, tmp_path):
    shutil.copytree(hostile, tmp_path / "run")
    origin = json.loads((hostile / "data.json").read_text())
    origin["sets"]["test"]["blake2b"] = "0"
    (tmp_path / "run" / "data.json").write_text(json.dumps(origin))
    with pytest.warns(DataWarning, match="the report leaves out what needs the images: .* is not what"):
        cli("report", tmp_path / "run")
    assert "is not what" in page(tmp_path / "run")


def targets_for(loss: str, images: np.ndarray) -> np.ndarray:
    """Real values, labels or classes by the first pixels of images (n, 6, 6)."""
    means = images.reshape(len(images), -1)[:, :3]
    return {"huber": means, "bce": (means > 0.5).astype(float), "cross-entropy": means.argmax(axis=1)}[loss]


@pytest.mark.parametrize(
    ("loss", "said"),
    [("huber", ", predicted "), ("bce", "Right where found"), ("cross-entropy", "Images by true class")],
)
def test_every_kind_of_targets_has_its_own_evidence(loss, said):
    images = np.random.default_rng(1).uniform(size=(20, 6, 6))
    dataset, *_ = given_dataset(images, targets_for(loss, images))
    network = two_layer_cnn(image_shape=(1, 6, 6), n_filters=2, n_outputs=3)
    parts = evidence_parts(*seen_or_why(network, lambda: (dataset, None, None), loss), "confusion")
    macro = "{% import 'parts.html' as parts %}{{ parts.evidence(seen, why, confusion, [], most_classes) }}"
    text = environment(TEMPLATES).from_string(macro).render(parts)
    assert said in text
    assert "Most mistaken" in text
    assert "20 training images" in text
    assert ("Confusions" in text) == (loss == "cross-entropy")


@pytest.mark.parametrize(
    ("loss", "said"),
    [("huber", "Test R²"), pytest.param("bce", "F1 score, mean over labels", marks=pytest.mark.slow)],
)
def test_a_run_without_classes_has_its_own_scores(loss, said, tmp_path):
    x = np.random.default_rng(1).uniform(size=(40, 6, 6))
    y = targets_for(loss, x)
    np.savez(tmp_path / "data.npz", x_train=x[:30], y_train=y[:30], x_test=x[30:], y_test=y[30:])
    cli(f"train {SMALL} --loss {loss}", "--data", tmp_path / "data.npz", "--out", tmp_path / "run", code=3)
    cli("report", tmp_path / "run")
    text = page(tmp_path / "run")
    ElementTree.fromstring(text)
    assert said in text
    assert "Most mistaken" in text
    assert "accuracy" not in text.lower()


def test_a_confusion_of_many_classes_is_a_picture_and_its_table_has_the_worst():
    random = np.random.default_rng(2)
    images, classes = random.uniform(size=(60, 6, 6)), np.arange(60) % 30
    dataset, *_ = given_dataset(images, classes)
    network = two_layer_cnn(image_shape=(1, 6, 6), n_filters=2, n_outputs=30)
    parts = evidence_parts(*seen_or_why(network, lambda: (dataset, None, None), "squared"), "confusion")
    assert len(parts["seen"].classes) == MOST_CLASSES
    assert "<svg" in parts["confusion"].image


def test_the_page_of_thousands_of_filters_stays_small(tmp_path):
    shutil.copytree(DIGITS, tmp_path / "run")
    architecture = two_layer_cnn(DIGITS).architecture
    network = TwoLayerCNN(type(architecture)(**{**vars(architecture), "n_filters": 3000}))
    (tmp_path / "run" / "model.safetensors").write_bytes(network.to_bytes())
    write_report(Run.open(tmp_path / "run"))
    text = page(tmp_path / "run")
    assert text.count('alt="Filter') == FILTERS_SHOWN
    assert len(text) < 500_000


def test_filters_are_told_by_what_they_do():
    """One filter sees a bright centre and votes for class 1; the other has no weight."""
    network = two_layer_cnn(image_shape=(1, 7, 7), n_filters=2, n_outputs=3)
    network[0].weight.data.copy_(torch.zeros(2, 1, 3, 3))
    network[0].weight.data[0, 0, 1, 1] = 1.0
    network[4].weight.data.copy_(torch.tensor([[-1.0, 0.0], [3.0, 0.0], [-2.0, 0.0]]))
    images = torch.zeros(3, 1, 7, 7)
    images[2, 0, 4, 1] = 1.0
    (card,) = filter_cards(network, ["a", "b", "c"], images)
    assert (card.index, card.share, card.votes, card.against) == (0, 1.0, ["b"], ["c", "a"])
    assert card.box == (7, 7, 0.0, 3.0, 3.0, 3.0)  # the patch whose centre is column 1, row 4
    assert filter_cards(network, [])[0].votes == ["output 1"]


def test_a_filter_whose_responses_are_all_negative_fires_nowhere():
    network = TwoLayerCNN(Architecture((1, 7, 7), 1, 2, (3, 3), pool="global", activation="linear")).eval()
    network[0].weight.data.fill_(-1.0)
    (card,) = filter_cards(network, ["a", "b"], torch.ones(2, 1, 7, 7))
    assert (card.fires, card.box) == (None, ())


def test_a_dropped_stage_says_why():
    records = [{"stage": 1, "kept": True, "score": 0.9}, {"stage": 2, "kept": False, "score": 0.85}]
    assert "accuracy of 85.00 % is not above the 90.00 %" in dropped(records[1], records)
    assert "loss of 3 is not below the 2" in dropped({"score": -3.0}, [{"kept": True, "score": -2.0}])
    assert "of equal stacks the smaller one is kept" in dropped({"score": 0.9}, records)
    assert dropped({"kept": False}, []).startswith("Dropped")


@given(st.floats(1e-12, 1e12), st.floats(1e-9, 1.0))
@settings(deadline=None, max_examples=200)
def test_a_claim_is_never_better_than_the_numbers(primal, share):
    """The printed excess is at least primal / dual - 1."""
    dual = primal * share
    (claim,) = claims({"primal": primal, "dual": dual, "scope": "global"})
    words = claim.text.split()
    said = float(words[2].replace(",", ""))
    excess = said / 100 if words[3] == "%" else said - 1
    assert excess >= (primal / dual - 1) * (1 - 1e-12)
    assert excess <= (primal / dual - 1) * 1.2 + 1e-9  # and says something


def test_what_is_no_number_is_no_claim():
    for primal, dual in ((1.0, float("nan")), (1.0, 0.0), (float("nan"), 1.0), (float("inf"), 1.0), (1.0, -1.0)):
        (claim,) = claims({"primal": primal, "dual": dual, "scope": "global"})
        assert "No lower bound" in claim.text
    assert percent_up(0.0123) == "1.3 %"


def test_a_share_is_read_without_counting_zeros():
    assert [percent(share) for share in (0, 0.0178, 1.3e-5, -4e-14)] == ["0 %", "1.78 %", "0.0013 %", "-4.0e-12 %"]


@pytest.mark.parametrize(
    ("values", "said", "proved"),
    [
        ({"scope": "global"}, ["At most 12 % above the best possible network."], [True]),
        (
            {"scope": "global", "filter_rank": 3, "filter_size": 9},
            ["At most 12 % above the best network with filters of rank 3 of 9."],
            [True],
        ),
        ({"scope": "sampled"}, ["At most 12 % above the best network with the sampled activation patterns."], [True]),
        (
            {"scope": "heuristic", "proved": 0.5, "proved_by": "polynomials"},
            [
                "At most 12 % above the best possible network, if the search missed no filter.",
                "At most 110 % above the best possible network (by polynomials).",
            ],
            [False, True],
        ),
        (
            {"scope": "family", "family_size": 1200, "proved": 0.25},
            [
                "At most 12 % above the best network over these 1,200 filters.",
                "At most 4.1 times the objective of the best possible network.",
            ],
            [True, True],
        ),
        (
            {"scope": "heuristic", "family_size": 60, "family": "filters of the dictionary", "family_gap": 0.00861},
            [
                "No network over these 60 filters of the dictionary is more than 0.87 % better.",
                "At most 12 % above the best possible network, if the search missed no filter.",
            ],
            [True, False],
        ),
        ({"scope": "of a later version"}, [None], [False]),
    ],
)
def test_a_certificate_is_a_sentence_with_its_scope(values, said, proved):
    found = claims({"primal": 1.0, "dual": 0.9} | values)  # 1 / 0.9 - 1 = 11.1 %
    assert [claim.proved for claim in found] == proved
    for claim, text in zip(found, said, strict=True):
        assert text is None or claim.text == text


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here to show the report")
    with Browser() as shown:
        yield shown


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_report_without_findings(browser, digits, hostile, width, scheme):
    for run in (digits, hostile):
        browser.open(run / "report.html", width, scheme)
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert browser.evaluate(CHECKS) == []
        dark = browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
        assert dark == (scheme == "dark")


def test_negative_control_a_bad_page_has_findings(browser, digits, tmp_path):
    bad = page(digits)
    for good, worse in (
        *(
            (' lang="en"', ""),
            ('<th scope="col">', "<th>"),
            (' tabindex="0"', ""),
            ("--muted: #5c636b", "--muted: #bbb"),
        ),
        *(('alt="Filter', 'class="'), ("<h2", "<h4"), ("</main>", "<p style='width: 2000px'>wide</p></main>")),
    ):
        assert good in bad
        bad = bad.replace(good, worse)
    (tmp_path / "bad.html").write_text(bad)
    browser.open(tmp_path / "bad.html", 390, "light")
    rules = {finding.split(":")[0].split()[0] for finding in browser.evaluate(CHECKS)}
    assert {"lang", "scope", "scrolled", "contrast", "alt", "heading"} <= rules
    assert not browser.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_axe_core_has_no_findings(browser, digits, hostile):
    axe = (files(pytest.importorskip("axe_core_python")) / "axe.min.js").read_text()
    for run in (digits, hostile):
        for width, scheme in ((390, "dark"), (1280, "light")):
            browser.open(run / "report.html", width, scheme)
            browser.evaluate(f"{axe};1")
            assert browser.evaluate("axe.run().then(found => found.violations.map(rule => rule.id))") == []
