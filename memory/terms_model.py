"""Weights and their gradients on one rank: sharded, gathered and on their way. Pure.

The formulas follow parallel/sharding.py: FSDP2, the next layer prefetched, the last reduction's input alive until the next.
"""

from __future__ import annotations

from .setting import BACKWARD, COMPUTE, Phase, Setting, Term, reduces_once, term
from .terms_activations import kept_bytes


def weights(s: Setting) -> Term:
    return term("weights", f"float{8 * s.master} master, 1/{s.layout.shard} of each", s.master * s.parameters / s.layout.shard)


def gradients(s: Setting) -> Term:
    """In the only or last micro-batch they grow as layer inputs (or whole gradients) go: beside all of those there are none yet."""
    total = s.master * s.parameters // s.layout.shard
    early = 0 if s.layout.num_micro_batches == 1 or reduces_once(s) else total
    growing = 0 if reduces_once(s) else max(early, total - kept_bytes(s))
    held = {Phase.FORWARD: early, Phase.LOSS: early} | dict.fromkeys(BACKWARD, growing)
    return Term("gradients", f"float{8 * s.master}, 1/{s.layout.shard} of each", held | {Phase.REDUCE: total, Phase.OPTIMIZER: total})


def whole_gradients(s: Setting) -> Term:
    """Reduced once per step, gradients of all weights pile up unsharded; at the end only those of embedding and head are left."""
    whole = s.master * s.parameters * reduces_once(s)
    held = dict.fromkeys((Phase.FORWARD, Phase.LOSS, *BACKWARD), whole)
    return Term(
        "gradients, whole",
        "kept over micro-batches, reduced once a step",
        held | {Phase.REDUCE: s.master * s.root_parameters * reduces_once(s)},
    )


def gathered_root(s: Setting) -> Term:
    return term(
        "embedding and head, gathered", "in compute precision, from forward to the end of backward", s.width * s.root_parameters, COMPUTE
    )


def gathered_layers(s: Setting) -> Term:
    phases = (Phase.FORWARD, *BACKWARD)
    if s.parallel.barrier_free:
        note = "all layers, in compute precision, from the first micro-batch to the last"
        return term("layers, gathered", note, s.width * s.spec.num_layers * s.layer_parameters, (Phase.LOSS, *phases))
    return term("layers, gathered", "the running layer and the next, in compute precision", 2 * s.width * s.layer_parameters, phases)


def layer_gradients(s: Setting) -> Term:
    note = "one layer's gradients, and the buffer of the reduction before"
    return term("layer gradients and reduction", note, (s.width + s.master) * s.layer_parameters, BACKWARD)


def head_gradient(s: Setting) -> Term:
    head = s.spec.vocab_size * s.spec.hidden_size
    root = s.root_parameters
    held = {Phase.LOSS: (s.master + s.width) * head} | dict.fromkeys(BACKWARD, s.width * head)
    # At the end: both gradients, and the same again as the reduction's input in master precision.
    return Term(
        "head and embedding gradients",
        f"summed in float{8 * s.master} over chunks, reduced last",
        held | {Phase.REDUCE: (s.width + s.master) * root},
    )
