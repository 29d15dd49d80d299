"""Inspects a process from outside: its state and kernel stack from /proc, its stacks from py-spy where that is installed."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .hang_verdict import Frame

_PR_SET_PTRACER = 0x59616D61
_SPY_S = 60.0
"""Seconds for all ranks of a node together: the first look at large libraries takes its time."""
_STATUS = (
    "Name",
    "State",
    "Threads",
    "VmRSS",
    "SigPnd",
    "ShdPnd",
    "SigBlk",
    "SigCgt",
    "voluntary_ctxt_switches",
    "nonvoluntary_ctxt_switches",
)
_SPIED = re.compile(r"^    (.+) \((.+):(\d+)\)$")
NOT_INSTALLED = (
    "py-spy is not installed: no native frames, and no stacks of a process that cannot write them (pip install 'efflaunch[watch]')"
)


def process_state(pid: int) -> str:
    """Read a process's state by the kernel, as `S (sleeping)` or `T (stopped)`; empty where unknown."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("State:")), "")


def kernel_view(pid: int) -> str:
    """Status, where each thread sleeps in the kernel, and (for root) the main thread's kernel stack."""
    root = Path(f"/proc/{pid}")
    if not root.is_dir():
        return "none: no /proc here, or the process is gone"
    lines = [line for line in _read(root / "status").splitlines() if line.partition(":")[0] in _STATUS]
    threads = sorted((root / "task").iterdir(), key=lambda path: int(path.name)) if (root / "task").is_dir() else []
    lines += [f"thread {task.name} ({_read(task / 'comm').strip()}): wchan {_read(task / 'wchan').strip() or '?'}" for task in threads]
    stack = _read(root / "stack")
    return "\n".join([*lines, "kernel stack of the main thread:", stack])


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError as error:
        return f"not readable: {error.strerror}"


@dataclass(frozen=True, slots=True)
class Spied:
    """Stacks that py-spy took, by rank."""

    texts: dict[int, str]
    frames: dict[int, tuple[Frame, ...]]
    """Frames of the main thread, innermost first; only of ranks whose stack py-spy got."""


def native_stacks(pids: Mapping[int, int]) -> Spied:
    """py-spy's view of every rank, at the same time. A stopped process is read as it lies, without native frames."""
    spy = find_spy()
    if spy is None:
        return Spied(dict.fromkeys(pids, NOT_INSTALLED), {})
    started = {rank: _start(spy, pid) for rank, pid in pids.items()}
    texts = {rank: _finish(process) for rank, process in started.items()}
    return Spied(texts, {rank: frames for rank, text in texts.items() if (frames := spied_frames(text))})


def permit_tracing(agent_pid: int) -> None:
    """Let the agent's children (py-spy) look into this process where Yama allows parents only. Linux; a no-op elsewhere."""
    try:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PTRACER, agent_pid, 0, 0, 0)
    except (OSError, AttributeError):
        pass


def find_spy() -> str | None:
    """Return the path of py-spy, beside this Python or on PATH; None where it is not installed."""
    beside = Path(sys.executable).with_name("py-spy")
    return str(beside) if beside.is_file() else shutil.which("py-spy")


def _start(spy: str, pid: int) -> subprocess.Popen[str]:
    how = "--nonblocking" if process_state(pid).startswith(("T", "t")) else "--native"
    command = [spy, "dump", how, "--full-filenames", "--pid", str(pid)]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )


def _finish(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=_SPY_S)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0] + f"\npy-spy gave no answer within {_SPY_S:g} s"


def spied_frames(text: str) -> tuple[Frame, ...]:
    """The main thread's Python frames in py-spy's text."""
    _, separator, rest = text.partition('"MainThread"')
    if not separator:
        return ()
    lines = rest.splitlines()[1:]
    end = next((index for index, line in enumerate(lines) if not line.startswith("    ")), len(lines))
    matches = [match for line in lines[:end] if (match := _SPIED.match(line)) and match[2].endswith(".py")]
    return tuple(Frame(match[2], int(match[3]), match[1]) for match in matches)
