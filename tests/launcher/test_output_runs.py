"""Runs whose terminal or output goes away: training continues, or saves and exits 75, and the reason is in the log and in status."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

from efflaunch.launcher.commands import status as status_command
from efflaunch.launcher.rundir.metrics_index import newest_step
from efflaunch.launcher.rundir.metrics_reader import checkpoint_steps
from efflaunch.launcher.rundir.state import read_state
from efflaunch.tests.launcher.runs import BASE, HERE, environment
from efflaunch.tests.limits import ENDS_S, wait_until

COMMAND = [sys.executable, str(HERE / "drive.py"), "train", *BASE[:-1], "run.id=run"]


def start(directory: Path, *words: str, stdout: int, stderr: int, **more: object) -> subprocess.Popen[bytes]:
    variables = environment() | {"FAKE_STEP_S": "0.02"}
    return subprocess.Popen([*COMMAND, *words], cwd=directory, env=variables, stdout=stdout, stderr=stderr, **more)  # type: ignore[call-overload,no-any-return]


def test_a_terminal_that_is_closed(tmp_path: Path) -> None:
    """With the live display, which draws and sets the terminal up."""
    run_dir, (mine, its) = tmp_path / "runs" / "run", pty.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    words = ("logging.display=live", "train.steps=100000")
    run = start(tmp_path, *words, stdin=its, stdout=its, stderr=its, start_new_session=True, preexec_fn=take_terminal)
    os.close(its)
    try:
        # Not read: a terminal that is stopped (Ctrl-S) looks the same from here.
        wait_until(lambda: newest_step(run_dir) >= 4 or run.poll() is not None)
        assert run.poll() is None
        os.close(mine)
        assert run.wait(ENDS_S) == 75
    finally:
        run.kill()
        run.wait()
    assert checkpoint_steps(run_dir)[-1] == newest_step(run_dir)
    facts = status_command.status(run_dir)
    assert facts["state"] == "preempted" and facts["exit_code"] == 75
    texts = [notice["text"] for notice in facts["notices"]]
    assert "told to save and stop by SIGHUP: its terminal was closed" in texts
    assert all(text in (run_dir / "logs" / "agent.log").read_text() for text in texts)


IN_BACKGROUND = """
import fcntl, os, subprocess, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
modes = termios.tcgetattr(0)
termios.tcsetattr(0, termios.TCSANOW, [*modes[:3], modes[3] | termios.TOSTOP, *modes[4:]])
assert os.tcgetpgrp(0) == os.getpgrp()
run = subprocess.Popen(sys.argv[1:], process_group=0)
_, status = os.waitpid(run.pid, os.WUNTRACED)
if os.WIFSTOPPED(status):
    run.kill()
    sys.exit(99)
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""A shell with a terminal on which background jobs may not write (`stty tostop`), and the run as one of them."""


def test_a_job_in_the_background_of_a_terminal_it_may_not_write_to(tmp_path: Path) -> None:
    """The kernel stops who writes there (SIGTTOU); a run that is stopped trains nothing."""
    mine, its = pty.openpty()
    command = [sys.executable, "-c", IN_BACKGROUND, *COMMAND, "logging.display=plain", "train.steps=6"]
    shell = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdin=its, stdout=its, stderr=its, start_new_session=True)
    os.close(its)
    shown = b""
    try:
        while data := _read_terminal(mine):
            shown += data
    finally:
        os.close(mine)
    assert shell.wait(ENDS_S) == 0, shown
    assert b"step 6/6" in shown and newest_step(tmp_path / "runs" / "run") == 6


def _read_terminal(fd: int) -> bytes:
    """What was written to a terminal; nothing once nobody has it open any more."""
    try:
        return os.read(fd, 4096)
    except OSError:
        return b""


def test_output_that_nobody_reads_and_errors_that_fill_a_disk(tmp_path: Path) -> None:
    """A pipe whose reader left after the first line (`| head -1`), and a log on a full disk."""
    reader, writer = os.pipe()
    with open("/dev/full", "wb") as full:
        run = start(tmp_path, "train.steps=12", stdout=writer, stderr=full.fileno())
    os.close(writer)
    assert os.read(reader, 1)
    os.close(reader)
    assert run.wait(ENDS_S) == 0
    run_dir = tmp_path / "runs" / "run"
    state = read_state(run_dir)
    assert state is not None and (state.state, state.exit_code, newest_step(run_dir)) == ("done", 0, 12)
    lines = "\n".join(status_command.describe(status_command.status(run_dir), run_dir))
    assert "notice      standard output is gone (Broken pipe); the run continues" in lines
    assert json.loads((run_dir / "logs" / "notices.jsonl").read_text().splitlines()[0])["time"] >= state.started
