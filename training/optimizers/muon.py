"""Muon for the matrices of decoder layers, AdamW for everything else, on sharded float32 weights.

A step of a matrix W with gradient G: B <- B + (1 - momentum) (G - B), O = orthogonal(G + momentum (B - G)), W <- (1 - lr decay) W -
lr scale O, as torch.optim.Muon has it (Nesterov). All but `orthogonal` is element by element, on each rank's own part. For that
a matrix is sent together in bfloat16, which its first product rounds to in any case, orthogonalised by one rank, and sent back
(parallel/sharding/matrix_plan.py says by which and when); what the next round needs is on its way meanwhile, and AdamW's update
stands behind the first. Stacks of experts whose ranks have as many each stay where they are. Replicas all do the same.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ...parallel.sharding.matrix_plan import Round, spread_matrices
from ...parallel.sharding.parts import memory_of, row_split
from .config import MuonScale, OptimConfig
from .sharded_adamw import fused_adamw

MOMENTUM = "momentum_buffer"
"""Name of a matrix's state, as torch.optim.Muon has it."""
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic a x + b x^3 + c x^5 that drives singular values towards 1 (Jordan 2024)."""
SMALLEST_NORM = 1e-7


def orthogonal(matrix: Tensor, steps: int) -> Tensor:
    """Nearly the orthogonal matrix nearest to a bfloat16 `matrix` (m, n): Newton-Schulz in bfloat16, bit-equal to torch.optim.Muon's.

    Singular values end between about 0.5 and 1.5, not at 1; Jordan 2024 shows why that is enough.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.size(0) > matrix.size(1)
    wide = matrix.T if is_tall else matrix
    wide = wide / wide.norm().clamp(min=SMALLEST_NORM)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if is_tall else wide


def update_scale(scale: MuonScale, rows: int, columns: int) -> float:
    """What the learning rate of a matrix is multiplied with.

    `original`: sqrt(max(1, rows / columns)) (Jordan 2024); `match_rms_adamw`: 0.2 sqrt(max(rows, columns)), which gives an update the
    root mean square that AdamW's have, so that its learning rate and decay can be used (arXiv 2502.16982, section 2.2).
    """
    if scale is MuonScale.ORIGINAL:
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


@dataclass(eq=False)
class _Matrix:
    """One matrix: a parameter, an expert of a stack, or half of an expert's gate and up."""

    parameter: nn.Parameter
    shape: tuple[int, int]
    here: tuple[Any, ...] | None
    """Index of this rank's rows of it in its part of the parameter; None: it has none."""
    rows: tuple[int, ...] = ()
    """Rows of each rank of the group, in order."""
    is_transposed: bool = False
    """Its rows are a layer's inputs."""

    @property
    def scaled_by(self) -> tuple[int, int]:
        """Outputs and inputs, as the scale of an update has them."""
        return self.shape[::-1] if self.is_transposed else self.shape

    def part(self, values: Tensor) -> Tensor:
        """This rank's rows (r, columns), a view of its part of the parameter, its gradient or its state."""
        return values[self.here] if self.here is not None else values.new_empty(0, self.shape[1])


@dataclass(eq=False)
class _Team:
    """The matrices that one group of ranks holds together, and who does which."""

    group: ProcessGroup
    matrices: list[_Matrix] = field(default_factory=list)
    rounds: tuple[Round, ...] = ()


@dataclass(eq=False)
class _Travelling:
    """Parts of one round's matrices on their way: to their ranks, or back from them."""

    received: Tensor
    sent: Tensor
    work: Any

    def wait(self) -> Tensor:
        self.work.wait()
        return self.received


