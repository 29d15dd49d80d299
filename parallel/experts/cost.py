"""Seconds of every operator of a mixture-of-experts layer: alpha + volume x beta, forward and backward. Pure.

Volumes are bytes on links and multiply-adds in products; times are seconds. Layout of a layer: attention is split over a group whose
ranks gather their rows before it and scatter its sums after it; tokens go to their experts by an all-to-all of the expert group
(dispatch) and back (combine); the shards of one expert gather its tokens and scatter its sums. Volumes as in FSMoE
(arXiv 2501.10714): gather and scatter k x f x B x L x M elements, dispatch and combine that over the shards of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum

from ...errors import PlanError


class Resource(IntEnum):
    """What a task occupies while it runs; one task at a time."""

    COMPUTE = 0
    INTRA = 1
    """Links inside a node."""
    INTER = 2
    """Links between nodes."""


class Operator(IntEnum):
    """What a task does. The numbers index tables of costs."""

    ATTENTION_GATHER = 0
    ATTENTION = 1
    ATTENTION_SCATTER = 2
    GATE = 3
    """Router and the order of tokens by expert."""
    DISPATCH = 4
    EXPERT_GATHER = 5
    EXPERTS = 6
    EXPERT_SCATTER = 7
    COMBINE = 8
    INVERSE_ORDER = 9
    """Backward: the gradient of putting tokens back in their order."""
    EXPERT_WEIGHTS = 10
    """Weight gradients of experts, where they are deferred."""
    ATTENTION_WEIGHTS = 11
    """Weight gradients of attention's projections, where they are deferred."""
    REDUCE = 12
    """A piece of the reduction of dense gradients."""


class WeightGradients(Enum):
    """Which weight gradients are tasks of their own that may run later than the gradients of inputs."""

    FUSED = "fused"
    EXPERTS = "experts deferred"
    ALL = "experts and attention deferred"


class Placement(Enum):
    """Which links a process group uses."""

    NONE = "one rank"
    INTRA = "intra-node"
    INTER = "inter-node"
    BOTH = "both"


@dataclass(frozen=True, slots=True)
class AlphaBeta:
    """`alpha_s` seconds to start and `unit_s` seconds a unit: a byte on links, a multiply-add in products."""

    alpha_s: float
    unit_s: float


class Collective(Enum):
    """Kinds of communication that are priced by themselves."""

    ALL_TO_ALL = "all-to-all"
    ALL_GATHER = "all-gather"
    REDUCE_SCATTER = "reduce-scatter"
    ALL_REDUCE = "all-reduce"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What a machine takes: collectives by kind and links (bytes a rank sends, as the profile counted them), and compute."""

    name: str
    collectives: Mapping[tuple[Collective, Resource], AlphaBeta]
    product: AlphaBeta
    """A matrix product, a multiply-add as unit."""
    attention: AlphaBeta
    """Attention with its projections, forward, a multiply-add as unit."""
    score_s: float
    """A score of softmax."""
    gate_s: float
    """Router and order, forward."""
    inverse_order_s: float
    """Backward of the order, and once more of the router."""
    source: str

    def of(self, kind: Collective, resource: Resource) -> AlphaBeta:
        """PlanError where the machine was not measured for it."""
        cost = self.collectives.get((kind, resource))
        if cost is None:
            found = f"no {kind.value} on {resource.name.lower()}-node links"
            raise PlanError(f"rates of {self.name}", found=found, expected="alpha and beta of it", hint="measure it")
        return cost


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """`ranks` of which `ranks_in_node` share a node with any one of them, itself included."""

    ranks: int
    ranks_in_node: int

    def __post_init__(self) -> None:
        if not 1 <= self.ranks_in_node <= self.ranks or self.ranks % self.ranks_in_node:
            raise PlanError(
                "process group",
                found=f"{self.ranks} ranks, {self.ranks_in_node} of them in a node",
                expected="equally many in every node",
                hint=f"{self.ranks} ranks, {self.ranks} in a node",
            )

    @property
    def placement(self) -> Placement:
        """The links its members talk over."""
        if self.ranks == 1:
            return Placement.NONE
        if self.ranks_in_node == self.ranks:
            return Placement.INTRA
        return Placement.INTER if self.ranks_in_node == 1 else Placement.BOTH

    @property
    def intra_share(self) -> float:
        """Share of an all-to-all's bytes that stay in the node; a rank's own count on neither link."""
        return (self.ranks_in_node - 1) / (self.ranks - 1) if self.ranks > 1 else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """Process groups of one layer."""

    experts: ProcessGroup
    """Dispatch and combine."""
    shards: ProcessGroup
    """Ranks that hold one expert together."""
    attention: ProcessGroup
    """Ranks that share attention's heads."""
    gradients: ProcessGroup
    """Ranks over which dense gradients are reduced."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLayer:
    """One decoder layer with experts, for one micro-batch. Sizes in elements, B = batch, L = tokens, M = hidden, H = ffn."""

    batch: int
    tokens: int
    hidden: int
    ffn: int
    heads: int
    capacity: float
    """Rows of experts over top_k x tokens: a capacity factor, or the padding or imbalance assumed without one."""
    top_k: int = 2
    products: int = 2
    """Matrices of an expert: 2, or 3 with a gate."""
    element_bytes: int = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Volumes:
    """What one layer moves and computes on a rank in one direction of the pass."""

    dispatch_bytes: float
    """Combine moves as much."""
    gather_bytes: float
    """The scatter of experts' sums moves as much."""
    expert_macs: float
    attention_bytes: float
    """Before attention, and as much after it."""
    projection_macs: float
    attention_macs: float
    """Scores and sums of values, without projections."""
    scores: float
    gradient_elements: int
    """Dense weights of a rank, whose gradients are reduced."""


