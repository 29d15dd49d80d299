"""Beats between processes, and stacks on demand."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from efflaunch.tests.limits import wait_until
from efflaunch.utils import heartbeat as pulse
from efflaunch.utils.heartbeat import Heartbeat, HeartbeatBoard, attach, catches, read_beat


def test_a_beat_comes_back_as_it_was_said() -> None:
    memory = bytearray(512)
    rank = Heartbeat(memory, 256)
    assert read_beat(memory, 256) is None and read_beat(memory, 0) is None
    rank.begin_step(7, expected_s=1.5)
    rank.at("backward", 3)
    beat = read_beat(memory, 256)
    assert beat is not None and (beat.count, beat.step, beat.layer, beat.expected_s) == (2, 7, 3, 1.5)
    assert not beat.is_long and beat.thread == threading.get_ident() and str(beat) == "backward of layer 3, after step 7"


def test_long_phases_end() -> None:
    rank = Heartbeat(memory := bytearray(256))
    rank.begin_step(0, expected_s=0.0, is_long=True)
    rank.at("forward", 0)
    assert read_beat(memory).is_long  # type: ignore[union-attr]
    rank.begin_step(1, expected_s=0.0)
    with pytest.raises(RuntimeError), rank.long("saving"):
        rank.at("something inside")
        assert read_beat(memory).is_long  # type: ignore[union-attr]
        raise RuntimeError
    assert not read_beat(memory).is_long  # type: ignore[union-attr]


def test_half_a_beat_is_no_beat() -> None:
    rank = Heartbeat(memory := bytearray(256))
    rank.at("forward")
    memory[0] += 1
    assert read_beat(memory) is None


def test_long_names_are_cut() -> None:
    rank = Heartbeat(memory := bytearray(256))
    rank.at("x" * 200)
    assert read_beat(memory).phase == "x" * 64  # type: ignore[union-attr]


def _rank(place: str, local_rank: int, ready: Path) -> None:
    mine = attach(place, local_rank)
    mine.begin_step(local_rank, expected_s=0.0)
    ready.touch()
    time.sleep(600)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_beats_and_writes_its_stacks(tmp_path: Path, method: str) -> None:
    if method == "spawn" and not Path("/proc/self/fd").is_dir():
        pytest.skip("descriptors of another process cannot be opened here")
    board, context = HeartbeatBoard(2), multiprocessing.get_context(method)
    code = (
        "import sys; from pathlib import Path; sys.path[:0] = sys.argv[4:]; from efflaunch.tests.test_pulse import _rank; "
        "_rank(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))"
    )
    if method == "fork":
        process = context.Process(target=_rank, args=(board.place(), 1, tmp_path / "ready"), daemon=True)
        process.start()
    else:
        process = subprocess.Popen([sys.executable, "-c", code, board.place(), "1", str(tmp_path / "ready"), *sys.path])
    try:
        wait_until((tmp_path / "ready").exists)
        beat = board.beat(1)
        assert beat is not None and beat.step == 1 and board.beat(0) is None
        assert process.pid is not None and catches(process.pid, pulse.STACKS_SIGNAL)
        os.kill(process.pid, pulse.STACKS_SIGNAL)
        wait_until(lambda: "in _rank" in board.stacks(1))
        assert f"0x{beat.thread:016x}" in board.stacks(1) and board.stacks(0) == ""
    finally:
        process.kill()
        process.join() if method == "fork" else process.wait()  # type: ignore[union-attr]
        board.close()


def test_a_process_that_does_not_listen_is_not_signalled() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        assert not catches(process.pid, pulse.STACKS_SIGNAL)
    finally:
        process.kill()
        process.wait()
    assert not catches(process.pid, pulse.STACKS_SIGNAL)
    assert pulse.STACKS_SIGNAL not in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
