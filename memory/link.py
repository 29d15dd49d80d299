"""Traffic between a rank and its host (or its disk), and what of it computation does not hide. Pure.

The executor starts a layer's copies as it makes the rows, and fetches rows ahead of the chunk that needs them (memory/offload):
a direction stalls by what its transfer takes longer than the layer's computation.
"""

from __future__ import annotations

from .setting import Setting
from .terms_activations import class_bytes
from .work import batch_tokens, layer_backward_s, layer_forward_s, layer_recompute_s


def leaving_bytes(s: Setting) -> float:
    """Bytes one rank sends to the host in one layer's forward, the layers' mean."""
    return _forward_bytes(s) - _inner_bytes(s)


def returning_bytes(s: Setting) -> float:
    """Bytes that come back in one layer's backward. Layer inputs come once for each of the walks that start from them."""
    return _forward_bytes(s) + (input_reads(s) - 1) * batch_tokens(s) * _host_bytes(s)["layer_input"]


def input_reads(s: Setting) -> int:
    """How often backward reads a layer's input: by chunks once for all keys and values, and once with its chunk."""
    again = s.by_chunks and s.policy.key_value.recompute > 0
    return 2 if again else 1


def _forward_bytes(s: Setting) -> float:
    """All that waits on the host for one layer's backward, inner inputs of segments in."""
    return batch_tokens(s) * sum(_host_bytes(s).values())


def _inner_bytes(s: Setting) -> float:
    """Inputs of a segment's inner layers leave in backward, when they are made again."""
    inner = 1.0 - -(-s.spec.num_layers // s.segment_layers) / s.spec.num_layers
    return inner * batch_tokens(s) * _host_bytes(s)["layer_input"]


def _host_bytes(s: Setting) -> dict[str, float]:
    """Per token and layer."""
    moved = 0.0 if s.policy.graph else 1.0
    return {name: moved * s.policy.splits[name].host * num_bytes for name, num_bytes in class_bytes(s).items()}


def forward_stall_s(s: Setting) -> float:
    """Of one layer of one micro-batch."""
    return max(0.0, leaving_bytes(s) / s.cluster.host_link_bandwidth - layer_forward_s(s))


def backward_stall_s(s: Setting) -> float:
    """Of one layer of one micro-batch; both directions run side by side."""
    moved = max(returning_bytes(s), _inner_bytes(s))
    return max(0.0, moved / s.cluster.host_link_bandwidth - layer_backward_s(s) - layer_recompute_s(s))


def host_stall_s(s: Setting) -> float:
    """Of all layers of one micro-batch."""
    return s.spec.num_layers * (forward_stall_s(s) + backward_stall_s(s))
