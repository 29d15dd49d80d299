"""memory=auto: the policy that fits the memories there are in the least time. Pure.

`solve_memory` looks at every shape of the executor that the given fields allow (memory/shapes.py), solves the linear program of
the shares inside those that can be the best (memory/program.py), and takes the ledger's word, not the program's, on whether the
result fits.

Note: what is proven. A shape is passed over only where it could not be faster with all memory in the world than what was found, or
where its program has no solution. So the result is the best of all shapes, within PREFERENCE, for the estimates of memory/timing.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ..parallel.config import GradReduce
from .measure import measure_of
from .policy import MemoryPolicy
from .program import Affine, Answer, Program, least_growth, solve_program
from .setting import Setting, reduces_once
from .shapes import Measure, Measures, Shape, Share, linearise, policy_of, rounded, shapes, shares

PREFERENCE = 0.002
"""Of shapes whose times differ by less than this share, the simpler one is taken."""
_ROUNDS = 12
"""Of cuts and smaller limits until a rounded solution fits the ledger."""


@dataclass(frozen=True, slots=True)
class Room:
    """What is changed for a question like: what would more memory save?"""

    device_bytes: float = 0.0
    host_bytes: float = 0.0
    link: float = 1.0
    """Factor on the host link's bandwidth."""

    def extra(self, name: str) -> float:
        """Bytes more of the memory a row speaks of."""
        return self.device_bytes if name.startswith("device") else self.host_bytes

    def of(self, program: Program) -> Program:
        """The program with this room."""
        if self == AS_IT_IS:
            return program
        rows = tuple(replace(row, limit=row.limit + self.extra(row.name)) for row in program.rows)
        return replace(program, rows=rows, to_host_s=_faster(program.to_host_s, self.link), from_host_s=_faster(program.from_host_s, self.link))


def _faster(link_s: Affine, factor: float) -> Affine:
    return Affine(link_s.constant / factor, tuple(a / factor for a in link_s.slope))


AS_IT_IS = Room()


@dataclass(slots=True)
class Candidate:
    """One shape of one instance, with what has been found out about it."""

    shape: Shape
    reduce: GradReduce
    variables: list[Share]
    policy: Callable[[Sequence[float]], MemoryPolicy]
    measure: Measure
    bound_s: float
    """The step if nothing had to be moved or made again for want of memory."""
    _program: Program | None = field(default=None, repr=False)

    @property
    def effort(self) -> tuple[int, ...]:
        return (*self.shape.effort, int(self.reduce is not GradReduce.STEP))

    @property
    def program(self) -> Program:
        """Of the shares, from differences; later with cuts."""
        if self._program is None:
            self._program = linearise(self.measure, self.policy, self.variables, [0.0] * len(self.variables))
        return self._program

    def cut(self, x: Sequence[float]) -> None:
        """Add the tangents at `x`, where the ledger is not the straight line that was thought."""
        near = linearise(self.measure, self.policy, self.variables, x)
        self._program = replace(self.program, rows=self.program.rows + near.rows)

    def tighten(self, by: float) -> None:
        """Leave so many bytes of each memory free."""
        self._program = replace(self.program, rows=tuple(replace(row, limit=row.limit - by) for row in self.program.rows))


@dataclass(frozen=True, slots=True)
class Found:
    """The best policy for a room."""

    candidate: Candidate
    policy: MemoryPolicy
    answer: Answer
    time_s: float
    """Of the policy with rounded shares."""
    num_solved: int


