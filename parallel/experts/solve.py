"""Choose the schedule of a layer: every candidate is simulated with contention, and the fastest is kept. Pure.

Candidates are the schedules of other systems (peers.py) and our own: list scheduling by upward rank, weight gradients deferred,
reductions that fill gaps of their links, any of nine degrees for each phase, the batch whole or as two halves that are staggered. The
fastest forward pass is kept with the fastest backward pass of as many parts, so the plan is never slower than any of the others in the
model. Choosing is deterministic: the same costs give the same plan.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from . import fsmoe, peers
from .build_plan import phase_plan
from .cost import Contention, LayerCost, WeightGradients
from .peers import Peer
from .plan import ExpertSchedule, Phase
from .recipe import Attempt, Order, Prepared, Recipe, attempt, prepare

DEGREES = (1, 2, 3, 4, 5, 6, 8, 10, 12)
STAGGERS = (0.0, 0.25, 0.5)
"""Layers by which the second half of a batch lags."""
DEFERRED = ((WeightGradients.FUSED, 1), (WeightGradients.EXPERTS, 1), (WeightGradients.ALL, 1), (WeightGradients.ALL, 2))
"""Weight gradients that are deferred, and by how many layers at most."""
GAP_STRETCH = 1.02
"""A piece may end a little after the gap it was made for: all-to-alls that come early are rare."""
Point = tuple[int, int, int]
OURS_WHOLE, OURS_HALVES = "ours", "ours, half-batches"
"""Names of our own schedules."""
FLOWMOE_WHOLE = "flowmoe, whole batch"


@dataclass(frozen=True, slots=True)
class Choice:
    """Forward and backward of one scheduler."""

    name: str
    forward: Attempt
    backward: Attempt

    @property
    def seconds(self) -> float:
        """Of both phases."""
        return self.forward.seconds + self.backward.seconds

    @property
    def parts(self) -> int:
        """Parts of the batch, in both phases."""
        return self.forward.recipe.parts


def solve(cost: LayerCost, contention: Contention, *, layers: int = 4, half_batches: bool = True) -> ExpertSchedule:
    """Plan `layers` equal layers: the fastest of all candidates. `half_batches`: False where memory has no room for them."""
    prepared = prepare(cost, contention, layers)
    return schedule(best(candidates(prepared).values(), half_batches=half_batches), prepared)


def schedule(choice: Choice, prepared: Prepared) -> ExpertSchedule:
    """The plan of a choice."""
    return ExpertSchedule(
        name=choice.name,
        forward=phase_plan(choice.forward, Phase.FORWARD, prepared),
        backward=phase_plan(choice.backward, Phase.BACKWARD, prepared),
        predicted_s=choice.seconds,
    )


def candidates(prepared: Prepared) -> dict[str, Choice]:
    """Each scheduler's fastest, by name; ours with the batch whole, and as halves where it can be halved."""
    own = {OURS_WHOLE: own_choice(prepared, 1, OURS_WHOLE)}
    if prepared.cost.max_parts % 2 == 0:
        own[OURS_HALVES] = own_choice(prepared, 2, OURS_HALVES)
    return {**own, **peer_choices(prepared)}


def best(choices: Iterable[Choice], *, half_batches: bool = True) -> Choice:
    """The fastest forward pass with the fastest backward pass of as many parts; the first of equals.

    Without half-batches, of those that leave the batch whole.
    """
    by_parts: dict[int, list[Choice]] = {}
    for choice in choices:
        if half_batches or choice.parts == 1:
            by_parts.setdefault(choice.parts, []).append(choice)
    return min((_paired(alike) for alike in by_parts.values()), key=lambda choice: choice.seconds)


def _paired(choices: list[Choice]) -> Choice:
    forward = min(choices, key=lambda choice: choice.forward.seconds)
    backward = min(choices, key=lambda choice: choice.backward.seconds)
    name = forward.name if forward.name == backward.name else f"{forward.name} forward; {backward.name} backward"
    return Choice(name, forward.forward, backward.backward)


def peer_choices(prepared: Prepared) -> dict[str, Choice]:
    """The fastest that each other system can choose, by name."""
    tutel = _tutel(prepared)
    degree = tutel.forward.recipe.degree
    after, beside = peers.at_end(prepared), peers.beside_attention(prepared)
    small = peers.in_pieces(prepared, peers.LINA_PIECE_ELEMENTS)
    choices = [
        _choice(Peer.SEQUENTIAL, [peers.sequential()], [peers.sequential(after)], prepared),
        tutel,
        _choice(Peer.TUTEL_OVERLAP, peers.tutel(degree), peers.tutel(degree, beside), prepared),
        _choice(Peer.LINA, [peers.lina(degree)], [peers.lina(degree, small)], prepared),
        _choice(Peer.FSMOE, [fsmoe.forward(prepared)], fsmoe.backward(prepared), prepared),
        *_flowmoe(prepared),
    ]
    return {choice.name: choice for choice in choices}


