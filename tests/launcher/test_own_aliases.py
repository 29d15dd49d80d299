"""Old names of renamed keys in files of the user's own directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from efflaunch.errors import ConfigError
from efflaunch.launcher.config.compose import changed, compose, compose_group
from efflaunch.launcher.config.overrides import parse_overrides
from efflaunch.launcher.config.own_aliases import package_of

BASE = ["+experiment=quickstart"]


def put(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def notices(capsys: pytest.CaptureFixture[str]) -> list[str]:
    streams = capsys.readouterr()
    assert streams.out == "", "the notice is not part of what a command prints"
    return streams.err.splitlines()


def test_own_option_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The shipped option that the user's starts from holds the new name, which must lose."""
    file = put(tmp_path, "checkpoint/mine.yaml", "# Größe: mine.\ndefaults: [default, _self_]\n'while_flushing': skip  # kept\n")
    config = compose([*BASE, "checkpoint=mine"], str(tmp_path))
    assert config.checkpoint.on_busy.value == "skip"
    (line,) = notices(capsys)
    assert line.startswith(f"efflaunch: file {file}: checkpoint.while_flushing is now checkpoint.on_busy")
    assert compose_group("checkpoint", "mine", str(tmp_path))["on_busy"] == "skip"
    assert compose([*BASE, "checkpoint=mine", "checkpoint.on_busy=supersede"], str(tmp_path)).checkpoint.on_busy.value == "supersede"
    resumed = changed(compose(BASE), parse_overrides(["checkpoint=mine"], str(tmp_path)), str(tmp_path))
    assert resumed.checkpoint.on_busy.value == "skip"


def test_own_experiments(tmp_path: Path) -> None:
    text = "# @package _global_\ndefaults: [quickstart, _self_]\nlauncher: &a {hang_long_s: 7, hang_min_s: '${launcher.hang_long_s}'}\n"
    text += "optim:\n  states: host\n"
    put(tmp_path, "experiment/mine.yaml", text)
    config = compose(["+experiment=mine"], str(tmp_path))
    assert (config.launcher.hang_startup_s, config.launcher.hang_min_s, config.optim.state_device.value) == (7.0, 7.0, "host")
    assert (tmp_path / "experiment" / "mine.yaml").read_text() == text, "the user's file stays as it is"


def test_both_names_in_an_own_file_are_refused(tmp_path: Path) -> None:
    file = put(tmp_path, "checkpoint/mine.yaml", "defaults: [default]\nwhile_flushing: skip\non_busy: skip\n")
    with pytest.raises(ConfigError) as caught:
        compose([*BASE, "checkpoint=mine"], str(tmp_path))
    assert caught.value.where == f"file {file}, line 1" and caught.value.found == "checkpoint.while_flushing and checkpoint.on_busy"


def test_unused_own_files_are_not_read_for_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "checkpoint/unused.yaml", "while_flushing: [")
    compose(BASE, str(tmp_path))
    assert notices(capsys) == []


@pytest.mark.parametrize(
    ("text", "name", "package"),
    [
        ("a: 1\n", "optim/mine.yaml", "optim"),
        ("# Mine.\n# @package _global_\n", "optim/mine.yaml", ""),
        ("# @package launcher.ray\n", "optim/mine.yaml", "launcher.ray"),
        ("a: 1\n# @package _global_\n", "optim/mine.yaml", "optim"),
    ],
)
def test_the_group_a_file_stands_under(text: str, name: str, package: str) -> None:
    assert package_of(text, name) == package
