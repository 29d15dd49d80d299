"""Damaged files of a run and errors nobody foresaw: a sentence and an exit code, never a trace; what can be made again is."""

from __future__ import annotations

import json
import logging
import os
import stat
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from efflaunch.errors import EXIT_RETRY, EXIT_USER, ConfigError
from efflaunch.estimate.measured.profile import Profile, ProfileKey, find_profile, load_profiles, save_profile
from efflaunch.launcher import cli
from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.local import LocalLauncher
from efflaunch.launcher.rundir.metrics_reader import MetricsFollower
from efflaunch.launcher.rundir.progress import RunProgress, step_line
from efflaunch.launcher.rundir.run_dir import HASH_FILE, RUN_FILE, make_run_dir, read_run, store_config, write_run
from efflaunch.launcher.rundir.state import STATE_FILE, Attempt, Failure, RunState, mend_state, new_state, read_state, write_state
from efflaunch.utils.decode import decode

DAMAGE = (b"", b"\x00" * 20, b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b"{}", b"[" * 5000, b'{"a": 1e999}', b"key: [")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run_dir = tmp_path / "run"
    make_run_dir(run_dir)
    write_run(run_dir, compose(["+experiment=quickstart", "run.id=run", f"run.root={tmp_path}"]), 1)
    failure = Failure(rank=0, message="why", traceback="", log="logs/rank-0.log")
    attempts = (Attempt(number=1, started=1.0, ended=2.0, failure=failure, hosts=("a", "b"), blamed={"a": "slow"}),)
    write_state(run_dir, new_state(world_size=4, revision=1, attempts=attempts))
    return run_dir


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = cli.main([*words])
    output = "".join(capsys.readouterr())
    assert "Traceback" not in output
    return code, output


COMMANDS = ("status", "logs", "cancel", "checkpoints", "explain", "resume")


