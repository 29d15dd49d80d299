"""An agent's eye on its ranks: looks at their beats, has them write their stacks, finds out with the other agents who is to blame.

Files of an attempt, written only when they are needed: `stacks-R.txt` for each rank of a hang, `nccl-R` where NCCL's flight recorder
answers (flight_recorder.py), `hang.json` (what was found, by
whichever agent is last: all find the same) and `pulse-N.json` for node N while something looks stuck, which `efflaunch status` shows.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from ...utils.heartbeat import STACKS_SIGNAL, Beat, HeartbeatBoard, catches
from ...utils.text import plain_data
from ..config.run_config import LauncherConfig
from ..rundir.run_dir import attempt_dir
from ..rundir.small_files import read_json, write_if_room
from ..rundir.state import Failure
from .flight_recorder import PREFIX, FlightRecorder
from .hang_verdict import Frame, Limits, RankFacts, Silences, blame, describe_hang, parse_stacks, short_file, training_frames
from .procfs import kernel_view, native_stacks, process_state

_ANSWER_S = 5.0
"""Seconds a rank may take to write its Python stacks."""
_REWRITE_S = 10.0
"""Between two words on who is silent."""
_MAIN = ("launcher/agent/worker.py", "main")
HANG_FILE = "hang.json"


class Others(Protocol):
    """The agents of the other nodes of the run."""

    def asked(self) -> bool:
        """Return whether another agent has detected a hang and asks for stacks."""
        ...

    def ask(self) -> None:
        """Have all of them write stacks, and answer."""
        ...

    def exchange(self, mine: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[int]]:
        """Return the answers of all nodes, this one's too, and the nodes that gave none in time."""
        ...


