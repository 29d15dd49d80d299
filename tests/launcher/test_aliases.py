"""Old names of renamed keys, wherever a person or an earlier version wrote them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import yaml

from efflaunch.errors import ConfigError
from efflaunch.launcher.commands.sweep import expand
from efflaunch.launcher.config.aliases import RENAMED, current_data, current_references, notice_lines
from efflaunch.launcher.config.compose import changed, compose
from efflaunch.launcher.config.overrides import parse_overrides
from efflaunch.launcher.config.run_config import Config
from efflaunch.launcher.config.schema import config_keys, dump_config
from efflaunch.launcher.rundir.run_dir import HASH_FILE, RUN_FILE, config_diff, make_run_dir, read_attempt, read_run, store_config

BASE = ["+experiment=quickstart"]
VALUES = {
    "launcher.hang_long_s": ("7", 7.0),
    "parallel.plan_patience_s": ("3", 3.0),
    "checkpoint.while_flushing": ("skip", "skip"),
    "optim.states": ("host", "host"),
}
"""Old key: (what is typed, what the configuration then holds)."""


def value_of(config: Config, key: str) -> object:
    group, name = key.split(".")
    return dump_config(config)[group][name]


def notices(capsys: pytest.CaptureFixture[str]) -> list[str]:
    streams = capsys.readouterr()
    assert streams.out == "", "the notice is not part of what a command prints"
    return streams.err.splitlines()


def test_the_table_names_keys_that_exist() -> None:
    assert set(RENAMED) == set(VALUES) and set(RENAMED.values()) <= set(config_keys()) and not set(RENAMED) & set(config_keys())
    assert all(old.partition(".")[0] == new.partition(".")[0] for old, new in RENAMED.items())


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_typed_old_names(plus: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = compose([*BASE, *(f"{plus}{old}={typed}" for old, (typed, _) in VALUES.items())])
    assert [value_of(config, RENAMED[old]) for old in VALUES] == [value for _, value in VALUES.values()]
    lines = notices(capsys)
    assert len(lines) == len(VALUES)
    for old, line in zip(VALUES, lines, strict=True):
        assert line == f"efflaunch: {old} is now {RENAMED[old]}; the old name is accepted in this version and goes with the next"


def test_new_names_have_no_notice(capsys: pytest.CaptureFixture[str]) -> None:
    compose([*BASE, *(f"{RENAMED[old]}={typed}" for old, (typed, _) in VALUES.items())])
    assert notices(capsys) == []


@pytest.mark.parametrize("old", RENAMED)
def test_both_names_are_refused(old: str) -> None:
    typed = VALUES[old][0]
    with pytest.raises(ConfigError) as caught:
        compose([*BASE, f"{old}={typed}", f"++{RENAMED[old]}={typed}"])
    error = caught.value
    assert error.where == "command line" and error.found == f"{old} and {RENAMED[old]}"
    assert error.expected == "one name of the same key" and error.hint.startswith(f"{RENAMED[old]}=... alone")


def test_a_resume_takes_old_names(capsys: pytest.CaptureFixture[str]) -> None:
    stored = compose(BASE)
    config = changed(stored, parse_overrides(["checkpoint.while_flushing=supersede"]), None)
    assert config_diff(stored, config) == ["checkpoint.on_busy: wait -> supersede"] and len(notices(capsys)) == 1


def test_a_sweep_takes_old_names_with_one_notice(capsys: pytest.CaptureFixture[str]) -> None:
    points = expand([*BASE, "optim.states=device,host"])
    assert [point.overrides[-1] for point in points] == ["optim.state_device=device", "optim.state_device=host"]
    assert [point.suffix for point in points] == ["states-device", "states-host"], "runs of before are found again"
    assert len(notices(capsys)) == 1
    with pytest.raises(ConfigError, match=r"optim\.states and optim\.state_device"):
        expand(["optim.states=device,host", "optim.state_device=host"])


def test_interpolations() -> None:
    assert current_references("${optim.states}/${ checkpoint.while_flushing }") == "${optim.state_device}/${ checkpoint.on_busy }"
    plain = r"\${optim.states} optim.states ${optim.states_more}"
    assert current_references(plain) == plain
    assert compose([*BASE, "logging.wandb_project=${checkpoint.while_flushing}"]).logging.wandb_project == "wait"
    assert list(notice_lines(["optim.states", "optim.states"])) == list(notice_lines(["optim.states"]))


def as_before(run_dir: Path) -> bytes:
    """The run's files as the version before wrote them."""
    data = yaml.safe_load((run_dir / RUN_FILE).read_text())
    for old, new in RENAMED.items():
        group, name = new.split(".")
        data[group] = {old.partition(".")[2] if key == name else key: value for key, value in data[group].items()}
    text = yaml.safe_dump(data, sort_keys=False).encode()
    (run_dir / RUN_FILE).write_bytes(text)
    (run_dir / "revisions" / "1.yaml").write_bytes(text)
    (run_dir / HASH_FILE).write_text(f"{hashlib.sha256(text).hexdigest()}  {RUN_FILE}\n")
    return text


