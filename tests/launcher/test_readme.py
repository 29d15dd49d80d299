"""Every command of the README is one that works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from efflaunch.launcher import cli, start
from efflaunch.launcher.commands import completion, data, rehearse, status
from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.rundir.run_dir import make_run_dir, store_config

ROOT = Path(__file__).resolve().parent.parent.parent
COMMANDS = sorted({" ".join(words.split()) for words in re.findall(r"`efflaunch ([^`]+)`", (ROOT / "README.md").read_text())})


@pytest.fixture
def runs_mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "other"):
        make_run_dir(Path("runs") / name)
        store_config(Path("runs") / name, compose(["+experiment=quickstart", f"run.id={name}"]))


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 7
    assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in ("run", "test"))


@pytest.mark.usefixtures("runs_mine")
@pytest.mark.parametrize("command", COMMANDS)
def test_readme_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run for real where that is cheap; what trains or converts is stopped at its own door, after its arguments are checked."""
    monkeypatch.setattr(start, "launch", lambda config, run_dir=None: 0)
    monkeypatch.setattr(data, "_prepare", lambda options: 0)
    monkeypatch.setattr(rehearse, "_run", lambda config, overrides, config_dir: 0)
    words = shlex.split(command)
    if words[0] in ("evaluate", "export", "import"):
        pytest.skip("needs a trained run: tests/test_evaluation_runs.py, tests/test_real_runs.py, tests/model/test_import_model.py")
    assert cli.main(words) == 0, command


def test_stand_ins_exist() -> None:
    assert callable(start.launch) and callable(data._prepare) and callable(rehearse._run)
    assert callable(status.main) and callable(completion.main)
