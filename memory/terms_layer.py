"""The layer that runs: what its forward and backward hold at one time, and the loss after the last. Pure.

The formulas follow memory/layer.py, training/loss.py and parallel/sequence/{ulysses,ring}.py.
"""

from __future__ import annotations

from .setting import Phase, Setting, Term, term
from .terms_activations import (
    attention_saved_per_token,
    before_attention_saved_per_token,
    norm_bytes,
    saved_per_token,
)


def live_layer(s: Setting) -> Term:
    """Token-local work of the layer that runs: projections, norms, feed-forward, and their gradients."""
    if s.by_chunks:
        return live_layer_streaming(s, s.chunk_tokens or s.tokens)
    if s.chunk_tokens is not None:
        return live_layer_by_chunks(s, s.chunk_tokens)
    hidden, inner = s.spec.hidden_size * s.width, s.spec.intermediate_size * s.width
    saved = saved_per_token(s)
    forward = saved if s.policy.graph else max(3 * inner + 4 * hidden, before_attention_saved_per_token(s)) + attention_saved_per_token(s)
    by_phase = {
        Phase.FORWARD: forward,
        Phase.LOSS: saved if s.policy.graph else 0,
        # Gate, its activation and up, and their three gradients: 6 inner; dy, y and dx beside them.
        Phase.BACKWARD_MLP: saved + 2 * inner + 3 * hidden,
        Phase.BACKWARD_ATTENTION: before_attention_saved_per_token(s) + attention_saved_per_token(s) + 2 * hidden,
    }
    note = "saved for and made by one layer's forward and backward"
    return Term("live layer", note, {phase: per_token * s.tokens for phase, per_token in by_phase.items()})


