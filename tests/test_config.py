"""Options: what is refused before any training, what a resumed run may change; folders that bad input spares."""

from __future__ import annotations

import pytest
from helpers.commands import NO_SEARCH, Quiet, answer, cli, refused

from convcvx.activations import RELU
from convcvx.baseline import OPTIMIZERS
from convcvx.errors import InputError, RunError
from convcvx.network.export import FORMATS
from convcvx.oracles import FAMILIES, ORACLES
from convcvx.responses.team import Team
from convcvx.solvers import SOLVERS
from convcvx.stack.options import StackConfig, as_kept_by_stage, settings_of
from convcvx.terms import names
from convcvx.terms.launch import LAUNCHED, leads
from convcvx.training.jobs import train_into
from convcvx.training.option import as_kept
from convcvx.training.options import TrainConfig, check_unchanged
from convcvx.training.presets import PRESETS
from convcvx.training.run import Run

SMALL = {"limit": 120, "kernel_size": "4", "pool": "2", "beta_ratio": 0.05, "max_rounds": 1, "tol": 0.01, "rank": 2}
TUNED = SMALL | {"beta_ratio": None, "dictionary": 6, "max_rounds": 0, "tune": 0.2, "slide": 3.0, "rank": None}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 2**32}, "seed must be at most 4294967295; got 4294967296"),
        ({"seed": -1}, "seed must be a whole number >= 0; got -1"),
        ({"tune": float("nan"), "dictionary": 4}, "tune must be a non-negative float; got nan"),
        ({"tune": 0.7, "dictionary": 4}, "tune must be at most 0.5; got 0.7"),
        ({"tune": 0.1}, "tune 0.1 chooses the weight decay of a dictionary; pass --dictionary N"),
        ({"flips": True}, "flips train a dictionary on the mirror images as well; pass --dictionary N"),
        ({"threshold": 0.2}, "threshold 0.2 is one of the filters of a dictionary"),
        ({"slide": 2.0}, "slide 2 needs the filters of a dictionary"),
        ({"crops": 1}, "crops 1 move the images that filters slide on; pass --slide EPOCHS"),
        ({"dictionary": 0}, "dictionary must be a whole number >= 1; got 0"),
        ({"dictionary": 5, "flips": True}, "dictionary must have an even number of filters with flips; got 5"),
        ({"dictionary": 4, "threshold": 0.2}, "threshold 0.2 needs the hidden bias"),
        ({"dictionary": 4, "dictionary_source": "air"}, "dictionary_source must be one of patches, kmeans"),
        ({"dictionary": 12, "max_filters": 3}, "a dictionary of 12 filters is more than max_filters 3"),
        ({"gates": 0}, "gates must be a whole number >= 1; got 0"),
        ({"time_limit": 0.0}, "time_limit must be a positive float"),
    ],
)
def test_options_out_of_range_or_of_no_use_are_refused(options, message):
    with pytest.raises(InputError) as caught:
        TrainConfig(**options).check()
    assert message in str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_pass(name):
    TrainConfig.from_dict(PRESETS[name]).check()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"validation": "0.1"}, "validation must be a number; got '0.1'"),
        ({"flips": "no"}, "flips must be true or false; got 'no'"),
        ({"limit": 2.5}, "limit must be a whole number; got 2.5"),
        ({"limit": True}, "limit must be a whole number; got True"),
        ({"data": 3}, "data must be a text; got 3"),
        ({"colour": "red"}, "unknown option 'colour'"),
    ],
)
def test_values_of_another_kind_are_refused(values, message):
    with pytest.raises(InputError) as caught:
        TrainConfig.from_dict(values)
    assert message in str(caught.value)
    assert TrainConfig.from_dict({"limit": None, "beta": 1, "flips": True}).beta == 1


