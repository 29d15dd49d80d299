"""A group that is chosen at a resume takes earlier settings with it, and says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from efflaunch.launcher import start
from efflaunch.launcher.config.compose import changed, compose
from efflaunch.launcher.config.overrides import parse_overrides
from efflaunch.launcher.config.replaced_groups import replaced_lines
from efflaunch.launcher.rundir.run_dir import make_run_dir, store_config

FIRST = ["+experiment=quickstart", "run.id=run", "memory=streambp", "memory.chunk_tokens=300", "optim.lr=1e-4", "optim.betas=[0.8,0.9]"]


def lines(*overrides: str, first: list[str] = FIRST, config_dir: str | None = None) -> list[str]:
    before, parsed = compose(first, config_dir), parse_overrides(list(overrides), config_dir)
    return replaced_lines(before, changed(before, parsed, config_dir), parsed, config_dir)


def test_earlier_settings_of_a_group_are_named() -> None:
    assert lines("memory=keep") == [
        "memory=keep replaces all of memory, also what had been set in it: memory.chunk_tokens=300 (now null)",
    ]
    chosen = lines("optim=adamw", "train.steps=9", "optim.lr=2e-4")
    assert len(chosen) == 1 and "optim.betas=[0.8, 0.9] (now [0.9, 0.95])" in chosen[0] and "optim.lr" not in chosen[0], "it is typed again"


@pytest.mark.parametrize("overrides", [("train.steps=9",), ("memory.chunk_tokens=200",), ("launcher=slurm",), ("logging=tracked",)])
def test_nothing_is_said_where_nothing_is_gone(overrides: tuple[str, ...]) -> None:
    assert lines(*overrides) == []


def test_an_option_that_is_not_there_any_more(tmp_path: Path) -> None:
    """What it set by itself cannot be told from what was typed: all that changes is named."""
    (tmp_path / "optim").mkdir()
    mine = tmp_path / "optim" / "mine.yaml"
    mine.write_text("defaults:\n  - adamw\n  - _self_\nname: mine\nweight_decay: 0.3\n")
    first = ["+experiment=quickstart", "optim=mine"]
    before = compose(first, str(tmp_path))
    parsed = parse_overrides(["optim=adamw"])
    (line,) = replaced_lines(before, changed(before, parsed, None), parsed, None)
    assert "optim.weight_decay=0.3 (now 0.1)" in line and "optim.name" not in line
    (line,) = lines("optim=adamw", first=first, config_dir=str(tmp_path))
    assert "weight_decay" not in line and "optim.lr=0.003" in line, "the experiment's"


def test_a_resume_prints_it_and_the_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(start, "check_data", lambda config: None)
    monkeypatch.setattr(start, "check_resumed", lambda config, run_dir: [])
    monkeypatch.setattr("efflaunch.launcher.local.run", lambda *given, **named: 0)
    run_dir = tmp_path / "run"
    make_run_dir(run_dir)
    store_config(run_dir, compose([*FIRST, f"run.root={tmp_path}"]))
    assert start.resume(run_dir, ["memory=keep"], None, dry_run=True) == 0
    told = capsys.readouterr()
    assert "memory=keep replaces all of memory" in told.err and "replaces" not in told.out, "what is printed may be a script"
    assert start.resume(run_dir, ["memory=keep"], None) == 0
    told = capsys.readouterr()
    assert "memory=keep replaces all of memory" in told.err
    assert "  memory.chunk_tokens: 300 -> null" in told.out and "  memory.name: streambp -> keep" in told.out
