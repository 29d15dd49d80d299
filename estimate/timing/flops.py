"""Floating-point work of a step and what recomputation adds to it, counted causally, by class of activation. Pure.

Per token and layer (width d, query size q, key/value size k, feed-forward f): a forward pass takes 2 FLOPs a weight and
4 q a query-key pair; a class that is neither kept nor moved costs the products that make it once more.

Note: mirrors what backward recomputes: memory/executor/{layer_pass,token_local,feed_forward,attention_whole,attention_chunked}.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ...memory.activation_classes import (
    ATTENTION_OUTPUT,
    LAYER_INPUT,
    ForwardFlops,
    activation_classes,
    after_attention,
    feed_forward_costs,
)
from ..plan_inputs import PlanInputs


def causal_pairs(num_tokens: int, window: int | None) -> float:
    """Query-key pairs of one sequence, the diagonal counted half as kernels' FLOP counts do: n^2 / 2 without a window."""
    if window is None or window >= num_tokens:
        return num_tokens * num_tokens / 2
    return window * (num_tokens - window / 2)


def forward_attention_flops(windows: Iterable[int | None], query_size: int, num_tokens: int) -> float:
    """Scores and weighted values of all layers: 4 FLOPs a pair and query number."""
    return sum(4 * query_size * causal_pairs(num_tokens, window) * count for window, count in Counter(windows).items())


def class_recompute_flops(inputs: PlanInputs) -> dict[str, float]:
    """FLOPs of recomputing one token of a class in one layer (the layers' mean, for attention of a longest sequence).

    `layer_input`: a whole layer run forward, which inner layers of a segment cost.
    """
    spec, length = inputs.spec, inputs.data.max_seq_len
    attention = forward_attention_flops(spec.windows, spec.query_size, length) / (spec.num_layers * length)
    forward = ForwardFlops(linear=2.0 * inputs.active_layer_parameters, attention=attention)
    return {kind.name: kind.recompute_flops(spec, forward) for kind in activation_classes(spec)}


def recompute_linear_flops(inputs: PlanInputs) -> float:
    """Linear FLOPs that recomputing one token of one layer costs in backward, segments left out."""
    if inputs.policy.graph:
        return 0.0
    costs = class_recompute_flops(inputs)
    by_token = [kind for kind in activation_classes(inputs.spec) if kind.by_token]
    times = {kind: projections(inputs) if kind.of_heads else 1 for kind in by_token}
    again = sum(costs[kind.name] * (inputs.policy.split(kind).recompute * times[kind]) for kind in by_token)
    return _beside_adapters(inputs, again + norm_flops(inputs)) + shared_flops(inputs)


def projections(inputs: PlanInputs) -> int:
    """How often backward makes queries, keys and values that are not stored: groups of heads do for attention's forward and backward."""
    return 2 if inputs.policy.head_groups > 1 and inputs.policy.attention_output.recompute > 0 and not inputs.by_chunks else 1


def norm_flops(inputs: PlanInputs) -> float:
    """A norm after a product needs the product for its gradient, whatever is stored: per-head norms, and those that end Gemma's halves."""
    heads = 2.0 * inputs.spec.hidden_size * (inputs.spec.query_size + inputs.spec.kv_size) * inputs.spec.qk_norm
    if inputs.spec.norm_of_all_heads:
        # Of every group of heads all are made, for its norm: once more than is counted with the classes.
        heads *= 1 + (inputs.policy.head_groups - 1) * (1 + projections(inputs))
    ends = 2.0 * inputs.spec.hidden_size * inputs.spec.query_size + feed_forward_costs(inputs.spec).output_flops(inputs.spec)
    return heads + ends * inputs.spec.ends_with_norms


def shared_flops(inputs: PlanInputs) -> float:
    """What the expert makes that all tokens visit is needed for the gradient of what scales it, whatever is stored."""
    experts = inputs.spec.experts
    if experts is None or not experts.has_shared_gate:
        return 0.0
    return 2.0 * inputs.spec.hidden_size * experts.shared_size * (1.0 - experts.dense_share)


def segment_flops(inputs: PlanInputs) -> float:
    """Linear FLOPs of one token of an inner layer that is recomputed for the next layer's input.

    With the attention output stored neither attention nor its projections run.
    """
    costs = class_recompute_flops(inputs)
    kinds = activation_classes(inputs.spec)
    if inputs.policy.attention_output.recompute == 0:
        kinds = after_attention(kinds)
    again = sum(costs[kind.name] * inputs.policy.split(kind).recompute for kind in kinds if kind.by_token)
    return _beside_adapters(inputs, again + feed_forward_costs(inputs.spec).output_flops(inputs.spec))


def _beside_adapters(inputs: PlanInputs, matrices: float) -> float:
    """FLOPs of products with a layer's matrices, those with their adapters in: the layer's mean."""
    beside = inputs.adapter_layer_parameters
    return matrices * (1.0 + beside / (inputs.active_layer_parameters - beside))


def backward_flops(inputs: PlanInputs) -> float:
    """Linear FLOPs of one token in one layer's backward, nothing recomputed: 4 a weight; 2 where it is frozen.

    An adapter's factors take 4 a number, and x A^T is made again (model/adapters/lora.py); a magnitude needs its product's values,
    2 a weight and 2 a number of the factors (dora.py).
    """
    if inputs.trains_all:
        return 4.0 * inputs.active_layer_parameters
    own = inputs.active_layer_parameters + inputs.adapter_layer_parameters
    values = inputs.turned_layer_parameters + inputs.adapter_layer_parameters * inputs.adapter.dora
    return 2.0 * (own + values) + inputs.adapter_inner_flops