def test_bad_input_that_only_training_finds_spares_the_run_it_would_replace(tmp_path):
    folder = tmp_path / "run"
    bad = TrainConfig(**SMALL | {"solver": "closed-form", "loss": "cross-entropy"})
    with pytest.raises(InputError, match="needs loss 'squared'"):
        train_into(Run.new(folder), bad, Quiet())
    assert not folder.exists()
    first = train_into(Run.new(folder), TrainConfig(**SMALL), Quiet()).metrics
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match="needs loss 'squared'"):
        train_into(Run.new(folder, overwrite=True), bad, Quiet())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    again = train_into(Run.new(folder, overwrite=True), TrainConfig(**SMALL | {"beta_ratio": 0.5}), Quiet()).metrics
    assert again["primal"] != first["primal"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_link_to_a_run_is_overwritten_where_it_leads(tmp_path):
    train_into(Run.new(tmp_path / "run"), TrainConfig(**SMALL), Quiet())
    (tmp_path / "link").symlink_to(tmp_path / "run")
    train_into(Run.new(tmp_path / "link", overwrite=True), TrainConfig(**SMALL | {"seed": 1}), Quiet())
    assert (tmp_path / "link").is_symlink()
    assert Run(tmp_path / "run").config.seed == 1


def test_a_run_with_a_dictionary_goes_on_by_the_command_that_began_it(tmp_path):
    config = TrainConfig(**SMALL | {"dictionary": 6, "beta_ratio": 0.3})
    run = Run(tmp_path / "run")
    first = train_into(run, config, Quiet()).metrics
    assert run.continued({"dictionary": 6, "beta_ratio": 0.3}) == config
    assert train_into(run, run.continued({"dictionary": 6}), Quiet(), resume=True).metrics["primal"] == first["primal"]
    assert first["beta"] == pytest.approx(0.3 * first["beta_max"])


@pytest.mark.slow
def test_a_tuned_run_killed_before_its_first_checkpoint_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    config = TrainConfig(**TUNED)
    whole = train_into(Run(tmp_path / "whole"), config, Quiet()).metrics

    def killed(self, solution):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_state", killed)
        with pytest.raises(KeyboardInterrupt):
            train_into(Run(tmp_path / "killed"), config, Quiet())
    run = Run(tmp_path / "killed")
    assert run.load_descent() is not None
    resumed = train_into(run, run.config, Quiet(), resume=True).metrics
    assert resumed["primal"] == pytest.approx(whole["primal"], rel=1e-12)
    assert resumed["beta"] == pytest.approx(whole["beta"], rel=1e-12)


def test_the_seed_of_a_certificate_leaves_the_images_that_were_held_out(tmp_path):
    config = TrainConfig(**SMALL | {"validation": 0.3})
    trained = train_into(Run(tmp_path / "run"), config, Quiet()).metrics
    certified = answer(cli("certify --seed 5 --json", tmp_path / "run", *NO_SEARCH))
    assert certified["primal"] == pytest.approx(trained["primal"], rel=1e-9)


def test_a_dictionary_that_says_nothing_of_the_targets_is_refused(tmp_path):
    config = TrainConfig(**SMALL | {"dictionary": 4, "hidden_bias": True, "threshold": 1000.0})
    with pytest.raises(InputError, match="lower the threshold"):
        train_into(Run(tmp_path / "run"), config, Quiet())


@pytest.mark.parametrize(
    ("name", "stored", "same", "other"),
    [
        ("activation", "leaky-relu", "leaky-relu:0.01", "leaky-relu:0.02"),
        ("kernel_size", "3", "3x3", "3x4"),
        ("pool", "4", "4x4", "max:4"),
        ("resize", "8", "8x8", "no size"),
        ("loss", "huber", "huber:1", "huber:2"),
        ("loss", "huber:0.50", "huber:0.5", "squared"),
    ],
)
def test_what_is_resumed_may_be_asked_for_in_other_words(name, stored, same, other):
    check_unchanged(name, stored, same)
    with pytest.raises(InputError, match=f"{name} is '{stored}' in what is to be resumed but '{other}' was asked for"):
        check_unchanged(name, stored, other)


def test_no_activation_named_is_the_relu_everywhere():
    assert as_kept(TrainConfig, {"activation": None, "rank": None}) == {"activation": "relu", "rank": None}
    assert as_kept(TrainConfig, {"activation": RELU}) == {"activation": "relu"}


STACK = {"limit": 120, "validation": 0.2, "rank": "none,8", "beta_ratio": 0.1, "tol": 0.1, "max_rounds": 1}


def test_a_resumed_stack_may_change_budgets_only():
    stack = StackConfig.of(2, STACK, channels="6")
    assert stack.continued(STACK | {"stages": 2, "channels": "6"}) == stack
    assert [stage.max_rounds for stage in stack.continued({"max_rounds": 5}).stages] == [5, 5]
    for given, message in [
        ({"beta_ratio": 0.2}, "beta_ratio is 0.1 in what is to be resumed but 0.2 was asked for"),
        ({"rank": "none,9"}, "rank is 8 in what is to be resumed but 9"),
        ({"channels": "8"}, r"channels is \(6,\) in what"),
        ({"heads": "joint"}, "heads is 'last'"),
        ({"tol": -1.0}, "tol must be a positive float"),
        ({"stages": 3, "rank": "none"}, "stages is 2 in what is to be resumed but 3"),
    ]:
        with pytest.raises(InputError, match=message):
            stack.continued(given)


def test_a_list_is_a_value_a_stage_also_in_a_file():
    asked = {"kernel_size": [5, 3], "pool": [[4, 2], "max:2"], "dictionary": [20, 30], "padding": 1, "channels": [6]}
    stack = settings_of(as_kept_by_stage(asked))
    assert [(stage.kernel_size, stage.pool, stage.dictionary) for stage in stack.stages] == [
        ("5", "4x2", 20),
        ("3", "max:2", 30),
    ]
    assert [stage.padding for stage in stack.stages] == ["1", "1"]


def test_mirror_pairs_need_an_even_number_of_channels():
    options = {"flips": "yes", "dictionary": 4, "max_rounds": 0, "tune": 0.2}
    StackConfig.of(2, options, channels="4")
    with pytest.raises(InputError, match="flips of stage 2 need an even number of channels; got 3"):
        StackConfig.of(2, options, channels="3")


def test_processes_are_those_of_torchrun_where_they_are_asked_for(monkeypatch, tmp_path):
    for name, value in zip(LAUNCHED, ["1", "2", "127.0.0.1", "29500"], strict=True):
        monkeypatch.setenv(name, value)
    assert (Team().size, Team.of_torchrun().size, Team.of_torchrun().rank) == (1, 2, 1)
    assert train_into(Run(tmp_path / "run"), TrainConfig(**SMALL), Quiet()).metrics["n_filters"] > 0


@pytest.mark.parametrize(
    ("rank", "reads"), [("0", True), ("00", True), ("1", False), ("-1", True), ("first", True), (None, True)]
)
def test_one_process_reads_the_options(monkeypatch, rank, reads):
    for name, value in zip(LAUNCHED, ["1", "2", "127.0.0.1", "29500"], strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RANK") if rank is None else monkeypatch.setenv("RANK", rank)
    assert leads() == reads


@pytest.mark.parametrize(
    ("command", "content", "message"),
    [
        ("stack", b"stages = 1\nvalidation = 0", "validation must be above 0"),
        ("stack", b"kernel_size = [3, 2, 3]", "kernel_size must be one value, or 2 by commas; got '3,2,3'"),
        ("train", b"stages = 1", "unknown option 'stages'"),
        ("train", b"\xff\xfe", "cannot read --config"),
        ("train", b"a = " + b"[" * 900 + b"]" * 900, "; it takes lines of TOML such as rank = 4"),
        ("train", b'flips = "no"', "flips must be true or false; got 'no'"),
    ],
)
def test_a_config_file_is_read_as_the_command_would(tmp_path, command, content, message):
    (tmp_path / "options.toml").write_bytes(content)
    assert message in refused(command, "--config", tmp_path / "options.toml", "--out", tmp_path / "run")


def test_a_folder_that_is_no_run_is_not_offered_resume(tmp_path):
    (tmp_path / "precious.txt").write_text("keep me")
    with pytest.raises(RunError) as caught:
        Run.new(tmp_path)
    assert "--resume" not in str(caught.value)


def test_names_are_those_of_the_tables():
    assert tuple(SOLVERS) == names.SOLVERS
    assert tuple(ORACLES) == names.ORACLES
    assert tuple(FAMILIES) == names.FAMILIES
    assert tuple(OPTIMIZERS) == names.OPTIMIZERS
    assert tuple(FORMATS) == tuple(names.EXPORTS)
