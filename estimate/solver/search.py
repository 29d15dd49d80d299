"""The search over shapes of the layer executor: a linear program in each that can matter, and the ledger's word on the result. Pure.

Note: what is proven. A shape is passed over only where it could not be faster by PREFERENCE with all memory in the world than what
was found, or where its program has no solution. So no policy of any shape is faster by more than `SearchResult.gap`, by the estimates of
estimate/timing/step.py. What PREFERENCE leaves is used for room: a memory filled to its last GiB for a thousandth of the time would
be a bad bargain, for what an estimate misses then ends the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from ...memory.policy import MemoryPolicy
from ...parallel.config import GradReduce
from .linear_program import ROOMY, Affine, LpSolution, PolicyProgram, least_growth, solve_program
from .shapes import BUDGET, Evaluate, PolicyCost, Shape, Share, linearise, rounded

PREFERENCE = 0.01
"""Policies whose times differ by less than this share are equal: the one that leaves most room is taken."""
ROOM_STEP = 0.05
"""Shapes whose fullest memories differ by less than a step of this share leave as much room: the simpler one is taken."""
_ROOMY_STEPS = round(ROOMY / ROOM_STEP)
MIN_SHARE = 0.05
"""Shares of tokens smaller than this are left out where that costs next to nothing."""
LOOKS = 16
"""Most shapes that are solved for their room alone."""
_FULL_STEPS = math.ceil(1.0 / ROOM_STEP)
_NEAREST = 4
"""Shapes that are solved for where none fits: those that come nearest with nothing kept."""
_ROUNDS = 12
"""Most rounds of cuts and smaller limits until a rounded solution fits the ledger."""


@dataclass(frozen=True, slots=True)
class ExtraCapacity:
    """What is changed for a question like: what would more memory save?"""

    device_bytes: float = 0.0
    """Bytes added to each rank's device, besides what the allocator loses of them."""
    host_bytes: float = 0.0
    """Bytes added to each node's host memory."""
    budget_bytes: float = 0.0
    """Bytes added to memory.host_budget."""
    link: float = 1.0
    """Factor on the bandwidth of the way to the host, or to files."""

    def extra(self, name: str) -> float:
        """Bytes more of the memory a row speaks of."""
        if name.startswith("device"):
            return self.device_bytes
        return self.budget_bytes if name == BUDGET else self.host_bytes

    def of(self, program: PolicyProgram) -> PolicyProgram:
        """The program with this room."""
        if self == NO_EXTRA:
            return program
        rows = tuple(replace(row, limit=row.limit + self.extra(row.name)) for row in program.rows)
        return replace(
            program, rows=rows, to_host_s=_faster(program.to_host_s, self.link), from_host_s=_faster(program.from_host_s, self.link)
        )


def _faster(link_s: Affine, factor: float) -> Affine:
    return Affine(link_s.constant / factor, tuple(a / factor for a in link_s.slope))


NO_EXTRA = ExtraCapacity()


