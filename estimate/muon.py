"""What Muon's matrices are to a rank: their weights, the work on them, what travels and what takes memory meanwhile. Pure.

Note: mirrors training/optimizers/muon.py, whose rounds are those of parallel/sharding/matrix_plan.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ..model.families import facts_of
from ..model.spec import ModelSpec
from ..parallel.sharding.matrix_plan import Shape, orthogonalise_flops, slowest_flops, spread_matrices
from .plan_inputs import PlanInputs

BYTES = 2
"""Matrices travel, and are orthogonalised, in bfloat16."""


@dataclass(frozen=True, slots=True)
class MuonWork:
    """One update of the matrices of a stage; counts are of numbers."""

    parameters: int = 0
    """Weights that Muon updates; they have one moment, not two."""
    flops: float = 0.0
    """Of the rank that has most to do, in every round."""
    sent: float = 0.0
    """Numbers that one rank sends, to the ranks of matrices and back from its own."""
    live: int = 0
    """Numbers in bfloat16 that a rank holds at one time for the matrices it orthogonalises, sends and receives."""


def muon_work(inputs: PlanInputs) -> MuonWork:
    """The matrices of the layers that these inputs are of; nothing where another optimizer updates them."""
    steps = inputs.residency.orthogonalise_steps
    return MuonWork() if steps == 0 else _work(inputs.spec, inputs.layout.shard, inputs.expert_parallel, steps)


@lru_cache(maxsize=64)  # asked for by every term of every policy the solver looks at
def _work(spec: ModelSpec, shard: int, expert_parallel: int, steps: int) -> MuonWork:
    together, experts = _layers(spec), _experts(spec)
    alone = 0.0
    sent = 0.0
    if experts and expert_parallel > 1:
        # Each rank has whole experts of its own, and rows of each of them.
        own, others = experts[: len(experts) // expert_parallel], shard // expert_parallel
        alone, sent = slowest_flops(own, spread_matrices(own, others), steps), _sent(own, others)
    elif experts and _num_experts(spec) % shard == 0:
        alone = sum(orthogonalise_flops(each, steps) for each in experts) / shard
    else:
        together += experts
    rounds = spread_matrices(together, shard)
    everything = {*together, *experts}
    return MuonWork(
        parameters=_numbers(_layers(spec)) + _numbers(_experts(spec)),
        flops=slowest_flops(together, rounds, steps) + alone,
        sent=_sent(together, shard) + sent,
        live=max((_live(each, shard > 1) for each in everything), default=0),
    )


def _num_experts(spec: ModelSpec) -> int:
    return 0 if spec.experts is None else spec.experts.num_experts


def _numbers(shapes: list[Shape]) -> int:
    return sum(rows * columns for rows, columns in shapes)


def _sent(shapes: list[Shape], ranks: int) -> float:
    """There and back, but for what stays on its rank."""
    return 2.0 * _numbers(shapes) / ranks * (ranks - 1) / ranks


def _live(shape: Shape, travels: bool) -> int:
    """The next round's and the last one's, sent and received each; this one put together, and two iterates; two squares."""
    return (7 if travels else 3) * shape[0] * shape[1] + 2 * min(shape) ** 2


def _layers(spec: ModelSpec) -> list[Shape]:
    """Every matrix of the decoder layers but those of routed experts."""
    hidden, dense = spec.hidden_size, spec.num_layers - spec.expert_layers
    shapes = _attention(spec) * spec.num_layers + _dense_feed_forward(spec) * dense
    if spec.experts is not None:
        router = [(spec.experts.num_experts, hidden)] * (spec.experts.num_experts > 1)
        shared = _feed_forward(hidden, spec.experts.shared_size) if spec.experts.shared_size else []
        shapes += (router + shared) * spec.expert_layers
    return shapes


def _attention(spec: ModelSpec) -> list[Shape]:
    """As the model has them: of a family that fuses queries, keys and values one matrix."""
    hidden, queries, keys = spec.hidden_size, spec.query_size, spec.kv_size
    inner = [(queries + 2 * keys, hidden)] if facts_of(spec.family).fused_qkv else [(queries, hidden), (keys, hidden), (keys, hidden)]
    return [*inner, (hidden, queries)]


def _dense_feed_forward(spec: ModelSpec) -> list[Shape]:
    hidden, inner = spec.hidden_size, spec.intermediate_size
    return [(2 * inner, hidden), (hidden, inner)] if spec.fused_gate_up else _feed_forward(hidden, inner)


def _feed_forward(hidden: int, inner: int) -> list[Shape]:
    return [(inner, hidden), (inner, hidden), (hidden, inner)]


def _experts(spec: ModelSpec) -> list[Shape]:
    """The matrices of all routed experts."""
    if spec.experts is None:
        return []
    return _feed_forward(spec.hidden_size, spec.experts.inner_size) * (spec.experts.num_experts * spec.expert_layers)


def exchange_s(inputs: PlanInputs) -> float:
    """Seconds for which one rank's parts of matrices, and its orthogonal ones, are on their way."""
    sent, shard, cluster = muon_work(inputs).sent * BYTES, inputs.layout.shard, inputs.cluster
    near = min(shard, inputs.layout.ranks_per_node)
    within, across = (near - 1) / max(1, shard - 1), (shard - near) / max(1, shard - 1)
    return sent * (within / cluster.intra_node_bandwidth + across / cluster.inter_node_bandwidth)


def orthogonalise_s(inputs: PlanInputs) -> float:
    """Seconds of Newton-Schulz on the rank that has most to do."""
    return muon_work(inputs).flops / inputs.gemm_rate