class Muon(torch.optim.Optimizer):
    """Over the groups of `build_optimizer`: Muon where a group is named `muon`, torch's fused AdamW over the others.

    Every rank calls `step`, with a gradient for every matrix. `transposed_experts`: stacks of experts are (E, inputs, outputs).
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig, *, transposed_experts: bool = False) -> None:
        super().__init__(groups, {"lr": config.lr, "weight_decay": config.weight_decay})
        self._config = config
        others = [group for group in self.param_groups if group["name"] != "muon"]
        # The same groups and states: what sets rates, saves and restores sees one optimizer.
        self._adamw: torch.optim.Optimizer | None = None
        if others:
            self._adamw = fused_adamw(others, config)
            self._adamw.state = self.state
        self._muon = next(group for group in self.param_groups if group["name"] == "muon")
        named = list(zip(self._muon["param_names"], self._muon["params"], strict=True))
        self._alone, self._teams = _teams(named, transposed_experts)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of everything. Collective over the ranks that hold parts of a matrix."""
        missing = [name for name, each in zip(self._muon["param_names"], self._muon["params"], strict=True) if each.grad is None]
        assert not missing, f"no gradient for {', '.join(missing)}"
        self._update_momentum()
        first = deque(deque([self._gather(team, team.rounds[0])]) for team in self._teams)
        if self._adamw is not None:
            self._adamw.step()
        for matrix in self._alone:
            self._apply(matrix, orthogonal(self._direction(matrix).contiguous(), self._config.muon_steps))
        for team in self._teams:
            self._work(team, first.popleft())

    def _update_momentum(self) -> None:
        for parameter in self._muon["params"]:
            state = self.state[parameter]
            if MOMENTUM not in state:
                state[MOMENTUM] = torch.zeros_like(parameter.grad)
            memory_of(state[MOMENTUM]).lerp_(memory_of(parameter.grad), 1 - self._config.muon_momentum)

    def _direction(self, matrix: _Matrix) -> Tensor:
        """This rank's rows of what is to be orthogonalised, in bfloat16."""
        gradient = matrix.part(memory_of(matrix.parameter.grad))  # type: ignore[arg-type]
        momentum = matrix.part(memory_of(self.state[matrix.parameter][MOMENTUM]))
        return gradient.lerp(momentum, self._config.muon_momentum).bfloat16()

    def _apply(self, matrix: _Matrix, rows: Tensor) -> None:
        """Update this rank's rows of a matrix by those of its orthogonal one."""
        rate, weights = float(self._muon["lr"]), matrix.part(memory_of(matrix.parameter))
        weights.mul_(1 - rate * self._muon["weight_decay"])
        weights.add_(rows, alpha=-rate * update_scale(self._config.muon_scale, *matrix.scaled_by))

    def _work(self, team: _Team, coming: deque[_Travelling]) -> None:
        """All rounds of a team: gather the next round's, orthogonalise this one's, apply the last one's, send this one's back."""
        # Queues, so that nothing lives on in a variable: memory is counted (estimate/muon.py).
        leaving: deque[tuple[Round, _Travelling]] = deque()
        for number, each in enumerate(team.rounds):
            if number + 1 < len(team.rounds):
                coming.append(self._gather(team, team.rounds[number + 1]))
            done = self._orthogonalised(team, each, coming)
            if leaving:
                self._take(team, *leaving.popleft())
            leaving.append((each, self._scatter(team, each, done)))
            del done
        while leaving:
            self._take(team, *leaving.popleft())

    def _orthogonalised(self, team: _Team, each: Round, coming: deque[_Travelling]) -> list[Tensor]:
        """This rank's matrices of a round, which came first; each is gone once its orthogonal one is there."""
        matrices = [team.matrices[index] for index in each[dist.get_rank(team.group)]]
        whole, done = _assembled(team, matrices, coming.popleft().wait()), []
        while whole:
            done.append(orthogonal(whole.pop(0), self._config.muon_steps))
        return done

    def _gather(self, team: _Team, each: Round) -> _Travelling:
        parts = [self._direction(team.matrices[index]).reshape(-1) for index in _in_order(each)]
        ours, theirs = _counts(team, each)
        return _exchange(team, parts, ours, theirs)

    def _scatter(self, team: _Team, each: Round, done: Sequence[Tensor]) -> _Travelling:
        rank, ranks = dist.get_rank(team.group), range(dist.get_world_size(team.group))
        cut = [matrix.split(team.matrices[index].rows) for index, matrix in zip(each[rank], done, strict=True)]
        ours, theirs = _counts(team, each)
        return _exchange(team, [rows[other].reshape(-1) for other in ranks for rows in cut], theirs, ours)

    def _take(self, team: _Team, each: Round, coming: _Travelling) -> None:
        received, start, rank = coming.wait(), 0, dist.get_rank(team.group)
        for index in _in_order(each):
            matrix = team.matrices[index]
            size = matrix.rows[rank] * matrix.shape[1]
            if size:
                self._apply(matrix, received[start : start + size].view(-1, matrix.shape[1]))
            start += size


def _in_order(each: Round) -> Iterator[int]:
    """Matrices of a round, by their rank."""
    return (index for numbers in each for index in numbers)


def _counts(team: _Team, each: Round) -> tuple[list[int], list[int]]:
    """Numbers that this rank holds of each rank's matrices, and that each rank holds of this one's."""
    rank = dist.get_rank(team.group)
    chosen = [[team.matrices[index] for index in numbers] for numbers in each]
    ours = [sum(matrix.rows[rank] * matrix.shape[1] for matrix in matrices) for matrices in chosen]
    theirs = [sum(matrix.rows[other] * matrix.shape[1] for matrix in chosen[rank]) for other in range(len(each))]
    return ours, theirs


def _exchange(team: _Team, parts: list[Tensor], sent: list[int], received: list[int]) -> _Travelling:
    # A rank without a matrix in a round has nothing to send back.
    nothing = memory_of(team.matrices[0].parameter).new_empty(0, dtype=torch.bfloat16)
    buffer = torch.cat([nothing, *parts])
    target = buffer.new_empty(sum(received))
    return _Travelling(target, buffer, dist.all_to_all_single(target, buffer, received, sent, group=team.group, async_op=True))


