"""The order in which a run's layers take chunks of rows to experts, chosen by the schedules' own solver, and what it hides. Pure.

A layer's dispatch, products and combine are priced by the plan's rates; every degree that divides a rank's experts is simulated with
contention, backward with weight gradients in place and deferred, and the fastest is kept (parallel/experts/recipe.py). One chunk is among
them: never slower in the model.

Note: assumed. Starts are of FSMoE's testbeds (arXiv 2501.10714, figure 5: all-to-all 0.18 to 0.29 ms, products 0.04 to 0.09); chunks are
taken to be equal, which they are where experts are used evenly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from ...memory.activation_classes import EXPERT_GATE_UP
from ...parallel.experts.cost import CALIBRATED, LayerCost, Operator, OperatorCost, Resource, WeightGradients
from ...parallel.experts.layer_order import PLAIN, LayerOrder, pass_order
from ...parallel.experts.plan import Phase, check_phase
from ..plan_inputs import PlanInputs

if TYPE_CHECKING:
    from ...parallel.experts.recipe import Attempt, Prepared, Recipe

EXCHANGE_START_S = 0.2e-3
PRODUCT_START_S = 0.07e-3


@dataclass(frozen=True, slots=True)
class ChosenOrder:
    """What every layer with experts executes, and seconds of one piece of rows through it in the model."""

    order: LayerOrder
    seconds: float
    """Forward and backward, of exchanges and products."""
    plain_s: float
    """With every exchange waited for."""
    compute_s: float
    """Of products alone."""

    @property
    def exposed(self) -> float:
        """Share of the exchanges' seconds that products do not hide; above 1 where a degree that was set is slower than plain."""
        exchanges = self.plain_s - self.compute_s
        return max(0.0, (self.seconds - self.compute_s) / exchanges) if exchanges > 0 else 1.0

    @property
    def hidden_share(self) -> float:
        """What products hide of the exchanges, to be shown: none where the order is slower than plain."""
        return max(0.0, 1.0 - self.exposed)


AS_THEY_COME = ChosenOrder(PLAIN, 0.0, 0.0, 0.0)
"""Where no rows travel, or on cores that nothing can be beside of."""


def way_s(inputs: PlanInputs) -> float:
    """Seconds of one way to experts, or back, of one of a rank's tokens in one layer, on the busiest rank."""
    experts, ep = inputs.spec.experts, inputs.expert_parallel
    if experts is None or ep == 1:
        return 0.0
    sent = experts.per_token * inputs.spec.hidden_size * inputs.width * inputs.row_share
    near = min(ep, inputs.layout.ranks_per_node)
    within, across = sent * (near - 1) / ep, sent * (ep - near) / ep
    return within / inputs.cluster.intra_node_bandwidth + across / inputs.cluster.inter_node_bandwidth


def expert_order(inputs: PlanInputs) -> ChosenOrder:
    """The order of a run: of `parallel.experts.degree` chunks where that is set, else of those that the model has as fastest, on GPUs."""
    experts, degree = inputs.spec.experts, inputs.parallel.experts.degree
    # Cores that make products send rows too: beside them an exchange is not hidden.
    if experts is None or inputs.expert_parallel == 1 or (degree is None and not inputs.on_gpu):
        return AS_THEY_COME
    rows = inputs.layout.tokens_per_rank
    rows = min(rows, inputs.policy.chunk_tokens or rows)
    # Pieces of about as many rows have one order: solvers ask for many sizes.
    rows = 1 << max(0, rows.bit_length() - 1)
    flops = 2.0 * experts.per_token * 3 * inputs.spec.hidden_size * experts.inner_size * inputs.row_share
    return _choose(
        rows * way_s(inputs),
        rows * flops / inputs.gemm_rate,
        inputs.policy.graph,
        not inputs.policy.graph and inputs.policy.split(EXPERT_GATE_UP).recompute > 0,
        inputs.expert_parallel > inputs.layout.ranks_per_node,
        _degrees(experts.num_experts // inputs.expert_parallel) if degree is None else (degree,),
    )


def _degrees(experts: int) -> tuple[int, ...]:
    """Those whose chunks are whole experts of a rank: each expert's gradient is then one product, and never a sum of pieces."""
    from ...parallel.experts.solve import DEGREES

    return tuple(degree for degree in DEGREES if experts % degree == 0)


@lru_cache(maxsize=256)  # asked for by terms of every policy the solver looks at
def _choose(way: float, products: float, graph: bool, makes_gate_up: bool, across: bool, degrees: tuple[int, ...]) -> ChosenOrder:
    # Tables of numbers, which commands that plan no experts do not load.
    from ...parallel.experts.build_plan import phase_plan
    from ...parallel.experts.recipe import Order, Recipe, prepare

    prepared = prepare(_cost(way, products, graph, makes_gate_up, Resource.INTER if across else Resource.INTRA), CALIBRATED, 1)
    forward = _fastest([Recipe(degree=each, order=Order.RANK) for each in degrees], Phase.FORWARD, prepared)
    ways = (WeightGradients.FUSED, WeightGradients.EXPERTS)
    backward = _fastest(
        [Recipe(degree=each, weights=how, order=Order.RANK) for each in degrees for how in ways], Phase.BACKWARD, prepared
    )
    plans = [phase_plan(tried, phase, prepared) for tried, phase in ((forward, Phase.FORWARD), (backward, Phase.BACKWARD))]
    for plan in plans:
        check_phase(plan)
    rows = (*prepared.cost.forward, *prepared.cost.backward[WeightGradients.FUSED])
    return ChosenOrder(
        order=LayerOrder(*map(pass_order, plans)),
        seconds=forward.seconds + backward.seconds,
        plain_s=sum(row.seconds(1.0) for row in rows),
        compute_s=sum(row.seconds(1.0) for row in rows if row.resource is Resource.COMPUTE),
    )


def _fastest(recipes: list[Recipe], phase: Phase, prepared: Prepared) -> Attempt:
    """The first of equals: fewer chunks, and weight gradients in place."""
    from ...parallel.experts.recipe import attempt

    return min((attempt(recipe, phase, prepared) for recipe in recipes), key=lambda tried: tried.seconds)


def _cost(way: float, products: float, graph: bool, makes_gate_up: bool, links: Resource) -> LayerCost:
    """Price the moves of a layer: collectives and products of each as memory/executor/expert_chunks.py makes them."""

    def exchange(operator: Operator, ways: int, starts: int) -> OperatorCost:
        return OperatorCost(operator, links, starts * EXCHANGE_START_S, ways * way)

    def compute(operator: Operator, passes: float, starts: int) -> OperatorCost:
        return OperatorCost(operator, Resource.COMPUTE, starts * PRODUCT_START_S, passes * products)

    forward = (exchange(Operator.DISPATCH, 1, 1), compute(Operator.EXPERTS, 1, 2), exchange(Operator.COMBINE, 1, 1))
    # Rows, unless the graph has them, gradients and weights; back come gradients of rows and of weights.
    moves = (exchange(Operator.DISPATCH, 2 - graph, 3 - graph), exchange(Operator.COMBINE, 1, 2))
    again, starts = 2 / 3 * makes_gate_up, 2 + makes_gate_up
    fused = (*moves, compute(Operator.EXPERTS, 2 + again, starts + 2))
    deferred = (*moves, compute(Operator.EXPERTS, 1 + again, starts), compute(Operator.EXPERT_WEIGHTS, 1, 2))
    return LayerCost(forward, {WeightGradients.FUSED: fused, WeightGradients.EXPERTS: deferred}, None, 1)