@dataclass(slots=True)
class Candidate:
    """One shape of one instance, with what has been found out about it."""

    shape: Shape
    reduce: GradReduce
    variables: list[Share]
    policy: Callable[[Sequence[float]], MemoryPolicy]
    measure: Evaluate
    roomy: tuple[str, ...] = ()
    """Beginnings of the names of rows whose memories are to have room."""
    _bound_s: float | None = field(default=None, repr=False)
    _program: PolicyProgram | None = field(default=None, repr=False)

    @property
    def bound_s(self) -> float:
        """The step if nothing had to be moved or recomputed for want of memory."""
        if self._bound_s is None:
            alone = [entry.classes for entry in self.variables]
            ideal = [float(entry.keep or alone.count(entry.classes) == 1) for entry in self.variables]
            self._bound_s = self.measure(self.policy(ideal)).step_s(link=math.inf)
        return self._bound_s

    @property
    def complexity(self) -> tuple[int, ...]:
        return (*self.shape.complexity, int(self.reduce is not GradReduce.STEP))

    @property
    def family(self) -> tuple[object, ...]:
        """Shapes that differ only in the size of their chunks."""
        return (replace(self.shape, chunk_tokens=None), self.reduce)

    @property
    def program(self) -> PolicyProgram:
        """The linear program of the shares, from differences; later with cuts."""
        if self._program is None:
            program = linearise(self.measure, self.policy, self.variables, [0.0] * len(self.variables))
            self._program = replace(program, roomy=self.roomy)
        return self._program

    def cut(self, x: Sequence[float]) -> None:
        """Add the tangents at `x`, where the ledger is not the straight line that was thought."""
        near = linearise(self.measure, self.policy, self.variables, x)
        self._program = replace(self.program, rows=self.program.rows + near.rows)

    def tighten(self, over: Mapping[str, float]) -> None:
        """Leave so many bytes free of each memory that was too small, but what is there with all kept."""
        ends = [[float(keep and variable.keep) for variable in self.variables] for keep in (True, False)]
        rows = []
        for row in self.program.rows:
            least = min(row.num_bytes(x) for x in ends)
            rows.append(replace(row, limit=max(row.limit - over.get(memory_of(row.name), 0.0), min(row.limit, least))))
        self._program = replace(self.program, rows=tuple(rows))


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The best policy for a room."""

    candidate: Candidate
    policy: MemoryPolicy
    prices: dict[str, float]
    """Seconds one more byte would save, by row, in this shape."""
    time_s: float
    """Seconds of the policy with rounded shares."""
    least_s: float
    """Seconds of the fastest shares, whatever they move."""
    bound_s: float
    """No policy of any shape takes less."""
    num_solved: int

    @property
    def gap(self) -> float:
        """The share of the step by which some other policy could be faster."""
        return max(0.0, 1.0 - self.bound_s / self.time_s)


class PolicySearch:
    """All shapes of one instance; asked once for each room."""

    def __init__(self, candidates: Sequence[Candidate], tokens: int, ranks: int) -> None:
        """`tokens` of a rank; `ranks` share a node."""
        self.candidates, self.tokens, self.ranks = candidates, tokens, ranks
        self.smallest: dict[tuple[object, ...], Candidate] = {}
        """For each family of shapes, the member with the smallest chunks: the others need more."""
        for entry in sorted(candidates, key=lambda entry: entry.complexity):
            self.smallest[entry.family] = entry
        self._can_hold_minimum: dict[tuple[object, ...], bool] = {}

    @cached_property
    def in_order(self) -> list[Candidate]:
        """Those first that could be the fastest."""
        return sorted(self.candidates, key=lambda entry: (entry.bound_s, entry.complexity))

    def best(self, room: ExtraCapacity = NO_EXTRA, looks: int = LOOKS) -> SearchResult | None:
        """The policy that fits, by the ledger, and is the fastest but for PREFERENCE; None where none fits.

        `looks`: most shapes that are solved for the room they leave alone, where time is all that is asked about: 0.
        """
        broken: set[int] = set()
        if not self.may_fit(room):
            return None
        for attempt in range(_ROUNDS + len(self.candidates)):
            answers, bound = self._answers(room, broken, looks)
            if not answers:
                return None
            least = min(answer.time_s for _, answer in answers)
            bound = min(bound, least)
            within = max(least, bound * (1.0 + PREFERENCE))
            candidate, answer = min(
                (pair for pair in answers if pair[1].time_s <= within),
                key=lambda pair: (self._fullness(pair[0], within, room), pair[0].complexity, pair[1].time_s),
            )
            num_rows = len(candidate.program.rows)
            checked = self._round_and_check(candidate, within, room)
            if checked is None:
                broken.add(id(candidate))
            elif checked[1] <= within * (1.0 + PREFERENCE / 2) or len(candidate.program.rows) == num_rows or attempt >= _ROUNDS:
                policy, time_s = checked
                return SearchResult(candidate, policy, answer.prices, time_s, least, bound, len(answers))
            # Else the shape needs more than its first tangents said, and another may be better.
        return None

    def may_fit(self, room: ExtraCapacity = NO_EXTRA) -> bool:
        """False only where no shape fits the device with nothing kept. A look at the shapes that need least; no program is solved."""
        return any(self._has_room(entry, room) for entry in self._least_memory())

    def _least_memory(self) -> list[Candidate]:
        """Shapes that need least of every memory: the smallest pieces, attention recomputed, gradients gone after each micro-batch."""
        smallest = [entry for entry in self.smallest.values() if not entry.shape.stored] or list(self.smallest.values())
        last = max(entry.complexity[-1] for entry in smallest)
        return [entry for entry in smallest if entry.complexity[-1] == last]

    def _has_room(self, entry: Candidate, room: ExtraCapacity) -> bool:
        key = (entry.family, room)
        if key not in self._can_hold_minimum:
            self._can_hold_minimum[key] = _can_hold_minimum(self.smallest[entry.family], room, self.ranks)
        return self._can_hold_minimum[key]

    def _answers(self, room: ExtraCapacity, broken: set[int], looks: int) -> tuple[list[tuple[Candidate, LpSolution]], float]:
        """Optima of the shapes that can matter, and what the others take at least.

        A shape that could not be faster by PREFERENCE matters only where it may leave more room than those before it.
        """
        solutions: list[tuple[Candidate, LpSolution]] = []
        least = others = float("inf")
        fullest = _FULL_STEPS
        for candidate in self.in_order:
            equal = candidate.bound_s * (1.0 + PREFERENCE) >= least
            if equal and (fullest <= _ROOMY_STEPS or looks <= 0 or candidate.bound_s > least * (1.0 + PREFERENCE)):
                return solutions, min(others, candidate.bound_s)
            if id(candidate) in broken or not self._has_room(candidate, room):
                continue
            if equal and self._least_steps(candidate, room) >= fullest:
                others = min(others, candidate.bound_s)
                continue
            looks -= equal
            answer = solve_program(room.of(candidate.program))
            if answer is not None:
                solutions.append((candidate, answer))
                least = min(least, answer.time_s)
                fullest = min(fullest, self._fullness(candidate, least * (1.0 + PREFERENCE), room)) if looks > 0 else fullest
        return solutions, others

    def _fullness(self, candidate: Candidate, within_s: float, room: ExtraCapacity) -> int:
        """Steps of ROOM_STEP to which the shape's fullest memory is full at least, if it may take so long; from ROOMY on."""
        program = room.of(candidate.program)
        answer = solve_program(program, within_s)
        return _steps(program.fullness(answer.x)) if answer is not None else _FULL_STEPS

    def _least_steps(self, candidate: Candidate, room: ExtraCapacity) -> int:
        """The same for the device alone with nothing kept on it: no shares of this shape leave more room."""
        if "device, " not in candidate.roomy:
            return _ROOMY_STEPS
        rows = candidate.measure(candidate.policy(_ends(candidate)[0])).rows.items()
        return _steps(max(used / max(limit + room.extra(name), 1.0) for name, (used, limit) in rows if name.startswith("device, ")))

    def _round_and_check(self, candidate: Candidate, within_s: float, room: ExtraCapacity) -> tuple[MemoryPolicy, float] | None:
        """Rounded shares that fit by the ledger, of those within the time the ones that leave most room."""
        for attempt in range(_ROUNDS):
            program = room.of(candidate.program)
            answer = solve_program(program, within_s) or solve_program(program)
            if answer is None:
                return None
            x = rounded(candidate.variables, answer.x, self.tokens)
            over = overflows(candidate.measure(candidate.policy(x)), room)
            if not over:
                return self._without_tiny_shares(candidate, x, within_s, room)
            if attempt < _ROUNDS // 2 and candidate.variables:
                candidate.cut(answer.x)
            else:
                candidate.tighten(over)
        return None

    def _without_tiny_shares(
        self, candidate: Candidate, x: tuple[float, ...], within_s: float, room: ExtraCapacity
    ) -> tuple[MemoryPolicy, float]:
        """Without shares so small that they only make the policy harder to read."""
        most = max(within_s, candidate.measure(candidate.policy(x)).step_s(room.link)) * (1.0 + PREFERENCE / 4)
        for index, share in enumerate(x):
            whole = 0.0 if share < MIN_SHARE else 1.0 if share > 1.0 - MIN_SHARE else share
            other = (*x[:index], whole, *x[index + 1 :])
            measured = candidate.measure(candidate.policy(other))
            if overflow(measured, room) <= 0 and measured.step_s(room.link) <= most:
                x = other
        policy = candidate.policy(x)
        return policy, candidate.measure(policy).step_s(room.link)

    def least(self) -> tuple[Candidate, MemoryPolicy]:
        """The policy that needs least of the device as far as the host allows; where the device is large enough, least of the host."""
        candidate, policy = self._least("device")
        rows = candidate.measure(policy).rows
        fits = all(used <= limit for name, (used, limit) in rows.items() if name.startswith("device"))
        return self._least("host") if fits else (candidate, policy)

    def last_resort(self) -> SearchResult | None:
        """The policy that needs least, if the ledger lets it pass where the search found nothing."""
        candidate, policy = self.least()
        measured = candidate.measure(policy)
        time_s = measured.step_s()
        return SearchResult(candidate, policy, {}, time_s, time_s, self.in_order[0].bound_s, 0) if overflow(measured) <= 0 else None

    def _least(self, memory: str) -> tuple[Candidate, MemoryPolicy]:
        nearest = sorted(self._least_memory(), key=lambda entry: (_nearest(entry), entry.complexity))[:_NEAREST]
        grown = [(*least_growth(entry.program, memory), entry) for entry in nearest]
        _, x, candidate = min(grown, key=lambda item: (item[0], item[2].complexity))
        return candidate, candidate.policy(rounded(candidate.variables, x, self.tokens))


