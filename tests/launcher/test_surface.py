"""What people and schedulers rely on: configuration keys, groups, commands and exit codes. A change is a visible diff."""

from __future__ import annotations

from pathlib import Path

from efflaunch import errors
from efflaunch.launcher.commands import COMMANDS
from efflaunch.launcher.config.conf_groups import EXPERIMENT, GROUPS, conf_dir
from efflaunch.launcher.config.schema import config_keys

KEYS = Path(__file__).resolve().parent.parent / "golden" / "config_keys.txt"


def test_config_keys() -> None:
    """Edit tests/golden/config_keys.txt by hand when a key is meant to come or go."""
    assert config_keys() == KEYS.read_text().split()


def test_groups() -> None:
    assert " ".join(GROUPS) == "model adapter data optim parallel engine memory checkpoint cluster launcher logging eval"
    folders = {path.name for path in conf_dir().iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {*GROUPS, EXPERIMENT}


def test_commands() -> None:
    assert list(COMMANDS) == [
        "train",
        "sweep",
        "plan",
        "check-model",
        "doctor",
        "profile",
        "rehearse",
        "resume",
        "status",
        "logs",
        "cancel",
        "checkpoints",
        "explain",
        "simulate",
        "evaluate",
        "compare",
        "report",
        "export",
        "import",
        "data",
        "completion",
    ]


def test_exit_codes() -> None:
    assert {name: value for name, value in vars(errors).items() if name.startswith("EXIT_")} == {
        "EXIT_DONE": 0,
        "EXIT_RETRY": 1,
        "EXIT_PREEMPTED": 75,
        "EXIT_USER": 93,
    }
    assert errors.ConfigError.exit_code == errors.DataError.exit_code == errors.CheckpointError.exit_code == 93
