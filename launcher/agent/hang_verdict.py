"""Decides whether ranks hang, and which of them is at fault. Pure: beats and stacks in, a verdict out."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...units import format_seconds
from ...utils.heartbeat import Beat

_LOOK_S = 30.0
"""Seconds that count at most between two looks: an agent that was suspended with its ranks, or a laptop that slept, is no hang."""
_QUIET = 0.25
"""Share of the allowance after which a rank's silence is reported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """launcher.hang_*; `factor` None: nothing is ever taken for a hang."""

    factor: float | None
    min_s: float
    long_s: float

    def allowance_s(self, beat: Beat | None) -> float:
        """Return seconds a rank may stay silent after this beat; without a factor as if it were 0."""
        if beat is None:
            return max(self.min_s, self.long_s)
        in_steps = max(self.min_s, (self.factor or 0.0) * beat.expected_s)
        return max(in_steps, self.long_s) if beat.is_long else in_steps


@dataclass(slots=True)
class Silences:
    """Seconds since the last new beat of each rank of a node, by the watcher's clock."""

    beats: dict[int, Beat | None] = field(default_factory=dict)
    silent_s: dict[int, float] = field(default_factory=dict)
    _looked: float | None = None

    def look(self, beats: Mapping[int, Beat | None], now: float) -> None:
        """`beats` of all ranks, at `now` (monotonic seconds)."""
        passed = 0.0 if self._looked is None else min(_LOOK_S, now - self._looked)
        self._looked = now
        for rank, beat in beats.items():
            spoke = rank not in self.beats or beat != self.beats[rank]
            self.silent_s[rank] = 0.0 if spoke else self.silent_s[rank] + passed
            self.beats[rank] = beat

    def allowance_s(self, limits: Limits) -> float:
        """The longest of all ranks': one that waits for a rank in a long phase waits as long."""
        return max((limits.allowance_s(beat) for beat in self.beats.values()), default=limits.long_s)

    def hang(self, limits: Limits) -> bool:
        """Return whether some rank has been silent for too long."""
        return limits.factor is not None and max(self.silent_s.values(), default=0.0) > self.allowance_s(limits)

    def quiet(self, limits: Limits) -> bool:
        """Return whether something looks stuck, long before it counts as a hang."""
        return max(self.silent_s.values(), default=0.0) > _QUIET * self.allowance_s(limits)


@dataclass(frozen=True, slots=True)
class Frame:
    """One line of a Python stack."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{short_file(self.file)}:{self.line} in {self.function}"


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFacts:
    """Evidence about one rank of a hang: beat, kernel state, stack."""

    rank: int
    host: str
    silent_s: float
    step: int
    """Finished updates; -1 where it never said."""
    phase: str
    """The rank's last beat, as text."""
    count: int = 0
    process: str = ""
    """The process's state by the kernel, as `T (stopped)`; empty where unknown."""
    frames: tuple[Frame, ...] = ()
    """Stack of the training thread, innermost first; empty where the rank wrote none."""
    recorded: bool = False
    """Whether NCCL's flight recorder wrote the rank's collectives."""

    @property
    def is_stopped(self) -> bool:
        return self.process[:1] in ("T", "t")

    @property
    def own(self) -> Frame | None:
        """The innermost frame of this package, else the innermost."""
        return next((frame for frame in self.frames if _is_ours(frame)), self.frames[0] if self.frames else None)

    @property
    def waits(self) -> bool:
        """Return whether the rank is inside a collective: below this package's innermost frame, or in one that does nothing else."""
        below = itertools.takewhile(lambda frame: not _is_ours(frame), self.frames)
        return any("torch/distributed/" in frame.file for frame in below) or any(frame.function in _WAITING for frame in self.frames[:1])


_WAITING = ("wait", "synchronize")
_INSTALLED = ("/site-packages/", "/dist-packages/")
_PACKAGE = f"{Path(__file__).parents[2]}/"
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x([0-9a-f]+)[^\n]*\(most recent call first\):\n((?:  File [^\n]*\n?)*)", re.MULTILINE)
_FRAME = re.compile(r'^  File "([^"\n]*)", line (\d+) in ([^\n]*)$', re.MULTILINE)


def short_file(path: str) -> str:
    """A path from the package on: `training/trainer.py`, `torch/distributed/distributed_c10d.py`."""
    own = _path_in_package(path)
    if own is not None:
        return own
    for root in _INSTALLED:
        _, separator, rest = path.rpartition(root)
        if separator:
            return rest
    return "/".join(path.split("/")[-2:])


def _path_in_package(path: str) -> str | None:
    """Return the path from the package on, wherever it is installed; None for foreign files. A checkout may hold the environment."""
    for root in _INSTALLED:
        _, separator, rest = path.rpartition(root)
        if separator:
            return rest.removeprefix("efflaunch/") if rest.startswith("efflaunch/") else None
    if path.startswith(_PACKAGE):
        return path.removeprefix(_PACKAGE)
    _, separator, rest = path.rpartition("/efflaunch/")
    return rest if separator else None


def _is_ours(frame: Frame) -> bool:
    return _path_in_package(frame.file) is not None


