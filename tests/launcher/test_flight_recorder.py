"""NCCL's flight recorder is switched on for ranks with a GPU, and asked for its dump when they hang. A stand-in answers as torch does."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from efflaunch.launcher.agent import flight_recorder
from efflaunch.launcher.agent.flight_recorder import FlightRecorder, recorder_of
from efflaunch.launcher.agent.hang_watch import HangWatch
from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.env import recorder_variables
from efflaunch.tests.limits import ENDS_S, wait_until

RECORDER = """
import os, sys, time
dump, stem, rank = os.environ["TORCH_FR_DUMP_TEMP_FILE"], os.environ["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"], sys.argv[1]
pipe = f"{stem}{rank}.pipe"
os.mkfifo(pipe)
file = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
while not os.read(file, 128):
    time.sleep(0.05)
with open(dump + rank, "wb") as out:
    out.write(b"entries")
time.sleep(600)
"""
"""What ProcessGroupNCCL does in a thread of its own, once for each rank."""


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that end with the test."""
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait(ENDS_S)


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("TORCH_NCCL_", "TORCH_FR_"))]:
        monkeypatch.delenv(name)


def start(recorder: FlightRecorder, rank: int) -> subprocess.Popen[bytes]:
    """A rank with a recorder, as soon as it listens."""
    process = subprocess.Popen([sys.executable, "-c", RECORDER, str(rank)], env={**os.environ, **recorder.variables()})
    wait_until(recorder._pipe(rank).exists)
    return process


def test_what_is_set_and_what_the_user_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert recorder_variables("logs/nccl-") == {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": "logs/nccl-",
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": "logs/nccl-",
    }
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "0")
    monkeypatch.setenv("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "/elsewhere/rank-")
    assert recorder_variables("logs/nccl-") == {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}


def test_torch_takes_these_names() -> None:
    """A name that a later torch dropped would switch nothing on, in silence."""
    import torch

    headers = Path(torch.__file__).parent / "include" / "torch" / "csrc" / "distributed" / "c10d"
    text = "".join((headers / name).read_text() for name in ("FlightRecorder.hpp", "ProcessGroupNCCL.hpp"))
    with (Path(torch.__file__).parent / "lib" / "libtorch_cpu.so").open("rb") as file:
        library = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        missing = [name for name in recorder_variables("") if name not in text and library.find(name.encode()) < 0]
    assert missing == [] and 'c10::str(fileStem, rank, ".pipe")' in text


def test_only_ranks_with_a_gpu_have_one(tmp_path: Path) -> None:
    assert recorder_of(compose(["+experiment=quickstart"]), tmp_path, range(2)) is None
    recorder = recorder_of(compose(["+experiment=llama8b_1M"]), tmp_path, range(8))
    assert recorder is not None and recorder.dump_file(3) == tmp_path / "nccl-3"


def test_without_named_pipes_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(flight_recorder.os, "mkfifo", refused)
    recorder = FlightRecorder(tmp_path, range(1))
    assert "TORCH_NCCL_DEBUG_INFO_PIPE_FILE" not in recorder.variables() and recorder.variables()["TORCH_FR_DUMP_TEMP_FILE"]
    assert recorder.dump([0]) == frozenset()


def test_ranks_that_listen_write_their_dumps(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    recorder = FlightRecorder(tmp_path, range(4, 7), answer_s=ENDS_S)
    started += [start(recorder, 4), start(recorder, 6)]
    assert list(tmp_path.glob(".*")) == [], "the trial is gone"
    assert recorder.dump([4, 5, 6]) == {4, 6}
    assert recorder.dump_file(6).read_bytes() == b"entries"
    recorder.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nccl-4", "nccl-6"]


def test_one_that_does_not_answer_is_not_waited_for_long(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path, range(1), answer_s=0.1)
    os.mkfifo(recorder._pipe(0))
    reader = os.open(recorder._pipe(0), os.O_RDONLY | os.O_NONBLOCK)
    assert recorder.dump([0]) == frozenset()
    assert os.read(reader, 128) == b"1"
    os.close(reader)


def test_the_dump_is_named_with_the_stacks_of_a_hang(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    logs = tmp_path / "logs" / "attempt-1"
    logs.mkdir(parents=True)
    recorder = FlightRecorder(logs, range(1), answer_s=ENDS_S)
    started.append(start(recorder, 0))
    launcher = compose(["+experiment=quickstart"]).launcher
    with closing(HangWatch(tmp_path, 1, range(1), launcher, None, recorder=recorder)) as watch:
        failure = watch._investigate({0: started[0].pid}, asked=False)
    assert failure.message.endswith("logs/attempt-1/stacks-*.txt, collectives by NCCL's flight recorder: logs/attempt-1/nccl-*")
    assert "== NCCL's flight recorder ==\nnccl-0, beside this file" in (logs / "stacks-0.txt").read_text()
    assert not recorder._pipe(0).exists()