class Search:
    """All shapes of one instance; asked once for each room."""

    def __init__(self, candidates: Sequence[Candidate], tokens: int) -> None:
        self.candidates = sorted(candidates, key=lambda entry: (entry.bound_s, entry.effort))
        self.tokens = tokens

    def best(self, room: Room = AS_IT_IS) -> Found | None:
        """The fastest policy that fits, by the ledger; None where there is none."""
        broken: set[int] = set()
        while True:
            answers = self._answers(room, broken)
            if not answers:
                return None
            least = min(answer.time_s for _, answer in answers)
            equal = [pair for pair in answers if pair[1].time_s <= least * (1.0 + PREFERENCE)]
            candidate, answer = min(equal, key=lambda pair: (pair[0].effort, pair[1].time_s))
            settled = self._settle(candidate, answer, room)
            if settled is not None:
                return Found(candidate, *settled, len(answers))
            broken.add(id(candidate))

    def _answers(self, room: Room, broken: set[int]) -> list[tuple[Candidate, Answer]]:
        found: list[tuple[Candidate, Answer]] = []
        least = float("inf")
        for candidate in self.candidates:
            if candidate.bound_s > least * (1.0 + PREFERENCE):
                break
            beaten = any(answer.time_s <= candidate.bound_s and other.effort <= candidate.effort for other, answer in found)
            if beaten or id(candidate) in broken:
                continue
            answer = solve_program(room.of(candidate.program))
            if answer is not None:
                found.append((candidate, answer))
                least = min(least, answer.time_s)
        return found

    def _settle(self, candidate: Candidate, answer: Answer, room: Room) -> tuple[MemoryPolicy, Answer, float] | None:
        """Rounded shares that the ledger says fit."""
        solved: Answer | None = answer
        for attempt in range(_ROUNDS):
            if solved is None:
                return None
            policy = candidate.policy(rounded(candidate.variables, solved.x, self.tokens))
            measured = candidate.measure(policy)
            over = overflow(measured, room)
            if over <= 0:
                return policy, solved, measured.step_s(room.link)
            if attempt < _ROUNDS // 2 and candidate.variables:
                candidate.cut(solved.x)
            else:
                candidate.tighten(over)
            solved = solve_program(room.of(candidate.program))
        return None

    def least(self, memory: str) -> tuple[Candidate, MemoryPolicy]:
        """The policy that needs least of the device (or, `host`, of the host), as far as the other memory allows."""
        smallest = max(entry.effort[3] for entry in self.candidates)
        grown = []
        for entry in self.candidates:
            if entry.effort[3] == smallest:
                growth, x = least_growth(entry.program, memory)
                grown.append((growth, entry.effort, entry, x))
        _, _, candidate, x = min(grown, key=lambda item: item[:2])
        return candidate, candidate.policy(rounded(candidate.variables, x, self.tokens))


def overflow(measured: Measures, room: Room = AS_IT_IS) -> float:
    """Bytes by which the fullest memory is too small; 0 or less where all fit."""
    return max(used - limit - room.extra(name) for name, (used, limit) in measured.rows.items())


def search_of(setting: Setting) -> Search:
    """Every shape for the configuration behind `setting` (its policy is not looked at)."""
    candidates: list[Candidate] = []
    for reduce in _reductions(setting):
        s = replace(setting, parallel=replace(setting.parallel, grad_reduce=reduce))
        measure = measure_of(s)
        for shape in shapes(
            s.memory,
            tokens=s.tokens,
            layers=s.spec.num_layers,
            local_kv_heads=max(1, s.spec.num_kv_heads // s.layout.ulysses),
            ring=s.layout.ring > 1,
        ):
            candidates.append(_candidate(s, shape, measure))
    return Search(candidates, setting.tokens)


def _candidate(s: Setting, shape: Shape, measure: Measure) -> Candidate:
    variables = shares(s.memory, shape)

    def policy(x: Sequence[float]) -> MemoryPolicy:
        return policy_of(s.memory, shape, variables, x)

    alone = [entry.classes for entry in variables]
    ideal = measure(policy([1.0 if entry.keep or alone.count(entry.classes) == 1 else 0.0 for entry in variables]))
    bound = ideal.step_s(link=float("inf"))
    return Candidate(shape, s.parallel.grad_reduce, variables, policy, measure, bound)


def _reductions(setting: Setting) -> list[GradReduce]:
    asked = setting.parallel.grad_reduce
    if asked is not GradReduce.AUTO:
        return [asked]
    once = replace(setting, parallel=replace(setting.parallel, grad_reduce=GradReduce.STEP))
    several = reduces_once(once) and not setting.parallel.barrier_free
    return [GradReduce.STEP, GradReduce.MICRO_BATCH] if several else [GradReduce.STEP]
