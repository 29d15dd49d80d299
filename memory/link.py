"""Traffic between a rank and its host (or its disk), and what of it computation does not hide. Pure.

The executor starts a layer's copies as it makes the rows, and fetches rows ahead of the chunk that needs them (memory/offload):
a direction stalls by what its transfer takes longer than the layer's computation.
"""

from __future__ import annotations

from .activation_classes import KEY_VALUE, LAYER_INPUT, QUERY, RESIDUAL, activation_classes, after_attention
from .rates import activation_way
from .setting import Setting
from .terms_activations import class_bytes, class_splits
from .work import batch_tokens, inner_share, layer_backward_s, layer_forward_s, layer_recompute_s, projections


def leaving_bytes(s: Setting) -> float:
    """Bytes one rank sends to the host in one layer's forward, the layers' mean."""
    return _forward_bytes(s) - inner_bytes(s)


def returning_bytes(s: Setting) -> float:
    """Bytes that come back in one layer's backward, each class as often as it is read.

    At most: the piece that ends one walk over the tokens and begins the next comes once.
    """
    projected = projections(s) if s.in_pieces else 1
    reads = {LAYER_INPUT.name: input_reads(s), QUERY.name: projected, KEY_VALUE.name: projected}
    once = sum(reads.get(name, 1) * num_bytes for name, num_bytes in _host_bytes(s).items())
    return batch_tokens(s) * (once + inner_share(s) * _again_reads(s))


def _again_reads(s: Setting) -> float:
    """Bytes per token that a segment's layer reads to run again for the next one's input."""
    host = _host_bytes(s)
    summed, query, keys = (s.policy.split(kind).recompute for kind in (RESIDUAL, QUERY, KEY_VALUE))
    after = sum(host[kind.name] for kind in after_attention(activation_classes(s.spec)))
    if s.policy.attention_output.complete:
        return after + summed * sum(host[kind.name] for kind in RESIDUAL.made_from)
    if not s.by_chunks:
        walks = s.policy.head_groups * max(query, keys) + summed
    elif s.layout.ulysses > 1:
        walks = keys + max(query, summed)
    else:
        walks = max(query, keys, summed)
    # One piece alone is not let go before the layer's output is there.
    return after + host[QUERY.name] + host[KEY_VALUE.name] + host[LAYER_INPUT.name] * (walks if s.in_pieces else min(1.0, walks))


def input_reads(s: Setting) -> float:
    """How often backward fetches a layer's input: one piece alone stays; several come once for each walk that needs them."""
    if not s.in_pieces:
        return 1.0
    if s.by_chunks:
        return 1.0 + s.policy.key_value.recompute + (s.layout.ulysses > 1)
    remade = max(s.policy.query.recompute, s.policy.key_value.recompute)
    return 1.0 + s.policy.head_groups * (1.0 + remade * projections(s))


def _forward_bytes(s: Setting) -> float:
    """All that waits on the host for one layer's backward, inner inputs of segments in."""
    return batch_tokens(s) * sum(_host_bytes(s).values())


def inner_bytes(s: Setting) -> float:
    """Inputs of a segment's inner layers leave in backward, when they are made again."""
    return inner_share(s) * batch_tokens(s) * _host_bytes(s)[LAYER_INPUT.name]


def _host_bytes(s: Setting) -> dict[str, float]:
    """Per token and layer."""
    moved = 0.0 if s.policy.graph else 1.0
    splits = class_splits(s)
    return {name: moved * splits[name].host * num_bytes for name, num_bytes in class_bytes(s).items()}


def to_host_s(s: Setting) -> float:
    """How long the way to the host is busy in one layer's forward."""
    return activation_way(s).seconds(leaving_bytes(s))


def from_host_s(s: Setting) -> float:
    """How long it is busy in one layer's backward; inputs of a segment's inner layers leave meanwhile."""
    return activation_way(s).seconds(inner_bytes(s), returning_bytes(s))


def forward_stall_s(s: Setting) -> float:
    """Of one layer of one micro-batch."""
    return max(0.0, to_host_s(s) - layer_forward_s(s))


def backward_stall_s(s: Setting) -> float:
    """Of one layer of one micro-batch; both directions run side by side."""
    return max(0.0, from_host_s(s) - layer_backward_s(s) - layer_recompute_s(s))


def host_stall_s(s: Setting) -> float:
    """Of all layers of one micro-batch."""
    return s.spec.num_layers * (forward_stall_s(s) + backward_stall_s(s))
