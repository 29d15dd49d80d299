"""Standard output that is full, gone, slow, stopped or closed, and text that a terminal would act on: no run ends with them."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from efflaunch.launcher import output
from efflaunch.launcher.cli import main
from efflaunch.launcher.output import BackgroundFile, LenientFile, PlainText, SteadyOutput, lenient_file, lenient_text
from efflaunch.launcher.run_watcher import Guard
from efflaunch.launcher.rundir.notices import NOTICES_FILE, Notices, read_notices
from efflaunch.tests.launcher.runs import environment
from efflaunch.utils.text import plain, plain_data, typed


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for fd in (reader, writer):
        try:
            os.close(fd)
        except OSError as error:
            assert error.errno == errno.EBADF


def test_a_full_disk_loses_lines_and_says_so_once() -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        file = LenientFile(full.fileno(), "standard output")
        text = lenient_text(full.fileno(), "standard output")
        for line in ("one\n", "two\n"):
            assert file.write(line.encode()) == 4
            print(line, file=text, end="", flush=True)
        assert (file.lost, file.trouble) == (8, "standard output cannot be written (No space left on device)")


def test_a_reader_that_is_gone(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    file = BackgroundFile(writer, "standard output")
    steady = SteadyOutput([file], [])
    file.write(b"one\n")
    assert file.drain(10) and os.read(reader, 100) == b"one\n" and steady.news() == []
    os.close(reader)
    file.write(b"two\n")
    file.drain(10)
    assert file.is_gone and steady.news() == ["standard output is gone (Broken pipe)"] and steady.news() == []
    file.write(b"three\n")
    assert file.lost == len(b"two\nthree\n") and file.drain(0)


def test_a_reader_that_stopped_delays_nobody_and_gets_what_fits(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    file = BackgroundFile(writer, "standard output")
    line = b"x" * 999 + b"\n"
    for _ in range(2 * output.MAX_PENDING // len(line)):
        file.write(line)
    assert file.lost and file.trouble == "standard output is not read fast enough: lines are left out"
    assert not file.drain(0.05)
    num_read, wanted = 0, 2 * output.MAX_PENDING // len(line) * len(line) - file.lost
    while num_read < wanted:
        num_read += len(os.read(reader, 1 << 16))
    assert file.drain(10) and num_read == wanted


def test_one_that_takes_nothing_is_said_not_to_read(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "STUCK_S", 0.0)
    file = BackgroundFile(pipe[1], "standard output")
    file.write(b"x" * (1 << 17))
    time.sleep(0.01)
    assert SteadyOutput([file], []).news() == ["standard output has not been read for 0 s"]


def test_a_forked_process_writes_for_itself(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    file = BackgroundFile(writer, "standard output")
    with file._changed:
        pid = os.fork()
        if pid == 0:
            file.write(b"child")
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0 and os.read(reader, 100) == b"child"


def test_a_full_file_does_not_end_who_writes_lines_to_it(tmp_path: Path) -> None:
    with lenient_file(Path("/dev/full")) as keep:
        keep("lost")
    with lenient_file(tmp_path / "file") as keep:
        keep("caf\u00e9")
    assert (tmp_path / "file").read_bytes() == "caf\u00e9\n".encode()


def test_what_a_terminal_would_act_on_is_spelled_out() -> None:
    assert plain("loss\t1\n\x1b]0;title\x07 \x9b2J \u202eevil\r") == "loss\t1\n\\x1b]0;title\\x07 \\x9b2J \\u202eevil\\r"
    assert plain("caf\u00e9 \U0001f600") == "caf\u00e9 \U0001f600" and plain("\udcff") == "\\udcff"
    assert plain_data({"a\x1b": ["\x00", 1, None, {"b": "\x7f"}]}) == {"a\\x1b": ["\\x00", 1, None, {"b": "\\x7f"}]}
    stream = io.StringIO()
    print("\x1b[31mred", file=PlainText(stream))  # type: ignore[call-overload]
    assert stream.getvalue() == "\\x1b[31mred\n"


def test_commands_to_type_are_quoted() -> None:
    assert typed("resume", Path("runs/it"), "train.steps=4") == "efflaunch resume runs/it train.steps=4"
    assert typed("status", Path("my runs/$(id)")) == "efflaunch status 'my runs/$(id)'"


def test_notices_are_kept_and_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    notices, since = Notices(tmp_path, tmp_path / "logs" / "agent.log"), time.time()
    notices.add("told to stop \x1b[2J")
    with (tmp_path / NOTICES_FILE).open("a") as file:
        file.write('{"time": 1, "text": "old"}\n{"time": 99')
    assert [notice["text"] for notice in read_notices(tmp_path, since)] == ["told to stop \\x1b[2J"]
    assert "efflaunch: told to stop" in (tmp_path / "logs" / "agent.log").read_text()
    Notices(tmp_path / "nowhere", tmp_path / "nowhere" / "log").add("not kept")


def test_what_fails_in_showing_a_run_is_noted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    calls: list[int] = []

    def look() -> None:
        calls.append(1)
        raise KeyError("loss")

    guard = Guard("the display", Notices(tmp_path, tmp_path / "logs" / "agent.log"))
    assert guard(lambda: 7) == 7 and guard(look) is None and guard(look) is None
    assert len(calls) == 1 and capsys.readouterr().err == "efflaunch: the display failed (KeyError: 'loss'): training continues without\n"
    assert "Traceback" in (tmp_path / "logs" / "agent.log").read_text() and "Traceback" not in (tmp_path / NOTICES_FILE).read_text()
    lock_guard = Guard("the lock", Notices(tmp_path, tmp_path / "logs" / "agent.log"), tries_again=True)
    assert lock_guard(look) is None and lock_guard(look) is None and len(calls) == 3 and lock_guard(lambda: 7) == 7


CLOSED = "import os, sys; os.closerange(0, 3); os.execv(sys.executable, [sys.executable, '-m', 'efflaunch', *sys.argv[1:]])"


def test_streams_that_were_closed_are_no_files_of_ours(tmp_path: Path) -> None:
    """Descriptor 1 would else be the next file that is opened, and what is printed would go there."""
    done = subprocess.run([sys.executable, "-c", CLOSED, "--version"], env=environment(), cwd=tmp_path, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize(("target", "code"), [("/dev/full", 1), (None, 0)])
def test_a_command_that_only_prints_says_when_it_cannot(tmp_path: Path, target: str | None, code: int) -> None:
    """Where the disk is full that is an error; a reader that is gone (None) had what it wanted."""
    command = [sys.executable, "-m", "efflaunch", "--help"]
    if target is None:
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(target, os.O_WRONLY)
    done = subprocess.run(command, env=environment(), cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    said = "efflaunch: what it prints cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (code, said if code else "")


def test_errors_carry_no_escapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path / "\x1b[31mrun")]) == 93
    errors = capsys.readouterr().err
    assert "\x1b" not in errors and "\\x1b[31mrun" in errors
    assert main(["train", "\x1b]0;x\x07=1"]) == 93 and "\x1b" not in "".join(capsys.readouterr())


def test_json_stays_json(tmp_path: Path) -> None:
    stream = io.StringIO()
    print(json.dumps({"a": "\x1b"}), file=PlainText(stream))  # type: ignore[call-overload]
    assert json.loads(stream.getvalue()) == {"a": "\x1b"}
