"""Every term of one rank; each subject has its file. Pure.

tests/memory/test_ledger_measured.py and `python -m efflaunch.bench.predicted` compare their sum with traced steps.
"""

from __future__ import annotations

from .setting import ALL, COMPUTE, GIB, Phase, Setting, Term, term
from .terms_activations import activations, attention_outputs, in_flight, layer_inputs
from .terms_layer import keys_and_values, last_hidden, live_layer, loss_chunk
from .terms_model import (
    gathered_layers,
    gathered_root,
    gradients,
    head_gradient,
    layer_gradients,
    weights,
    whole_gradients,
)
from .terms_optimizer import optimizer_states

__all__ = ["ALL", "GIB", "UNSEEN", "Phase", "Setting", "Term", "device_terms", "term"]

UNSEEN = ("communicators", "context", "allocator reserve")
"""Terms that are assumed: no count of tensors can show them."""


def batch(s: Setting) -> Term:
    """Token, target and position ids, and rotary tables."""
    per_token = 3 * 8 + 2 * s.spec.head_dim * s.width
    return term("batch and rotary tables", "ids of the micro-batch, cos and sin", per_token * s.tokens, COMPUTE)


def communicators(s: Setting) -> Term:
    """One communicator per power of two of ranks, and the mesh's own; on GPUs each has buffers."""
    count = s.layout.world_size.bit_length() if s.layout.world_size > 1 else 0
    each = GIB // 4 if s.on_gpu else 8 << 20
    return term("communicators", f"{count} groups of ranks, about {each >> 20} MiB each (assumed)", count * each)


def context(s: Setting) -> Term:
    num_bytes, note = (2 * GIB, "CUDA context, libraries (assumed)") if s.on_gpu else (GIB // 2, "Python and torch (assumed)")
    return term("context", note, num_bytes)


def reserve(s: Setting) -> Term:
    share = 0.03 if s.on_gpu else 0.0
    return term("allocator reserve", "3 % of the device lost between blocks (assumed)", share * s.cluster.device_memory_bytes)


def device_terms(s: Setting) -> tuple[Term, ...]:
    """Every term of one rank, those of no bytes left out."""
    makers = (
        weights, optimizer_states, gradients, whole_gradients, gathered_root, gathered_layers, layer_gradients, head_gradient,
        layer_inputs, attention_outputs, activations, in_flight, live_layer, keys_and_values, loss_chunk, last_hidden, batch,
        communicators, context, reserve,
    )  # fmt: skip
    return tuple(made for made in (make(s) for make in makers) if made.num_bytes)