def _assembled(team: _Team, matrices: Sequence[_Matrix], received: Tensor) -> list[Tensor]:
    """This rank's matrices of a round, whole, from what each rank sent: its rows of one after the other."""
    sizes = [matrix.rows[rank] * matrix.shape[1] for rank in range(dist.get_world_size(team.group)) for matrix in matrices]
    pieces = received.split(sizes)
    return [torch.cat(pieces[place :: len(matrices)]).view(matrix.shape) for place, matrix in enumerate(matrices)]


def _teams(named: Sequence[tuple[str, nn.Parameter]], transposed_experts: bool) -> tuple[list[_Matrix], list[_Team]]:
    """The matrices that lie whole on this rank and are its own, and those of each group, in the parameters' order."""
    alone: list[_Matrix] = []
    teams: dict[ProcessGroup, _Team] = {}
    for name, parameter in named:
        split, halves = row_split(parameter), _halves(name, parameter, transposed_experts)
        if split.group is None or _is_even_stack(parameter):
            alone += [_whole(parameter, number, half) for number in _stack(parameter) for half in halves]
            continue
        team = teams.setdefault(split.group, _Team(split.group))
        if parameter.ndim == 3 and split.dim == 0:
            team.matrices += [_one_of(parameter, number, half) for number in range(parameter.shape[0]) for half in halves]
        else:
            team.matrices += [_rows_of(parameter, number, half) for number in _stack(parameter) for half in halves]
    for matrix in (*alone, *(matrix for team in teams.values() for matrix in team.matrices)):
        matrix.is_transposed = transposed_experts and matrix.parameter.ndim == 3
    for team in teams.values():
        team.rounds = spread_matrices([matrix.shape for matrix in team.matrices], dist.get_world_size(team.group))
    return alone, list(teams.values())


def _is_even_stack(parameter: nn.Parameter) -> bool:
    """Whether every rank has as many whole matrices of a stack: then each does its own."""
    split = row_split(parameter)
    return parameter.ndim == 3 and split.dim == 0 and len({len(each) for each in split.ranges}) == 1


def _stack(parameter: nn.Parameter) -> Sequence[int | None]:
    """Numbers of the matrices in this rank's part of a stack; None: it is one matrix."""
    return [None] if parameter.ndim == 2 else range(memory_of(parameter).shape[0])


@dataclass(frozen=True)
class _Half:
    """Rows (as a range) and columns (start and step) of one matrix in the last two dims."""

    rows: range
    first_column: int
    column_step: int
    num_columns: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), self.num_columns

    def index(self, number: int | None, start: int = 0, stop: int | None = None) -> tuple[Any, ...]:
        """Of its rows from `start` to `stop`, counted in this rank's part."""
        rows = slice(self.rows.start, self.rows.stop) if stop is None else slice(start, stop)
        columns = slice(self.first_column, None, self.column_step)
        return (rows, columns) if number is None else (number, rows, columns)


def _halves(name: str, parameter: nn.Parameter, transposed: bool) -> tuple[_Half, ...]:
    """The matrices of a parameter: itself; of experts' gate and up, which files and dense layers have as two, both.

    They lie below each other, or in `transposed` stacks (E, inputs, outputs) in every other column.
    """
    rows, columns = parameter.shape[-2:]
    if not (parameter.ndim == 3 and name.endswith("gate_up_proj")):
        return (_Half(range(rows), 0, 1, columns),)
    if transposed:
        return tuple(_Half(range(rows), first, 2, columns // 2) for first in (0, 1))
    return _Half(range(rows // 2), 0, 1, columns), _Half(range(rows // 2, rows), 0, 1, columns)


def _whole(parameter: nn.Parameter, number: int | None, half: _Half) -> _Matrix:
    return _Matrix(parameter, half.shape, half.index(number))


def _one_of(parameter: nn.Parameter, number: int, half: _Half) -> _Matrix:
    """A matrix of a stack that one rank of the group has whole."""
    split = row_split(parameter)
    mine = split.ranges[dist.get_rank(split.group)]
    held = tuple(half.shape[0] * (number in each) for each in split.ranges)
    return _Matrix(parameter, half.shape, half.index(number - mine.start) if number in mine else None, held)


def _rows_of(parameter: nn.Parameter, number: int | None, half: _Half) -> _Matrix:
    """A matrix whose rows lie over the group."""
    split = row_split(parameter)
    mine = split.ranges[dist.get_rank(split.group)]
    shared = [range(max(each.start, half.rows.start), min(each.stop, half.rows.stop)) for each in split.ranges]
    own = shared[dist.get_rank(split.group)]
    here = half.index(number, own.start - mine.start, own.stop - mine.start) if len(own) else None
    return _Matrix(parameter, half.shape, here, tuple(len(each) for each in shared))