def test_a_stored_run_is_read_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = compose([*BASE, "run.id=run", f"run.root={tmp_path}", *(f"{RENAMED[old]}={typed}" for old, (typed, _) in VALUES.items())])
    run_dir = tmp_path / "run"
    make_run_dir(run_dir)
    store_config(run_dir, config)
    text, stored = as_before(run_dir), read_run(run_dir).config
    assert config_diff(config, stored) == [] and stored == config
    assert store_config(run_dir, config) == (1, []) and (run_dir / RUN_FILE).read_bytes() == text, "nothing to write"
    assert read_attempt(run_dir, 1) == config
    attempt = run_dir / "logs" / "attempt-2"
    attempt.mkdir(parents=True)
    kept = [line for line in text.splitlines() if not line.startswith((b"efflaunch_version", b"revision"))]
    (attempt / RUN_FILE).write_bytes(b"\n".join(kept))
    assert read_attempt(run_dir, 2) == config
    assert notices(capsys) == [], "nobody typed the old names"
    (run_dir / RUN_FILE).write_bytes(text.replace(b"while_flushing: skip", b"while_flushing: wait"))
    (run_dir / "revisions" / "1.yaml").unlink()
    with pytest.raises(ConfigError, match=r"do not match run\.sha256"):
        read_run(run_dir)


@pytest.mark.parametrize(("stored", "read"), [(False, None), (True, True), (None, None)])
def test_a_stored_default_that_said_nothing_says_nothing(stored: bool | None, read: bool | None) -> None:
    """Runs of before hold tie_embeddings=false whether or not it was asked for; beside a path that would be a contradiction."""
    data = {"model": {"path": "x", "tie_embeddings": stored, "name": "y"}}
    assert current_data(data, "f") == {"model": {"path": "x", "tie_embeddings": read, "name": "y"}}


def test_stored_data_with_both_names() -> None:
    result = current_data({"optim": {"lr": 1, "states": "host", "name": "x"}}, "f")
    assert list(result["optim"].items()) == [("lr", 1), ("state_device", "host"), ("name", "x")]
    assert current_data(None, "f") is None and current_data({"optim": 3}, "f") == {"optim": 3}
    with pytest.raises(ConfigError, match=r"run\.yaml: found optim\.states and optim\.state_device"):
        current_data({"optim": {"states": "host", "state_device": "host"}}, "run.yaml")


def test_a_key_that_is_gone_says_what_took_its_place(tmp_path: Path) -> None:
    """cluster.efficiency was one share for products and attention; runs of before are read with both at that share."""
    with pytest.raises(ConfigError) as caught:
        compose([*BASE, "cluster.efficiency=0.34"])
    error = caught.value
    assert error.where == "cluster.efficiency" and error.found == "a key that is gone" and "cluster.gemm_efficiency" in error.expected
    assert error.hint.startswith("cluster.gemm_efficiency=0.34 cluster.attention_efficiency=0.34")
    compose([*BASE, *error.hint.partition(",")[0].split()])
    stored = dump_config(compose(BASE))
    new = ("gemm_efficiency", "attention_efficiency", "gpu", "reserve")
    old = {key: value for key, value in stored["cluster"].items() if key not in new}
    data = current_data({**stored, "cluster": {**old, "efficiency": 0.25}}, "run.yaml")
    assert data["cluster"]["gemm_efficiency"] == data["cluster"]["attention_efficiency"] == 0.25 and "efficiency" not in data["cluster"]
    assert data["cluster"]["reserve"] == 0.0, "such a run had all of its device, and is resumed with it"
    kept = current_data({**stored, "cluster": {**old, "efficiency": 0.25, "reserve": 0.1}}, "run.yaml")
    assert kept["cluster"]["reserve"] == 0.1
