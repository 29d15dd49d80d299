"""The order in which a rank takes the chunks of one layer's experts: what a training step executes of a schedule. Pure.

A pass is one list of turns. Exchanges are begun at their turn and run beside what follows; experts wait for their chunk's dispatch
alone. All ranks take the same turns, so their collectives meet; `digest` is what they compare before the first step.

Note: chunks. Experts of a rank lie one after the other, and a chunk is an equal run of them: a product stays whole, and its weights'
gradient is made at once. Where chunks do not divide a rank's experts, each expert's rows are cut into `slots`, as many for both passes, so
that what forward kept lies as backward reads it, however many chunks each of them has.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from enum import Enum

from ...errors import PlanError
from .cost import Operator
from .plan import PhasePlan


class Move(Enum):
    """What is done with a chunk in a turn."""

    DISPATCH = "dispatch"
    """Its rows begin to travel to the ranks of their experts."""
    EXPERTS = "experts"
    """Products of its rows, once they are there; backward: gradients of rows, and of weights where those are not deferred."""
    COMBINE = "combine"
    """Results begin to travel back."""
    WEIGHTS = "weights"
    """Backward: gradients of weights that were deferred."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A move of one chunk."""

    move: Move
    chunk: int


@dataclass(frozen=True, slots=True)
class PassOrder:
    """All turns of one direction through a layer's experts, in `degree` chunks."""

    degree: int
    turns: tuple[Turn, ...]

    @property
    def defers_weights(self) -> bool:
        """Whether weight gradients have turns of their own."""
        return any(turn.move is Move.WEIGHTS for turn in self.turns)

    @property
    def is_plain(self) -> bool:
        """Whether there is one chunk and nothing beside its exchanges."""
        return self.degree == 1 and not self.defers_weights

    @property
    def words(self) -> str:
        """The order in a few words."""
        deferred = ", weight gradients deferred" * self.defers_weights
        return f"{self.degree} chunk{'s' * (self.degree > 1)}{deferred}"


@dataclass(frozen=True, slots=True)
class LayerOrder:
    """Both directions through the experts of every layer."""

    forward: PassOrder
    backward: PassOrder

    @property
    def is_plain(self) -> bool:
        """Whether both directions are: every exchange is waited for."""
        return self.forward.is_plain and self.backward.is_plain

    @property
    def digest(self) -> str:
        """Equal where two orders execute alike."""
        passes = (self.forward, self.backward)
        lines = [f"{each.degree} " + " ".join(f"{turn.move.value}{turn.chunk}" for turn in each.turns) for each in passes]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def slots(self, experts: int) -> int:
        """Runs that the rows of each of a rank's `experts` are cut into, so that chunks of both directions are whole slots."""
        return math.lcm(*(each.degree // math.gcd(each.degree, experts) for each in (self.forward, self.backward)))


def in_order(degree: int, *, defers_weights: bool = False) -> PassOrder:
    """All dispatches, then each chunk's experts and combine, then the deferred weights: FSMoE's order (arXiv 2501.10714, section 4)."""
    chunks = range(degree)
    turns = [Turn(Move.DISPATCH, chunk) for chunk in chunks]
    turns += [Turn(move, chunk) for chunk in chunks for move in (Move.EXPERTS, Move.COMBINE)]
    return PassOrder(degree, (*turns, *(Turn(Move.WEIGHTS, chunk) for chunk in chunks if defers_weights)))


PLAIN = LayerOrder(in_order(1), in_order(1))
"""Every exchange by itself."""
_MOVES = {
    Operator.DISPATCH: Move.DISPATCH,
    Operator.EXPERTS: Move.EXPERTS,
    Operator.COMBINE: Move.COMBINE,
    Operator.EXPERT_WEIGHTS: Move.WEIGHTS,
}


def pass_order(plan: PhasePlan) -> PassOrder:
    """The turns of a planned phase of one layer, which keep its streams' orders. Exchanges go first: nothing waits there.

    PlanError where streams wait for each other for ever.
    """
    queues = [list(order) for order in reversed(plan.orders)]
    done: set[int] = set()
    turns: list[Turn] = []
    while any(queues):
        ready = next((queue for queue in queues if queue and done.issuperset(plan.tasks[queue[0]].needs)), None)
        if ready is None:
            raise PlanError("order of experts", found="streams that wait for each other", expected="an order", hint="a plan of solve.py")
        number = ready.pop(0)
        done.add(number)
        task = plan.tasks[number]
        # An all-to-all over both kinds of links is two tasks and one collective.
        if task.operator in _MOVES and Turn(_MOVES[task.operator], task.chunk) not in turns:
            turns.append(Turn(_MOVES[task.operator], task.chunk))
    order = PassOrder(plan.degree, tuple(turns))
    check_pass(order)
    return order


def check_pass(order: PassOrder) -> None:
    """PlanError unless every chunk is dispatched, computed and combined once, in this order, and weights come after their experts."""
    at = {turn: number for number, turn in enumerate(order.turns)}
    moves = [Move.DISPATCH, Move.EXPERTS, Move.COMBINE, *([Move.WEIGHTS] if order.defers_weights else [])]
    holds = len(at) == len(order.turns) and at.keys() == {Turn(move, chunk) for move in moves for chunk in range(order.degree)}
    for chunk in range(order.degree) if holds else ():
        dispatch, experts, *later = (at[Turn(move, chunk)] for move in moves)
        holds = holds and dispatch < experts < min(later)
    if not holds:
        words = " ".join(f"{turn.move.value}{turn.chunk}" for turn in order.turns)
        expected = "dispatch, experts, combine of every chunk, and weights after experts"
        raise PlanError("order of experts", found=f"{order.degree} chunks: {words}", expected=expected, hint="in_order(degree)")
