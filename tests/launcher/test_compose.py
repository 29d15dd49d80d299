"""Command lines to configurations: experiments as golden files, overrides, the user's own directory, mistakes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from efflaunch.errors import EXIT_USER, ConfigError
from efflaunch.launcher.config.compose import compose, compose_group
from efflaunch.launcher.config.conf_groups import EXPERIMENT, GROUPS, first_comment, option_file, options
from efflaunch.launcher.config.schema import dump_config

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "experiments"
UPDATE = "EFFLAUNCH_UPDATE_GOLDEN"
QUICK = "+experiment=quickstart"


@pytest.mark.parametrize("name", options(EXPERIMENT))
def test_experiment_composes_as_recorded(name: str) -> None:
    """EFFLAUNCH_UPDATE_GOLDEN=1 writes the files anew."""
    text = json.dumps(dump_config(compose([f"+experiment={name}"])), indent=1) + "\n"
    file = GOLDEN / f"{name}.json"
    if os.environ.get(UPDATE):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert text == file.read_text(), f"composes differently now; if that is meant: {UPDATE}=1 pytest {__file__}"


def test_no_stale_golden_files() -> None:
    assert {file.stem for file in GOLDEN.glob("*.json")} == set(options(EXPERIMENT))


@pytest.mark.parametrize("name", options(EXPERIMENT))
def test_experiments_name_themselves(name: str) -> None:
    assert compose([f"+experiment={name}"]).experiment == name


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in GROUPS for name in options(group)])
def test_every_option_names_and_explains_itself(group: str, name: str) -> None:
    assert compose_group(group, name)["name"] == name
    assert first_comment(option_file(group, name))


def test_overrides_win_in_order() -> None:
    config = compose([QUICK, "memory=keep", "train.steps=7", "optim.warmup_steps=2", "train.steps=9", "data.max_seq_len=4K"])
    assert (config.train.steps, config.data.max_seq_len, config.memory.name) == (9, 4096, "keep")


@pytest.mark.parametrize("form", ["experiment=quickstart", "+experiment=quickstart"])
def test_plus_is_optional(form: str) -> None:
    assert compose([form, "+train.z_loss=0.1"]).train.z_loss == 0.1
    assert compose([form, "++train.z_loss=0.1", "+memory=keep"]).memory.name == "keep"


def test_no_experiment_needs_a_choice_of_each_group() -> None:
    config = compose(["model=tiny", "data=stdlib", "cluster=local_cpu", "train.steps=20", "parallel.tokens_per_rank=4K"])
    assert config.experiment == "custom" and config.train.steps == 20


def test_own_directory(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n# My own.\ndefaults:\n  - /experiment/quickstart\n  - override /model: smaller\nexperiment: mine\n"
    )
    (tmp_path / "model" / "smaller.yaml").write_text("# Half.\ndefaults:\n  - tiny\n  - _self_\nname: smaller\nnum_layers: 2\n")
    config = compose(["+experiment=mine", "train.steps=30"], str(tmp_path))
    assert (config.experiment, config.model.num_layers, config.model.hidden_size, config.train.steps) == ("mine", 2, 256, 30)
    assert "mine" in options(EXPERIMENT, str(tmp_path))


def message(*overrides: str, config_dir: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(list(overrides), config_dir)
    assert caught.value.exit_code == EXIT_USER
    return str(caught.value)


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_unknown_key_with_and_without_plus(plus: str) -> None:
    text = message(QUICK, f"{plus}data.max_seq_lenn=1M")
    assert text.startswith("data.max_seq_lenn: found an unknown key; expected a key of data: name, prefixes,")
    assert text.endswith("Try: did you mean data.max_seq_len?")


def test_unknown_key_in_an_experiment_file(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "typo.yaml").write_text("# @package _global_\ndefaults:\n  - /experiment/quickstart\ntrain:\n  stps: 3\n")
    assert "train.stps: found an unknown key" in message("+experiment=typo", config_dir=str(tmp_path))


def test_unknown_experiment_lists_them() -> None:
    text = message("+experiment=quickstrt")
    assert text.startswith("+experiment: found 'quickstrt'; expected one of llama3_prolong_512k, llama3_prolong_64k, llama3_ultralong_1M,")
    assert text.endswith("Try: +experiment=quickstart")


def test_unknown_option_lists_them() -> None:
    text = message(QUICK, "memory=keeep")
    assert text == "memory: found 'keeep'; expected one of alst, auto, keep, memo, recompute, streambp, upipe.\n  Try: memory=keep"


def test_nothing_chosen() -> None:
    assert message("train.steps=3").endswith("or an experiment that sets it: +experiment=quickstart")
    text = message("model=tiny", "data=stdlib", "cluster=local_cpu")
    assert text.startswith("train.steps: found no value; expected a value: this key has no default.")


@pytest.mark.parametrize(
    ("argument", "start"),
    [
        ("stray", "argument 'stray': found neither a command, an option nor key=value"),
        ("~model", "argument '~model': found a deletion"),
        ("data.prefixes=[a,", "argument 'data.prefixes=[a,': found no viable alternative"),
        ("train.steps=1,2", "argument 'train.steps=1,2': found several values; expected a value that can be parsed."),
        ("train.steps=${nowhere}", "command line or configuration file: found "),
    ],
)
def test_arguments_that_make_no_sense(argument: str, start: str) -> None:
    assert message(QUICK, argument).startswith(start)


def test_values_that_do_not_go_together() -> None:
    assert message(QUICK, "data.global_batch_tokens=4K").startswith(
        "data.global_batch_tokens: found 4K; expected at least data.max_seq_len=8K"
    )
    assert message(QUICK, "optim.schedule=zigzag").startswith(
        "optim.schedule: found `zigzag`; expected one of cosine, linear, wsd, constant"
    )


def test_config_dir_must_exist(tmp_path: Path) -> None:
    assert message(QUICK, config_dir=str(tmp_path / "none")).startswith("--config-dir: found ")