def parse_stacks(text: str) -> dict[int, tuple[Frame, ...]]:
    """The threads of faulthandler's text by id, frames innermost first. Of several dumps the last counts."""
    return {
        int(number, 16): tuple(Frame(file, int(line), function) for file, line, function in _FRAME.findall(frames))
        for number, frames in _THREAD.findall(text)
    }


def training_frames(threads: Mapping[int, tuple[Frame, ...]], main: int) -> tuple[Frame, ...]:
    """The stack that shows where training is: the main thread's, or that of autograd's own thread where main waits for a backward."""
    frames = threads.get(main, ())
    if frames and frames[0].function == "_engine_run_backward":
        others = [
            stack for thread, stack in threads.items() if thread != main and any("torch/autograd/function.py" in f.file for f in stack)
        ]
        return others[0] if others else frames
    return frames


@dataclass(frozen=True, kw_only=True, slots=True)
class Blame:
    """Ranks that the others wait for, worst first; none where they cannot be distinguished. `reason` is a sentence."""

    ranks: tuple[int, ...]
    reason: str


def blame(facts: Sequence[RankFacts]) -> Blame:
    """Choose the faulty ranks of a hang, from strong signs to weak ones.

    A process that cannot run; a rank that has not entered the collective the others wait in; one that is elsewhere than most; one
    that has come less far.
    """
    for pick, why in (
        (_stopped, "is stopped and cannot run"),
        (_silent, "gave no stacks"),
        (_outside, ""),
        (_elsewhere, ""),
        (_behind, ""),
    ):
        suspects = pick(facts)
        if suspects and len(suspects) < len(facts):
            return Blame(ranks=tuple(fact.rank for fact in suspects), reason=_sentence(suspects, facts, why))
    if facts and all(fact.is_stopped for fact in facts):
        return Blame(ranks=tuple(fact.rank for fact in facts), reason="all ranks are stopped and cannot run")
    places = Counter(str(fact.own) for fact in facts if fact.own is not None)
    if len(places) == 1 and len(facts) > 1:
        return Blame(ranks=(), reason=f"all ranks are at {next(iter(places))}, so none is to blame: look at the network and the devices")
    if len(facts) == 1:
        return Blame(ranks=(facts[0].rank,), reason=_where(facts[0]))
    return Blame(ranks=(), reason="; ".join(_where(fact) for fact in facts[:_NAMED]))


_NAMED, _LINES = 4, 8
"""Ranks a sentence names at most, and a list."""


def _stopped(facts: Sequence[RankFacts]) -> list[RankFacts]:
    return [fact for fact in facts if fact.is_stopped]


def _silent(facts: Sequence[RankFacts]) -> list[RankFacts]:
    return [fact for fact in facts if not fact.frames]


def _outside(facts: Sequence[RankFacts]) -> list[RankFacts]:
    return [fact for fact in facts if not fact.waits]


def _elsewhere(facts: Sequence[RankFacts]) -> list[RankFacts]:
    places = Counter(str(fact.own) for fact in facts)
    most, count = places.most_common(1)[0] if places else ("", 0)
    return [fact for fact in facts if str(fact.own) != most] if 2 * count > len(facts) else []


def _behind(facts: Sequence[RankFacts]) -> list[RankFacts]:
    least = min(((fact.step, fact.count) for fact in facts), default=(0, 0))
    return [fact for fact in facts if (fact.step, fact.count) == least]


def _sentence(suspects: Sequence[RankFacts], facts: Sequence[RankFacts], why: str) -> str:
    named = "; ".join(_named(fact, why) for fact in suspects[:_NAMED])
    more = f"; {len(suspects) - _NAMED} more" if len(suspects) > _NAMED else ""
    others = Counter(str(fact.own) for fact in facts if fact not in suspects and fact.own is not None)
    rest = f"; the others wait at {others.most_common(1)[0][0]}" if others else ""
    return f"{named}{more}{rest}"


def _named(fact: RankFacts, why: str) -> str:
    return f"rank {fact.rank} on {fact.host} {why} ({fact.phase})" if why else _where(fact)


def _where(fact: RankFacts) -> str:
    place = "" if fact.own is None else f" at {fact.own}"
    return f"rank {fact.rank} on {fact.host} is{place} ({fact.phase})"


def silence_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each rank of hang.read_pulses, the longest silence first: ranks that wait for it fell silent later."""
    worst = sorted(rows, key=lambda row: -row["silent_s"])
    lines = [
        f"rank {row['rank']} on {row['host']} for {format_seconds(row['silent_s'])}, a hang from {format_seconds(row['allowed_s'])} on: "
        f"{row['doing']}"
        for row in worst[:_LINES]
    ]
    return lines + ([f"{len(worst) - _LINES} more ranks"] if len(worst) > _LINES else [])


def describe_hang(facts: Sequence[RankFacts], blamed: Blame, *, allowance_s: float, missing: Sequence[int], stacks: str) -> str:
    """Describe the hang for a person; `missing`: nodes whose agents gave no answer."""
    silent = max((fact.silent_s for fact in facts), default=0.0)
    parts = [
        f"no progress for {format_seconds(silent)}, more than the {format_seconds(allowance_s)} allowed (launcher.hang_*): {blamed.reason}"
    ]
    if missing:
        parts.append(f"no word from the agents of nodes {', '.join(map(str, missing))} of the run")
    parts.append(f"stacks of all ranks: {stacks}")
    return "; ".join(parts)