@pytest.mark.parametrize("name", [RUN_FILE, STATE_FILE, HASH_FILE, "metrics.jsonl"])
def test_commands_on_a_damaged_run(run_dir: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    for content in DAMAGE[::4]:
        (run_dir / name).write_bytes(content)
        for command in COMMANDS:
            code, output = said(capsys, command, str(run_dir), *(["--dry-run"] if command == "resume" else []))
            assert code in (0, EXIT_USER), (command, content, output)
            if name == RUN_FILE:
                assert code == EXIT_USER and "run.yaml" in output and "revisions/ holds every version" in output
            if name == STATE_FILE and command in ("status", "logs", "cancel"):
                assert code == EXIT_USER and f"{name}: found " in output and "efflaunch resume" in output


def test_a_state_is_read_as_written(run_dir: Path) -> None:
    run_state = read_state(run_dir)
    assert isinstance(run_state, RunState) and decode(RunState, json.loads(json.dumps(asdict(run_state)))) == run_state
    assert mend_state(run_dir) is None and run_state.attempts[0].hosts == ("a", "b")


@pytest.mark.parametrize(
    "change", [{"pid": -1}, {"pid": 0}, {"pid": "1"}, {"attempts": "abc"}, {"attempts": [3]}, {"started": None}, {"new": 1}]
)
def test_a_state_with_another_meaning_is_refused(run_dir: Path, change: dict[str, Any]) -> None:
    """A process number of -1 would signal every process of the user."""
    data = json.loads((run_dir / STATE_FILE).read_text())
    (run_dir / STATE_FILE).write_text(json.dumps({**data, **change}))
    with pytest.raises(ConfigError, match=f"{STATE_FILE}: found .*{next(iter(change))}"):
        read_state(run_dir)
    assert "set aside as state.json.damaged" in str(mend_state(run_dir))
    assert read_state(run_dir) is None and (run_dir / "state.json.damaged").is_file()


def test_a_kill_between_two_files_of_a_revision_is_repaired(run_dir: Path) -> None:
    first, second = (
        read_run(run_dir).config,
        compose(["+experiment=quickstart", "run.id=run", f"run.root={run_dir.parent}", "train.steps=30"]),
    )
    old_hash = (run_dir / HASH_FILE).read_bytes()
    assert store_config(run_dir, second) == (2, ["train.steps: 20 -> 30"])
    new_hash = (run_dir / HASH_FILE).read_bytes()
    # Killed after run.yaml, before its hash.
    (run_dir / HASH_FILE).write_bytes(old_hash)
    assert read_run(run_dir).config == second and read_run(run_dir).revision == 2
    assert store_config(run_dir, second) == (2, []) and (run_dir / HASH_FILE).read_bytes() == new_hash
    # Killed after the copy of a revision, before run.yaml.
    (run_dir / "revisions" / "3.yaml").write_text("half")
    assert read_run(run_dir).config == second
    assert store_config(run_dir, first)[0] == 3 and read_run(run_dir).config == first
    # Lost, or damaged.
    (run_dir / HASH_FILE).unlink()
    assert read_run(run_dir).config == first
    assert store_config(run_dir, first) == (3, []) and (run_dir / HASH_FILE).is_file()
    # An edit is an edit.
    path = run_dir / RUN_FILE
    path.write_text(path.read_text().replace("steps: 20", "steps: 21"))
    with pytest.raises(ConfigError, match="contents that do not match run.sha256"):
        read_run(run_dir)


def test_a_run_file_that_is_lost_is_the_newest_revision(run_dir: Path) -> None:
    config = read_run(run_dir).config
    (run_dir / RUN_FILE).unlink()
    with pytest.raises(ConfigError, match=r"found no run.yaml.*\n  Try: cp \S*/revisions/1.yaml \S*/run.yaml") as raised:
        read_run(run_dir)
    subprocess.run(raised.value.hint, shell=True, check=True)
    assert read_run(run_dir).config == config


def test_damaged_lines_of_metrics_are_passed_over(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = [{"rank": 0, "tokens": 5, "peak_bytes": 7}]
    step = {
        "event": "step",
        "step": 1,
        "loss": 2.0,
        "step_s": 1.0,
        "total_tokens": 9,
        "tokens_per_s": 9.0,
        "lr": 1.0,
        "plan": "p",
        "ranks": ranks,
    }
    start = {"event": "start", "steps": 20, "world_size": 4, "parameters": 10}
    broken: list[Any] = [
        {**step, name: value}
        for name in step
        if name != "event"
        for value in ("x", [1], {"a": 1}, True, -1e400)
        if (name, value) != ("plan", "x")
    ]
    broken += [{**start, name: value} for name in start if name != "event" for value in ("x", -1, None, [])]
    broken += [
        {"event": name} for name in ("step", "start", "checkpoint_failed", "planner_failed", "drift", "certificate", "stragglers", "score")
    ]
    broken += [{**step, "ranks": [{}]}, {**start, "certificate": {"place": 3}}, {"event": "drift", "measured_over_predicted": {"2": "x"}}]
    lines = [json.dumps(item) for item in broken]
    (run_dir / "metrics.jsonl").write_text(
        "\n".join([json.dumps(start), *lines, "[" * 5000, "\x00", json.dumps(step), '{"event": "st']) + "\n"
    )
    assert MetricsFollower(run_dir).read() == [start, step]
    for command in ("status", "explain"):
        code, output = said(capsys, command, str(run_dir), *(["--json"] if command == "status" else []))
        assert code in (0, EXIT_USER), output


@pytest.mark.parametrize("name", ["loss", "tokens_per_s", "lr", "plan", "ranks", "total_tokens", "grad_norm"])
def test_numbers_that_a_step_lacks_are_unknown(run_dir: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """As null, which is no number either, or not at all."""
    whole = {"loss": 2.0, "tokens_per_s": 9.0, "lr": 1.0, "plan": "p", "ranks": [], "total_tokens": 9, "grad_norm": 1.0}
    start = {"event": "start", "steps": 20, "world_size": 4, "parameters": 10}
    lacking = [{**whole, name: None}, *([{key: value for key, value in whole.items() if key != name}] if name != "loss" else [])]
    for numbers in lacking:
        step = {"event": "step", "step": 1, "step_s": 1.0, **numbers}
        (run_dir / "metrics.jsonl").write_text(f"{json.dumps(start)}\n{json.dumps(step)}\n")
        for options in ((), ("--json",)):
            code, told = said(capsys, "status", str(run_dir), *options)
            assert code == 0 and ("unknown at step 1" in told) == (name == "loss" and not options), told
        line = step_line(RunProgress().apply([start, step]))
        assert ("unknown" in line) == (name in ("loss", "tokens_per_s", "lr"))


def test_a_damaged_profile_never_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    key = ProfileKey(hardware="h", ranks="r", model="m", versions="v")
    profile = Profile(key=key, degrees=(), overhead_s=1.0, gather_s=0.0, empty_s=0.0, step_s=0.0)
    path = tmp_path / "profile.yaml"
    entries = (b"efflaunch_profile: 2\nentries: [3]\n", b"efflaunch_profile: 2\nentries: [{key: 1}]\n")
    for content in (*DAMAGE, *entries):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="profile .*: found "):
            load_profiles(path)
        other, why = find_profile(None, key)
        assert other is None and "is damaged" in why
        with pytest.raises(ConfigError):
            find_profile(str(path), key)
        with caplog.at_level(logging.WARNING):
            save_profile(path, profile)
        assert load_profiles(path) == [profile] and "set aside as profile.yaml.damaged" in caplog.text
    path.write_text(path.read_text().replace("overhead_s: 1.0", "overhead_s: -1.0"))
    with pytest.raises(ConfigError, match="a time below zero"):
        load_profiles(path)


def test_an_error_nobody_foresaw_is_one_paragraph(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz0123")

    def fail(words: list[str]) -> int:
        raise KeyError("hf_abcdefghijklmnopqrstuvwxyz0123\nsecond line")

    monkeypatch.setattr(cli, "_dispatch", fail)
    code, output = said(capsys, "status", "x")
    assert code == EXIT_RETRY and output.count("\n") == 1 and "an unexpected error (KeyError: '<HF_TOKEN>" in output and "--debug" in output
    (file,) = tmp_path.glob("efflaunch-error-*.txt")
    assert str(file) in output and stat.S_IMODE(file.stat().st_mode) == 0o600
    kept = file.read_text()
    assert "Traceback" in kept and "$ efflaunch status x" in kept and "hf_" not in kept
    assert cli.main(["status", "x", "--debug"]) == EXIT_RETRY
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    assert "could not be written" in said(capsys, "status", "x")[1]


@pytest.mark.parametrize(
    "words",
    [
        ["logs", "x", "--lines", "-5"],
        ["plan", "+experiment=quickstart", "--lengths", "github", "--sequences", "0"],
        ["plan", "+experiment=quickstart", "--certify", "nan"],
        ["explain", "x", "--step", "1e3"],
        ["simulate", "--lengths", "github", "--steps", str(10**30)],
        ["profile", "--seconds", "inf"],
        ["checkpoints", "x", "--pin", "-1"],
        ["export", "x", "y", "--step", "-1"],
    ],
    ids=lambda words: words[0] + words[-2],
)
def test_numbers_of_options_have_ranges(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    code, output = said(capsys, *words)
    assert code == EXIT_USER and f"{words[-1]!r} is not" in output and ("or more" in output or "more than 0" in output)


def test_a_damaged_checkpoint_is_not_exported(run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from efflaunch.checkpoint.files import CheckpointInfo
    from efflaunch.model import export

    path = run_dir / "checkpoints" / "step-00000001"
    path.mkdir(parents=True)
    monkeypatch.setattr(export, "choose_checkpoint", lambda *given: CheckpointInfo(path, 1, 0, 0.0, 1, None))
    for content in DAMAGE:
        (path / "state.json").write_bytes(content)
        (path / "COMMIT").write_bytes(content)
        code, output = said(capsys, "export", str(run_dir), str(run_dir.parent / "out"))
        assert code == EXIT_USER and "--verify finds a whole one" in output, output


def test_a_start_mends_a_damaged_state(run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from efflaunch.launcher import local
    from efflaunch.launcher.backend import Launch

    (run_dir / STATE_FILE).write_bytes(b"{")
    monkeypatch.setattr(local, "run", lambda *given, **named: 0)
    config = read_run(run_dir).config
    assert LocalLauncher().submit(Launch(config=config, run_dir=run_dir)) == 0
    assert "state.json is damaged" in capsys.readouterr().out
    assert (run_dir / "state.json.damaged").is_file() and os.listdir(run_dir / "revisions") == ["1.yaml"]
