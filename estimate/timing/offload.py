"""Traffic between a rank and its host (or its disk), and what of it computation does not hide. Pure.

The executor starts a layer's copies as it makes the rows, and fetches rows ahead of the chunk that needs them (memory/offload):
a direction stalls by what its transfer takes longer than the layer's computation.

Note: `returning_bytes` mirrors what the executor reads: memory/executor/{read_order,attention_whole,attention_chunked}.py.
"""

from __future__ import annotations

from ...memory.activation_classes import KEY_VALUE, LAYER_INPUT, QUERY, RESIDUAL, activation_classes, after_attention
from ..footprint.activations import class_bytes, class_splits
from ..plan_inputs import PlanInputs
from .bandwidth import offload_link
from .flops import batch_tokens, inner_share, layer_backward_s, layer_forward_s, layer_recompute_s, projections


def leaving_bytes(inputs: PlanInputs) -> float:
    """Bytes one rank sends to the host in one layer's forward, the layers' mean."""
    return _forward_bytes(inputs) - inner_bytes(inputs)


def returning_bytes(inputs: PlanInputs) -> float:
    """Bytes that come back in one layer's backward, each class as often as it is read.

    At most: the piece that ends one walk over the tokens and begins the next comes once.
    """
    projected = projections(inputs) if inputs.in_pieces else 1
    reads = {LAYER_INPUT.name: input_reads(inputs), QUERY.name: projected, KEY_VALUE.name: projected}
    once = sum(reads.get(name, 1) * num_bytes for name, num_bytes in _host_bytes(inputs).items())
    return batch_tokens(inputs) * (once + inner_share(inputs) * _recompute_reads(inputs))


def _recompute_reads(inputs: PlanInputs) -> float:
    """Bytes per token that the recompute of a segment's layer reads, for the next one's input."""
    host = _host_bytes(inputs)
    summed, query, keys = (inputs.policy.split(kind).recompute for kind in (RESIDUAL, QUERY, KEY_VALUE))
    after = sum(host[kind.name] for kind in after_attention(activation_classes(inputs.spec)))
    if inputs.policy.attention_output.complete:
        return after + summed * sum(host[kind.name] for kind in RESIDUAL.made_from)
    if not inputs.by_chunks:
        walks = inputs.policy.head_groups * max(query, keys) + summed
    elif inputs.layout.ulysses > 1:
        walks = keys + max(query, summed)
    else:
        walks = max(query, keys, summed)
    # One piece alone is not let go before the layer's output is there.
    return after + host[QUERY.name] + host[KEY_VALUE.name] + host[LAYER_INPUT.name] * (walks if inputs.in_pieces else min(1.0, walks))


def input_reads(inputs: PlanInputs) -> float:
    """How often backward fetches a layer's input: one piece alone stays; several come once for each walk that needs them."""
    if not inputs.in_pieces:
        return 1.0
    if inputs.by_chunks:
        return 1.0 + inputs.policy.key_value.recompute + (inputs.layout.ulysses > 1)
    recomputed = max(inputs.policy.query.recompute, inputs.policy.key_value.recompute)
    return 1.0 + inputs.policy.head_groups * (1.0 + recomputed * projections(inputs))


def _forward_bytes(inputs: PlanInputs) -> float:
    """All that waits on the host for one layer's backward, inner inputs of segments in."""
    return batch_tokens(inputs) * sum(_host_bytes(inputs).values())


def inner_bytes(inputs: PlanInputs) -> float:
    """Inputs of a segment's inner layers leave in backward, when they are recomputed."""
    return inner_share(inputs) * batch_tokens(inputs) * _host_bytes(inputs)[LAYER_INPUT.name]


def _host_bytes(inputs: PlanInputs) -> dict[str, float]:
    """Per token and layer."""
    moved = 0.0 if inputs.policy.graph else 1.0
    splits = class_splits(inputs)
    return {name: moved * splits[name].host * num_bytes for name, num_bytes in class_bytes(inputs).items()}


def to_host_s(inputs: PlanInputs) -> float:
    """How long the way to the host is busy in one layer's forward."""
    return offload_link(inputs).seconds(leaving_bytes(inputs))


def from_host_s(inputs: PlanInputs) -> float:
    """How long it is busy in one layer's backward; inputs of a segment's inner layers leave meanwhile."""
    return offload_link(inputs).seconds(inner_bytes(inputs), returning_bytes(inputs))


def forward_stall_s(inputs: PlanInputs) -> float:
    """Seconds that forward waits in one layer of one micro-batch."""
    return max(0.0, to_host_s(inputs) - layer_forward_s(inputs))


def backward_stall_s(inputs: PlanInputs) -> float:
    """Seconds that backward waits in one layer of one micro-batch; both directions run side by side."""
    return max(0.0, from_host_s(inputs) - layer_backward_s(inputs) - layer_recompute_s(inputs))


def host_stall_s(inputs: PlanInputs) -> float:
    """Seconds that all layers of one micro-batch wait."""
    return inputs.spec.num_layers * (forward_stall_s(inputs) + backward_stall_s(inputs))