def volumes(layer: ExpertLayer, groups: Groups) -> Volumes:
    """Count the volumes of a layer under a layout."""
    rows = layer.batch * layer.tokens
    routed = layer.top_k * layer.capacity * rows * layer.hidden
    shards, ranks = groups.shards.ranks, groups.attention.ranks
    return Volumes(
        dispatch_bytes=routed / shards * layer.element_bytes,
        gather_bytes=routed * layer.element_bytes,
        expert_macs=routed * layer.ffn * layer.products / shards,
        attention_bytes=rows * layer.hidden * layer.element_bytes,
        projection_macs=4 * rows * layer.hidden**2 / ranks,
        attention_macs=2 * layer.batch * layer.tokens**2 * layer.hidden / ranks,
        scores=layer.batch * layer.heads * layer.tokens**2 / ranks,
        gradient_elements=4 * layer.hidden**2 // ranks + 2 * layer.hidden,
    )


@dataclass(frozen=True, slots=True)
class Contention:
    """How tasks of different resources slow each other down.

    A task on x runs at 1 / (1 + sum over other active resources y of extra[x][y]) of its speed.
    """

    name: str
    extra: tuple[tuple[float, float, float], ...]

    @property
    def flat(self) -> tuple[float, ...]:
        """Row after row."""
        return tuple(value for row in self.extra for value in row)


IDEAL = Contention("ideal", ((0.0, 0.0, 0.0),) * 3)
CALIBRATED = Contention("calibrated", ((0.0, 0.05, 0.05), (0.0, 0.0, 0.4), (0.0, 0.4, 0.0)))
"""Links at 1 / 1.4 speed while both are busy, compute 5 % slower an active link: with these the simulated gain of FSMoE over Tutel is
near the one its paper measured."""


@dataclass(frozen=True, slots=True)
class OperatorCost:
    """Seconds of an operator on one resource: alpha_s once a task, work_s over all tasks of the layer together."""

    operator: Operator
    resource: Resource
    alpha_s: float
    work_s: float

    def seconds(self, share: float) -> float:
        """Of a task with this share of the layer's rows."""
        return self.alpha_s + self.work_s * share


@dataclass(frozen=True, slots=True)
class GradientCost:
    """Reduction of one layer's dense gradients: `elements`, and seconds of a piece on its links."""

    resource: Resource
    alpha_s: float
    element_s: float
    elements: int

    def seconds(self, elements: float) -> float:
        """Of one piece; nothing takes no time."""
        return self.alpha_s + self.element_s * elements if elements > 0 else 0.0


@dataclass(frozen=True, slots=True)
class LayerCost:
    """All operators of a layer. An operator without a row, or with two (an all-to-all over both links), is meant so."""

    forward: tuple[OperatorCost, ...]
    backward: Mapping[WeightGradients, tuple[OperatorCost, ...]]
    gradient: GradientCost | None
    """None where one rank has the whole gradient."""
    max_parts: int
    """Sequences of the micro-batch: it cannot be cut into more parts."""


