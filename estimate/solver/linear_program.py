"""The linear program behind memory=auto: shares of tokens to keep and to move, for one shape of the layer executor. Pure.

Note: the program. Variables x are shares of tokens in [0, 1]: of a class (memory/policy.py) that is kept, or moved to the host.
Everything else follows as affine functions of x, made from the ledger and the timing by differences (estimate/solver/shapes.py):

    minimise   forward(x) + backward(x) + stall_forward + stall_backward + exposed
    subject to bytes_r(x) <= limit_r                          each phase of the device, the host, ...
               to_host(x)   <= forward(x)  + stall_forward    what the link cannot hide, it adds
               from_host(x) <= backward(x) + stall_backward
               hidden       <= forward(x) + backward(x) + exposed   gathers and reductions run beside all compute
               keep + host  <= 1                              of each class

Source of the form: MEMO (arXiv 2407.12117), section 4.2, whose one alpha is this program with all classes tied and nothing
kept; here every class has its own two shares. HiGHS solves it (scipy.optimize.linprog).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_MOVED_S = 1e-6
"""Weight of what decides last: a second of link time, of shares that take the same time; where room decides, time and link together."""
ROOMY = 0.5
"""A memory of which so large a share is used has room enough: below it less is moved instead."""
_FIRST_MEMORY = 0.01
"""Weight of the first of the memories that are to have room, beside the fullest of them."""


@dataclass(frozen=True, slots=True)
class Affine:
    """constant + slope . x"""

    constant: float
    slope: tuple[float, ...]

    def __call__(self, x: Sequence[float]) -> float:
        return self.constant + sum(a * b for a, b in zip(self.slope, x, strict=True))

    def __add__(self, other: Affine) -> Affine:
        return Affine(self.constant + other.constant, tuple(a + b for a, b in zip(self.slope, other.slope, strict=True)))


@dataclass(frozen=True, slots=True)
class Row:
    """A memory that must not overflow: bytes(x) <= limit. Several rows may bear one name, as the pieces of a maximum."""

    name: str
    num_bytes: Affine
    limit: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyProgram:
    """One instance; seconds are of a whole step."""

    forward_s: Affine
    backward_s: Affine
    to_host_s: Affine
    """How long the link is busy in forward, if nothing waits for it."""
    from_host_s: Affine
    rows: tuple[Row, ...]
    exclusive: tuple[tuple[int, ...], ...] = ()
    """Variables that are at most 1 together."""
    fixed_s: float = 0.0
    hidden_s: float = 0.0
    """Communication beside forward and backward; what is longer than both of them shows."""
    roomy: tuple[str, ...] = ()
    """Beginnings of the names of rows whose memories are to be left as empty as the time allows; the first of them most of all."""

    def fullness(self, x: Sequence[float]) -> float:
        """The share of its limit that the fullest of the memories in `roomy` takes with these shares; 0 without any."""
        return max((row.num_bytes(x) / _scale(row) for row in self.rows if row.name.startswith(self.roomy)), default=0.0)

    def time_s(self, x: Sequence[float]) -> float:
        """The step with these shares."""
        return step_s(
            self.forward_s(x), self.backward_s(x), self.to_host_s(x), self.from_host_s(x), fixed_s=self.fixed_s, hidden_s=self.hidden_s
        )


def step_s(forward_s: float, backward_s: float, to_host_s: float, from_host_s: float, *, fixed_s: float, hidden_s: float) -> float:
    """Seconds of a step: what the link or other communication takes longer than the computation beside it, is waited for."""
    exposed = max(0.0, hidden_s - forward_s - backward_s)
    return fixed_s + max(forward_s, to_host_s) + max(backward_s, from_host_s) + exposed


@dataclass(frozen=True, slots=True)
class LpSolution:
    """An optimum: the shares, the seconds of the step, and what one more byte of each full row would save (seconds, >= 0)."""

    x: tuple[float, ...]
    time_s: float
    prices: dict[str, float]


def solve_program(program: PolicyProgram, within_s: float | None = None) -> LpSolution | None:
    """The fastest shares; None where none satisfy all rows.

    `within_s`: of those that take no longer, the shares that leave most room. The memory of `roomy` that is fullest, in shares of its
    limit, is as empty as it can be, down to ROOMY; then the first of them; and of what is left undecided the least is moved.
    """
    if not program.forward_s.slope:
        inside = all(row.num_bytes.constant <= row.limit for row in program.rows)
        return LpSolution((), program.time_s(()), {}) if inside else None
    from scipy.optimize import linprog

    size = len(program.forward_s.slope)
    rows, limits = _matrices(program, size)
    seconds, moved = _objectives(program)
    cost, bounds = [a + _MOVED_S * b for a, b in zip(seconds, moved, strict=True)], _bounds(size)
    if within_s is not None:
        # seconds(x) <= within_s: constants of the step moved to the right.
        rows.append(seconds)
        limits.append(within_s - program.fixed_s - program.forward_s.constant - program.backward_s.constant)
        rows, limits = _with_room(program, rows, limits, size)
        # In shares of what there is of each: seconds of the step, and of the link.
        least = [(b + _MOVED_S * a) / within_s for a, b in zip(seconds, moved, strict=True)]
        cost, bounds = [_MOVED_S * share for share in least] + [1.0, _FIRST_MEMORY], [*bounds, (ROOMY, None), (ROOMY, None)]
    solution = linprog(cost, A_ub=rows, b_ub=limits, bounds=bounds, method="highs-ds")
    if solution.status == 2:
        return None
    assert solution.status == 0, f"the solver stopped: {solution.message}"
    x = tuple(min(1.0, max(0.0, float(share))) for share in solution.x[:size])
    # Marginals are per unit of a scaled limit and at most 0; rows of one name are pieces of one maximum, whose prices add up.
    prices: dict[str, float] = {}
    for row, marginal in zip(program.rows, solution.ineqlin.marginals, strict=False):
        prices[row.name] = prices.get(row.name, 0.0) - float(marginal) / _scale(row)
    return LpSolution(x, program.time_s(x), prices)


def _bounds(size: int) -> list[tuple[float | None, float | None]]:
    return [(0.0, 1.0)] * size + [(0.0, None)] * 3


def _objectives(program: PolicyProgram) -> tuple[list[float], list[float]]:
    """Seconds of the step, and of the link, per unit of each variable."""
    compute, link = program.forward_s + program.backward_s, program.to_host_s + program.from_host_s
    return [*compute.slope, 1.0, 1.0, 1.0], [*link.slope, 0.0, 0.0, 0.0]


def _matrices(program: PolicyProgram, size: int) -> tuple[list[list[float]], list[float]]:
    """Left and right sides over (x, stall_forward, stall_backward, exposed); those of program.rows first."""
    compute = program.forward_s + program.backward_s
    rows, limits = [], []
    for row in program.rows:
        # bytes_r(x) <= limit_r, for each memory.
        # In shares of the limit: bytes are too large for a solver's tolerances.
        scale = _scale(row)
        rows.append([a / scale for a in row.num_bytes.slope] + [0.0] * 3)
        limits.append((row.limit - row.num_bytes.constant) / scale)
    # Each pair: busy(x) <= beside(x) + stall, the two directions of the link beside forward and backward; last
    # hidden <= forward(x) + backward(x) + exposed, whose busy time does not depend on x. `stall` is minimised, so it is the excess.
    nothing = Affine(0.0, (0.0,) * size)
    pairs = ((program.to_host_s, program.forward_s), (program.from_host_s, program.backward_s), (nothing, compute))
    for index, (busy, beside) in enumerate(pairs):
        rows.append([a - b for a, b in zip(busy.slope, beside.slope, strict=True)] + [-float(index == stall) for stall in range(3)])
        limits.append(beside.constant - busy.constant - (program.hidden_s if index == 2 else 0.0))
    # keep + host <= 1 of each class: a token is stored once at most, and recomputed for the rest.
    for together in program.exclusive:
        rows.append([1.0 if index in together else 0.0 for index in range(size)] + [0.0] * 3)
        limits.append(1.0)
    return rows, limits


def _with_room(
    program: PolicyProgram, rows: list[list[float]], limits: list[float], size: int
) -> tuple[list[list[float]], list[float]]:
    """The rows with two variables more: the share of its limit that the fullest memory of `roomy` takes, and the first of them alone."""
    rows, limits = [[*row, 0.0, 0.0] for row in rows], list(limits)
    for row in program.rows:
        for column, names in enumerate((program.roomy, program.roomy[:1])):
            if row.name.startswith(names):
                # bytes_r(x) / limit_r - fullness <= 0
                slope = [a / _scale(row) for a in row.num_bytes.slope]
                rows.append([*slope, 0.0, 0.0, 0.0, -float(column == 0), -float(column == 1)])
                limits.append(-row.num_bytes.constant / _scale(row))
    return rows, limits


def _scale(row: Row) -> float:
    return max(abs(row.limit), 1.0)


def least_growth(program: PolicyProgram, memory: str) -> tuple[float, tuple[float, ...]]:
    """The least share t by which the limits of rows that begin with `memory` must grow for a solution, and its shares.

    Where even that helps nothing, for the other memories are too small too, all limits grow.
    """
    from scipy.optimize import linprog

    size = len(program.forward_s.slope)
    rows, limits = _matrices(program, size)
    for names in ((memory,), ("device", "host")):
        growth = [[-float(row.name.startswith(names))] for row in program.rows] + [[0.0]] * (len(rows) - len(program.rows))
        # bytes_r(x) - t limit_r <= limit_r, in shares of the limit; t is the last variable, and all that is minimised.
        together = [row + extra for row, extra in zip(rows, growth, strict=True)]
        solution = linprog([0.0] * (size + 3) + [1.0], A_ub=together, b_ub=limits, bounds=[*_bounds(size), (None, None)], method="highs-ds")
        if solution.status == 0:
            return float(solution.x[-1]), tuple(min(1.0, max(0.0, float(share))) for share in solution.x[:size])
    raise AssertionError("limits that grow without end hold anything")