def _choice(peer: Peer, forward: Iterable[Recipe], backward: Iterable[Recipe], prepared: Prepared) -> Choice:
    return Choice(peer.value, _fastest(forward, Phase.FORWARD, prepared), _fastest(backward, Phase.BACKWARD, prepared))


def _fastest(recipes: Iterable[Recipe], phase: Phase, prepared: Prepared) -> Attempt:
    return min((attempt(recipe, phase, prepared) for recipe in recipes), key=lambda tried: tried.seconds)


def _tutel(prepared: Prepared) -> Choice:
    """One degree for both phases."""
    after = peers.at_end(prepared)
    pairs = (_choice(Peer.TUTEL, peers.tutel(degree), peers.tutel(degree, after), prepared) for degree in fsmoe.DEGREES)
    return min(pairs, key=lambda choice: choice.seconds)


def _flowmoe(prepared: Prepared) -> list[Choice]:
    """Its fastest, and its fastest with the whole batch, if that is another.

    One number of parts for both phases; the size of pieces is searched for with the best degree of a middling size.
    """
    middling = peers.in_pieces(prepared, peers.FLOWMOE_PIECES[2])
    choices = []
    for parts in peers.parts_of(prepared.cost.max_parts):
        first = _fastest(peers.flowmoe(parts, middling), Phase.BACKWARD, prepared)
        sizes = (replace(first.recipe, pieces=peers.in_pieces(prepared, size)) for size in peers.FLOWMOE_PIECES)
        forward = _fastest(peers.flowmoe(parts), Phase.FORWARD, prepared)
        choices.append(Choice(Peer.FLOWMOE.value, forward, _fastest(sizes, Phase.BACKWARD, prepared)))
    fastest = min(choices, key=lambda choice: choice.seconds)
    return [fastest, *(replace(choice, name=FLOWMOE_WHOLE) for choice in choices[:1] if choice is not fastest)]


def fsmoe_one_stream(prepared: Prepared) -> Choice:
    """FSMoE without both kinds of links side by side: an ablation of its paper, and no candidate."""
    backward = (recipe for full in fsmoe.backward(prepared) for recipe in fsmoe.one_stream(full.pieces))
    return _choice(Peer.FSMOE_ONE_STREAM, fsmoe.one_stream(), backward, prepared)


def own_choice(prepared: Prepared, parts: int, name: str) -> Choice:
    """Our own schedule with the batch in so many parts."""
    return Choice(name, own_phase(prepared, parts, Phase.FORWARD), own_phase(prepared, parts, Phase.BACKWARD))


@dataclass(slots=True)
class _Search:
    """Our recipes of one phase, each simulated once. A point is (index of a degree, of a stagger, of what is deferred)."""

    prepared: Prepared
    phase: Phase
    parts: int
    tried: dict[Point, Attempt] = field(default_factory=dict)

    @property
    def sizes(self) -> Point:
        """How many values each axis has."""
        degrees = sum(self.parts * degree <= DEGREES[-1] for degree in DEGREES)
        return degrees, len(STAGGERS) if self.parts > 1 else 1, len(DEFERRED) if self.phase is Phase.BACKWARD else 1

    def seconds(self, point: Point) -> float:
        """What the recipe of a point takes."""
        if point not in self.tried:
            weights, horizon = DEFERRED[point[2]]
            recipe = Recipe(
                degree=DEGREES[point[0]],
                parts=self.parts,
                weights=weights,
                horizon=horizon,
                stagger=STAGGERS[point[1]],
                order=Order.RANK,
                gap_stretch=GAP_STRETCH if self.phase is Phase.BACKWARD else None,
            )
            self.tried[point] = attempt(recipe, self.phase, self.prepared)
        return self.tried[point].seconds

    def around(self, point: Point) -> list[Point]:
        """The point, the degrees next to it, and all of the other two axes."""
        degree, stagger, deferred = point
        degrees, staggers, ways = self.sizes
        steps = [(step, stagger, deferred) for step in (degree, degree - 1, degree + 1) if 0 <= step < degrees]
        steps += [(degree, index, deferred) for index in range(staggers)]
        return steps + [(degree, stagger, index) for index in range(ways)]


def own_phase(prepared: Prepared, parts: int, phase: Phase) -> Attempt:
    """Search one phase: from the best of every second degree, to whatever is faster around it, until nothing is."""
    search = _Search(prepared, phase, parts)
    degrees, staggers, ways = search.sizes
    point = min(((index, staggers // 2, ways // 2) for index in range(0, degrees, 2)), key=search.seconds)
    while (nearest := min(search.around(point), key=search.seconds)) != point:
        point = nearest
    return search.tried[point]
