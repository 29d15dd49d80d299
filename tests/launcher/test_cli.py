"""The command: help, completion, wrong words, and how fast nothing is imported."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from efflaunch.errors import ConfigError
from efflaunch.launcher import cli
from efflaunch.launcher.commands import COMMANDS
from efflaunch.launcher.commands.completion import SHELLS, complete, script
from efflaunch.launcher.config.schema import config_keys
from efflaunch.tests.launcher.runs import environment
from efflaunch.tests.limits import ENDS_S


def efflaunch(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "efflaunch", *words], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=ENDS_S
    )


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    bare = capsys.readouterr().out
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out == bare
    for command in COMMANDS:
        assert f"\n  {command} " in bare


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = efflaunch(command, "--help")
    assert result.returncode == 0 and f"usage: efflaunch {command}" in result.stdout, result.stderr


def test_train_help_lists_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for key in config_keys():
        assert f"    {key} " in text
    assert re.search(r"^ +quickstart +A small Llama", text, re.MULTILINE)
    assert "optim.betas                        list of number = [0.9, 0.95]" in text
    assert "OMP_NUM_THREADS of each rank; null: the environment's" in text


def test_train_help_knows_the_users_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\n# All mine.\n")
    assert cli.main(["train", "--config-dir", str(tmp_path), "--help"]) == 0
    assert "All mine." in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("efflaunch 0.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stauts", "x"], "efflaunch: command line: found 'stauts'; expected a command (train, sweep, plan, check-model, doctor, profile,"),
        (["train", "--colour"], "efflaunch: efflaunch train: found unrecognized arguments: --colour; expected usage: efflaunch train"),
        (["status"], "efflaunch: efflaunch status: found the following arguments are required: RUN_DIR; expected usage: efflaunch status"),
        (["status", "nowhere"], "efflaunch: nowhere: found no run.yaml; expected a run directory."),
        (["resume", "nowhere"], "efflaunch: nowhere: found no run.yaml; expected a run directory."),
        (["explain", "nowhere"], "efflaunch: nowhere: found no run.yaml; expected a run directory."),
        (["export", "nowhere", "out"], "efflaunch: nowhere: found no run.yaml; expected a run directory."),
        (["completion", "tcsh"], "efflaunch: efflaunch completion: found 'tcsh'; expected one of bash, zsh, fish."),
        (["+experiment=quickstart", "train.stepz=3"], "efflaunch: train.stepz: found an unknown key;"),
    ],
)
def test_mistakes_exit_93_with_one_message(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 93
    captured = capsys.readouterr()
    assert captured.err.startswith(message) and "\n  Try: " in captured.err
    assert not captured.out


def test_print_config_is_what_would_run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["+experiment=quickstart", "--print-config", "train.steps=17"]) == 0
    assert "steps: 17" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_run_directory_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["+experiment=quickstart", f"run.root={tmp_path / 'file'}", "run.id=a"]) == 93
    assert f"efflaunch: run.root: found {tmp_path / 'file' / 'a'}: Not a directory" in capsys.readouterr().err


def test_a_machine_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if shutil.which("nvidia-smi"):
        pytest.skip("has GPUs")
    assert cli.main(["+experiment=llama8b_1M"]) == 93
    text = capsys.readouterr().err
    assert "8 GPUs" in text and "found none" in text and "efflaunch plan" in text
    assert not list(tmp_path.iterdir()), "nothing half-written"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("efflaunch st", ["status"]),
        ("efflaunch +exp", ["+experiment="]),
        ("efflaunch train +experiment=quickstart_m", ["+experiment=quickstart_moe"]),
        ("efflaunch plan memory=", [f"memory={name}" for name in ("alst", "auto", "keep", "memo", "recompute", "streambp", "upipe")]),
        ("efflaunch train train.st", ["train.steps=", "train.stages="]),
        (
            "efflaunch +experiment=quickstart memory.activations=",
            ["memory.activations=keep", "memory.activations=host", "memory.activations=recompute", "memory.activations=null"],
        ),
        ("efflaunch resume runs/x logging.tensorboard=", ["logging.tensorboard=true", "logging.tensorboard=false"]),
        ("efflaunch status --j", ["--json"]),
        ("efflaunch explain runs/x --o", ["--out"]),
        ("efflaunch plan +experiment=quickstart --lengths w", ["wikipedia"]),
        ("efflaunch simulate cluster=h200", ["cluster=h200_141g_8"]),
        ("efflaunch completion z", ["zsh"]),
        ("efflaunch train nonsense", []),
    ],
)
def test_completion_candidates(line: str, expected: list[str]) -> None:
    assert complete(line) == expected


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_scripts(shell: str) -> None:
    assert "efflaunch completion words" in script(shell)
    with pytest.raises(ConfigError):
        script(f"{shell}x")


def test_completion_in_a_real_bash(tmp_path: Path) -> None:
    command = tmp_path / "efflaunch"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m efflaunch "$@"\n')
    command.chmod(0o755)
    test = """
    eval "$(efflaunch completion bash)"
    try() { COMP_LINE="$1"; COMP_POINT=${#1}; COMPREPLY=(); _efflaunch 2>/dev/null; echo "${COMPREPLY[*]}"; }
    try "efflaunch pl"
    try "efflaunch train +experiment=llama8b_1M"
    try "efflaunch train memory=k"
    """
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(["bash", "-c", test], env=environment() | {"PATH": path}, capture_output=True, text=True, timeout=ENDS_S)
    assert result.stdout.splitlines() == ["plan", "llama8b_1M", "keep"], result.stderr


HEAVY = ["torch", "ray", "transformers", "hydra", "omegaconf", "numpy", "yaml", "rich"]


def imported_by(*words: str) -> set[str]:
    code = f"import sys, json; from efflaunch.launcher.cli import main; main({list(words)!r}); print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=ENDS_S, check=True)
    return {name.partition(".")[0] for name in json.loads(result.stdout.splitlines()[-1])}


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["completion", "words", "efflaunch +"]])
def test_answers_at_once_because_nothing_heavy_is_imported(words: list[str]) -> None:
    assert not imported_by(*words) & set(HEAVY)


def test_plan_does_not_import_torch() -> None:
    assert not imported_by("plan", "+experiment=llama8b_1M") & {"torch", "ray", "transformers"}
