"""Run files that are not as convcvx writes them: an error that names the file and what is wrong, whatever it is."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import fields

import numpy as np
import pytest
import torch
from helpers.commands import DIGITS, cli, refused
from safetensors.torch import save_file

from convcvx.certificate import Certificate
from convcvx.certificate.data import same_space
from convcvx.errors import RunError
from convcvx.network.two_layer import read_weights, two_layer_cnn
from convcvx.stack.network import stacked_cnn
from convcvx.stack.run import StackRun
from convcvx.storage.reading import form_fault, open_tensors
from convcvx.training.run import Run

OTHER_JSON = ["[]", "5", "null", "true", '"text"', "{}", "[{}]", '{"a": 1}', "NaN", "", "{", "\xff"]
OTHER_JSON += ["[" * 100_000, "9" * 5000]
READERS = {
    "config.json": [lambda run: run.config, lambda run: run.continued({})],
    "beta_max.json": [lambda run: run.beta_max],
    "beta.json": [lambda run: run.chosen_beta],
    "history.json": [lambda run: run.history],
    "metrics.json": [lambda run: run.metrics],
    "compare-adam.json": [lambda run: run.comparisons],
}


@pytest.fixture
def run(tmp_path) -> Run:
    shutil.copytree(DIGITS, tmp_path / "run")
    return Run(tmp_path / "run")


def test_negative_control_a_run_of_an_earlier_version_is_read(run):
    assert run.config.whiten is False
    assert run.continued({}).kernel_size == "3"
    assert run.beta_max == pytest.approx(0.2964, abs=1e-4)
    assert run.chosen_beta is None
    assert len(run.history) == 6
    assert run.metrics["n_filters"] == run.load_state().n_filters == 44
    assert run.load_embedding().dim == 9
    assert two_layer_cnn(run.folder)(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_what_to_do_about_a_torn_file_is_said(run):
    for name, content in (("config.json", ""), ("config.json", '{"data": '), ("state.safetensors", "")):
        (run.folder / name).write_text(content)
        with pytest.raises(RunError, match=r"cannot read .*; restore it, or remove it and train again"):
            run.config if name == "config.json" else run.load_state()


@pytest.mark.parametrize("name", READERS)
def test_json_of_another_kind_is_refused(run, name):
    empty_is_good = {"config.json": ["{}"], "history.json": ["[]"]}.get(name, [])
    number_is_good = ["5"] if name.startswith("beta") else []
    for content in OTHER_JSON:
        (run.folder / name).write_text(content, encoding="latin-1")
        for read in READERS[name]:
            if content in empty_is_good + number_is_good:
                read(run)
                continue
            with pytest.raises(RunError, match=name.replace(".", r"\.")) as caught:
                read(run)
            assert "\n" not in str(caught.value)
            assert len(str(caught.value)) < 600


def test_every_key_of_the_metrics_that_is_needed_must_be_there_and_of_its_kind(run):
    good = run.metrics
    for key in Run.METRICS:
        if key.endswith("?"):
            continue
        for wrong in (None, "text", True, [1]):
            metrics = {name: value for name, value in good.items() if name != key or wrong is not None}
            if wrong is not None and not (wrong == "text" and Run.METRICS[key] is str):
                metrics[key] = wrong
            elif wrong is not None:
                continue
            (run.folder / "metrics.json").write_text(json.dumps(metrics))
            with pytest.raises(RunError, match=f"{key} (is missing|must be)"):
                run.metrics  # noqa: B018 - a property


def test_what_metrics_may_lack_is_of_its_kind_where_it_is_there(run):
    good = run.metrics
    optional = [key.removesuffix("?") for key in Run.METRICS if key.endswith("?")]
    for key in optional:
        (run.folder / "metrics.json").write_text(json.dumps(good | {key: None}))
        assert run.metrics[key] is None
        for wrong in ([], {}, True, "x" if key not in ("proved_by", "family") else 1):
            (run.folder / "metrics.json").write_text(json.dumps(good | {key: wrong}))
            cli("report", run.folder, code=2)
            with pytest.raises(RunError, match=rf"(slope is missing|{key} must be)"):
                run.metrics  # noqa: B018 - a property
    (run.folder / "metrics.json").write_text(json.dumps(good | {"family_gap": 0.1, "family_size": None}))
    cli("report", run.folder)


def test_every_field_of_a_certificate_is_of_its_kind(run):
    """Of a file alone: that of an earlier version has few of them."""
    path = run.folder / "certificate.json"
    good = json.loads(path.read_text()) | {"space": [0.5] * 8, "proved": 0.1, "family": "ternary", "optimum": {}}
    path.write_text(json.dumps(good | {"more": 1}))
    with pytest.raises(RunError, match=r"certificate\.json is of another version"):
        run.certificate  # noqa: B018 - a property
    path.write_text(json.dumps(good | {"g_max": None, "proved_gap": None}))
    assert run.certificate.g_max == math.inf
    for key in fields(Certificate):
        for wrong in ({"a": 1}, [{}], "text", True, 5):
            written = good | {key.name: wrong}
            path.write_text(json.dumps(written))
            try:
                found = run.certificate.to_dict()[key.name]
            except RunError as error:
                assert "certificate.json" in str(error) and "\n" not in str(error)  # noqa: PT017, PT018
            else:
                assert type(found) is type(wrong) or isinstance(found, float)
    without = {name: value for name, value in good.items() if name != "space"}
    path.write_text(json.dumps(without))
    assert run.certificate.space is None


def test_spaces_of_other_lengths_are_others():
    assert same_space((0.5, 0.1), (0.5, 0.1))
    assert same_space(None, (0.5,))
    assert not same_space((0.5, 0.1), (0.5,))
    assert not same_space((0.5, 0.1), ())


@pytest.mark.parametrize("wrong", [[], "x", None, [{}], {"train": []}])
def test_a_record_of_the_data_that_is_none_is_refused(run, wrong):
    origin = {"options": {"data": "digits", "data_dir": None}, "paths": {}, "sets": wrong}
    (run.folder / "data.json").write_text(json.dumps(origin))
    for command in ("certify", "compare", "report"):
        assert "data.json does not say what the run was trained on" in refused(command, run.folder)


@pytest.mark.parametrize("name", ["state.safetensors", "embedding.safetensors", "model.safetensors"])
def test_tensors_that_are_missing_or_of_another_kind_are_refused(run, name):
    tensors, described = open_tensors(run.folder / name)
    read = {"state": run.load_state, "embedding": run.load_embedding, "model": lambda: two_layer_cnn(run.folder)}
    read = read[name.split(".")[0]]

    def refused(tensors: dict[str, torch.Tensor], described: object) -> None:
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, run.folder / name, None if described is None else {"convcvx": json.dumps(described)})
        with pytest.raises((RunError, ValueError)) as caught:
            read()
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)

    for key, tensor in tensors.items():
        refused({other: tensors[other] for other in tensors if other != key}, described)
        shorter = [] if key == "basis" else [tensor[:0], tensor[:1]]  # a basis may be of any rank
        for wrong in (tensor.to(torch.complex64), tensor.long(), tensor[None], *shorter):
            if wrong.shape != tensor.shape or not wrong.is_floating_point():
                refused(tensors | {key: wrong}, described)
        if name != "model.safetensors":  # which `certify` looks at itself
            refused(tensors | {key: tensor * np.nan}, described)
    for key in ("rounds", "history", "spec", "channels", "architecture"):
        if key in described:
            refused(tensors, {other: value for other, value in described.items() if other != key})
            refused(tensors, described | {key: True})
    for other in ([], 5, None, "text", {}):
        refused(tensors, other)
    (run.folder / name).write_bytes((run.folder / name).read_bytes()[:100])
    with pytest.raises(RunError, match=name):
        read()


def test_an_architecture_of_any_size_takes_no_memory(run):
    tensors, described = open_tensors(run.folder / "model.safetensors")
    for key, value in (("n_filters", 10**12), ("n_outputs", 10**9), ("kernel_size", [10**5, 10**5]), ("pool", "none")):
        described["architecture"] |= {key: value}
        save_file(tensors, run.folder / "model.safetensors", {"convcvx": json.dumps(described)})
        with pytest.raises(RunError, match=r"model\.safetensors"):
            read_weights(run.folder / "model.safetensors")


def test_a_stack_of_other_files_is_refused(run):
    for content in OTHER_JSON:
        (run.folder / "stack.json").write_text(content, encoding="latin-1")
        with pytest.raises(RunError, match=r"stack\.json"):
            StackRun(run.folder).config  # noqa: B018 - a property
    with pytest.raises(RunError, match=r"stages is missing"):
        stacked_cnn(run.folder)
    with pytest.raises(RunError, match=r"metrics\.json"):
        StackRun(run.folder).metrics  # noqa: B018 - a property


def test_what_metrics_say_is_text_in_a_report(run):
    script = "<script>alert(1)</script>"
    (run.folder / "metrics.json").write_text(json.dumps(run.metrics | {"scope": script, "solver": script}))
    cli("report", run.folder)
    page = (run.folder / "report.html").read_text()
    assert "<script>" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 3


@pytest.mark.parametrize("command", ["report", "compare", "certify"])
@pytest.mark.parametrize("name", ["config.json", "metrics.json", "history.json", "model.safetensors"])
def test_commands_end_with_one_line(run, command, name):
    if command == "certify" and name in ("metrics.json", "history.json"):
        pytest.skip("certify reads neither")
    (run.folder / name).write_text("[5]")
    done = cli(command, run.folder, *(["--epochs", "0"] if command == "compare" else []), code=2)
    assert done.output.startswith("convcvx: error: ")
    assert done.output.count("\n") == 1


def test_forms_say_where_a_fault_is():
    form = {"a": [{"b": (float, None)}], "c?": [int, int]}
    assert form_fault({"a": [{"b": 1}, {"b": None}], "more": 1}, form) is None
    assert form_fault({"a": [{"b": 1}, {"b": True}]}, form) == "b must be a number; got True"
    assert form_fault({"a": [], "c": [1]}, form) == "c must be a list of 2; got [1]"
    assert form_fault({"a": [], "c": [1, 2.0]}, form) == "c[1] must be a whole number; got 2.0"
    assert form_fault({"c": [1, 2]}, form) == "a is missing"
    assert form_fault([], form) == "it must be an object; got []"