def _steps(fullness: float) -> int:
    return max(_ROOMY_STEPS, math.ceil(fullness / ROOM_STEP - 1e-6))


def _nearest(entry: Candidate) -> float:
    """Bytes by which it does not fit with nothing kept but what must be, there or on the host."""
    return min(overflow(entry.measure(entry.policy(x))) for x in _ends(entry))


def _ends(entry: Candidate) -> list[list[float]]:
    """Shares with nothing kept: what must wait somewhere all on the host, or all on the device."""
    return [[float(keep and variable.rest) for variable in entry.variables] for keep in (False, True)]


def _can_hold_minimum(entry: Candidate, room: ExtraCapacity, ranks: int) -> bool:
    """Whether there is room where nothing waits but what must: on the device, on the host, and on a device and its part of it together.

    Each end needs least of one of them, so what has no room at either has none in between.
    """
    looks = [_slack_bytes(entry.measure(entry.policy(x)), room, ranks) for x in _ends(entry)]
    return not any(all(look[phase] < 0 for look in looks) for phase in looks[0])


def _slack_bytes(measured: PolicyCost, room: ExtraCapacity, ranks: int) -> dict[str, float]:
    """Bytes left in each memory and phase, and on a device together with a rank's part of the host: where things wait changes no sum.

    Without what rounding to blocks takes on the host: of a family's shapes it is not always least with the smallest chunks.
    """
    left = {name: limit + room.extra(name) - measured.smooth(name) for name, (_, limit) in measured.rows.items()}
    device = {name: spare for name, spare in left.items() if name.startswith("device, ")}
    both = {f"both{name[6:]}": spare + left[f"host{name[6:]}"] / ranks for name, spare in device.items() if f"host{name[6:]}" in left}
    budget = {f"budget{name[6:]}": spare + left[BUDGET] / ranks for name, spare in device.items() if BUDGET in left}
    return left | both | budget


def memory_of(row: str) -> str:
    """`device`, `host` or the budget: rows of one memory are its phases."""
    return row.partition(", ")[0]


def overflows(measured: PolicyCost, room: ExtraCapacity = NO_EXTRA) -> dict[str, float]:
    """Bytes by which each memory that is too small is."""
    overruns: dict[str, float] = {}
    for name, (used, limit) in measured.rows.items():
        if (over := used - limit - room.extra(name)) > 0:
            overruns[memory_of(name)] = max(over, overruns.get(memory_of(name), 0.0))
    return overruns


def overflow(measured: PolicyCost, room: ExtraCapacity = NO_EXTRA) -> float:
    """Bytes by which the fullest memory is too small; 0 or less where all fit."""
    return max(used - limit - room.extra(name) for name, (used, limit) in measured.rows.items())