def model_flops_per_token(inputs: PlanInputs) -> float:
    """Linear FLOPs of one token that training needs whatever is recomputed: 6 a weight, 4 of a frozen one."""
    every = matrix_parameters(inputs)
    trained = inputs.spec.num_layers * inputs.adapter_layer_parameters + inputs.trained_head_parameters
    return 4.0 * every + 2.0 * (every if inputs.trains_all else trained)


def inner_share(inputs: PlanInputs) -> float:
    """The share of layers whose forward is recomputed because their output was not stored: (k - 1) / k where k divides the layers."""
    return 1.0 - -(-inputs.spec.num_layers // inputs.segment_layers) / inputs.spec.num_layers


def attention_passes(inputs: PlanInputs) -> float:
    """Forward passes' worth of attention: 1 forward, 2.5 backward (scores are recomputed), more if its output is not stored."""
    if inputs.policy.graph:
        return 3.5
    return 3.5 + inputs.policy.attention_output.recompute * (1.0 + inner_share(inputs))


def linear_flops(inputs: PlanInputs) -> float:
    """Linear FLOPs of one token. The head is not recomputed: its gradient is made with its logits."""
    own = 2 * inputs.active_layer_parameters + backward_flops(inputs)
    layer = own + recompute_linear_flops(inputs) + inner_share(inputs) * segment_flops(inputs)
    return inputs.spec.num_layers * layer + 4 * inputs.head_parameters + 2 * inputs.trained_head_parameters


def sequence_flops(inputs: PlanInputs, length: int) -> tuple[float, float]:
    """Attention and linear FLOPs of one sequence, recomputation in."""
    attention = attention_passes(inputs) * forward_attention_flops(inputs.spec.windows, inputs.spec.query_size, length)
    return attention, linear_flops(inputs) * length


def reference_flops(inputs: PlanInputs, length: int) -> tuple[float, float]:
    """Attention and linear FLOPs of one sequence's forward through the frozen model; 0 where no step makes a reference."""
    if not inputs.makes_reference:
        return 0.0, 0.0
    frozen = inputs.active_parameters - inputs.spec.num_layers * inputs.adapter_layer_parameters
    attention = forward_attention_flops(inputs.spec.windows, inputs.spec.query_size, length)
    return attention, 2.0 * (frozen + inputs.head_parameters) * length


def matrix_parameters(inputs: PlanInputs) -> int:
    """Weights each token is multiplied with: all but the embedding table (the head counts, tied or not)."""
    return inputs.active_parameters + inputs.head_parameters


def batch_tokens(inputs: PlanInputs) -> float:
    """Tokens of one rank in a micro-batch of longest sequences."""
    return inputs.layout.sequences_per_group * inputs.data.max_seq_len / inputs.layout.sp_degree


def layer_forward_s(inputs: PlanInputs) -> float:
    """Seconds of one layer's forward on one rank: a micro-batch of longest sequences, the layers' mean."""
    attention = class_recompute_flops(inputs)[ATTENTION_OUTPUT.name]
    products = class_recompute_flops(inputs)[LAYER_INPUT.name] - attention
    return batch_tokens(inputs) * (products / inputs.gemm_rate + attention / inputs.attention_rate.forward)


def layer_backward_s(inputs: PlanInputs) -> float:
    """Seconds of one layer's backward with nothing recomputed: 2.5 forward passes of attention, and `backward_flops`."""
    attention = class_recompute_flops(inputs)[ATTENTION_OUTPUT.name]
    return batch_tokens(inputs) * (2.5 * attention / inputs.attention_rate.backward + backward_flops(inputs) / inputs.gemm_rate)


def weight_gradient_s(inputs: PlanInputs) -> float:
    """Seconds of a micro-batch's gradients of weights that a pass of their own can make: of layers' matrices, but for experts'."""
    spec, experts = inputs.spec, inputs.spec.experts
    routed = 0.0 if experts is None else 3.0 * spec.hidden_size * experts.per_token * experts.inner_size * spec.expert_layers
    apart = spec.num_layers * inputs.active_layer_parameters - routed
    return batch_tokens(inputs) * 2.0 * apart / inputs.gemm_rate


def layer_recompute_s(inputs: PlanInputs) -> float:
    """Seconds that the policy's recomputation adds to one layer's backward, segments in."""
    attention = (attention_passes(inputs) - 3.5) * class_recompute_flops(inputs)[ATTENTION_OUTPUT.name]
    products = recompute_linear_flops(inputs) + inner_share(inputs) * segment_flops(inputs)
    return batch_tokens(inputs) * (attention / inputs.attention_rate.forward + products / inputs.gemm_rate)


def attention_pass_s(inputs: PlanInputs) -> float:
    """Seconds of a step for each FLOP of one forward pass of attention on one rank: forward, recomputed and backward."""
    rate = inputs.attention_rate
    return (attention_passes(inputs) - 2.5) / rate.forward + 2.5 / rate.backward


def work_s(inputs: PlanInputs, attention_flops: float, linear_flops: float) -> float:
    """Seconds of one rank for FLOPs as sequence_flops counts them: each kind at its own rate."""
    return attention_flops / attention_passes(inputs) * attention_pass_s(inputs) + linear_flops / inputs.gemm_rate