def live_layer_by_chunks(s: Setting, chunk: int) -> Term:
    """Rows that attention needs are there for all tokens, what is between them for one chunk (memory/layer.py)."""
    hidden, inner = s.spec.hidden_size * s.width, s.spec.intermediate_size * s.width
    queries, keys = s.width * s.spec.query_size, 2 * s.width * s.spec.kv_size
    groups = s.policy.head_groups
    # With one Ulysses rank the projections are what attention reads; otherwise their exchanged copies are counted with it.
    attention = attention_saved_per_token(s) + ((queries + keys) // groups if s.layout.ulysses == 1 else 0)
    after = saved_per_token(s) - before_attention_saved_per_token(s) - attention_saved_per_token(s) + 2 * inner + 3 * hidden
    before = before_attention_saved_per_token(s) + hidden
    per_token_and_chunk = {
        Phase.FORWARD: (attention + hidden, max(3 * inner + 4 * hidden, before)),
        # dx of the second half and do for all rows, and dy from the layer above.
        Phase.BACKWARD_MLP: (attention + queries + 2 * hidden, after),
        # Attention's own gradients are counted with K/V; after it only q, k, v gradients and both dx are left beside a chunk.
        Phase.BACKWARD_ATTENTION: (max(attention + queries + 2 * hidden, queries + keys + 3 * hidden), 0),
    }
    by_phase = {phase: whole * s.tokens + part * chunk for phase, (whole, part) in per_token_and_chunk.items()}
    return Term("live layer", f"what attention reads and makes; the rest of one layer {chunk} tokens at a time", by_phase)


def live_layer_streaming(s: Setting, chunk: int) -> Term:
    """Attention by chunks of queries: whole are only keys, values and their gradients, the layer's gradient, and log-sum-exp.

    Backward: the incoming gradient, overwritten by the outgoing one; K and V of all rows and their float32 gradients are
    counted with K/V. A layer input that waits on the host comes back by chunks.
    """
    hidden, inner = s.spec.hidden_size * s.width, s.spec.intermediate_size * s.width
    lse = s.spec.num_heads * s.master
    own_input = 0 if s.policy.layer_input.keep >= 1.0 else hidden
    attention = s.width * (2 * s.spec.query_size + 2 * s.spec.kv_size)
    forward = max(3 * inner + 4 * hidden, before_attention_saved_per_token(s)) + attention_saved_per_token(s)
    after = saved_per_token(s) - before_attention_saved_per_token(s) + 2 * inner + 3 * hidden
    before = before_attention_saved_per_token(s) + hidden
    per_token_and_chunk = {
        Phase.FORWARD: (hidden + own_input, forward),
        Phase.SEGMENT: (hidden + own_input, forward) if s.segment_layers > 1 else (0, 0),
        Phase.BACKWARD_MLP: (hidden + lse, before + after),
        Phase.BACKWARD_ATTENTION: (hidden + lse, before + attention_saved_per_token(s) + attention),
        Phase.BACKWARD_PROJECTIONS: (hidden + lse, before + hidden),
    }
    by_phase = {phase: whole * s.tokens + part * chunk for phase, (whole, part) in per_token_and_chunk.items()}
    return Term("live layer", f"its gradient and log-sum-exp; the rest of one layer {chunk} tokens at a time", by_phase)


def keys_and_values_streaming(s: Setting) -> Term:
    """Keys and values of all rows between the exchanges, and in backward their float32 gradients."""
    kv, own = 2 * s.kv_copies * s.spec.kv_size, 2 * s.spec.kv_size * (s.layout.ulysses > 1)
    forward = s.width * (kv + own)
    backward = forward + s.master * kv
    held = {Phase.FORWARD: forward, Phase.BACKWARD_MLP: backward}
    held |= {Phase.BACKWARD_ATTENTION: backward, Phase.BACKWARD_PROJECTIONS: backward}
    return Term("K/V and their gradients", f"all rows, heads over {s.layout.ulysses}", {p: n * s.tokens for p, n in held.items()})


def keys_and_values(s: Setting) -> Term:
    """What attention itself makes: visiting keys and values of a ring, merged outputs, and the gradients of q, k, v."""
    if s.by_chunks:
        return keys_and_values_streaming(s)
    groups = 1 if s.policy.graph else s.policy.head_groups
    kv, queries = 2 * s.kv_copies * s.spec.kv_size // groups, s.spec.query_size // groups
    ring = s.layout.ring > 1
    travelling = 2 * s.width * kv * ring
    forward = travelling + s.master * queries
    # Gradients in float32, the kernel's own results beside them, and do on both sides of the exchange.
    backward = (s.master + s.width) * (queries + kv) + 2 * s.width * queries + travelling + 2 * s.master * kv * ring
    workspace = (2 * s.width + s.master) * queries if s.on_gpu else 0
    by_phase = {Phase.FORWARD: forward, Phase.BACKWARD_ATTENTION: backward + workspace}
    note = f"ring of {s.layout.ring}, heads over {s.layout.ulysses}" + (f", each KV head on {s.kv_copies} ranks" if s.kv_copies > 1 else "")
    return Term("K/V and attention gradients", note, {phase: per_token * s.tokens for phase, per_token in by_phase.items()})


def loss_chunk(s: Setting) -> Term:
    """Logits of one chunk: in compute precision, in float32, and one float32 temporary."""
    per_logit = s.master + (s.width if s.width < s.master else 0) + s.master
    chunk = min(s.train.loss_chunk_tokens, s.tokens)
    return term("loss chunk", f"logits of {chunk} tokens x {s.spec.vocab_size}", per_logit * s.spec.vocab_size * chunk, (Phase.LOSS,))


def last_hidden(s: Setting) -> Term:
    """Around the last norm: the last layer's output, what its norm saves, and the gradient of the hidden vectors."""
    per_token = (norm_bytes(s) + 2 * s.width) * s.spec.hidden_size
    held = {Phase.LOSS: per_token, Phase.BACKWARD_MLP: s.width * s.spec.hidden_size}
    return Term("last hidden vectors", "output of the last layer, its norm and its gradient", {p: n * s.tokens for p, n in held.items()})
