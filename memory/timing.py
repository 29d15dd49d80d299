"""Work and time of one step, counted causally: only query-key pairs that attention really computes. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..parallel.config import GradReduce
from .terms import Setting


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Estimates for one step of longest sequences; `assumptions` says what they rest on."""

    attention_flops: float
    linear_flops: float
    """Both per step, over all ranks, with recomputation."""
    model_flops: float
    """Without recomputation: what model FLOPs utilisation counts."""
    compute_s: float
    sequence_s: float
    """Exchanges of sequence parallelism that stand in compute's way."""
    sharding_s: float
    """Gathers and reductions that compute does not hide."""
    tokens: int
    assumptions: tuple[str, ...]

    @property
    def flops(self) -> float:
        return self.attention_flops + self.linear_flops

    @property
    def step_s(self) -> float:
        return self.compute_s + self.sequence_s + self.sharding_s

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s


def causal_pairs(num_tokens: int, window: int | None) -> float:
    """Query-key pairs of one sequence, the diagonal counted half as kernels' FLOP counts do: n^2 / 2 without a window."""
    if window is None or window >= num_tokens:
        return num_tokens * num_tokens / 2
    return window * (num_tokens - window / 2)


def forward_attention_flops(windows: Iterable[int | None], query_size: int, num_tokens: int) -> float:
    """Scores and weighted values of all layers: 4 FLOPs a pair and query number."""
    return sum(4 * query_size * causal_pairs(num_tokens, window) for window in windows)


def attention_passes(s: Setting) -> float:
    """Forward passes' worth of attention: 1 forward, 2.5 backward (scores are made again), 1 more if its output is not kept."""
    kept = s.policy.graph or s.policy.attention_output.recompute == 0
    return 3.5 if kept else 4.5


def linear_passes(s: Setting) -> int:
    """FLOPs per weight and token: 2 forward, 4 backward, 2 more if recomputed."""
    return 6 if s.policy.graph else 8


def estimate_time(s: Setting) -> Timing:
    """A step of as many longest sequences as fit in the global batch."""
    length, layout = s.data.max_seq_len, s.layout
    sequences = max(1, s.data.global_batch_tokens // length)
    attention, linear = _sequence_flops(s, length)
    rate = s.cluster.peak_flops * s.cluster.efficiency
    # The busiest group sets the pace: sequences do not always divide over the groups.
    in_turn = layout.sequences_per_group * layout.num_micro_batches
    compute = in_turn * (attention + linear) / (layout.sp_degree * rate)
    ring = max(0.0, ring_s(s) * length - attention / (layout.sp_degree * rate))
    exchange = in_turn * (exchange_s(s) * length + ring)
    sharding = max(0.0, layout.num_micro_batches * gather_s(s) + reduce_s(s) - compute)
    forward = forward_attention_flops(s.spec.windows, s.spec.query_size, length)
    return Timing(
        attention_flops=sequences * attention,
        linear_flops=sequences * linear,
        model_flops=sequences * (3.5 * forward + 6 * _matrix_parameters(s) * length),
        compute_s=compute,
        sequence_s=exchange,
        sharding_s=sharding,
        tokens=sequences * length,
        assumptions=_assumptions(s, sequences),
    )


def _matrix_parameters(s: Setting) -> int:
    """Weights each token is multiplied with: all but the embedding table (the head counts, tied or not)."""
    return s.spec.num_layers * s.layer_parameters + s.spec.vocab_size * s.spec.hidden_size


def linear_flops(s: Setting) -> float:
    """Linear FLOPs of one token. The head is not recomputed: its gradient is made with its logits."""
    head = s.spec.vocab_size * s.spec.hidden_size
    return linear_passes(s) * s.spec.num_layers * s.layer_parameters + 6 * head


def _sequence_flops(s: Setting, length: int) -> tuple[float, float]:
    """Attention and linear FLOPs of one sequence."""
    attention = attention_passes(s) * forward_attention_flops(s.spec.windows, s.spec.query_size, length)
    return attention, linear_flops(s) * length


def exchange_s(s: Setting) -> float:
    """Ulysses all-to-alls of one token of a sequence: q, k, v in and o out, forward, again if recomputed, and their gradients."""
    ulysses = s.layout.ulysses
    if ulysses == 1:
        return 0.0
    into, out = s.spec.query_size + 2 * s.kv_copies * s.spec.kv_size, s.spec.query_size
    again = 0 if s.policy.graph else into + out
    sent = s.spec.num_layers * s.width * (2 * (into + out) + again) / s.layout.sp_degree
    near = min(ulysses, s.layout.ranks_per_node)
    within, across = sent * (near - 1) / ulysses, sent * (ulysses - near) / ulysses
    return within / s.cluster.intra_node_bandwidth + across / s.cluster.inter_node_bandwidth


def ring_s(s: Setting) -> float:
    """Ring hops of one token of a sequence; they run beside attention, and only what is longer than it shows."""
    ring = s.layout.ring
    if ring == 1:
        return 0.0
    per_hop = 2 * s.spec.kv_size * s.kv_copies / s.layout.ulysses / ring
    passes = attention_passes(s) - 2.5
    moved = s.spec.num_layers * per_hop * ((passes + 1) * (ring - 1) * s.width + ring * s.master)
    crosses = s.layout.sp_degree > s.layout.ranks_per_node
    return moved / (s.cluster.inter_node_bandwidth if crosses else s.cluster.intra_node_bandwidth)


def gather_s(s: Setting) -> float:
    """Weights gathered twice a micro-batch, and gradients scattered where they are reduced each time."""
    reduce_each = s.parallel.grad_reduce is not GradReduce.STEP
    return collective_s(s, 2 * s.width * s.parameters + (s.master * s.parameters if reduce_each else 0))


def reduce_s(s: Setting) -> float:
    """Gradients once a step: scattered over shards unless every micro-batch did, then summed over replicas."""
    once = collective_s(s, s.master * s.parameters) if s.parallel.grad_reduce is GradReduce.STEP else 0.0
    copies = s.layout.replicate
    bandwidth = s.cluster.inter_node_bandwidth if s.layout.num_nodes > 1 else s.cluster.intra_node_bandwidth
    return once + 2 * s.master * s.parameters / s.layout.shard * (copies - 1) / copies / bandwidth


def collective_s(s: Setting, num_bytes: float) -> float:
    """A gather or scatter of so many bytes over the shards. Across nodes rings run side by side, one through each rank's link."""
    shard, cluster = s.layout.shard, s.cluster
    crosses = shard > s.layout.ranks_per_node
    across = min(cluster.intra_node_bandwidth, cluster.inter_node_bandwidth * s.layout.ranks_per_node)
    return num_bytes * (shard - 1) / shard / (across if crosses else cluster.intra_node_bandwidth)


def _assumptions(s: Setting, sequences: int) -> tuple[str, ...]:
    cluster, length = s.cluster, s.data.max_seq_len
    return (
        f"every sequence has data.max_seq_len={length} tokens ({sequences} a step); shorter ones need less of everything",
        f"{cluster.efficiency:.0%} of {cluster.peak_flops / 1e12:g} TFLOP/s a rank (cluster.efficiency); causal FLOPs, recomputation in",
        f"{cluster.intra_node_bandwidth / 1e9:g} GB/s inside a node, {cluster.inter_node_bandwidth / 1e9:g} GB/s between, per rank",
        "Ulysses exchanges are not hidden; ring hops hide behind attention, weight gathers and gradient reductions behind all compute",
        "reading data, saving checkpoints and the optimizer step take no time",
    )
