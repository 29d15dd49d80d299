"""Work and time of one step, counted causally: only query-key pairs that attention really computes. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from ...memory.activation_classes import EXPERT_GATE_UP
from ...parallel.config import GradReduce
from ..footprint.weight_operands import makes_weights_apart
from ..plan_inputs import PlanInputs
from .bandwidth import gb_per_s, offload_link
from .expert_order import expert_order, way_s
from .flops import (
    attention_passes,
    forward_attention_flops,
    inner_share,
    model_flops_per_token,
    projections,
    reference_flops,
    sequence_flops,
    weight_gradient_s,
    work_s,
)
from .offload import host_stall_s, leaving_bytes, returning_bytes
from .unpack import norms_s, unpack_s
from .update import update_time


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
    experts_s: float
    """Rows to their experts and back where ranks share them, and waiting for the rank whose experts have most to do."""
    sharding_s: float
    """Gathers and reductions that compute does not hide."""
    host_s: float
    """Copies to and from the host that compute does not hide."""
    update_s: float
    """The optimizer's update, as far as backward does not hide it."""
    bubble_s: float = 0.0
    """Seconds in which stages of a pipeline wait for others while it fills and drains."""
    host_bytes: float
    """What one rank sends to the host and fetches back in a step."""
    tokens: int
    assumptions: tuple[str, ...]

    @property
    def flops(self) -> float:
        return self.attention_flops + self.linear_flops

    @property
    def step_s(self) -> float:
        return self.compute_s + self.sequence_s + self.experts_s + self.sharding_s + self.host_s + self.update_s + self.bubble_s

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s


