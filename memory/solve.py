"""memory=auto: the policy that fits the memories there are in the least time. Pure.

`solve_memory` looks at every shape of the executor that the given fields allow (memory/shapes.py), solves the linear program of
the shares inside those that can be the best (memory/program.py), and takes the ledger's word, not the program's, on whether the
result fits.

Note: what is proven. A shape is passed over only where it could not be faster by PREFERENCE with all memory in the world than what
was found, or where its program has no solution. So no policy of any shape is faster by more than `gap`, by the estimates of
memory/timing.py. What PREFERENCE leaves is used to move less: a host memory full of activations for a thousandth of the time
would be a bad bargain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ..errors import ConfigError
from ..parallel.config import GradReduce, SequenceMode
from .heads import head_groups
from .measure import measure_of
from .policy import MemoryPolicy
from .program import Affine, Answer, Program, least_growth, solve_program
from .report import SolveReport
from .setting import Setting, reduces_once
from .shapes import Measure, Measures, Shape, Share, linearise, policy_of, rounded, shapes, shares

PREFERENCE = 0.01
"""Policies whose times differ by less than this share are equal: the simpler shape, and the one that moves less, is taken."""
CRUMB = 0.05
"""Shares of tokens smaller than this are left out where that costs next to nothing."""
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
    def family(self) -> tuple[object, ...]:
        """Shapes that differ only in the size of their chunks."""
        return (replace(self.shape, chunk_tokens=None), self.reduce)

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
    prices: dict[str, float]
    """Seconds one more byte would save, by row, in this shape."""
    time_s: float
    """Of the policy with rounded shares."""
    least_s: float
    """Of the fastest shares found, whatever they move."""
    bound_s: float
    """No policy of any shape takes less."""
    num_solved: int

    @property
    def gap(self) -> float:
        """The share of the step by which some other policy could be faster."""
        return max(0.0, 1.0 - self.bound_s / self.time_s)


class Search:
    """All shapes of one instance; asked once for each room."""

    def __init__(self, candidates: Sequence[Candidate], tokens: int) -> None:
        self.candidates = sorted(candidates, key=lambda entry: (entry.bound_s, entry.effort))
        self.tokens = tokens

    def best(self, room: Room = AS_IT_IS) -> Found | None:
        """The policy that fits, by the ledger, and is the fastest but for PREFERENCE; None where none fits."""
        alive = self._alive(room)
        broken = {id(entry) for entry in self.candidates if entry.family not in alive}
        while True:
            answers, bound = self._answers(room, broken)
            if not answers:
                return None
            least = min(answer.time_s for _, answer in answers)
            bound = min(bound, least)
            within = max(least, bound * (1.0 + PREFERENCE))
            candidate, answer = min(
                (pair for pair in answers if pair[1].time_s <= within), key=lambda pair: (pair[0].effort, pair[1].time_s)
            )
            settled = self._settle(candidate, within, room)
            if settled is not None:
                policy, time_s = settled
                return Found(candidate, policy, answer.prices, time_s, least, bound, len(answers))
            broken.add(id(candidate))

    def may_fit(self, room: Room = AS_IT_IS) -> bool:
        """False only where no shape fits the device with nothing kept."""
        return bool(self._alive(room))

    def _alive(self, room: Room) -> set[tuple[object, ...]]:
        """Families of shapes whose smallest pieces fit the device with nothing kept: larger ones need more."""
        return {entry.family for entry in self._smallest() if _holds(entry, room)}

    def _smallest(self) -> list[Candidate]:
        """Of each family the member with the smallest chunks."""
        smallest: dict[tuple[object, ...], Candidate] = {}
        for entry in sorted(self.candidates, key=lambda entry: entry.effort):
            smallest[entry.family] = entry
        return list(smallest.values())

    def _answers(self, room: Room, broken: set[int]) -> tuple[list[tuple[Candidate, Answer]], float]:
        """Optima of the shapes that can matter, and what the others take at least."""
        found: list[tuple[Candidate, Answer]] = []
        least = float("inf")
        for candidate in self.candidates:
            if candidate.bound_s * (1.0 + PREFERENCE) >= least:
                return found, candidate.bound_s
            answer = None if id(candidate) in broken else solve_program(room.of(candidate.program))
            if answer is not None:
                found.append((candidate, answer))
                least = min(least, answer.time_s)
        return found, float("inf")

    def _settle(self, candidate: Candidate, within_s: float, room: Room) -> tuple[MemoryPolicy, float] | None:
        """Rounded shares that the ledger says fit, of those within the time the ones that move least."""
        for attempt in range(_ROUNDS):
            program = room.of(candidate.program)
            answer = solve_program(program, within_s) or solve_program(program)
            if answer is None:
                return None
            x = rounded(candidate.variables, answer.x, self.tokens)
            over = overflow(candidate.measure(candidate.policy(x)), room)
            if over <= 0:
                return self._swept(candidate, x, within_s, room)
            if attempt < _ROUNDS // 2 and candidate.variables:
                candidate.cut(answer.x)
            else:
                candidate.tighten(over)
        return None

    def _swept(self, candidate: Candidate, x: tuple[float, ...], within_s: float, room: Room) -> tuple[MemoryPolicy, float]:
        """Without shares so small that they only make the policy harder to read."""
        for index, share in enumerate(x):
            whole = 0.0 if share < CRUMB else 1.0 if share > 1.0 - CRUMB else share
            other = (*x[:index], whole, *x[index + 1 :])
            measured = candidate.measure(candidate.policy(other))
            if overflow(measured, room) <= 0 and measured.step_s(room.link) <= within_s * (1.0 + PREFERENCE / 4):
                x = other
        policy = candidate.policy(x)
        return policy, candidate.measure(policy).step_s(room.link)

    def least(self, memory: str) -> tuple[Candidate, MemoryPolicy]:
        """The policy that needs least of the device (or, `host`, of the host), as far as the other memory allows."""
        grown = [(*least_growth(entry.program, memory), entry) for entry in self._smallest()]
        _, x, candidate = min(grown, key=lambda item: (item[0], item[2].effort))
        return candidate, candidate.policy(rounded(candidate.variables, x, self.tokens))


def _holds(entry: Candidate, room: Room) -> bool:
    """Whether the device has room where nothing is kept but what must be, there or on the host."""
    ends = [[float(keep and variable.rest) for variable in entry.variables] for keep in (False, True)]
    looks = [entry.measure(entry.policy(x)).rows for x in ends]
    return not any(
        all(rows[name][0] > rows[name][1] + room.device_bytes for rows in looks) for name in looks[0] if name.startswith("device")
    )


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
            head_groups=_head_groups(s),
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


def _head_groups(s: Setting) -> list[int]:
    """Numbers of groups that the heads of a rank fall into, whatever Ulysses degree a step is planned with."""
    adaptive = s.parallel.sequence is SequenceMode.ADAPTIVE
    ulysses = math.gcd(s.spec.num_heads, 1 << (s.layout.world_size.bit_length() - 1)) if adaptive else s.layout.ulysses
    return [groups for groups in (1, 2, 4, 8) if _divides(s, groups, ulysses)]


def _divides(s: Setting, groups: int, ulysses: int) -> bool:
    try:
        head_groups(s.spec.num_heads, s.spec.num_kv_heads, num_groups=groups, ulysses=ulysses)
    except ConfigError:
        return False
    return True


def _reductions(setting: Setting) -> list[GradReduce]:
    asked = setting.parallel.grad_reduce
    if asked is not GradReduce.AUTO:
        return [asked]
    once = replace(setting, parallel=replace(setting.parallel, grad_reduce=GradReduce.STEP))
    several = reduces_once(once) and not setting.parallel.barrier_free
    return [GradReduce.STEP, GradReduce.MICRO_BATCH] if several else [GradReduce.STEP]


def solved_setting(setting: Setting, candidate: Candidate, policy: MemoryPolicy) -> Setting:
    """The setting with what was left open decided."""
    return replace(setting, policy=policy, parallel=replace(setting.parallel, grad_reduce=candidate.reduce))


def solve_memory(setting: Setting) -> tuple[Setting, SolveReport]:
    """The setting with the policy that fits in the least time, and how that was found.

    Fields of `setting.memory` that are given are held fixed; `setting.policy` is not looked at. Where nothing fits it is the
    policy that needs least of what is missing, and the report says so.
    """
    from .prices import report_of

    search = search_of(setting)
    found = search.best()
    if found is not None:
        solved = solved_setting(setting, found.candidate, found.policy)
    else:
        solved = solved_setting(setting, *search.least(_missing(search)))
    return solved, report_of(solved, search, found)


def _missing(search: Search) -> str:
    """The memory that is too small even for the policy that needs least of the device."""
    candidate, policy = search.least("device")
    rows = candidate.measure(policy).rows
    return "device" if any(used > limit for name, (used, limit) in rows.items() if name.startswith("device")) else "host"
