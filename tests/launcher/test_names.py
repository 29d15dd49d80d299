"""Names that reach a shell, a scheduler or a path: refused, or quoted; and nothing of ours reaches folders that are not."""

from __future__ import annotations

import copy
import json
import os
import shlex
import stat
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from efflaunch.errors import ConfigError
from efflaunch.launcher import start
from efflaunch.launcher.cli import main
from efflaunch.launcher.commands.sweep import expand
from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.config.schema import dump_config, load_config, walk_fields
from efflaunch.launcher.env import chosen_variables
from efflaunch.launcher.ray.request import check_ray
from efflaunch.launcher.ray.upload import measure
from efflaunch.launcher.rundir.run_dir import make_run_dir, make_run_id, store_config
from efflaunch.launcher.rundir.state import Attempt, Failure, new_state, read_state, write_state
from efflaunch.tests.limits import ENDS_S
from efflaunch.utils.names import MAX_IDENTIFIER, as_identifier, check_identifier, check_path, check_text, inside, is_file_name

EVIL = "a\ntouch owned"
BASE = ["+experiment=quickstart", "run.id=run"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "../a", "a..b", "-rf", ".a", "a b", "a\n", "caf\u00e9", "$(id)", "a" * 300])
def test_what_is_no_identifier(name: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.id: found"):
        check_identifier("run.id", name)
    check_identifier("run.id", as_identifier(name))


def test_identifiers_that_are_cut_stay_apart() -> None:
    check_identifier("run.id", "llama8b_1M-20260131-142501.3f9c")
    one, other = as_identifier("a" * 300 + "1"), as_identifier("a" * 300 + "2")
    assert one != other and len(one) == len(other) == MAX_IDENTIFIER
    check_identifier("run.id", make_run_id("an experiment/" * 40))


@pytest.mark.parametrize("name", [".", "..", "a/b", "a" * 300, "''"])
def test_an_id_that_is_refused_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir(mode=0o755)
    assert main(["train", "+experiment=quickstart", f"run.id={name}"]) == 93
    assert stat.S_IMODE((tmp_path / "runs").stat().st_mode) == 0o755 and not list((tmp_path / "runs").iterdir())


def text_keys() -> list[str]:
    """Every key whose value is a text, or a list of them."""
    kinds = ((key, get_args(hint) or (hint,)) for key, hint, _ in walk_fields())
    return [key for key, kind in kinds if str in kind]


@pytest.mark.parametrize("character", ["\n", "\r", "\x1b", "\x00", "\x9b", "\u2028"])
def test_no_text_of_a_configuration_has_control_characters(character: str) -> None:
    data, keys = dump_config(compose(BASE)), text_keys()
    assert {"run.id", "run.root", "cluster.slurm.partition", "cluster.slurm.prologue", "launcher.slurm.python", "launcher.ray.env"} <= set(
        keys
    )
    lists = {key for key, hint, _ in walk_fields() if get_args(hint) == (str,)}
    for key in keys:
        changed = copy.deepcopy(data)
        *parents, leaf = key.split(".")
        group: Any = changed
        for parent in parents:
            group = group[parent]
        value = f"a{character}touch owned"
        group[leaf] = [value] if key in lists else value
        with pytest.raises(ConfigError, match="expected one line without control characters") as caught:
            load_config(changed)
        assert str(caught.value).startswith(key) and value not in str(caught.value)


def test_a_prologue_may_be_indented() -> None:
    data = dump_config(compose(BASE))
    data["cluster"]["slurm"]["prologue"] = ["if true; then", "\tmodule load cuda", "fi"]
    assert load_config(data).cluster.slurm.prologue[1] == "\tmodule load cuda"


def test_keys_of_resources_and_names_of_variables() -> None:
    data = dump_config(compose([*BASE, "launcher=ray", "launcher.ray.address=http://head:8265"]))
    data["launcher"]["ray"]["resources"] = {EVIL: 1.0}
    with pytest.raises(ConfigError, match=r"launcher\.ray\.resources: found the character"):
        load_config(data)
    config = compose([*BASE, "launcher=ray", "launcher.ray.address=http://head:8265", "launcher.ray.env=['A;id']"])
    with pytest.raises(ConfigError, match=r"launcher\.ray\.env\[0\]: found 'A;id'; expected the name of a variable"):
        check_ray(config, None)


def test_values_and_files_that_go_with_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", EVIL)
    with pytest.raises(ConfigError, match=r"launcher\.ray\.env: MINE: found the character"):
        chosen_variables(["MINE"])
    (tmp_path / EVIL).touch()
    (tmp_path / "link").symlink_to(tmp_path / EVIL)
    with pytest.raises(ConfigError, match=r"launcher\.ray\.code\[0\]: found the character"):
        measure([str(tmp_path / "link")], 1 << 20)


@pytest.mark.parametrize(
    "words", [["launcher=slurm"], ["launcher=slurm", "launcher.nodes=1:2"], ["launcher=ray", "launcher.ray.local=true"], []]
)
def test_a_dry_run_that_is_piped_to_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """From a directory and below a root with a newline in their names, of which the first line alone is one of ours."""
    folder = tmp_path / EVIL
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert main(["train", *BASE, *words, "--dry-run"]) == 93
    assert capsys.readouterr().out == ""
    monkeypatch.chdir(tmp_path)
    config = compose([*BASE, *words])
    for run_dir in (Path(f"runs/{EVIL}"), Path(EVIL) / "run"):
        with pytest.raises(ConfigError, match="run directory: found the character"):
            start.show_launch(config, run_dir)
        with pytest.raises(ConfigError, match="run directory: found the character"):
            start.launch(config, run_dir)
    assert capsys.readouterr().out == "" and sorted(path.name for path in tmp_path.iterdir()) == [EVIL]


@pytest.mark.parametrize("launcher", ["slurm", "local", "ray"])
def test_a_root_that_a_shell_would_read_is_quoted(tmp_path: Path, capsys: pytest.CaptureFixture[str], launcher: str) -> None:
    root = tmp_path / "my $(touch owned) 'runs' ; touch owned"
    words = ["launcher.ray.local=true"] if launcher == "ray" else []
    config = compose([*BASE, f"launcher={launcher}", *words])
    start.show_launch(replace(config, run=replace(config.run, root=str(root))))
    text = capsys.readouterr().out
    assert shlex.quote(str(root / "run")) in text
    # Everything is there but what it starts.
    stub = "python() { :; }; srun() { :; }; scontrol() { :; }; set +u; "
    subprocess.run(
        ["bash", "-c", f"{stub} export PATH=/nowhere SLURM_JOB_ID=1\n{text}"],
        cwd=tmp_path,
        capture_output=True,
        timeout=ENDS_S,
        check=False,
    )
    assert not (tmp_path / "owned").exists()


def test_long_and_odd_values_of_a_sweep_make_identifiers() -> None:
    points = expand(["+experiment=quickstart", "data.prefixes=[" + "a" * 400 + "],[../b]", "train.seed=0,1"])
    for point in points:
        check_identifier("run.id", as_identifier(f"base-{point.suffix}"))
    assert len({as_identifier(f"base-{point.suffix}") for point in points}) == 4


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir(mode=0o755)
    (folder / "chapter.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"run\.id: found .*thesis, a directory without run\.yaml that holds 'chapter\.tex'"):
        make_run_dir(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755 and os.listdir(folder) == ["chapter.tex"]
    with pytest.raises(ConfigError, match="which is no directory"):
        make_run_dir(folder / "chapter.tex")
    # A start that was cut off before run.yaml was written.
    (tmp_path / "cut").mkdir()
    for name in ("logs", ".lock-of-somebody"):
        (tmp_path / "cut" / name).mkdir()
    make_run_dir(tmp_path / "cut")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run_dir = tmp_path / "runs" / "run"
    make_run_dir(run_dir)
    store_config(run_dir, compose(BASE))
    (run_dir / "logs" / "attempt-1").mkdir()
    return run_dir


def write_failure(run_dir: Path, log: str) -> None:
    failure = Failure(rank=0, message="\x1b[2Jgone", traceback="\x1b]0;x\x07", log=log)
    attempt = Attempt(number=1, started=1.0, ended=2.0, exit_code=1, failure=failure)
    write_state(run_dir, replace(new_state(world_size=1, revision=1, attempts=(attempt,)), state="failed", exit_code=1))


@pytest.mark.parametrize("kind", ["absolute", "parent", "link"])
def test_a_log_path_stays_inside_the_run(run_dir: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    secret = run_dir.parent.parent / "secret"
    secret.write_text("mellon")
    (run_dir / "logs" / "link").symlink_to(secret)
    (run_dir / "logs" / "attempt-1" / "rank-0.log").symlink_to(secret)
    write_failure(run_dir, {"absolute": str(secret), "parent": "../../secret", "link": "logs/link"}[kind])
    assert main(["logs", str(run_dir)]) == 93
    output = capsys.readouterr()
    assert "mellon" not in output.out + output.err and "state.json: found a log elsewhere" in output.err


def test_what_is_printed_of_a_run_has_no_escapes(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_failure(run_dir, "logs/attempt-1/rank-0.log")
    (run_dir / "logs" / "attempt-1" / "rank-0.log").write_bytes(b"one\x1b[31m\n\x9b2J\xc2\x9b\rtwo\n")
    (run_dir / "checkpoints" / "step-00000001").mkdir(parents=True)
    (run_dir / "checkpoints" / "step-00000001" / "COMMIT").write_text('{"format": "\x1b[1m"}')
    (run_dir / "metrics.jsonl").write_text(json.dumps({"event": "checkpoint_failed", "step": 1, "error": "\x1b[5m"}) + "\n")
    for words in (["status"], ["logs"], ["checkpoints"], ["status", "--json"], ["checkpoints", "--json"]):
        main([words[0], str(run_dir), *words[1:]])
    output = capsys.readouterr()
    assert not {"\x1b", "\x9b", "\r", "\x07"} & set(output.out + output.err)
    assert "one\\x1b[31m" in output.out and "\\x1b[2Jgone" in output.out
    run_state = read_state(run_dir)
    assert run_state is not None and run_state.failure is not None and run_state.failure.message == "\\x1b[2Jgone"


def test_paths_and_file_names(tmp_path: Path) -> None:
    for path in ("", " ", "a\nb"):
        with pytest.raises(ConfigError):
            check_path("run.root", path)
    check_text("key", "caf\u00e9 -- ok")
    assert [is_file_name(name) for name in ("a.bin", "..", ".", "", "a/b", "/a", "a\0b")] == [True, *[False] * 6]
    assert inside(tmp_path, "a/b") == tmp_path / "a" / "b"
    for name in ("../x", "/etc/passwd", "a/../../x", "a\0b"):
        with pytest.raises(ValueError, match="leads out of"):
            inside(tmp_path, name)
