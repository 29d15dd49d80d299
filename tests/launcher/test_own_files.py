"""What a user writes over the shipped configuration wins or is refused: files of --config-dir, settings of Hydra, prefixes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from efflaunch.errors import EXIT_USER, ConfigError
from efflaunch.launcher.commands.help import train_help
from efflaunch.launcher.config.compose import compose, compose_group
from efflaunch.launcher.config.run_config import Config

BARE = ["model=tiny", "data=stdlib", "cluster=local_cpu", "train.steps=20", "parallel.tokens_per_rank=4K"]


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(folder: Path | None, *words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose([*(words or BARE)], None if folder is None else str(folder))
    assert caught.value.exit_code == EXIT_USER
    return str(caught.value)


def test_an_option_with_a_shipped_name_wins(tmp_path: Path) -> None:
    put(tmp_path / "my 'own, [dir]", "optim/adamw.yaml", "# Mine.\nname: adamw\nlr: 0.25\n")
    put(
        tmp_path / "my 'own, [dir]",
        "experiment/quickstart.yaml",
        "# @package _global_\n# Mine.\nexperiment: quickstart\noptim: {lr: 0.125}\n",
    )
    folder = str(tmp_path / "my 'own, [dir]")

    def made(*words: str) -> Config:
        return compose([*words], folder)

    assert made(*BARE).optim.lr == 0.25 and compose(BARE).optim.lr != 0.25
    assert made(*BARE, "+experiment=quickstart").optim.lr == 0.125
    assert compose_group("optim", "adamw", folder)["lr"] == 0.25
    assert re.search(r"^ +adamw +Mine\.", train_help("", folder), re.MULTILINE)


def test_a_shipped_option_is_not_extended_under_its_own_name(tmp_path: Path) -> None:
    file = put(tmp_path, "optim/adamw.yaml", "defaults: [adamw]\nlr: 0.25\n")
    text = refused(tmp_path)
    assert text.startswith(f"file {file}: found itself in its defaults list") and "my_adamw.yaml" in text


@pytest.mark.parametrize(
    "word", ["hydra.run.dir=x", "+hydra.verbose=true", "hydra={run: {dir: x}}", "hydra/job_logging=none", "++hydra.sweep.dir=x"]
)
def test_settings_of_hydra_are_refused(word: str) -> None:
    text = refused(None, *BARE, word)
    assert text.startswith(f"argument {word!r}: found a setting of Hydra; expected keys of efflaunch") and "run.root=DIR" in text


@pytest.mark.parametrize(
    "content", ["# @package _global_\nhydra: {run: {dir: x}}\n", "# @package _global_\ndefaults: [{override /hydra/job_logging: none}]\n"]
)
def test_settings_of_hydra_in_files_are_refused(tmp_path: Path, content: str) -> None:
    put(tmp_path, "experiment/mine.yaml", content)
    assert "mine.yaml: found a setting of Hydra" in refused(tmp_path, "+experiment=mine")


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("config.yaml", "config.yaml: found a main configuration file; expected options only"),
        ("optim/mine.yml", "mine.yml: found the ending .yml; expected .yaml"),
        ("optim/mine.YAML", "mine.YAML: found the ending .YAML; expected .yaml"),
        ("optim.yaml", "optim.yaml: found a file beside the groups; expected DIR/GROUP/NAME.yaml"),
        ("experiment.yml", "experiment.yml: found a file beside the groups"),
        ("experiments/mine.yaml", "experiments: found a folder of no group"),
        ("hydra/job_logging.yaml", "hydra: found a setting of Hydra"),
    ],
)
def test_files_that_would_be_ignored_are_refused(tmp_path: Path, name: str, start: str) -> None:
    put(tmp_path, name, "name: mine\n")
    assert start in refused(tmp_path)
    assert "found an unknown key" in refused(None, *BARE, "+nogroup=mine")


def test_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "mine.yaml").symlink_to("/nowhere/mine.yaml")
    assert "mine.yaml: found a link to /nowhere/mine.yaml, which is not there" in refused(tmp_path)


def test_other_files_may_lie_there(tmp_path: Path) -> None:
    put(tmp_path, "profile.yaml", "a: [")
    put(tmp_path, "kubernetes/job.yaml", "a: [")
    put(tmp_path, "model/unused.yaml", "a: [")
    assert compose(BARE, str(tmp_path)).model.name == "tiny"


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("name: [1,\n", "line 2: found expected the node content"),
        ("- a\n- b\n", "line 1: found a list; expected `key: value` lines"),
        ("a: b: c\n", "line 1: found mapping values are not allowed here"),
        ("x: 1\ny: !!python/object:os.system {}", "line 2: found the tag tag:yaml.org,2002:python/object:os.system"),
        (b"name: x\nn: \xff\n", "line 2: found bytes that are no UTF-8"),
        ("name: a\nlr: 1\nname: b\n", "line 3: found name again, after line 1; expected each key once"),
        ("name: 2001-01-01\n", "line 1: found the date 2001-01-01"),
        ("lr: " + "9" * 5000, "line 1: found a number of 5000 digits"),
        ("name: " + "[" * 2000, "line 1: found groups more than 50 deep"),
        ("name: &a [*a]\n", "line 1: found the alias *a"),
        (BOMB, "found more than 100,000 values, with aliases expanded"),
        ("? [a]\n: b\n", "line 1: found found unhashable key"),
        ("1: 2\n", "found the key 1"),
        ("name: \x00", "found unacceptable character"),
        ("defaults: adamw\n", "found the defaults 'adamw'; expected a list of options"),
        ("defaults: [null]\n", "found the defaults [None]"),
        ("defaults: [{a: {b: c}}]\n", "found the defaults"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_malformed_files_are_named_with_the_line(tmp_path: Path, content: str | bytes, found: str) -> None:
    file = put(tmp_path, "optim/mine.yaml", content)
    text = refused(tmp_path, *BARE, "optim=mine")
    assert text.startswith(f"file {file}") and found in text


@pytest.mark.parametrize(
    "content",
    ["name: ${\n", "name: ${nowhere}\n", "defaults: [nowhere]\n", "name: ${oc.env:NO_SUCH_VARIABLE}\n", "# @package train\nsteps: 3\n"],
)
def test_files_that_do_not_compose_are_refused(tmp_path: Path, content: str) -> None:
    put(tmp_path, "optim/mine.yaml", content)
    assert refused(tmp_path, *BARE, "optim=mine")


def test_a_chain_of_defaults_is_followed(tmp_path: Path) -> None:
    put(tmp_path, "optim/mine.yaml", "defaults: [base]\nname: mine\n")
    file = put(tmp_path, "optim/base.yaml", "lr: [")
    assert refused(tmp_path, *BARE, "optim=mine").startswith(f"file {file}, line 1")


def test_an_option_of_another_package_is_no_group(tmp_path: Path) -> None:
    put(tmp_path, "optim/mine.yaml", "# @package train\nsteps: 3\n")
    with pytest.raises(ConfigError, match="optim=mine: found keys of train; expected keys of optim alone"):
        compose_group("optim", "mine", str(tmp_path))


def test_prefixes() -> None:
    assert refused(None, *BARE, "~optim.lr").startswith("argument '~optim.lr': found a deletion")
    assert refused(None, *BARE, "+++optim.lr=1").startswith("argument '+++optim.lr=1': found neither")
    assert compose([*BARE, "++optim.lr=1", "+train.seed=3"]).optim.lr == 1.0
