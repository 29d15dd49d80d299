"""`efflaunch logs --follow`: what is there, what comes, later attempts, the end; on every backend."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from efflaunch.launcher.backend import Standing
from efflaunch.launcher.backend_registry import launcher_of
from efflaunch.launcher.cli import main
from efflaunch.launcher.commands import follow_logs as module
from efflaunch.launcher.commands.follow_logs import LogFollower, follow
from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.rundir import state
from efflaunch.launcher.rundir.run_dir import attempt_dir, make_run_dir, store_config
from efflaunch.launcher.rundir.state import Attempt, Failure, new_state, write_state


def append(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(text)


def test_whole_lines_under_the_name_of_their_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    follower = LogFollower(2)
    append(one, "a\nb\nc\nhal")
    follower.look([one, two])
    assert capsys.readouterr().out == f"== {one}\nb\nc\n"
    append(one, "f\n")
    append(two, "from its beginning\nsecond\nthird\n")
    follower.look([one, two])
    assert capsys.readouterr().out == f"half\n\n== {two}\nfrom its beginning\nsecond\nthird\n"
    follower.look([one, two])
    assert capsys.readouterr().out == ""
    append(two, "no end")
    follower.look([one, two], last=True)
    assert capsys.readouterr().out == "no end\n"
    two.write_text("anew\n")
    two.with_name("one").unlink()
    follower.look([one, two])
    assert capsys.readouterr().out == "anew\n"


def test_lines_longer_than_a_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "_MAX_READ", 4)
    append(tmp_path / "log", "ab\n" + "c" * 9 + "\nd\n")
    follower = LogFollower(0)
    follower.look([])
    follower.look([tmp_path / "log"])
    out = capsys.readouterr().out
    assert out.replace("\n", "") == f"== {tmp_path}/logab" + "c" * 9 + "d"


def test_what_was_written_before_the_end_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = [False]

    def is_over() -> bool:
        if ended[0]:
            append(tmp_path / "log", "in time")
        return ended[0]

    def pause() -> None:
        ended[0] = True

    append(tmp_path / "log", "first\n")
    follow(lambda: [tmp_path / "log"], is_over, num_lines=5, pause=pause)
    assert capsys.readouterr().out == f"== {tmp_path}/log\nfirst\nin time\n"


PLACES = {"local": "logs/agent.log", "slurm": "slurm/17.out", "ray": "ray/here-1.out"}


def run_with(tmp_path: Path, backend: str, attempts: tuple[Attempt, ...], what: str = state.RUNNING) -> Path:
    run_dir = tmp_path / "run"
    if not run_dir.exists():
        make_run_dir(run_dir)
        launcher = "launcher=ray launcher.ray.local=true" if backend == "ray" else f"launcher={backend}"
        store_config(run_dir, compose(["+experiment=quickstart", "run.id=run", *launcher.split()]))
        if backend == "ray":
            append(run_dir / "ray" / "job.json", json.dumps({"job": "here-1", "address": "", "number": 1}))
    write_state(run_dir, replace(new_state(world_size=2, revision=1, attempts=attempts), state=what))
    return run_dir


@pytest.mark.parametrize("backend", PLACES)
def test_a_run_is_followed_over_a_restart_to_its_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], backend: str
) -> None:
    first = Attempt(number=1, started=1.0)
    run_dir = run_with(tmp_path, backend, (first,))
    failure = Failure(rank=1, message="rank 1 fell", traceback="trace", log="logs/attempt-2/rank-1.log", exit_code=1)
    append(run_dir / PLACES[backend], "agent speaks\n")
    append(attempt_dir(run_dir, 1) / "rank-0.log", "old\nolder\n")
    append(attempt_dir(run_dir, 1) / "rank-1.log", "not asked for\n")

    def events() -> Iterator[None]:
        append(attempt_dir(run_dir, 1) / "rank-0.log", "step 1\n")
        yield
        append(attempt_dir(run_dir, 2) / "rank-0.log", "the second attempt\n")
        append(attempt_dir(run_dir, 2) / "rank-1.log", "its whole log\n")
        run_with(tmp_path, backend, (first, replace(first, number=2)))
        for _ in range(2 * module._TURNS):
            yield
        append(run_dir / PLACES[backend], "agent ends\n")
        run_with(tmp_path, backend, (first, replace(first, number=2, ended=2.0, failure=failure)), state.FAILED)
        while True:
            yield

    script = events()
    monkeypatch.setattr(module.time, "sleep", lambda seconds: next(script))
    kind = type(launcher_of(compose(["+experiment=quickstart", f"launcher={backend}"]).launcher.backend))
    monkeypatch.setattr(kind, "status", lambda launcher, run_dir, run_state: Standing(state=run_state.state))
    assert main(["logs", str(run_dir), "--follow", "--lines", "1"]) == 0
    out = capsys.readouterr().out
    expected = ["agent speaks", "older", "step 1", "the second attempt", "agent ends", "its whole log", "first failure: rank 1 fell"]
    assert [line for line in out.splitlines() if line in expected] == expected
    assert "\nold\n" not in out and "not asked for" not in out and f"== {run_dir}/logs/attempt-2/rank-1.log, in full" in out


def test_a_run_that_has_ended_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = run_with(tmp_path, "local", (Attempt(number=1, started=1.0, ended=2.0, exit_code=0),), state.DONE)
    append(attempt_dir(run_dir, 1) / "rank-0.log", "words")
    monkeypatch.setattr(module.time, "sleep", lambda seconds: pytest.fail("it waits"))
    assert main(["logs", str(run_dir), "-f"]) == 0
    assert capsys.readouterr().out == f"== {run_dir}/logs/attempt-1/rank-0.log\nwords\n"


def test_ctrl_c_ends_the_command_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = run_with(tmp_path, "local", (Attempt(number=1, started=1.0),))

    def press(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.time, "sleep", press)
    monkeypatch.setattr("efflaunch.launcher.local.is_locked", lambda run_dir: True)
    assert main(["logs", str(run_dir), "-f"]) == 0 and capsys.readouterr().err == ""