def layer_cost(layer: ExpertLayer, groups: Groups, rates: Rates) -> LayerCost:
    """Price a layer. PlanError where the machine has no figure for a collective that the layout needs."""
    size = volumes(layer, groups)
    exchange = _exchange(size, groups, rates)
    product = AlphaBeta(rates.product.alpha_s * layer.products, rates.product.unit_s)
    experts = AlphaBeta(product.alpha_s, product.unit_s * size.expert_macs)
    # Half of attention's alpha is paid for every part of a batch that is cut: it fits what chunked attention takes.
    fixed = rates.attention.alpha_s / 2
    projections = rates.attention.unit_s * size.projection_macs
    attention = AlphaBeta(fixed, fixed + projections + rates.attention.unit_s * size.attention_macs + rates.score_s * size.scores)
    gate = _compute(Operator.GATE, AlphaBeta(0.0, rates.gate_s))
    forward = (*exchange, gate, _compute(Operator.EXPERTS, experts), _compute(Operator.ATTENTION, attention))
    orders = [_compute(kind, AlphaBeta(0.0, rates.inverse_order_s)) for kind in (Operator.INVERSE_ORDER, Operator.GATE)]
    backward = {how: (*exchange, *orders, *_backward(how, experts, attention, projections)) for how in WeightGradients}
    return LayerCost(forward, backward, _gradient(size, groups, rates, layer.element_bytes), layer.batch)


def _backward(how: WeightGradients, experts: AlphaBeta, attention: AlphaBeta, projections: float) -> list[OperatorCost]:
    """Backward takes twice the time of forward; what is deferred leaves its place and costs the same later."""
    rows = [_compute(Operator.EXPERTS, experts, 1 if how is not WeightGradients.FUSED else 2)]
    if how is not WeightGradients.FUSED:
        rows.append(_compute(Operator.EXPERT_WEIGHTS, experts))
    later = projections if how is WeightGradients.ALL else 0.0
    rows.append(_compute(Operator.ATTENTION, AlphaBeta(2 * attention.alpha_s, 2 * attention.unit_s - later)))
    if later:
        rows.append(_compute(Operator.ATTENTION_WEIGHTS, AlphaBeta(0.0, later)))
    return rows


def _compute(operator: Operator, cost: AlphaBeta, times: int = 1) -> OperatorCost:
    return OperatorCost(operator, Resource.COMPUTE, times * cost.alpha_s, times * cost.unit_s)


def _exchange(size: Volumes, groups: Groups, rates: Rates) -> list[OperatorCost]:
    """Communication of a layer, the same forward and backward: what gathers forward scatters backward."""
    gather, scatter = Collective.ALL_GATHER, Collective.REDUCE_SCATTER
    rows = []
    for operator in (Operator.DISPATCH, Operator.COMBINE):
        rows += _all_to_all(operator, size.dispatch_bytes, groups.experts, rates)
    for operator, kind, sent, group in (
        (Operator.EXPERT_GATHER, gather, size.gather_bytes, groups.shards),
        (Operator.EXPERT_SCATTER, scatter, size.gather_bytes, groups.shards),
        (Operator.ATTENTION_GATHER, gather, size.attention_bytes, groups.attention),
        (Operator.ATTENTION_SCATTER, scatter, size.attention_bytes, groups.attention),
    ):
        if group.placement is not Placement.NONE:
            link = slowest_links(group)
            cost = rates.of(kind, link)
            rows.append(OperatorCost(operator, link, cost.alpha_s, cost.unit_s * sent))
    return rows


def _all_to_all(operator: Operator, sent_bytes: float, group: ProcessGroup, rates: Rates) -> list[OperatorCost]:
    """One row, or two where the group spans nodes and has several ranks in each: both run side by side."""
    if group.placement in (Placement.INTRA, Placement.INTER):
        parts = [(slowest_links(group), 1.0)]
    elif group.placement is Placement.BOTH:
        parts = [(Resource.INTRA, group.intra_share), (Resource.INTER, 1.0 - group.intra_share)]
    else:
        parts = []
    costs = [(link, share, rates.of(Collective.ALL_TO_ALL, link)) for link, share in parts]
    return [OperatorCost(operator, link, cost.alpha_s, cost.unit_s * sent_bytes * share) for link, share, cost in costs]


def slowest_links(group: ProcessGroup) -> Resource:
    """The links that a ring over the group waits for."""
    return Resource.INTRA if group.placement is Placement.INTRA else Resource.INTER


def _gradient(size: Volumes, groups: Groups, rates: Rates, element_bytes: int) -> GradientCost | None:
    if groups.gradients.placement is Placement.NONE:
        return None
    links = slowest_links(groups.gradients)
    cost = rates.of(Collective.ALL_REDUCE, links)
    return GradientCost(links, cost.alpha_s, cost.unit_s * element_bytes, size.gradient_elements)