def estimate_time(inputs: PlanInputs) -> Timing:
    """A step of as many longest sequences as fit in the global batch."""
    length, layout = inputs.data.max_seq_len, inputs.layout
    sequences = max(1, inputs.data.global_batch_tokens // length)
    attention, linear = sequence_flops(inputs, length)
    passes = inputs.passes // layout.num_micro_batches
    # The busiest group sets the pace: sequences do not always divide over the groups.
    in_turn = layout.sequences_per_group * inputs.passes
    reference = reference_flops(inputs, length)
    reference_s = reference[0] / inputs.attention_rate.forward + reference[1] / inputs.gemm_rate
    compute = (in_turn * work_s(inputs, attention, linear) + in_turn // passes * reference_s) / layout.sp_degree
    compute += inputs.passes * (unpack_s(inputs) + norms_s(inputs))
    ring = max(0.0, ring_s(inputs) * length - work_s(inputs, attention, 0.0) / layout.sp_degree)
    exchange = in_turn * (exchange_s(inputs) * length + ring)
    sharding = max(0.0, sharding_s(inputs) - compute)
    forward = forward_attention_flops(inputs.spec.windows, inputs.spec.query_size, length)
    return Timing(
        attention_flops=sequences * (passes * attention + reference[0]),
        linear_flops=sequences * (passes * linear + reference[1]),
        model_flops=sequences * (3.5 * forward + model_flops_per_token(inputs) * length),
        compute_s=compute,
        sequence_s=exchange,
        experts_s=in_turn * length * (experts_exchange_s(inputs) + experts_wait_s(inputs)),
        sharding_s=sharding,
        host_s=inputs.passes * host_stall_s(inputs),
        host_bytes=inputs.passes * inputs.spec.num_layers * (leaving_bytes(inputs) + returning_bytes(inputs)),
        update_s=update_time(inputs).shown_s,
        tokens=sequences * length,
        assumptions=_assumptions(inputs, sequences),
    )


def fill_share(inputs: PlanInputs) -> float:
    """What each stage beyond the first adds to a step, in micro-batches of this stage: all, or of a virtual stage its part.

    Where gradients of weights are put off it is F + B - W in place of F + B + W (2401.10241, section 2.1).
    """
    if not makes_weights_apart(inputs):
        return 1.0 / inputs.num_parts
    timing = estimate_time(inputs)
    micro_batch = (timing.compute_s + timing.sequence_s + timing.experts_s + timing.host_s) / inputs.passes
    return 1.0 - 2.0 * weight_gradient_s(inputs) / micro_batch


def exchange_s(inputs: PlanInputs) -> float:
    """Ulysses all-to-alls of one token of a sequence: q, k, v in and o out, forward, once more if recomputed, and their gradients."""
    ulysses = inputs.layout.ulysses
    if ulysses == 1:
        return 0.0
    into, out = inputs.spec.query_size + 2 * inputs.kv_copies * inputs.spec.kv_size, inputs.spec.query_size
    sent = inputs.spec.num_layers * inputs.width * (2 * (into + out) + _recompute_exchange(inputs, into, out)) / inputs.layout.sp_degree
    near = min(ulysses, inputs.layout.ranks_per_node)
    within, across = sent * (near - 1) / ulysses, sent * (ulysses - near) / ulysses
    return within / inputs.cluster.intra_node_bandwidth + across / inputs.cluster.inter_node_bandwidth


def _recompute_exchange(inputs: PlanInputs, into: int, out: int) -> float:
    """Numbers a token exchanges once more: q, k, v for attention's backward and o for what follows it, and all of it in segments."""
    if inputs.policy.graph:
        return 0.0
    return into * projections(inputs) + out + inner_share(inputs) * (into + out) * inputs.policy.attention_output.recompute


def experts_exchange_s(inputs: PlanInputs) -> float:
    """All-to-alls of one token of a sequence to its experts and back, on the busiest rank, as far as products do not hide them.

    Forward a row goes and comes back; backward it goes once more with its gradient, and a gradient comes back. Segments: forward again.
    """
    if inputs.spec.experts is None or inputs.expert_parallel == 1:
        return 0.0
    ways = 4.0 if inputs.policy.graph else 5 + 2 * inner_share(inputs)
    exposed = expert_order(inputs).exposed
    return exposed * inputs.spec.expert_layers * ways * way_s(inputs) / inputs.layout.sp_degree


def experts_wait_s(inputs: PlanInputs) -> float:
    """Seconds of one token of a sequence for which ranks wait for the one whose experts get most rows: its products beyond the mean."""
    experts = inputs.spec.experts
    if experts is None or inputs.expert_parallel == 1:
        return 0.0
    once = 2.0 * inputs.spec.expert_layers * experts.per_token * 3 * inputs.spec.hidden_size * experts.inner_size
    # Backward makes two products for each of forward's, and of the three of an expert the first two once more where they are not stored.
    passes = 3.0 if inputs.policy.graph else 3.0 + inputs.policy.split(EXPERT_GATE_UP).recompute * 2 / 3 + inner_share(inputs)
    return (inputs.row_share - 1.0) * passes * once / (inputs.gemm_rate * inputs.layout.sp_degree)


def ring_s(inputs: PlanInputs) -> float:
    """Ring hops of one token of a sequence; they run beside attention, and only what is longer than it shows."""
    ring = inputs.layout.ring
    if ring == 1:
        return 0.0
    per_hop = 2 * inputs.spec.kv_size * inputs.kv_copies / inputs.layout.ulysses / ring
    passes = attention_passes(inputs) - 2.5
    moved = inputs.spec.num_layers * per_hop * ((passes + 1) * (ring - 1) * inputs.width + ring * inputs.master)
    crosses = inputs.layout.sp_degree > inputs.layout.ranks_per_node
    return moved / (inputs.cluster.inter_node_bandwidth if crosses else inputs.cluster.intra_node_bandwidth)


def sharding_s(inputs: PlanInputs) -> float:
    """Gathers and reductions of a step, before what compute hides."""
    again = inputs.layout.num_micro_batches * collective_s(inputs, _gathered_bytes(inputs)) * inputs.makes_reference
    return again + inputs.passes * gather_s(inputs) + inputs.passes // inputs.layout.num_micro_batches * reduce_s(inputs)


def gather_s(inputs: PlanInputs) -> float:
    """Weights gathered twice a micro-batch, and gradients scattered where they are reduced each time."""
    reduce_each = inputs.parallel.grad_reduce is not GradReduce.STEP
    reduced = inputs.master * reduce_each * inputs.trained_gathered_parameters
    return collective_s(inputs, 2 * _gathered_bytes(inputs) + reduced)


def _gathered_bytes(inputs: PlanInputs) -> int:
    """Weights of the stage, each gathered once: in compute precision, packed matrices as they are."""
    return inputs.width * inputs.gathered_parameters - len(inputs.layers) * inputs.packed_layer_savings


def reduce_s(inputs: PlanInputs) -> float:
    """Gradients once a step: scattered over shards unless every micro-batch did, then summed over replicas."""
    whole = inputs.master * inputs.trained_gathered_parameters
    once = collective_s(inputs, whole) if inputs.parallel.grad_reduce is GradReduce.STEP else 0.0
    copies = inputs.layout.replicate
    bandwidth = inputs.cluster.inter_node_bandwidth if inputs.layout.num_nodes > 1 else inputs.cluster.intra_node_bandwidth
    return once + 2 * inputs.master * inputs.trained_parameters / inputs.layout.shard * (copies - 1) / copies / bandwidth


def collective_s(inputs: PlanInputs, num_bytes: float) -> float:
    """A gather or scatter of so many bytes over the shards. Across nodes rings run side by side, one through each rank's link."""
    shard, cluster = inputs.layout.shard, inputs.cluster
    crosses = shard > inputs.layout.ranks_per_node
    across = min(cluster.intra_node_bandwidth, cluster.inter_node_bandwidth * inputs.layout.ranks_per_node)
    return num_bytes * (shard - 1) / shard / (across if crosses else cluster.intra_node_bandwidth)


def _assumptions(inputs: PlanInputs, sequences: int) -> tuple[str, ...]:
    cluster, length = inputs.cluster, inputs.data.max_seq_len
    twice = "forward and backward run twice, the first time for the norm to clip by (optim.clip_mode=two_pass)"
    hidden = f"rows to experts: {expert_order(inputs).hidden_share:.0%} of their way beside products, by the model of schedules"
    busiest = f"{hidden}; the busiest rank gets {inputs.row_share:g} times the mean, and all wait for it"
    return (
        f"every sequence has data.max_seq_len={length} tokens ({sequences} a step); shorter ones need less of everything",
        f"products at {inputs.gemm_rate / 1e12:.3g} TFLOP/s a rank ({cluster.gemm_efficiency:.0%} of cluster.peak_flops, "
        "cluster.gemm_efficiency); causal FLOPs, recomputation in",
        _attention_line(inputs),
        f"{cluster.intra_node_bandwidth / 1e9:g} GB/s inside a node, {cluster.inter_node_bandwidth / 1e9:g} GB/s between, per rank",
        "Ulysses exchanges are not hidden; ring hops hide behind attention, weight gathers and gradient reductions behind all compute",
        *((_host_line(inputs),) if inputs.policy.uses_host or inputs.memory.solve else ()),
        *((twice,) if inputs.residency.two_passes else ()),
        *((busiest,) * (inputs.expert_parallel > 1)),
        update_time(inputs).assumption,
        "reading data and saving checkpoints take no time",
    )


def _attention_line(inputs: PlanInputs) -> str:
    """States the rates of attention, of which kernel they are and where from."""
    rate, kernel = inputs.attention_rate, inputs.attention_kernel.value
    name = f"attention ({kernel})" if inputs.on_gpu else "attention"
    return f"{name} at {rate.forward / 1e12:.3g} TFLOP/s forward and {rate.backward / 1e12:.3g} backward ({rate.source})"


def _host_line(inputs: PlanInputs) -> str:
    """States at which rates rows move, and where those are from."""
    way, place = offload_link(inputs), f"files under {inputs.policy.offload_dir}" if inputs.policy.offload_dir else "the host"
    rates = gb_per_s(way.out) if way.out == way.back else f"{gb_per_s(way.out)}, back at {gb_per_s(way.back)}"
    both = f", both ways at once {gb_per_s(way.both)} each" if way.both < 0.98 * min(way.out, way.back) else ""
    return f"copies to {place} run at {rates} a rank{both}, beside one layer's compute ({way.source})"