class HangWatch:
    """Detects hangs among one node's ranks during one attempt. To be closed."""

    def __init__(
        self,
        run_dir: Path,
        number: int,
        ranks: range,
        config: LauncherConfig,
        others: Others | None,
        *,
        recorder: FlightRecorder | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run_dir, self._number, self._ranks, self._others, self._recorder = run_dir, number, ranks, others, recorder
        self._limits, self._clock = limits_of(config), clock
        self._board = HeartbeatBoard(len(ranks))
        self._silences = Silences()
        self._quiet_written_at: float | None = None

    def place(self) -> str:
        """Return the address by which the ranks attach to the heartbeat board."""
        return self._board.place()

    def close(self) -> None:
        self._board.close()
        if self._recorder is not None:
            self._recorder.close()

    def look(self, pids: Mapping[int, int]) -> Failure | None:
        """The failure of the attempt, where its ranks hang; `pids` of those that run. Takes a while only when they do."""
        now = self._clock()
        self._silences.look({rank: self._board.beat(self._local(rank)) for rank in self._ranks}, now)
        self._write_stuck(now)
        asked = self._others is not None and self._others.asked()
        if not asked and not self._silences.hang(self._limits):
            return None
        return self._investigate(pids, asked=asked)

    def _investigate(self, pids: Mapping[int, int], *, asked: bool) -> Failure:
        if self._others is not None and not asked:
            self._others.ask()
        facts = self._dump(pids)
        missing: list[int] = []
        allowance_s = self._silences.allowance_s(self._limits)
        if self._others is not None:
            answers, missing = self._others.exchange([_packed(fact) for fact in facts])
            facts = sorted((_unpacked(answer) for answer in answers), key=lambda fact: fact.rank)
        blamed = blame(facts)
        first = blamed.ranks[0] if blamed.ranks else facts[0].rank
        logs = attempt_dir(Path(), self._number)
        stacks = str(logs / "stacks-*.txt")
        if any(fact.recorded for fact in facts):
            stacks += f", collectives by NCCL's flight recorder: {logs / PREFIX}*"
        message = describe_hang(facts, blamed, allowance_s=allowance_s, missing=missing, stacks=stacks)
        stack = next((_text(fact) for fact in facts if fact.rank == first), "")
        failure = Failure(rank=first if blamed.ranks else -1, message=message, traceback=stack, log=str(logs / _stacks_name(first)))
        write_if_room(self._run_dir / logs / HANG_FILE, asdict(failure))
        return failure

    def _local(self, rank: int) -> int:
        return rank - self._ranks.start

    def _write_stuck(self, now: float) -> None:
        """Write pulse-N.json while something looks stuck, and once more when it makes progress again."""
        quiet = self._silences.quiet(self._limits)
        if not quiet and self._quiet_written_at is None:
            return
        if quiet and self._quiet_written_at is not None and now - self._quiet_written_at < _REWRITE_S:
            return
        self._quiet_written_at = now if quiet else None
        rows = [
            {"rank": rank, "silent_s": round(self._silences.silent_s[rank], 1), "doing": str(self._silences.beats[rank] or "starting")}
            for rank in self._ranks
        ]
        node = self._ranks.start // len(self._ranks)
        value = {"time": time.time(), "host": socket.gethostname(), "allowed_s": self._silences.allowance_s(self._limits), "ranks": rows}
        write_if_room(attempt_dir(self._run_dir, self._number) / f"pulse-{node}.json", value | {"stuck": quiet})

    def _dump(self, pids: Mapping[int, int]) -> list[RankFacts]:
        """stacks-R.txt of every rank of this node."""
        before = {rank: len(self._board.stacks(self._local(rank))) for rank in pids}
        asked = {rank for rank, pid in pids.items() if catches(pid, STACKS_SIGNAL)}
        for rank in asked:
            _signal(pids[rank])
        self._wait_for({rank: before[rank] for rank in asked if not process_state(pids[rank]).startswith("T")})
        texts = {rank: self._board.stacks(self._local(rank))[before[rank] :] for rank in pids}
        # A stopped process does not answer.
        listening = [rank for rank in pids if not process_state(pids[rank]).startswith("T")]
        recorded = frozenset() if self._recorder is None else self._recorder.dump(listening)
        native = native_stacks(pids)
        facts = []
        for rank, pid in pids.items():
            facts.append(replace(self._facts(rank, pid, texts[rank], native.frames.get(rank, ())), recorded=rank in recorded))
            text = _page(facts[-1], pid, texts[rank], _why_none(facts[-1], rank in asked), kernel_view(pid), native.texts[rank])
            with suppress(OSError):  # a full disk
                (attempt_dir(self._run_dir, self._number) / _stacks_name(rank)).write_text(text, encoding="utf-8")
        return facts

    def _wait_for(self, lengths: Mapping[int, int]) -> None:
        """Wait until the ranks have written all of their stacks, or time is up."""
        deadline, seen = time.monotonic() + _ANSWER_S, dict(lengths)
        while time.monotonic() < deadline:
            time.sleep(0.1)
            now = {rank: len(self._board.stacks(self._local(rank))) for rank in lengths}
            if now == seen and all(now[rank] > lengths[rank] for rank in lengths):
                return
            seen = now

    def _facts(self, rank: int, pid: int, text: str, spied: tuple[Frame, ...]) -> RankFacts:
        beat = self._silences.beats.get(rank)
        frames = training_frames(parse_stacks(text), beat.thread) if beat is not None else ()
        return RankFacts(
            rank=rank,
            host=socket.gethostname(),
            silent_s=self._silences.silent_s.get(rank, 0.0),
            step=-1 if beat is None else beat.step,
            count=0 if beat is None else beat.count,
            phase=_phase(beat),
            process=process_state(pid),
            frames=frames or spied,
        )


def limits_of(config: LauncherConfig) -> Limits:
    """Return the limits on silence that the configuration sets."""
    return Limits(factor=config.hang_factor, min_s=config.hang_min_s, long_s=config.hang_startup_s)


def read_hang(run_dir: Path, number: int) -> Failure | None:
    """The failure that the agents of an attempt agreed on, where its ranks hung."""
    record = read_json(attempt_dir(run_dir, number) / HANG_FILE)
    return None if record is None else Failure(**record)


def read_pulses(run_dir: Path, number: int) -> list[dict[str, Any]]:
    """Read which ranks of an attempt look stuck: rank, host, silent_s (by now), allowed_s, doing, as their nodes last wrote."""
    rows = []
    for path in sorted(attempt_dir(run_dir, number).glob("pulse-*.json")):
        report = read_json(path)
        if report is None or not report["stuck"]:
            continue
        since = max(0.0, time.time() - report["time"])
        more = {"host": report["host"], "allowed_s": report["allowed_s"]}
        rows += [{**row, "silent_s": row["silent_s"] + since, **more} for row in report["ranks"]]
    return sorted(plain_data(rows), key=lambda row: int(row["rank"]))


def _phase(beat: Beat | None) -> str:
    return "not started yet" if beat is None else str(beat)


def _stacks_name(rank: int) -> str:
    return f"stacks-{rank}.txt"


def _signal(pid: int) -> None:
    try:
        os.kill(pid, STACKS_SIGNAL)
    except ProcessLookupError:
        pass


def _why_none(fact: RankFacts, asked: bool) -> str:
    if fact.is_stopped:
        return "none: the process is stopped, so it cannot write them"
    return "none: it did not answer the signal" if asked else "none: it does not listen for the signal (not started yet, or gone)"


def _page(fact: RankFacts, pid: int, python: str, why_none: str, kernel: str, native: str) -> str:
    """stacks-R.txt."""
    head = f"rank {fact.rank}, process {pid} on {fact.host}\nsilent for {fact.silent_s:.1f} s: {fact.phase}\n"
    sections = (
        ("Python stacks (faulthandler)", python or why_none),
        ("the kernel's view", kernel),
        ("Python and native stacks (py-spy)", native),
        *([("NCCL's flight recorder", f"{PREFIX}{fact.rank}, beside this file; torchfrtrace reads it")] if fact.recorded else []),
    )
    return head + "".join(f"\n== {name} ==\n{text.rstrip()}\n" for name, text in sections)


def _text(fact: RankFacts) -> str:
    """Like a traceback, innermost last."""
    if not fact.frames:
        return ""
    # What lies outside of the rank's main function is how its process was started.
    inside = list(itertools.takewhile(lambda frame: (short_file(frame.file), frame.function) != _MAIN, fact.frames))
    lines = [f'  File "{frame.file}", line {frame.line}, in {frame.function}' for frame in reversed(inside)]
    return "\n".join([f"Where rank {fact.rank} was (most recent call last):", *lines])


_SENT_FRAMES = 40


def _packed(fact: RankFacts) -> dict[str, Any]:
    return {**asdict(fact), "frames": [(frame.file, frame.line, frame.function) for frame in fact.frames[:_SENT_FRAMES]]}


def _unpacked(answer: dict[str, Any]) -> RankFacts:
    return RankFacts(**{**answer, "frames": tuple(Frame(*frame) for frame in answer["frames"])})
